"""Decoding in registers: one small function per family, from planes to quads of int8, and one for the scales of all.

A *quad* is an int32 with the values of four neighbouring weights as bytes, before any scale. Every family returns quads
`[A, B, S.quads]` for rows `row` (`[A, 1]`, int64) and runs `run` (`[1, B]`, or `[A, B]`); the skeletons know nothing else.
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
    choose,
    from_lane,
    lane,
    negate_bytes,
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
def load_words(data, row, run, mask, rows, runs, S: tl.constexpr, P: tl.constexpr):
    """The bits of plane P of each run as int32 `[A, B, words]`; a run with fewer than 32 bits has one word."""
    bits: tl.constexpr = run_bits(S, P)
    start = data + plane_start(rows, runs, S, P)
    item = row * runs + run
    if bits >= 32:
        n: tl.constexpr = bits // 32
        at = (item * n)[:, :, None] + tl.arange(0, n)[None, None, :]
        v = tl.load(start.to(tl.pointer_type(tl.int32), bitcast=True) + at, mask=mask[:, :, None], other=0)
    elif bits == 16:
        v = tl.load(start.to(tl.pointer_type(tl.uint16), bitcast=True) + item, mask=mask, other=0).to(tl.int32)[:, :, None]
    elif bits == 8:
        v = tl.load(start + item, mask=mask, other=0).to(tl.int32)[:, :, None]
    else:
        row_bytes = (runs * bits) // 8
        per: tl.constexpr = 8 // bits
        v = tl.load(start + row * row_bytes + run // per, mask=mask, other=0).to(tl.int32)
        v = (v >> ((run % per).to(tl.int32) * bits))[:, :, None]
    return v


@triton.jit
def spread(words, WIDTH: tl.constexpr, COUNT: tl.constexpr):
    """`[A, B, n]` -> `[A, B, COUNT]`: each word and its shifts by multiples of WIDTH (upper bits are left over)."""
    each: tl.constexpr = COUNT // words.shape[2]
    if each > 1:
        moved = words[:, :, :, None] >> (WIDTH * tl.arange(0, each))[None, None, None, :]
        words = tl.reshape(moved, (words.shape[0], words.shape[1], COUNT))
    return words


@triton.jit
def interleave(a, b):
    """Two `[A, B, n]` -> `[A, B, 2n]`, alternating."""
    return tl.reshape(tl.join(a, b), (a.shape[0], a.shape[1], 2 * a.shape[2]))


# -- families ------------------------------------------------------------------------------------------------


@triton.jit
def direct_quads(data, row, run, mask, rows, runs, book, S: tl.constexpr, ASM: tl.constexpr):
    """Codes are the values (the constant `S.base` is added by the skeletons)."""
    q = load_words(data, row, run, mask, rows, runs, S, S.code[0][0])
    if S.code[0][1] < 8:
        q = spread(q, S.code[0][1], S.quads) & splat_mask(S.code[0][1], 8)
    if len(S.code) == 2:
        high = load_words(data, row, run, mask, rows, runs, S, S.code[1][0])
        q |= (spread(high, S.code[1][1], S.quads) & splat_mask(S.code[1][1], 8)) << S.code[0][1]
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


@triton.jit
def opaque_word(book, i, ASM: tl.constexpr):
    """Word i of the table in an ordinary register: the offset is zero, but only known per thread."""
    return tl.load(book + i + (lane(ASM) >> 5))


@triton.jit
def table_tree(book, sel, at: tl.constexpr, COUNT: tl.constexpr, b3, b4, b5, ASM: tl.constexpr):
    """Four look-ups in COUNT entries, bytes from word `at` of `book`: the nibbles of `sel` choose among eight, b3 .. b5 between halves."""
    if COUNT <= 8:
        v = choose(opaque_word(book, at, ASM), opaque_word(book, at + COUNT // 4 - 1, ASM), sel)
    else:
        lo = table_tree(book, sel, at, halving(COUNT), b3, b4, b5, ASM)
        hi = table_tree(book, sel, at + halving(COUNT) // 4, halving(COUNT), b3, b4, b5, ASM)
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
def table_quads(data, row, run, mask, rows, runs, book, S: tl.constexpr, ASM: tl.constexpr):
    """Codes of 2 to 6 bits index a table of bytes."""
    n: tl.constexpr = halving(S.quads)
    w = load_words(data, row, run, mask, rows, runs, S, S.code[0][0])
    if S.parity:
        w = restore_parity(w)
    low_width: tl.constexpr = S.code[0][1]
    low = spread(w, low_width, n)
    if len(S.code) == 2:
        high_width: tl.constexpr = S.code[1][1]
        high = spread(load_words(data, row, run, mask, rows, runs, S, S.code[1][0]), high_width, n)
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
        first: tl.constexpr = 1 << S.code_bits
        a = table_tree(book, sel, first, count, b3, b4, b5, ASM)
        b = table_tree(book, shift_right(sel, 16), first, count, shift_right(b3, 16), shift_right(b4, 16), shift_right(b5, 16), ASM)
        q = interleave(a, b)
    else:
        slots = 4 * tl.arange(0, 8)[None, None, None, :]
        code = (low[:, :, :, None] >> slots) & low_mask(low_width)
        if high_width > 0:
            code |= ((high[:, :, :, None] >> slots) & low_mask(high_width)) << low_width
        values = tl.load(book + code)
        v0, v1, v2, v3 = split4(tl.reshape(values, (w.shape[0], w.shape[1], S.quads, 4)))
        q = pack4(v0, v1, v2, v3, ASM)
    return q


@triton.jit
def pairs_quads(data, row, run, mask, rows, runs, book, S: tl.constexpr, ASM: tl.constexpr):
    """Five-bit codes index a table of pairs: one word per lane of a warp."""
    n: tl.constexpr = halving(S.quads)
    low = spread(load_words(data, row, run, mask, rows, runs, S, S.code[0][0]), 4, n)
    high = five(load_words(data, row, run, mask, rows, runs, S, S.code[1][0]), n)
    code = select(low, high, NIBBLE_BYTES)
    if ASM:
        table = tl.load(book + lane(ASM))
        a = permute(from_lane(code, table), from_lane(code >> 8, table), "0x5410")
        b = permute(from_lane(code >> 16, table), from_lane(code >> 24, table), "0x5410")
    else:
        v = tl.load(book + ((code[:, :, :, None] >> (8 * tl.arange(0, 4))[None, None, None, :]) & 31))
        v0, v1, v2, v3 = split4(v)
        a = v0 | v1 << 16
        b = v2 | v3 << 16
    return interleave(a, b)


@triton.jit
def five(word, N: tl.constexpr):
    """Words of high bits `[A, B, n]`, bit i of a byte for the i-th of eight words of nibbles -> bit 4 of every byte, `[A, B, N]`."""
    i = tl.arange(0, N)[None, None, None, :]
    moved = tl.where(i < 4, (word << 4)[:, :, :, None] >> i, word[:, :, :, None] >> (i - 4))
    return tl.reshape(moved, (word.shape[0], word.shape[1], N))


@triton.jit
def natural_codes(data, row, run, mask, rows, runs, S: tl.constexpr):
    """Whole codes `[A, B, run / vec]` of formats with four or eight weights per code."""
    n: tl.constexpr = S.run // S.vec
    width: tl.constexpr = S.code[0][1]
    code = spread(load_words(data, row, run, mask, rows, runs, S, S.code[0][0]), width, n) & low_mask(width)
    for i in tl.static_range(1, tl.constexpr(len(S.code))):
        part = spread(load_words(data, row, run, mask, rows, runs, S, S.code[i][0]), S.code[i][1], n)
        code |= (part & low_mask(S.code[i][1])) << code_low(S, i)
    return code


@triton.constexpr_function
def code_low(s, i):
    """Lowest bit of the i-th plane of the code."""
    return sum(width for _, width in s.code[:i])


@triton.jit
def word_pairs(table, at):
    """Entries `at [A, B, n]` of a table of eight bytes -> words `[A, B, 2n]`."""
    both = tl.load(table.to(tl.pointer_type(tl.int64), bitcast=True) + at)
    return interleave(both.to(tl.int32), (both >> 32).to(tl.int32))


@triton.jit
def sign_masks(code, data, row, run, mask, rows, runs, book, S: tl.constexpr, ASM: tl.constexpr):
    """Byte masks `[A, B, S.quads]` of the weights to negate."""
    patterns = book + S.entries * S.vec // 4
    if S.sign == "bits":
        word = load_words(data, row, run, mask, rows, runs, S, S.sign_plane)
        m = byte_mask(spread(word, 1, S.quads), ASM)
    elif S.sign == "code":
        m = word_pairs(patterns, code >> S.code_bits)
    else:
        word = load_words(data, row, run, mask, rows, runs, S, S.sign_plane)
        m = word_pairs(patterns, spread(word, 7, halving(S.quads)) & 127)
    return m


@triton.jit
def grid_quads(data, row, run, mask, rows, runs, book, S: tl.constexpr, ASM: tl.constexpr):
    """Codes index a table of four or eight values, with signs apart or not."""
    code = natural_codes(data, row, run, mask, rows, runs, S)
    index = code & low_mask(S.code_bits)
    if S.vec == 8:
        q = word_pairs(book, index)
    else:
        q = tl.load(book + index)
    if S.sign != "":
        q = negate_bytes(q, sign_masks(code, data, row, run, mask, rows, runs, book, S, ASM))
    return q


@triton.jit
def trellis_states(data, row, run, mask, rows, runs, S: tl.constexpr):
    """First states of the generator, `[A, B, run / vec]`."""
    state = natural_codes(data, row, run, mask, rows, runs, S) + S.start
    if S.variant_entries > 0:
        state += ((raw_scale(data, row, run, mask, rows, runs, S, S.scale) >> S.scale_bits) & 1) * S.variant_entries
    return state


@triton.jit
def trellis_value(state, i: tl.constexpr, S: tl.constexpr, ASM: tl.constexpr):
    """The i-th value of a code; the states are independent powers, not a chain."""
    v = byte_sum((state * S.steps[i]) & TRELLIS_MASK, ASM)
    if S.absolute:
        v = tl.abs(v)
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
def trellis_quads(data, row, run, mask, rows, runs, book, S: tl.constexpr, ASM: tl.constexpr):
    """Codes start a generator of four or eight values."""
    state = trellis_states(data, row, run, mask, rows, runs, S)
    q = trellis_four(state, 0, S, ASM)
    if S.vec == 8:
        q = interleave(q, trellis_four(state, 4, S, ASM))
    if S.sign != "":
        q = negate_bytes(q, sign_masks(state, data, row, run, mask, rows, runs, book, S, ASM))
    return q


@triton.jit
def quads(data, row, run, mask, rows, runs, book, S: tl.constexpr, ASM: tl.constexpr):
    """Values of runs as bytes, int32 `[A, B, S.quads]` (see the module)."""
    if S.family == "direct":
        return direct_quads(data, row, run, mask, rows, runs, book, S, ASM)
    elif S.family == "table":
        return table_quads(data, row, run, mask, rows, runs, book, S, ASM)
    elif S.family == "pairs":
        return pairs_quads(data, row, run, mask, rows, runs, book, S, ASM)
    elif S.family == "grid":
        return grid_quads(data, row, run, mask, rows, runs, book, S, ASM)
    else:
        return trellis_quads(data, row, run, mask, rows, runs, book, S, ASM)


# -- scales --------------------------------------------------------------------------------------------------


@triton.jit
def raw_scale(data, row, run, mask, rows, runs, S: tl.constexpr, PLANES: tl.constexpr):
    """Stored scales (and variant bits above them) `[A, B, S.groups]`."""
    n: tl.constexpr = S.groups
    if S.parity:
        w = load_words(data, row, run, mask, rows, runs, S, S.code[0][0])
        lo, hi = tl.split(tl.permute(tl.reshape(w, (w.shape[0], w.shape[1], 2, 2)), (0, 1, 3, 2)))
        # the multiplication gathers bits 0, 8, 16, 24 in bits 24 .. 27
        four = (shift_right((lo & LOW_BYTES) * 0x01020408, 24) & 15) << (4 * tl.arange(0, 2))[None, None, :]
        raw = tl.sum(four, axis=2)[:, :, None]
    elif S.sign == "word":
        raw = shift_right(load_words(data, row, run, mask, rows, runs, S, S.sign_plane), 28)
    else:
        raw = spread(load_words(data, row, run, mask, rows, runs, S, PLANES[0][0]), PLANES[0][1], n) & low_mask(PLANES[0][1])
        if len(PLANES) == 2:
            high = spread(load_words(data, row, run, mask, rows, runs, S, PLANES[1][0]), PLANES[1][1], n)
            raw |= (high & low_mask(PLANES[1][1])) << PLANES[0][1]
    return raw


@triton.jit
def float_bits(p, mask, KIND: tl.constexpr):
    """Stored floats at byte addresses `p` as float32."""
    if KIND == "f16":
        v = tl.load(p.to(tl.pointer_type(tl.float16), bitcast=True), mask=mask, other=0.0).to(tl.float32)
    elif KIND == "f32":
        v = tl.load(p.to(tl.pointer_type(tl.float32), bitcast=True), mask=mask, other=0.0)
    else:
        e = tl.load(p, mask=mask, other=0).to(tl.int32)
        # 2^(e - 128), subnormal for e < 2
        v = tl.where(e < 2, 0x00200000 << e, (e - 1) << 23).to(tl.float32, bitcast=True)
    return v


@triton.jit
def row_scale(data, row, mask, rows, runs, S: tl.constexpr):
    """`d` of rows whose format has one per row, times `unit`; like `row`."""
    size: tl.constexpr = 4 if S.d_kind == "f32" else 2
    return float_bits(data + plane_start(rows, runs, S, S.d_plane) + row * size, mask, S.d_kind) * S.unit


@triton.jit
def block_scale(data, row, run, mask, rows, runs, S: tl.constexpr, PLANE: tl.constexpr):
    """`d` (or `dmin`) of formats with one per block, `[A, B]`."""
    size: tl.constexpr = 1 if S.d_kind == "e8m0" else 2
    per: tl.constexpr = S.d_size // S.run
    at = row * (runs // per) + run // per
    return float_bits(data + plane_start(rows, runs, S, PLANE) + at * size, mask, S.d_kind)


@triton.jit
def row_exponent(data, row, mask, rows, runs, S: tl.constexpr):
    """Exponent e of rows: `|scale| <= 2^e`; int32 like `row`."""
    p = (data + plane_start(rows, runs, S, S.exponent_plane)).to(tl.pointer_type(tl.int8), bitcast=True)
    return tl.load(p + row, mask=mask, other=0).to(tl.int32)


@triton.jit
def power_of_two(e):
    """2^e as float32, for -126 <= e <= 127."""
    return ((e + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def integer_scale(data, row, run, mask, rows, runs, lut, S: tl.constexpr):
    """What the stored scale stands for, float32 `[A, B, groups]`, and `shift` of the chosen variant, int32."""
    if S.scale_bits == 0:
        scale = tl.full((run.shape[0], run.shape[1], 1), 1.0, tl.float32)
        shift = scale.to(tl.int32)
    else:
        raw = raw_scale(data, row, run, mask, rows, runs, S, S.scale)
        shift = raw
        if S.shift != 0:
            shift = ((raw >> S.scale_bits) & 1) * S.shift
        if S.shift != 0 or S.variant_entries != 0:
            raw &= low_mask(S.scale_bits)
        if S.scale_map is None:
            scale = tl.load(lut + raw)
        else:
            scale = (raw * S.scale_map[1] + S.scale_map[0]).to(tl.float32)
    return scale, shift


@triton.jit
def scales(data, row, run, mask, rows, runs, lut, S: tl.constexpr):
    """`(scale, shift, low)`, each `[A, B, groups]`: weight = scale * (value + base + shift) - low.

    A `d` per row is left out (`row_scale`). `shift` and `low` only mean something if `S.shift`, `S.affine`.
    """
    scale, shift = integer_scale(data, row, run, mask, rows, runs, lut, S)
    if S.d_size > 0:
        scale *= (block_scale(data, row, run, mask, rows, runs, S, S.d_plane) * S.unit)[:, :, None]
    low = scale
    if S.affine:
        low = block_scale(data, row, run, mask, rows, runs, S, S.dmin_plane)[:, :, None]
        if len(S.minimum) == 0:
            low *= S.min_map[0]
        else:
            m = raw_scale(data, row, run, mask, rows, runs, S, S.minimum)
            low = low * (m * S.min_map[1] + S.min_map[0]).to(tl.float32)
    return scale, shift, low
