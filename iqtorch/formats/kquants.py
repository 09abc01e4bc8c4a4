"""The k-quants of llama.cpp: Q2_K, Q3_K, Q4_K, Q5_K, Q6_K.

Blocks of 256 weights with a float16 `d` and a small integer scale per 16 or 32 weights; Q2_K, Q4_K and Q5_K also subtract
`dmin` times an integer minimum. `g` is the group. Source: llama.cpp ggml/src/ggml-common.h and ggml-quants.c.
"""

from __future__ import annotations

import numpy as np

from .base import Field, Format, IntArray, at, bits, integers
from .layout import codes2, codes4, codes8, high1, nibbles_by, offset, signed_bytes


def _scale6(byte: int, own: int, shift: int) -> Field:
    """Eight 6-bit numbers of the 12 scale bytes of Q4_K and Q5_K.

    Numbers 0..3 are the low six bits of the four bytes at `own`. Numbers 4..7 have their low four bits in the four bytes at 8,
    from bit `shift`, and their high two bits in the top of the bytes at `own`.
    """

    def low(g: IntArray) -> IntArray:
        return np.where(g < 4, 8 * (byte + own + g), 8 * (byte + 8 + g - 4) + shift)

    def high(g: IntArray) -> IntArray:
        return np.where(g < 4, 8 * (byte + own + g) + 4, 8 * (byte + own + g - 4) + 6)

    return bits(8, (low, 4), (high, 2))


Q2_K = Format(
    "q2_k", 10, 256, 84, integers(2),
    {
        "d": at(80, 2), "dmin": at(82, 2),
        "scale": bits(16, (lambda g: 8 * g, 4)),
        "min": bits(16, (lambda g: 8 * g + 4, 4)),
        "code": bits(256, codes2(16)),
    },
    scale_values=tuple(range(16)), min_values=tuple(range(16)), fallback="iq4_nl",
)  # fmt: skip

# A set high bit means "no minus 4": the three bits together are the value plus 4.
Q3_K = Format(
    "q3_k", 11, 256, 110, integers(3, offset=4),
    {
        "d": at(108, 2),
        "scale": bits(16, nibbles_by(8, 96), (lambda g: 8 * (104 + g % 4) + 2 * (g // 4), 2)),
        "code": bits(256, codes2(32), high1(0)),
    },
    scale_values=offset(6, 32), fallback="iq4_nl",
)  # fmt: skip

Q4_K = Format(
    "q4_k", 12, 256, 144, integers(4),
    {
        "d": at(0, 2), "dmin": at(2, 2),
        "scale": _scale6(4, own=0, shift=0),
        "min": _scale6(4, own=4, shift=4),
        "code": bits(256, codes4(16, half=32)),
    },
    scale_values=tuple(range(64)), min_values=tuple(range(64)), fallback="q5_0",
)  # fmt: skip

Q5_K = Format(
    "q5_k", 13, 256, 176, integers(5),
    {
        "d": at(0, 2), "dmin": at(2, 2),
        "scale": _scale6(4, own=0, shift=0),
        "min": _scale6(4, own=4, shift=4),
        "code": bits(256, codes4(48, half=32), high1(16)),
    },
    scale_values=tuple(range(64)), min_values=tuple(range(64)), fallback="q6_0",
)  # fmt: skip

Q6_K = Format(
    "q6_k", 14, 256, 210, integers(6, offset=32),
    {
        "d": at(208, 2),
        "scale": bits(16, codes8(192)),
        "code": bits(256, codes4(0, half=64), codes2(128)),
    },
    scale_values=signed_bytes(), fallback="q8_0",
)  # fmt: skip

FORMATS = (Q2_K, Q3_K, Q4_K, Q5_K, Q6_K)
