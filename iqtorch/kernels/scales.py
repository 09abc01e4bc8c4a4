"""What stored scales, minima and floats stand for, in registers, for all formats."""

# mypy: ignore-errors

from __future__ import annotations

import triton
import triton.language as tl

from .asm import LOW_BYTES, fetch, from_lane, lane, shift_right
from .planes import low_mask, plane, plane_start, spread, unleave, word_halves


@triton.jit
def prepare_scales(lut, S: tl.constexpr, ASM: tl.constexpr):
    """What `scales` needs of the table of scales: one value per lane for PTX look-ups, else its address."""
    if ASM and S.scale_map is None:
        lut = tl.load(lut + lane()).to(tl.int32, bitcast=True)
    return lut


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
def spare_bits(w):
    """Bit 15 of both halves of a word, in bits 0 and 16."""
    return shift_right(w, 15) & 0x00010001


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
        w0, w1, w2, w3 = plane(planes, S, S.code[0][0])
        bits = spare_bits(w0) | spare_bits(w1) << 2 | spare_bits(w2) << 4 | spare_bits(w3) << 6
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
