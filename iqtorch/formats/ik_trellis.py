"""The trellis formats of ik_llama.cpp: IQ1_KT, IQ2_KT, IQ3_KT, IQ4_KT.

Values are generated, not looked up: starting from `x = code + offset`, each step multiplies x by a constant modulo 2^32 and
takes the sum of its four bytes' low six bits, minus 126. One code gives 8 (IQ4_KT: 4) neighbouring values.
The whole codebook is small enough to be a table here (65536 x 8 bytes at most); kernels may generate it instead.
Sources: ik_llama.cpp ggml/src/iqk/iqk_quantize.cpp; the idea of a computed codebook is QTIP's (arXiv 2406.11235).
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from .base import Codebook, Format, bits
from .tables import IQ4

MULTIPLIER = 0xCBAC1FED
OFFSET = 4096
#: Second offset of IQ4_KT, chosen by the variant bit.
OFFSET_ALTERNATE = OFFSET + 32768


def generate(codes: int, vec: int, offset: int) -> npt.NDArray[np.int16]:
    """Values -126..126 of codes `0 .. codes - 1`: `[codes, vec]`."""
    x = np.arange(codes, dtype=np.uint64) + np.uint64(offset)
    out = np.empty((codes, vec), np.int16)
    for i in range(vec):
        x = (x * np.uint64(MULTIPLIER)) & np.uint64(0xFFFFFFFF)
        out[:, i] = sum(((x >> np.uint64(8 * b)) & np.uint64(63)).astype(np.int16) for b in range(4)) - 126
    return out


def _trellis(code_bits: int, vec: int, *offsets: int, absolute: bool = False) -> Codebook:
    def build() -> npt.NDArray[np.int8]:
        values = np.stack([generate(1 << code_bits, vec, offset) for offset in offsets])
        return (np.abs(values) if absolute else values).astype(np.int8)

    return Codebook(build, vec, 1 << code_bits, len(offsets))


# Group g = 0..31 of eight weights: sub-block g // 4, position g % 4. Groups of sub-blocks b and b+4 share a byte of `qh`.
IQ1_KT = Format(
    "iq1_kt", 158, 256, 56, _trellis(13, 8, OFFSET),
    {
        "scale": bits(8, (lambda b: 8 * b, 4)),
        "code": bits(
            32,
            (lambda g: 8 * (8 + g), 8),
            (lambda g: 8 * (40 + g % 16) + 4 * (g // 16), 4),
            (lambda g: 8 * (g // 4) + 4 + g % 4, 1),
        ),
    },
    d_kind="f32", row_header_bytes=4, scale_values=IQ4, fallback="iq4_nl",
)  # fmt: skip

IQ2_KT = Format(
    "iq2_kt", 153, 256, 68, _trellis(16, 8, OFFSET),
    {
        "scale": bits(8, (lambda b: 8 * (b % 4) + 4 * (b // 4), 4)),
        "code": bits(32, (lambda g: 8 * 4 + 16 * g, 16)),
    },
    d_kind="f32", row_header_bytes=4, scale_values=IQ4, fallback="iq4_nl", runtime_scale=1.05,
)  # fmt: skip

# Magnitudes from the generator, signs stored apart: sign of weight j is bit j // 32 of byte j % 32.
IQ3_KT = Format(
    "iq3_kt", 154, 256, 100, _trellis(16, 8, OFFSET, absolute=True),
    {
        "scale": bits(8, (lambda b: 8 * (b % 4) + 4 * (b // 4), 4)),
        "code": bits(32, (lambda g: 8 * 4 + 16 * g, 16)),
        "sign": bits(256, (lambda j: 8 * (68 + j % 32) + j // 32, 1)),
    },
    d_kind="f32", row_header_bytes=4, scale_values=tuple(range(16)), fallback="iq4_nl", runtime_scale=1.01,
)  # fmt: skip

# Group n = 0..63 of four weights. Per sub-block one u32: variant bit, 7 scale bits, then 3 high code bits for each of its 8 groups.
IQ4_KT = Format(
    "iq4_kt", 155, 256, 128, _trellis(15, 4, OFFSET, OFFSET_ALTERNATE),
    {
        "scale": bits(8, (lambda b: 32 * b + 1, 7)),
        "variant": bits(8, (lambda b: 32 * b, 1)),
        "code": bits(
            64,
            (lambda n: 8 * (32 + n), 8),
            (lambda n: 8 * (96 + n % 32) + 4 * (n // 32), 4),
            (lambda n: 32 * (n // 8) + 8 + 3 * (n % 8), 3),
        ),
    },
    d_kind="f32", row_header_bytes=4, scale_values=tuple(range(-64, 64)), fallback="iq4_nl",
)  # fmt: skip

FORMATS = (IQ1_KT, IQ2_KT, IQ3_KT, IQ4_KT)
