"""The i-quants of llama.cpp: IQ1_S, IQ1_M, IQ2_XXS, IQ2_XS, IQ2_S, IQ3_XXS, IQ3_S, IQ4_XS.

A code selects 8 (IQ3: 4) neighbouring weights from a grid. IQ2 and IQ3 grids are magnitudes with separate sign bits, and
`d * (0.5 + s) / 4` is written `d / 8 * (2 s + 1)`. IQ1 grids are -1, 0, 1, plus or minus 1/8 by the variant bit: times 8 here.
`g` is the group of one code, `b` the 32-weight sub-block. Source: llama.cpp ggml/src/ggml-common.h and ggml-quants.c.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from . import grid_tables as grids
from .base import Codebook, Format, at, bits, table
from .layout import bit, codes4, codes8, nibbles, offset, pairs
from .tables import IQ4


def _magnitudes(text: str, vec: int, entries: int, levels: tuple[int, ...]) -> Codebook:
    return Codebook(lambda: grids.grid(text, vec, levels)[None], vec, entries)


def _ternary() -> npt.NDArray[np.int8]:
    grid = 8 * grids.grid(grids.IQ1_S, 8, grids.IQ1_LEVELS)
    return np.stack([grid + 1, grid - 1])


TERNARY = Codebook(_ternary, 8, 2048, variants=2)
ODD_16 = tuple(2 * s + 1 for s in range(16))
ODD_8 = ODD_16[:8]

IQ2_XXS = Format(
    "iq2_xxs", 16, 256, 66, _magnitudes(grids.IQ2_XXS, 8, 256, grids.IQ2_LEVELS),
    {
        "d": at(0, 2),
        # per sub-block: four code bytes, then 4 x 7 sign bits and 4 scale bits
        "scale": bits(8, (lambda b: 8 * (2 + 8 * b) + 60, 4)),
        "code": bits(32, (lambda g: 8 * (2 + 8 * (g // 4) + g % 4), 8)),
        "sign": bits(32, (lambda g: 8 * (2 + 8 * (g // 4)) + 32 + 7 * (g % 4), 7)),
    },
    scale_values=ODD_16, unit=1 / 8, sign_parity=True, fallback="iq4_nl", requires_importance=True,
)  # fmt: skip

IQ2_XS = Format(
    "iq2_xs", 17, 256, 74, _magnitudes(grids.IQ2_XS, 8, 512, grids.IQ2_LEVELS),
    {
        "d": at(0, 2),
        "scale": bits(16, nibbles(66)),
        "code": bits(32, (lambda g: 8 * 2 + 16 * g, 9)),
        "sign": bits(32, (lambda g: 8 * 2 + 16 * g + 9, 7)),
    },
    scale_values=ODD_16, unit=1 / 8, sign_parity=True, fallback="iq4_nl", requires_importance=True,
)  # fmt: skip

IQ2_S = Format(
    "iq2_s", 22, 256, 82, _magnitudes(grids.IQ2_S, 8, 1024, grids.IQ2_LEVELS),
    {
        "d": at(0, 2),
        "scale": bits(16, nibbles(74)),
        "code": bits(32, codes8(2), pairs(66)),
        "sign": bits(256, bit(34)),
    },
    scale_values=ODD_16, unit=1 / 8, fallback="iq4_nl",
)  # fmt: skip

IQ3_XXS = Format(
    "iq3_xxs", 18, 256, 98, _magnitudes(grids.IQ3_XXS, 4, 256, grids.IQ3_XXS_LEVELS),
    {
        "d": at(0, 2),
        # per sub-block a 32-bit word: 4 x 7 sign bits, 4 scale bits
        "scale": bits(8, (lambda b: 8 * 66 + 32 * b + 28, 4)),
        "code": bits(64, codes8(2)),
        "sign": bits(32, (lambda g: 8 * 66 + 32 * (g // 4) + 7 * (g % 4), 7)),
    },
    scale_values=ODD_16, unit=1 / 4, sign_parity=True, fallback="iq4_nl",
)  # fmt: skip

IQ3_S = Format(
    "iq3_s", 21, 256, 110, _magnitudes(grids.IQ3_S, 4, 512, grids.IQ3_S_LEVELS),
    {
        "d": at(0, 2),
        "scale": bits(8, nibbles(106)),
        "code": bits(64, codes8(2), bit(66)),
        "sign": bits(256, bit(74)),
    },
    scale_values=ODD_16, fallback="iq4_nl",
)  # fmt: skip

IQ1_S = Format(
    "iq1_s", 19, 256, 50, TERNARY,
    {
        "d": at(0, 2),
        # per sub-block a 16-bit word: 4 x 3 high code bits, 3 scale bits, the variant
        "scale": bits(8, (lambda b: 8 * 34 + 16 * b + 12, 3)),
        "variant": bits(8, (lambda b: 8 * 34 + 16 * b + 15, 1)),
        "code": bits(32, codes8(2), (lambda g: 8 * 34 + 16 * (g // 4) + 3 * (g % 4), 3)),
    },
    scale_values=ODD_8, unit=1 / 8, fallback="iq4_nl", requires_importance=True,
)  # fmt: skip

IQ1_M = Format(
    "iq1_m", 29, 256, 56, TERNARY,
    {
        # four 16-bit words at 48: each 4 x 3 scale bits and a nibble of d
        "d": bits(1, *((lambda _, i=i: 8 * 48 + 16 * i + 12, 4) for i in range(4))),
        "scale": bits(16, (lambda g: 8 * 48 + 16 * (g // 4) + 3 * (g % 4), 3)),
        "variant": bits(32, (lambda g: 8 * 32 + 4 * g + 3, 1)),
        "code": bits(32, codes8(0), (lambda g: 8 * 32 + 4 * g, 3)),
    },
    scale_values=ODD_8, unit=1 / 8, fallback="iq4_nl",
)  # fmt: skip

IQ4_XS = Format(
    "iq4_xs", 23, 256, 136, table(IQ4),
    {
        "d": at(0, 2),
        "scale": bits(8, nibbles(4), pairs(2)),
        "code": bits(256, codes4(8, half=16)),
    },
    scale_values=offset(6, 32), fallback="iq4_nl",
)  # fmt: skip

FORMATS = (IQ1_S, IQ1_M, IQ2_XXS, IQ2_XS, IQ2_S, IQ3_XXS, IQ3_S, IQ4_XS)
