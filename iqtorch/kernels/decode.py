"""Decoding in registers: one small function per family, from planes to quads of int8.

A *quad* is an int32 with the values of four neighbouring weights as bytes, before any scale. Every family returns quads
`[S.quads, A, B]` for rows `row` (`[A, 1]`) and runs `run` (`[1, B]`); the kernels know nothing else of codes.
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
    scaled_pair,
    select,
    shift_right,
    two_byte_sums,
)
from .planes import each, flatten_last, halving, interleave, leave4, low_mask, plane, splat_mask, spread, unleave4, word_halves
from .scales import raw_scale


@triton.jit
def direct_quads(planes, held, S: tl.constexpr, ASM: tl.constexpr):
    """Codes are the values (the constant `S.base` is added by the products)."""
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
def pair_codes(planes, S: tl.constexpr):
    """Codes of pairs as bytes: four of them, eight weights, in a word."""
    low = spread(plane(planes, S, S.code[0][0]), 4, tl.constexpr(halving(S.quads)))
    return select(low, five(plane(planes, S, S.code[1][0])), NIBBLE_BYTES)


@triton.jit
def pairs_halves(planes, held, scale, S: tl.constexpr):
    """What `asm.halves` makes of `pairs_quads` (for one scale per eight weights or more), from a table of float16 pairs."""
    code = pair_codes(planes, S)
    by = each(scale.to(tl.float16), tl.constexpr(S.quads // 2 // S.groups))
    a0, a1 = scaled_pair(from_lane(code, held[1]), by)
    b0, b1 = scaled_pair(from_lane(code >> 8, held[1]), by)
    c0, c1 = scaled_pair(from_lane(code >> 16, held[1]), by)
    d0, d1 = scaled_pair(from_lane(code >> 24, held[1]), by)
    return interleave(a0, c0), interleave(a1, c1), interleave(b0, d0), interleave(b1, d1)


@triton.jit
def pairs_quads(planes, held, S: tl.constexpr, ASM: tl.constexpr):
    """Five-bit codes index a table of pairs: one word per lane of a warp."""
    code = pair_codes(planes, S)
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
def code_plane(planes, i: tl.constexpr, S: tl.constexpr):
    """The i-th part of each code, in the lower bits of `[run / vec, A, B]`."""
    words = plane(planes, S, S.code[i][0])
    if S.spare:
        words = leave4(words[0], words[1], words[2], words[3])
    n: tl.constexpr = S.run // S.vec
    return spread(words, S.code[i][1], n)


@triton.jit
def natural_codes(planes, S: tl.constexpr, ASM: tl.constexpr):
    """Whole codes `[run / vec, A, B]` of formats with four or eight weights per code."""
    width: tl.constexpr = S.code[0][1]
    code = code_plane(planes, 0, S) & low_mask(width)
    for i in tl.static_range(1, tl.constexpr(len(S.code))):
        code |= (code_plane(planes, i, S) & low_mask(S.code[i][1])) << code_low(S, i)
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
        more = ((raw_scale(planes, S, "scale", ASM) >> S.scale_bits) & 1) * S.variant_entries
        state += each(more, state.shape[0] // S.groups)
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
