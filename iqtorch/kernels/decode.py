"""Decoding in registers: one small function per family, from planes to quads of int8, and one for the scales of all.

A *quad* is an int32 with the values of four neighbouring weights as bytes, before any scale. Every family returns quads
`[S.quads, A, B]` for rows `row` (`[A, 1]`) and runs `run` (`[1, B]`); the skeletons know nothing else. Loads of weights
are not masked: rows and runs must be clamped to the matrix.
What belongs to one run comes first in every shape: Triton spreads the last dimensions over the threads, so a thread keeps whole
runs in its registers, and regrouping them moves nothing between threads.
`S` is the format's `Scheme`; branches on it are resolved at compile time.
"""

# mypy: ignore-errors

from __future__ import annotations

import triton
import triton.language as tl

from .asm import (
    LOW_BYTES,
    NIBBLE_BYTES,
    TOP_BITS,
    byte_mask,
    bytes_of,
    choose,
    cubic,
    fetch,
    from_lane,
    lane,
    negate_positive_bytes,
    pack4,
    permute,
    select,
    shift_right,
    two_byte_sums,
)


@triton.constexpr_function
def run_bits(s, plane):
    """Bits of a plane that belong to one run."""
    return s.planes[plane] * s.run // 256


@triton.constexpr_function
def splat_mask(width, slot):
    """`width` low bits set in every `slot` bits of a 32-bit word."""
    mask = sum(((1 << width) - 1) << i for i in range(0, 32, slot))
    return mask - (1 << 32) if mask >> 31 else mask


@triton.constexpr_function
def low_mask(width):
    return (1 << width) - 1


@triton.constexpr_function
def halving(n):
    return n // 2


@triton.jit
def plane_start(rows, runs, S: tl.constexpr, P: tl.constexpr):
    """First byte of plane P of a matrix."""
    at = rows.to(tl.int64) * 0
    for i in tl.static_range(tl.constexpr(P)):
        if S.planes[i] == 0:
            size = rows.to(tl.int64) * S.row_items[i]
        else:
            # the rows of a plane are whole bytes, the runs of a row need not be
            size = rows.to(tl.int64) * ((runs * run_bits(S, i)) // 8)
        at += (size + 15) // 16 * 16
    return at


@triton.constexpr_function
def place(s, plane):
    """Position of a plane among those that `load_planes` loads."""
    return sum(1 for bits in s.planes[:plane] if bits)


@triton.constexpr_function
def loaded(s):
    """The planes that `load_planes` loads."""
    return tuple(i for i, bits in enumerate(s.planes) if bits)


@triton.constexpr_function
def runs_per_item(s, plane):
    """Runs that share one item of a plane: more than one for a `d` per block."""
    return s.d_size // s.run if plane in (s.d_plane, s.dmin_plane) else 1


@triton.constexpr_function
def item_bits(s, plane):
    """Bits of one item: of the run, or of the `d` that it shares."""
    return run_bits(s, plane) * runs_per_item(s, plane)


@triton.jit
def load_plane(start, row, run, runs, BITS: tl.constexpr, PER: tl.constexpr, ASM: tl.constexpr):
    """Items of BITS bits, one for PER runs, of rows `[A, 1]` and runs `[1, B]` as int32 `[words, A, B]`.

    With fewer than 8 bits the lowest ones are the item's; what lies above is left over.
    """
    if BITS < 8:
        per: tl.constexpr = 8 // BITS
        at = row * ((runs * BITS) // 8) + run // per
    else:
        at = row * (runs // PER) + run // PER
    if ASM:
        v = tl.permute(fetch(start, at, tl.constexpr(max(BITS, 8))), (2, 0, 1))
    elif BITS >= 32:
        n: tl.constexpr = BITS // 32
        words = start.to(tl.pointer_type(tl.int32), bitcast=True)
        v = tl.load(words + ((at * n)[None, :, :] + tl.arange(0, n)[:, None, None]))
    elif BITS == 16:
        v = tl.load(start.to(tl.pointer_type(tl.uint16), bitcast=True) + at).to(tl.int32)[None, :, :]
    else:
        v = tl.load(start + at).to(tl.int32)[None, :, :]
    if BITS < 8:
        v = v >> (run % per * BITS)[None, :, :]
    return v


@triton.jit
def load_planes(data, row, run, rows, runs, S: tl.constexpr, ASM: tl.constexpr):
    """The stored bits of runs, everything that `quads` and `scales` read: a tuple of int32 `[words, A, B]`, one per plane."""
    return planes_from(data, row, run, rows, runs, 0, S, ASM)


@triton.jit
def planes_from(data, row, run, rows, runs, I: tl.constexpr, S: tl.constexpr, ASM: tl.constexpr):  # noqa: E741
    which: tl.constexpr = loaded(S)
    P: tl.constexpr = which[I]
    start = data + plane_start(rows, runs, S, P)
    planes = (load_plane(start, row, run, runs, item_bits(S, P), runs_per_item(S, P), ASM),)
    if len(which) > I + 1:
        planes = planes + planes_from(data, row, run, rows, runs, I + 1, S, ASM)
    return planes


@triton.jit
def plane(planes, S: tl.constexpr, P: tl.constexpr):
    """Plane P of what `load_planes` loaded."""
    return planes[place(S, P)]


@triton.jit
def flatten_last(v):
    """`[n, A, B, m]` -> `[n * m, A, B]`."""
    return tl.reshape(tl.permute(v, (0, 3, 1, 2)), (v.shape[0] * v.shape[3], v.shape[1], v.shape[2]))


@triton.jit
def interleave(a, b):
    """Two `[n, A, B]` -> `[2n, A, B]`, alternating."""
    return flatten_last(tl.join(a, b))


@triton.jit
def unleave(v):
    """Inverse of `interleave`, also for `[2n, M, R, B]`."""
    if len(v.shape) == 3:
        v = tl.permute(tl.reshape(v, (v.shape[0] // 2, 2, v.shape[1], v.shape[2])), (0, 2, 3, 1))
    else:
        v = tl.permute(tl.reshape(v, (v.shape[0] // 2, 2, v.shape[1], v.shape[2], v.shape[3])), (0, 2, 3, 4, 1))
    return tl.split(v)


@triton.jit
def unleave4(v):
    """`[4n, ...]` -> four `[n, ...]`."""
    even, odd = unleave(v)
    v0, v2 = unleave(even)
    v1, v3 = unleave(odd)
    return v0, v1, v2, v3


@triton.jit
def shifted(words, WIDTH: tl.constexpr, EACH: tl.constexpr):
    """`[n, A, B]` -> `[n * EACH, A, B]`: each word and its shifts by multiples of WIDTH."""
    if EACH > 1:
        by = WIDTH * tl.arange(0, EACH)[None, :, None, None]
        words = tl.reshape(words[:, None, :, :] >> by, (words.shape[0] * EACH, words.shape[1], words.shape[2]))
    return words


@triton.jit
def spread(words, WIDTH: tl.constexpr, COUNT: tl.constexpr):
    """`[n, A, B]` -> `[COUNT, A, B]`: each word and its shifts by multiples of WIDTH (upper bits are left over)."""
    return shifted(words, WIDTH, tl.constexpr(COUNT // words.shape[0]))


# -- families ------------------------------------------------------------------------------------------------


@triton.jit
def direct_quads(planes, held, S: tl.constexpr, ASM: tl.constexpr):
    """Codes are the values (the constant `S.base` is added by the skeletons)."""
    q = plane(planes, S, S.code[0][0])
    if S.code[0][1] < 8:
        q = spread(q, S.code[0][1], S.quads) & splat_mask(S.code[0][1], 8)
    if len(S.code) == 2:
        high = plane(planes, S, S.code[1][0])
        q |= (spread(high, S.code[1][1], S.quads) & splat_mask(S.code[1][1], 8)) << S.code[0][1]
    return q


@triton.jit
def cubic_quads(planes, held, S: tl.constexpr, ASM: tl.constexpr):
    """Codes whose table is a rounded cubic polynomial."""
    codes = direct_quads(planes, held, S, ASM)
    if ASM:
        q = cubic(codes, held[0], held[1], S)
    else:
        v0, v1, v2, v3 = unleave4(flatten_last(tl.load(held[0] + bytes_of(codes, False))))
        q = pack4(v0, v1, v2, v3, ASM)
    return q


@triton.jit
def restore_parity(w):
    """IQ4_KSS: words of 32 weights with the bits restored that gave way to the scale."""
    lo, hi = word_halves(w)
    lo = lo & (LOW_BYTES ^ -1)
    x = lo ^ hi
    x = x ^ shift_right(x, 4)
    x = x ^ shift_right(x, 2)
    x = x ^ shift_right(x, 1)
    lo = lo | (x & LOW_BYTES)
    return tl.reshape(tl.permute(tl.join(lo, hi), (3, 0, 1, 2)), w.shape)


@triton.jit
def word_halves(w):
    """`[4, A, B]` -> its first and second two words, `[2, A, B]` each."""
    return tl.split(tl.permute(tl.reshape(w, (2, 2, w.shape[1], w.shape[2])), (1, 2, 3, 0)))


@triton.constexpr_function
def table_words(s):
    """Words of four table entries that stay in registers."""
    return s.entries // (8 if s.shift else 4)


@triton.jit
def prepare(book, S: tl.constexpr, ASM: tl.constexpr):
    """What `quads` needs of the codebook, loaded once: registers for PTX look-ups, else its address; a tuple.

    Every thread of a warp reads its own copy of a table: equal addresses would make the words uniform registers, which byte
    permutes cannot read and which would be copied again for every use.
    """
    if ASM and S.family == "pairs":
        # as int8 and as float16 pairs
        held = (tl.load(book + lane()), tl.load(book + 32 + lane()))
    elif ASM and S.family == "table":
        held = table_slice(book + (1 << S.code_bits) + lane(), 0, table_words(S))
    elif ASM and S.family == "cubic":
        held = table_slice(book + (1 << S.code_bits) + lane(), 0, 2)
    else:
        held = (book,)
    return held


@triton.jit
def prepare_scales(lut, S: tl.constexpr, ASM: tl.constexpr):
    """What `scales` needs of the table of scales: one value per lane for PTX look-ups, else its address."""
    if ASM and S.scale_map is None:
        lut = tl.load(lut + lane()).to(tl.int32, bitcast=True)
    return lut


@triton.jit
def table_slice(p, FIRST: tl.constexpr, COUNT: tl.constexpr):
    """COUNT words from p + FIRST as a tuple."""
    if COUNT == 1:
        words = (tl.load(p + 32 * FIRST),)
    else:
        words = table_slice(p, FIRST, halving(COUNT)) + table_slice(p, FIRST + halving(COUNT), halving(COUNT))
    return words


@triton.jit
def table_tree(words, sel, at: tl.constexpr, COUNT: tl.constexpr, b3, b4, b5):
    """Four look-ups in COUNT entries from word `at`: the nibbles of `sel` choose among eight, b3 .. b5 between halves."""
    if COUNT <= 8:
        v = choose(words[at], words[at + COUNT // 4 - 1], sel)
    else:
        lo = table_tree(words, sel, at, halving(COUNT), b3, b4, b5)
        hi = table_tree(words, sel, at + halving(COUNT) // 4, halving(COUNT), b3, b4, b5)
        if COUNT == 16:
            v = choose(lo, hi, b3)
        elif COUNT == 32:
            v = choose(lo, hi, b4)
        else:
            v = choose(lo, hi, b5)
    return v


@triton.jit
def picker(bits):
    """Selector that takes byte i of the second operand where bit 2 of nibble i is set, else of the first."""
    return (bits & 0x44444444) | 0x32103210


@triton.jit
def table_quads(planes, held, S: tl.constexpr, ASM: tl.constexpr):
    """Codes of 2 to 6 bits index a table of bytes."""
    n: tl.constexpr = halving(S.quads)
    w = plane(planes, S, S.code[0][0])
    if S.parity:
        w = restore_parity(w)
    low_width: tl.constexpr = S.code[0][1]
    low = spread(w, low_width, n)
    if len(S.code) == 2:
        high_width: tl.constexpr = S.code[1][1]
        high = spread(plane(planes, S, S.code[1][0]), high_width, n)
    else:
        high_width: tl.constexpr = 0
        high = low
    if ASM:
        if low_width == 4:
            sel = low & 0x77777777
        elif high_width == 0:
            sel = low & 0x33333333
        else:
            sel = (low & 0x33333333) | ((high << 2) & 0x44444444)
        b3 = picker(low >> 1) if low_width == 4 else low
        b4 = picker(high << 2) if high_width > 0 else low
        b5 = picker(high << 1) if high_width > 1 else low
        count: tl.constexpr = 1 << S.code_bits
        a = table_tree(held, sel, 0, count, b3, b4, b5)
        b = table_tree(held, shift_right(sel, 16), 0, count, shift_right(b3, 16), shift_right(b4, 16), shift_right(b5, 16))
        q = interleave(a, b)
    else:
        slots = 4 * tl.arange(0, 8)[None, None, None, :]
        code = (low[:, :, :, None] >> slots) & low_mask(low_width)
        if high_width > 0:
            code |= ((high[:, :, :, None] >> slots) & low_mask(high_width)) << low_width
        v0, v1, v2, v3 = unleave4(flatten_last(tl.load(held[0] + code)))
        q = pack4(v0, v1, v2, v3, ASM)
    return q


@triton.jit
def pairs_quads(planes, held, S: tl.constexpr, ASM: tl.constexpr):
    """Five-bit codes index a table of pairs: one word per lane of a warp."""
    n: tl.constexpr = halving(S.quads)
    low = spread(plane(planes, S, S.code[0][0]), 4, n)
    high = five(plane(planes, S, S.code[1][0]))
    code = select(low, high, NIBBLE_BYTES)
    if ASM:
        a = permute(from_lane(code, held[0]), from_lane(code >> 8, held[0]), "0x5410")
        b = permute(from_lane(code >> 16, held[0]), from_lane(code >> 24, held[0]), "0x5410")
    else:
        v = tl.load(held[0] + ((code[:, :, :, None] >> (8 * tl.arange(0, 4))[None, None, None, :]) & 31))
        v0, v1, v2, v3 = unleave4(flatten_last(v))
        a = v0 | v1 << 16
        b = v2 | v3 << 16
    return interleave(a, b)


@triton.jit
def five(word):
    """Bit i of every byte of a word `[1, A, B]`, moved to bit 4: `[8, A, B]` (other bits are left over)."""
    i = tl.arange(0, 4)[None, :, None, None]
    low, high = word[:, None, :, :] << (4 - i), word[:, None, :, :] >> i
    return tl.reshape(tl.permute(tl.join(low, high), (0, 4, 1, 2, 3)), (8, word.shape[1], word.shape[2]))


@triton.jit
def natural_codes(planes, S: tl.constexpr, ASM: tl.constexpr):
    """Whole codes `[run / vec, A, B]` of formats with four or eight weights per code."""
    n: tl.constexpr = S.run // S.vec
    width: tl.constexpr = S.code[0][1]
    code = spread(plane(planes, S, S.code[0][0]), width, n) & low_mask(width)
    for i in tl.static_range(1, tl.constexpr(len(S.code))):
        part = spread(plane(planes, S, S.code[i][0]), S.code[i][1], n)
        code |= (part & low_mask(S.code[i][1])) << code_low(S, i)
    return code


@triton.constexpr_function
def code_low(s, i):
    """Lowest bit of the i-th plane of the code."""
    return sum(width for _, width in s.code[:i])


@triton.jit
def word_pairs(table, at, ASM: tl.constexpr):
    """Entries `at [n, A, B]` of a table of eight bytes -> words `[2n, A, B]`."""
    if ASM:
        v = flatten_last(fetch(table, at, 64))
    else:
        v = interleave(tl.load(table + 2 * at), tl.load(table + 2 * at + 1))
    return v


@triton.jit
def sign_masks(code, planes, held, S: tl.constexpr, ASM: tl.constexpr):
    """Byte masks `[S.quads, A, B]` of the weights to negate."""
    patterns = held[0] + S.entries * S.vec // 4
    if S.sign == "bits":
        word = plane(planes, S, S.sign_plane)
        m = byte_mask(spread(word, 1, S.quads), ASM)
    elif S.sign == "code":
        m = word_pairs(patterns, code >> S.code_bits, ASM)
    else:
        word = plane(planes, S, S.sign_plane)
        m = word_pairs(patterns, spread(word, 7, halving(S.quads)) & 127, ASM)
    return m


@triton.jit
def grid_quads(planes, held, S: tl.constexpr, ASM: tl.constexpr):
    """Codes index a table of four or eight values, with signs apart or not."""
    code = natural_codes(planes, S, ASM)
    index = code & low_mask(S.code_bits)
    if S.vec == 8:
        q = word_pairs(held[0], index, ASM)
    elif ASM:
        q = tl.reshape(fetch(held[0], index, 32), index.shape)
    else:
        q = tl.load(held[0] + index)
    if S.sign != "":
        q = negate_positive_bytes(q, sign_masks(code, planes, held, S, ASM))
    return q


@triton.jit
def trellis_states(planes, S: tl.constexpr, ASM: tl.constexpr):
    """First states of the generator less `S.start`, `[run / vec, A, B]`."""
    state = natural_codes(planes, S, ASM)
    if S.spare:
        state &= low_mask(S.code_bits)
    if S.variant_entries > 0:
        state += ((raw_scale(planes, S, "scale", ASM) >> S.scale_bits) & 1) * S.variant_entries
    return state


@triton.constexpr_function
def wrapped(value):
    """An integer modulo 2^32 as int32."""
    return (value & 0xFFFFFFFF) - ((value & 0x80000000) << 1)


@triton.jit
def trellis_word(state, i: tl.constexpr, SCALE: tl.constexpr, S: tl.constexpr):
    """Four numbers below 64 in bytes, times SCALE (1 or 4): their sum less 126 is the i-th value of a code. States are powers, no chain."""
    step: tl.constexpr = wrapped(S.steps[i] * SCALE)
    first: tl.constexpr = wrapped(S.start * S.steps[i] * SCALE)
    return (state * step + first) & wrapped(0x3F3F3F3F * SCALE)


@triton.jit
def trellis_two(state, i: tl.constexpr, S: tl.constexpr, ASM: tl.constexpr):
    """Values i and i + 1 of a code less `S.base`, in two bytes."""
    return two_byte_sums(trellis_word(state, i, 1, S), trellis_word(state, i + 1, 4, S), -126 - S.base, ASM)


@triton.jit
def trellis_four(state, i: tl.constexpr, S: tl.constexpr, ASM: tl.constexpr):
    a, b = trellis_two(state, i, S, ASM), trellis_two(state, i + 2, S, ASM)
    if ASM:
        q = permute(a, b, "0x5410")
    else:
        q = a | b << 16
    return q


@triton.jit
def trellis_sums(state, S: tl.constexpr, ASM: tl.constexpr):
    """What the generator makes of its states, less `S.base`, as bytes."""
    q = trellis_four(state, 0, S, ASM)
    if S.vec == 8:
        q = interleave(q, trellis_four(state, 4, S, ASM))
    return q


@triton.jit
def flips(q, planes, S: tl.constexpr, ASM: tl.constexpr):
    """Byte masks of the values, in bytes with 128 added, whose sign is not the stored one."""
    signs = plane(planes, S, S.sign_plane)[:, None, :, :] << (7 - tl.arange(0, S.quads)[None, :, None, None])
    wrong = q ^ tl.reshape(signs, q.shape) ^ TOP_BITS
    if ASM:
        mask = permute(wrong, wrong, "0xBA98")
    else:
        mask = byte_mask(shift_right(wrong, 7), ASM)
    return mask


@triton.jit
def flipped(planes, S: tl.constexpr):
    """Magnitudes of the generator with signs, otherwise: its own values, two's complement, and byte masks of those with the wrong sign."""
    q = trellis_sums(trellis_states(planes, S, True), S, True)
    return q ^ TOP_BITS, flips(q, planes, S, True)


@triton.jit
def trellis_quads(planes, held, S: tl.constexpr, ASM: tl.constexpr):
    """Codes start a generator of four or eight values."""
    q = trellis_sums(trellis_states(planes, S, ASM), S, ASM)
    if S.absolute:
        mask = flips(q, planes, S, ASM)
        # 256 - q in every byte, for bytes 2 .. 254
        q = (q ^ mask) + (mask & LOW_BYTES)
    return q


@triton.jit
def quads(planes, held, S: tl.constexpr, ASM: tl.constexpr):
    """Values of runs as bytes, int32 `[S.quads, A, B]` (see the module)."""
    if S.family == "direct":
        return direct_quads(planes, held, S, ASM)
    elif S.family == "cubic":
        return cubic_quads(planes, held, S, ASM)
    elif S.family == "table":
        return table_quads(planes, held, S, ASM)
    elif S.family == "pairs":
        return pairs_quads(planes, held, S, ASM)
    elif S.family == "grid":
        return grid_quads(planes, held, S, ASM)
    else:
        return trellis_quads(planes, held, S, ASM)


# -- scales --------------------------------------------------------------------------------------------------


@triton.constexpr_function
def plane_count(s, field):
    return len(getattr(s, field))


@triton.constexpr_function
def plane_index(s, field, i):
    return getattr(s, field)[i][0]


@triton.constexpr_function
def plane_width(s, field, i):
    return getattr(s, field)[i][1]


@triton.jit
def raw_scale(planes, S: tl.constexpr, FIELD: tl.constexpr, ASM: tl.constexpr):
    """Stored scales or minima (and variant bits above them) `[S.groups, A, B]`."""
    n: tl.constexpr = S.groups
    if S.parity:
        w = plane(planes, S, S.code[0][0])
        lo, _hi = word_halves(w)
        # the multiplication gathers bits 0, 8, 16, 24 in bits 24 .. 27
        low, high = unleave(shift_right((lo & LOW_BYTES) * 0x01020408, 24) & 15)
        raw = low | high << 4
    elif S.spare:
        w = plane(planes, S, S.code[0][0])
        w0, w1, w2, w3 = unleave4(shift_right(w, 15) & 0x00010001)
        bits = w0 | w1 << 2 | w2 << 4 | w3 << 6
        raw = (bits | bits >> 15) & 255
    elif S.sign == "word":
        raw = shift_right(plane(planes, S, S.sign_plane), 28)
    else:
        width: tl.constexpr = plane_width(S, FIELD, 0)
        words = plane(planes, S, plane_index(S, FIELD, 0))
        raw = spread(words, width, n) & low_mask(width)
        if plane_count(S, FIELD) == 2:
            more: tl.constexpr = plane_width(S, FIELD, 1)
            words = plane(planes, S, plane_index(S, FIELD, 1))
            raw |= (spread(words, more, n) & low_mask(more)) << width
    return raw


@triton.jit
def as_float(bits, S: tl.constexpr):
    """Bit patterns of stored floats (int32) as float32."""
    if S.d_kind == "f16":
        v = bits.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    elif S.d_kind == "f32":
        v = bits.to(tl.float32, bitcast=True)
    else:
        # 2^(bits - 128), subnormal below 2
        v = tl.where(bits < 2, 0x00200000 << bits, (bits - 1) << 23).to(tl.float32, bitcast=True)
    return v


@triton.jit
def row_scale(data, row, rows, runs, S: tl.constexpr):
    """`d` of rows `[A, 1]` whose format has one per row, times `unit`."""
    start = data + plane_start(rows, runs, S, S.d_plane)
    if S.d_kind == "f16":
        d = tl.load(start.to(tl.pointer_type(tl.uint16), bitcast=True) + row).to(tl.int32)
    else:
        d = tl.load(start.to(tl.pointer_type(tl.int32), bitcast=True) + row)
    return as_float(d, S) * S.unit


@triton.jit
def row_exponent(data, row, rows, runs, S: tl.constexpr, ASM: tl.constexpr):
    """Exponent e of rows: `|scale| <= 2^e`; int32 like `row`."""
    start = data + plane_start(rows, runs, S, S.exponent_plane)
    if ASM:
        e = tl.reshape(fetch(start, row, 8), row.shape)
    else:
        e = tl.load(start + row).to(tl.int32)
    return (e << 24) >> 24


@triton.jit
def power_of_two(e):
    """2^e as float32, for -126 <= e <= 127."""
    return ((e + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def integer_scale(planes, lut, S: tl.constexpr, ASM: tl.constexpr):
    """What the stored scale stands for, float32 `[groups, A, B]`, and `shift` of the chosen variant, int32."""
    if S.scale_bits == 0:
        scale = tl.full((1, planes[0].shape[1], planes[0].shape[2]), 1.0, tl.float32)
        shift = scale.to(tl.int32)
    else:
        raw = raw_scale(planes, S, "scale", ASM)
        shift = raw
        if S.shift != 0:
            shift = ((raw >> S.scale_bits) & 1) * S.shift
        if S.shift != 0 or S.variant_entries != 0:
            raw &= low_mask(S.scale_bits)
        if S.scale_wraps:
            raw = (raw << 24) >> 24
        if S.scale_map is None:
            if ASM:
                scale = from_lane(raw, lut).to(tl.float32, bitcast=True)
            else:
                scale = tl.load(lut + raw)
        else:
            scale = (raw * S.scale_map[1] + S.scale_map[0]).to(tl.float32)
    return scale, shift


@triton.jit
def scales(planes, lut, S: tl.constexpr, ASM: tl.constexpr):
    """`(scale, shift, low)`, each `[groups, A, B]`: weight = scale * (value + base + shift) - low.

    A `d` per row is left out (`row_scale`). `shift` and `low` only mean something if `S.shift`, `S.affine`.
    """
    scale, shift = integer_scale(planes, lut, S, ASM)
    if S.d_size > 0:
        scale *= as_float(plane(planes, S, S.d_plane), S) * S.unit
    low = scale
    if S.affine:
        low = as_float(plane(planes, S, S.dmin_plane), S)
        if len(S.minimum) == 0:
            low *= S.min_map[0]
        else:
            m = raw_scale(planes, S, "minimum", ASM)
            low = low * (m * S.min_map[1] + S.min_map[0]).to(tl.float32)
    return scale, shift, low
