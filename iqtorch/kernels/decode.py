"""Decoding in registers: one small function per family, from planes to quads of int8, and one for the scales of all.

A *quad* is an int32 with the values of four neighbouring weights as bytes, before any scale. Every family returns quads
`[A, B, S.quads]` for rows `row` (`[A, 1]`) and runs `run` (`[1, B]`); the skeletons know nothing else. Loads of weights
are not masked: rows and runs must be clamped to the matrix.
`S` is the format's `Scheme`; branches on it are resolved at compile time.
"""

# mypy: ignore-errors

from __future__ import annotations

import triton
import triton.language as tl

from .asm import (
    LOW_BYTES,
    NIBBLE_BYTES,
    TRELLIS_MASK,
    byte_mask,
    byte_sum,
    bytes_of,
    choose,
    cubic,
    fetch,
    fetch_pair,
    from_lane,
    lane,
    magnitude,
    negate_bytes,
    negate_positive_bytes,
    opaque,
    pack4,
    permute,
    select,
    shift_right,
    split4,
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


@triton.jit
def load_item(start, row, stride, column, ASM: tl.constexpr):
    """`start[row * stride + column]` for rows `[A, 1]` and columns `[1, B]`: `[A, B]`.

    Triton would give one thread several neighbouring items and then exchange them through shared memory. For vector kernels
    (ASM = 2) the columns hide that they are neighbours, and come first: every thread loads the items of its own runs.
    """
    if ASM == 2:
        at = tl.trans(row) * stride + tl.trans(opaque(column))
        v = tl.trans(tl.load(start + at))
    else:
        v = tl.load(start + (row * stride + column))
    return v


@triton.jit
def load_words(data, row, run, rows, runs, S: tl.constexpr, P: tl.constexpr, ASM: tl.constexpr):
    """The bits of plane P of each run as int32 `[A, B, words]`; a run with fewer than 32 bits has one word."""
    bits: tl.constexpr = run_bits(S, P)
    start = data + plane_start(rows, runs, S, P)
    if bits > 32:
        n: tl.constexpr = bits // 32
        at = ((row * runs + run) * n)[:, :, None] + tl.arange(0, n)[None, None, :]
        v = tl.load(start.to(tl.pointer_type(tl.int32), bitcast=True) + at)
    elif bits == 32:
        v = load_item(start.to(tl.pointer_type(tl.int32), bitcast=True), row, runs, run, ASM)[:, :, None]
    elif bits == 16:
        v = load_item(start.to(tl.pointer_type(tl.uint16), bitcast=True), row, runs, run, ASM).to(tl.int32)[:, :, None]
    elif bits == 8:
        v = load_item(start, row, runs, run, ASM).to(tl.int32)[:, :, None]
    else:
        per: tl.constexpr = 8 // bits
        v = load_item(start, row, (runs * bits) // 8, run // per, ASM).to(tl.int32)
        v = (v >> ((run % per).to(tl.int32) * bits))[:, :, None]
    return v


@triton.jit
def interleave(a, b):
    """Two `[A, B, n]` -> `[A, B, 2n]`, alternating."""
    return tl.reshape(tl.join(a, b), (a.shape[0], a.shape[1], 2 * a.shape[2]))


@triton.jit
def shifted(words, WIDTH: tl.constexpr, EACH: tl.constexpr):
    """`[A, B, n]` -> `[A, B, n * EACH]`: each word and its shifts by multiples of WIDTH.

    By halves and `interleave`, which keep everything in the thread's registers; broadcasting against a range would not.
    """
    if EACH > 1:
        even = shifted(words, 2 * WIDTH, halving(EACH))
        odd = shifted(words >> WIDTH, 2 * WIDTH, halving(EACH))
        words = interleave(even, odd)
    return words


@triton.jit
def spread(words, WIDTH: tl.constexpr, COUNT: tl.constexpr):
    """`[A, B, n]` -> `[A, B, COUNT]`: each word and its shifts by multiples of WIDTH (upper bits are left over)."""
    return shifted(words, WIDTH, tl.constexpr(COUNT // words.shape[2]))


# -- families ------------------------------------------------------------------------------------------------


@triton.jit
def direct_quads(data, row, run, rows, runs, held, S: tl.constexpr, ASM: tl.constexpr):
    """Codes are the values (the constant `S.base` is added by the skeletons)."""
    q = load_words(data, row, run, rows, runs, S, S.code[0][0], ASM)
    if S.code[0][1] < 8:
        q = spread(q, S.code[0][1], S.quads) & splat_mask(S.code[0][1], 8)
    if len(S.code) == 2:
        high = load_words(data, row, run, rows, runs, S, S.code[1][0], ASM)
        q |= (spread(high, S.code[1][1], S.quads) & splat_mask(S.code[1][1], 8)) << S.code[0][1]
    return q


@triton.jit
def cubic_quads(data, row, run, rows, runs, held, S: tl.constexpr, ASM: tl.constexpr):
    """Codes whose table is a rounded cubic polynomial."""
    codes = direct_quads(data, row, run, rows, runs, held, S, ASM)
    if ASM:
        q = cubic(codes, held[0], held[1], S)
    else:
        v0, v1, v2, v3 = split4(tl.load(held[0] + bytes_of(codes, False)))
        q = pack4(v0, v1, v2, v3, ASM)
    return q


@triton.jit
def restore_parity(w):
    """IQ4_KSS: words of 32 weights with the bits restored that gave way to the scale."""
    lo, hi = tl.split(tl.permute(tl.reshape(w, (w.shape[0], w.shape[1], 2, 2)), (0, 1, 3, 2)))
    lo = lo & (LOW_BYTES ^ -1)
    x = lo ^ hi
    x = x ^ shift_right(x, 4)
    x = x ^ shift_right(x, 2)
    x = x ^ shift_right(x, 1)
    lo = lo | (x & LOW_BYTES)
    return tl.reshape(tl.permute(tl.join(lo, hi), (0, 1, 3, 2)), w.shape)


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
def table_quads(data, row, run, rows, runs, held, S: tl.constexpr, ASM: tl.constexpr):
    """Codes of 2 to 6 bits index a table of bytes."""
    n: tl.constexpr = halving(S.quads)
    w = load_words(data, row, run, rows, runs, S, S.code[0][0], ASM)
    if S.parity:
        w = restore_parity(w)
    low_width: tl.constexpr = S.code[0][1]
    low = spread(w, low_width, n)
    if len(S.code) == 2:
        high_width: tl.constexpr = S.code[1][1]
        high = spread(load_words(data, row, run, rows, runs, S, S.code[1][0], ASM), high_width, n)
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
        values = tl.load(held[0] + code)
        v0, v1, v2, v3 = split4(tl.reshape(values, (w.shape[0], w.shape[1], S.quads, 4)))
        q = pack4(v0, v1, v2, v3, ASM)
    return q


@triton.jit
def pairs_quads(data, row, run, rows, runs, held, S: tl.constexpr, ASM: tl.constexpr):
    """Five-bit codes index a table of pairs: one word per lane of a warp."""
    n: tl.constexpr = halving(S.quads)
    low = spread(load_words(data, row, run, rows, runs, S, S.code[0][0], ASM), 4, n)
    high = five(load_words(data, row, run, rows, runs, S, S.code[1][0], ASM), 0, 1, n)
    code = select(low, high, NIBBLE_BYTES)
    if ASM:
        a = permute(from_lane(code, held[0]), from_lane(code >> 8, held[0]), "0x5410")
        b = permute(from_lane(code >> 16, held[0]), from_lane(code >> 24, held[0]), "0x5410")
    else:
        v = tl.load(held[0] + ((code[:, :, :, None] >> (8 * tl.arange(0, 4))[None, None, None, :]) & 31))
        v0, v1, v2, v3 = split4(v)
        a = v0 | v1 << 16
        b = v2 | v3 << 16
    return interleave(a, b)


@triton.jit
def five(word, FIRST: tl.constexpr, STEP: tl.constexpr, COUNT: tl.constexpr):
    """Bits FIRST, FIRST + STEP, .. of the bytes of a word `[A, B, 1]`, each moved to bit 4 of every byte: `[A, B, COUNT]`."""
    if COUNT > 1:
        even = five(word, FIRST, 2 * STEP, halving(COUNT))
        odd = five(word, FIRST + STEP, 2 * STEP, halving(COUNT))
        v = interleave(even, odd)
    elif FIRST < 4:
        v = word << (4 - FIRST)
    else:
        v = word >> (FIRST - 4)
    return v


@triton.jit
def natural_codes(data, row, run, rows, runs, S: tl.constexpr, ASM: tl.constexpr):
    """Whole codes `[A, B, run / vec]` of formats with four or eight weights per code."""
    n: tl.constexpr = S.run // S.vec
    width: tl.constexpr = S.code[0][1]
    code = spread(load_words(data, row, run, rows, runs, S, S.code[0][0], ASM), width, n) & low_mask(width)
    for i in tl.static_range(1, tl.constexpr(len(S.code))):
        part = spread(load_words(data, row, run, rows, runs, S, S.code[i][0], ASM), S.code[i][1], n)
        code |= (part & low_mask(S.code[i][1])) << code_low(S, i)
    return code


@triton.constexpr_function
def code_low(s, i):
    """Lowest bit of the i-th plane of the code."""
    return sum(width for _, width in s.code[:i])


@triton.jit
def word_pairs(table, at, ASM: tl.constexpr):
    """Entries `at [A, B, n]` of a table of eight bytes -> words `[A, B, 2n]`."""
    if ASM:
        low, high = fetch_pair(table, at)
    else:
        low, high = tl.load(table + 2 * at), tl.load(table + 2 * at + 1)
    return interleave(low, high)


@triton.jit
def sign_masks(code, data, row, run, rows, runs, held, S: tl.constexpr, ASM: tl.constexpr):
    """Byte masks `[A, B, S.quads]` of the weights to negate."""
    patterns = held[0] + S.entries * S.vec // 4
    if S.sign == "bits":
        word = load_words(data, row, run, rows, runs, S, S.sign_plane, ASM)
        m = byte_mask(spread(word, 1, S.quads), ASM)
    elif S.sign == "code":
        m = word_pairs(patterns, code >> S.code_bits, ASM)
    else:
        word = load_words(data, row, run, rows, runs, S, S.sign_plane, ASM)
        m = word_pairs(patterns, spread(word, 7, halving(S.quads)) & 127, ASM)
    return m


@triton.jit
def grid_quads(data, row, run, rows, runs, held, S: tl.constexpr, ASM: tl.constexpr):
    """Codes index a table of four or eight values, with signs apart or not."""
    code = natural_codes(data, row, run, rows, runs, S, ASM)
    index = code & low_mask(S.code_bits)
    if S.vec == 8:
        q = word_pairs(held[0], index, ASM)
    elif ASM:
        q = fetch(held[0], index)
    else:
        q = tl.load(held[0] + index)
    if S.sign != "":
        q = negate_positive_bytes(q, sign_masks(code, data, row, run, rows, runs, held, S, ASM))
    return q


@triton.jit
def trellis_states(data, row, run, rows, runs, S: tl.constexpr, ASM: tl.constexpr):
    """First states of the generator less `S.start`, `[A, B, run / vec]`."""
    state = natural_codes(data, row, run, rows, runs, S, ASM)
    if S.spare:
        state &= low_mask(S.code_bits)
    if S.variant_entries > 0:
        state += ((raw_scale(data, row, run, rows, runs, S, "scale", ASM) >> S.scale_bits) & 1) * S.variant_entries
    return state


@triton.constexpr_function
def first_term(s, i):
    """`start * steps[i]` modulo 2^32."""
    value = (s.start * s.steps[i]) & 0xFFFFFFFF
    return value - (1 << 32) if value >> 31 else value


@triton.jit
def trellis_word(state, i: tl.constexpr, S: tl.constexpr):
    """Four numbers below 64 in bytes: their sum less 126 is the i-th value of a code. States are powers, not a chain."""
    return (state * S.steps[i] + first_term(S, i)) & TRELLIS_MASK


@triton.jit
def trellis_value(state, i: tl.constexpr, S: tl.constexpr, ASM: tl.constexpr):
    """The i-th value of a code."""
    v = byte_sum(trellis_word(state, i, S), ASM)
    if S.absolute:
        v = magnitude(v, ASM)
    return v


@triton.jit
def trellis_four(state, i: tl.constexpr, S: tl.constexpr, ASM: tl.constexpr):
    return pack4(
        trellis_value(state, i, S, ASM),
        trellis_value(state, i + 1, S, ASM),
        trellis_value(state, i + 2, S, ASM),
        trellis_value(state, i + 3, S, ASM),
        ASM,
    )


@triton.jit
def trellis_quads(data, row, run, rows, runs, held, S: tl.constexpr, ASM: tl.constexpr):
    """Codes start a generator of four or eight values."""
    state = trellis_states(data, row, run, rows, runs, S, ASM)
    q = trellis_four(state, 0, S, ASM)
    if S.vec == 8:
        q = interleave(q, trellis_four(state, 4, S, ASM))
    if S.sign != "":
        q = negate_bytes(q, sign_masks(state, data, row, run, rows, runs, held, S, ASM))
    return q


@triton.jit
def quads(data, row, run, rows, runs, held, S: tl.constexpr, ASM: tl.constexpr):
    """Values of runs as bytes, int32 `[A, B, S.quads]` (see the module)."""
    if S.family == "direct":
        return direct_quads(data, row, run, rows, runs, held, S, ASM)
    elif S.family == "cubic":
        return cubic_quads(data, row, run, rows, runs, held, S, ASM)
    elif S.family == "table":
        return table_quads(data, row, run, rows, runs, held, S, ASM)
    elif S.family == "pairs":
        return pairs_quads(data, row, run, rows, runs, held, S, ASM)
    elif S.family == "grid":
        return grid_quads(data, row, run, rows, runs, held, S, ASM)
    else:
        return trellis_quads(data, row, run, rows, runs, held, S, ASM)


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
def raw_scale(data, row, run, rows, runs, S: tl.constexpr, FIELD: tl.constexpr, ASM: tl.constexpr):
    """Stored scales or minima (and variant bits above them) `[A, B, S.groups]`."""
    n: tl.constexpr = S.groups
    if S.parity:
        w = load_words(data, row, run, rows, runs, S, S.code[0][0], ASM)
        lo, _hi = tl.split(tl.permute(tl.reshape(w, (w.shape[0], w.shape[1], 2, 2)), (0, 1, 3, 2)))
        # the multiplication gathers bits 0, 8, 16, 24 in bits 24 .. 27
        low, high = tl.split(shift_right((lo & LOW_BYTES) * 0x01020408, 24) & 15)
        raw = (low | high << 4)[:, :, None]
    elif S.spare:
        w = load_words(data, row, run, rows, runs, S, S.code[0][0], ASM)
        w0, w1, w2, w3 = split4(shift_right(w, 15) & 0x00010001)
        bits = w0 | w1 << 2 | w2 << 4 | w3 << 6
        raw = ((bits | bits >> 15) & 255)[:, :, None]
    elif S.sign == "word":
        raw = shift_right(load_words(data, row, run, rows, runs, S, S.sign_plane, ASM), 28)
    else:
        width: tl.constexpr = plane_width(S, FIELD, 0)
        words = load_words(data, row, run, rows, runs, S, plane_index(S, FIELD, 0), ASM)
        raw = spread(words, width, n) & low_mask(width)
        if plane_count(S, FIELD) == 2:
            more: tl.constexpr = plane_width(S, FIELD, 1)
            words = load_words(data, row, run, rows, runs, S, plane_index(S, FIELD, 1), ASM)
            raw |= (spread(words, more, n) & low_mask(more)) << width
    return raw


@triton.jit
def load_floats(p, row, stride, column, S: tl.constexpr, ASM: tl.constexpr):
    """Stored floats as float32 `[A, B]` (see `load_item`)."""
    if S.d_kind == "f16":
        v = load_item(p.to(tl.pointer_type(tl.float16), bitcast=True), row, stride, column, ASM).to(tl.float32)
    elif S.d_kind == "f32":
        v = load_item(p.to(tl.pointer_type(tl.float32), bitcast=True), row, stride, column, ASM)
    else:
        e = load_item(p, row, stride, column, ASM).to(tl.int32)
        # 2^(e - 128), subnormal for e < 2
        v = tl.where(e < 2, 0x00200000 << e, (e - 1) << 23).to(tl.float32, bitcast=True)
    return v


@triton.jit
def row_scale(data, row, rows, runs, S: tl.constexpr):
    """`d` of rows `[A, 1]` whose format has one per row, times `unit`."""
    return load_floats(data + plane_start(rows, runs, S, S.d_plane), row, 1, 0, S, 0) * S.unit


@triton.jit
def block_scale(data, row, run, rows, runs, S: tl.constexpr, PLANE: tl.constexpr, ASM: tl.constexpr):
    """`d` (or `dmin`) of formats with one per block, `[A, B]`."""
    per: tl.constexpr = S.d_size // S.run
    return load_floats(data + plane_start(rows, runs, S, PLANE), row, runs // per, run // per, S, ASM)


@triton.jit
def row_exponent(data, row, rows, runs, S: tl.constexpr):
    """Exponent e of rows: `|scale| <= 2^e`; int32 like `row`."""
    p = (data + plane_start(rows, runs, S, S.exponent_plane)).to(tl.pointer_type(tl.int8), bitcast=True)
    return tl.load(p + row).to(tl.int32)


@triton.jit
def power_of_two(e):
    """2^e as float32, for -126 <= e <= 127."""
    return ((e + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def integer_scale(data, row, run, rows, runs, lut, S: tl.constexpr, ASM: tl.constexpr):
    """What the stored scale stands for, float32 `[A, B, groups]`, and `shift` of the chosen variant, int32."""
    if S.scale_bits == 0:
        scale = tl.full((run.shape[0], run.shape[1], 1), 1.0, tl.float32)
        shift = scale.to(tl.int32)
    else:
        raw = raw_scale(data, row, run, rows, runs, S, "scale", ASM)
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
def scales(data, row, run, rows, runs, lut, S: tl.constexpr, ASM: tl.constexpr):
    """`(scale, shift, low)`, each `[A, B, groups]`: weight = scale * (value + base + shift) - low.

    A `d` per row is left out (`row_scale`). `shift` and `low` only mean something if `S.shift`, `S.affine`.
    """
    scale, shift = integer_scale(data, row, run, rows, runs, lut, S, ASM)
    if S.d_size > 0:
        scale *= (block_scale(data, row, run, rows, runs, S, S.d_plane, ASM) * S.unit)[:, :, None]
    low = scale
    if S.affine:
        low = block_scale(data, row, run, rows, runs, S, S.dmin_plane, ASM)[:, :, None]
        if len(S.minimum) == 0:
            low *= S.min_map[0]
        else:
            m = raw_scale(data, row, run, rows, runs, S, "minimum", ASM)
            low = low * (m * S.min_map[1] + S.min_map[0]).to(tl.float32)
    return scale, shift, low
