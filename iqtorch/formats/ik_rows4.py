"""The row-interleaved formats of ik_llama.cpp: IQ2_K_R4, IQ3_K_R4, IQ4_K_R4, IQ5_K_R4, IQ4_KS_R4, IQ5_KS_R4.

They hold the integers of the plain format, four rows merged into one block, so they are the plain record with other fields.
Elements of a field are in the order row `k` (0..3), then the plain element. Source: ik_llama.cpp ggml/src/iqk/iqk_quantize.cpp.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from . import ik_table as plain
from .base import Field, Format, IntArray, RunSpec, bits


def _rows4(count: int, *runs: tuple[Callable[[IntArray, IntArray], IntArray], int]) -> Field:
    """Field of 4 x `count` elements from functions of (row, element in the row)."""

    def of(start: Callable[[IntArray, IntArray], IntArray], width: int) -> RunSpec:
        return (lambda e: start(e // count, e % count), width)

    return bits(4 * count, *(of(start, width) for start, width in runs))


def _scale_number(k: IntArray, g: IntArray) -> IntArray:
    """Scale of row k, 16-weight group g: n = 8 * (sub-block) + 4 * (half) + k, 0..63."""
    return 8 * (g // 2) + 4 * (g % 2) + k


def _header(byte: int = 0) -> Field:
    return _rows4(1, (lambda k, _: 8 * byte + 16 * k, 16))


def _variant(byte: int) -> Field:
    return _rows4(16, (lambda k, g: 8 * (byte + k + 4 * (g % 2)) + g // 2, 1))


def _codes2(byte: int) -> tuple[Callable[[IntArray, IntArray], IntArray], int]:
    return (lambda k, j: 8 * (byte + 32 * (j // 32) + 16 * (j // 16 % 2) + 4 * k + j % 4) + 2 * (j // 4 % 4), 2)


def _codes4(byte: int) -> tuple[Callable[[IntArray, IntArray], IntArray], int]:
    def start(k: IntArray, j: IntArray) -> IntArray:
        quad = j % 32 // 4
        return 8 * (byte + 64 * (j // 32) + 32 * (quad % 2) + 16 * (quad // 4) + 4 * k + j % 4) + 4 * (quad // 2 % 2)

    return (start, 4)


def _high1(byte: int, bit_of_quad: Callable[[IntArray], IntArray]) -> tuple[Callable[[IntArray, IntArray], IntArray], int]:
    return (lambda k, j: 8 * (byte + 16 * (j // 32) + 4 * k + j % 4) + bit_of_quad(j % 32 // 4), 1)


def _quads_even_first(quad: IntArray) -> IntArray:
    return quad // 2 + 4 * (quad % 2)


def _nibbles(byte: int) -> tuple[Callable[[IntArray, IntArray], IntArray], int]:
    return (lambda k, g: 8 * (byte + _scale_number(k, g) % 32) + 4 * (_scale_number(k, g) // 32), 4)


def _scale6() -> Field:
    """Scales of IQ4_K_R4 and IQ5_K_R4: high two bits at byte 16, low four at byte 32."""
    return _rows4(16, _nibbles(32), (lambda k, g: 8 * (16 + _scale_number(k, g) % 16) + 2 * (_scale_number(k, g) // 16), 2))


def _scale_bytes(first_bit: int, width: int) -> Field:
    return _rows4(8, (lambda k, b: 8 * (4 * b + k) + first_bit, width))


def _merged(base: Format, ggml_type: int, fields: dict[str, Field]) -> Format:
    return replace(base, name=f"{base.name}_r4", ggml_type=ggml_type, fields=fields, interleave=4, plain=base.name)


IQ2_K_R4 = _merged(plain.IQ2_K, 337, {
    "d": _header(), "variant": _variant(8),
    "scale": _rows4(16, _nibbles(16)),
    "code": _rows4(256, _codes2(48)),
})  # fmt: skip

IQ3_K_R4 = _merged(plain.IQ3_K, 338, {
    "d": _header(), "variant": _variant(8),
    "scale": _rows4(16, _nibbles(24), (lambda k, g: 8 * (16 + _scale_number(k, g) % 8) + _scale_number(k, g) // 8, 1)),
    "code": _rows4(256, _codes2(56), _high1(312, lambda quad: quad)),
})  # fmt: skip

IQ4_K_R4 = _merged(plain.IQ4_K, 339, {
    "d": _header(), "variant": _variant(8),
    "scale": _scale6(),
    "code": _rows4(256, _codes4(64)),
})  # fmt: skip

IQ5_K_R4 = _merged(plain.IQ5_K, 340, {
    "d": _header(), "variant": _variant(8),
    "scale": _scale6(),
    "code": _rows4(256, _codes4(64), _high1(576, _quads_even_first)),
})  # fmt: skip

IQ4_KS_R4 = _merged(plain.IQ4_KS, 344, {
    "scale": _scale_bytes(1, 7), "variant": _scale_bytes(0, 1),
    "code": _rows4(256, _codes4(32)),
})  # fmt: skip

IQ5_KS_R4 = _merged(plain.IQ5_KS, 352, {
    "scale": _scale_bytes(1, 7), "variant": _scale_bytes(0, 1),
    "code": _rows4(256, _codes4(32), _high1(544, _quads_even_first)),
})  # fmt: skip

FORMATS = (IQ2_K_R4, IQ3_K_R4, IQ4_K_R4, IQ5_K_R4, IQ4_KS_R4, IQ5_KS_R4)
