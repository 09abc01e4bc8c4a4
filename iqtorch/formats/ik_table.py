"""The non-linear formats of ik_llama.cpp: IQ2_K .. IQ6_K, IQ2_KS .. IQ5_KS, IQ4_KSS, IQ2_KL.

Every weight is `d * scale * table[variant][code]`; the `_K` formats have a float16 `d` per block and a scale per 16
weights, the others a `d` per row (row header) and a scale per 32. `j` below is the weight in the block (0..255), `g` the
group. Sources: ik_llama.cpp ggml/src/ggml-common.h (block layouts), ggml/src/iqk/iqk_quantize.cpp (to_float).
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from .base import Codebook, Format, IntArray, Wire, at, bits, table
from .layout import bit, codes2, codes4, codes8, high1, nibbles, nibbles_by, offset, pairs, signed_bytes
from .tables import IQ2, IQ2_KL_PAIRS, IQ3, IQ4, IQ5, IQ6, shifted

TABLE2 = table(IQ2, shifted(IQ2, 5))
TABLE3 = table(IQ3, shifted(IQ3, 4))
TABLE4 = table(IQ4, shifted(IQ4, 4))
TABLE5 = table(IQ5, shifted(IQ5, 2))
TABLE6 = table(IQ6, shifted(IQ6, 1))
PAIRS = Codebook(lambda: np.array(IQ2_KL_PAIRS, np.int8)[None], vec=2, entries=32)


#: Scale byte of IQ4_KS, IQ4_KSS and IQ5_KS without its lowest bit, which is the variant: odd integers, no zero.
ODD_127 = tuple(2 * v - 127 for v in range(128))

IQ2_K = Format(
    "iq2_k", 137, 256, 76, TABLE2,
    {
        "d": at(0, 2),
        "variant": bits(16, bit(2)),
        "scale": bits(16, nibbles(4)),
        "code": bits(256, codes2(12)),
    },
    scale_values=offset(4, 8), fallback="iq4_nl",
)  # fmt: skip

IQ2_KS = Format(
    "iq2_ks", 145, 256, 70, TABLE2,
    {
        "variant": bits(8, bit(0)),
        "scale": bits(8, nibbles(2), bit(1)),
        "code": bits(256, codes2(6)),
    },
    row_header_bytes=2, scale_values=offset(5, 16), fallback="iq4_nl",
)  # fmt: skip

IQ2_KL = Format(
    "iq2_kl", 157, 256, 86, PAIRS,
    {
        "scale": bits(8, nibbles_by(4, 2), pairs(0)),
        # pair p = 0..127 in the block: sub-block p // 16, position p % 16
        "code": bits(
            128,
            (lambda p: 8 * (6 + 16 * (p // 32) + p % 16) + 4 * (p // 16 % 2), 4),
            (lambda p: 8 * (70 + p % 16) + p // 16, 1),
        ),
    },
    row_header_bytes=2, scale_values=offset(6, 32), fallback="iq4_nl",
)  # fmt: skip

# The low byte of `extra` holds the fifth scale bits and the high byte the variants: the opposite of IQ2_KS.
IQ3_KS = Format(
    "iq3_ks", 156, 256, 102, TABLE3,
    {
        "scale": bits(8, nibbles_by(4, 2), bit(0)),
        "variant": bits(8, bit(1)),
        "code": bits(256, codes2(6), high1(70)),
    },
    row_header_bytes=2, scale_values=offset(5, 16), fallback="iq4_nl",
)  # fmt: skip

IQ3_K = Format(
    "iq3_k", 138, 256, 110, TABLE3,
    {
        "d": at(0, 2),
        "variant": bits(16, bit(2)),
        "scale": bits(16, nibbles(6), bit(4)),
        "code": bits(256, codes2(14), high1(78)),
    },
    # magnitude 2m+1, negative when the fifth bit is set: odd, no zero
    scale_values=tuple(2 * m + 1 for m in range(16)) + tuple(-2 * m - 1 for m in range(16)), fallback="iq4_nl",
)  # fmt: skip

IQ4_K = Format(
    "iq4_k", 139, 256, 144, TABLE4,
    {
        "d": at(0, 2),
        "variant": bits(16, bit(2)),
        "scale": bits(16, nibbles(8), pairs(4)),
        "code": bits(256, codes4(16, half=16)),
    },
    scale_values=offset(6, 32), fallback="q5_0",
)  # fmt: skip

IQ4_KS = Format(
    "iq4_ks", 144, 256, 136, TABLE4,
    {
        "scale": bits(8, (lambda g: 8 * g + 1, 7)),
        "variant": bits(8, bit(0, 8)),
        "code": bits(256, codes4(8, half=16)),
    },
    d_kind="f32", row_header_bytes=4, scale_values=ODD_127, fallback="iq4_nl",
)  # fmt: skip

IQ5_KS = Format(
    "iq5_ks", 152, 256, 168, TABLE5,
    {
        "scale": bits(8, (lambda g: 8 * g + 1, 7)),
        "variant": bits(8, bit(0, 8)),
        "code": bits(256, codes4(8, half=32), high1(136)),
    },
    d_kind="f32", row_header_bytes=4, scale_values=ODD_127, fallback="q5_0",
)  # fmt: skip

IQ5_K = Format(
    "iq5_k", 140, 256, 176, TABLE5,
    {
        "d": at(0, 2),
        "variant": bits(16, bit(2)),
        "scale": bits(16, nibbles(8), pairs(4)),
        "code": bits(256, codes4(16, half=32), high1(144)),
    },
    scale_values=offset(6, 32), fallback="q6_0",
)  # fmt: skip

IQ6_K = Format(
    "iq6_k", 141, 256, 212, TABLE6,
    {
        "d": at(0, 2),
        "variant": bits(16, bit(2)),
        "scale": bits(16, codes8(4)),
        "code": bits(256, codes4(20, half=32), codes2(148)),
    },
    scale_values=signed_bytes(), fallback="q8_0",
)  # fmt: skip


# IQ4_KSS stores 64 words of 16 bits: bit 0 carries one bit of a scale byte, the rest a Gray-coded word of four codes
# (weights 2k, 2k+16, 2k+1, 2k+17 in nibbles 0..3) whose 16 bits have even parity. Its plain bytes are
# 64 decoded words (128 bytes), then the 8 scale bytes.


def _kss_to_plain(stored: Tensor) -> Tensor:
    pairs = stored.unflatten(-1, (64, 2)).to(torch.int32)
    word = pairs[..., 0] | pairs[..., 1] << 8
    upper = word & 0xFFFE
    codes = upper ^ (upper >> 1)
    weights = 1 << torch.arange(8, device=stored.device, dtype=torch.int32)
    scale = ((word & 1).unflatten(-1, (8, 8)) * weights).sum(-1)
    code_bytes = torch.stack([codes & 255, codes >> 8], -1).flatten(-2)
    return torch.cat([code_bytes, scale], -1).to(torch.uint8)


def _kss_to_stored(plain: Tensor) -> Tensor:
    pairs = plain[..., :128].unflatten(-1, (64, 2)).to(torch.int32)
    word = pairs[..., 0] | pairs[..., 1] << 8
    for step in (1, 2, 4, 8):  # running XOR from the top bit: the inverse of the Gray step
        word = word ^ (word >> step)
    shifts = torch.arange(8, device=plain.device, dtype=torch.int32)
    scale_bits = ((plain[..., 128:].to(torch.int32)[..., None] >> shifts) & 1).flatten(-2)
    word = (word & 0xFFFE) | scale_bits
    return torch.stack([word & 255, word >> 8], -1).flatten(-2).to(torch.uint8)


def _kss_codes(j: IntArray) -> IntArray:
    i = j % 16
    return 16 * (8 * (j // 32) + i // 2) + 8 * (i % 2) + 4 * (j // 16 % 2)


IQ4_KSS = Format(
    "iq4_kss", 146, 256, 128, TABLE4,
    {
        "scale": bits(8, (lambda g: 8 * (128 + g) + 1, 7)),
        "variant": bits(8, bit(128, 8)),
        "code": bits(256, (_kss_codes, 4)),
    },
    d_kind="f32", row_header_bytes=4, scale_values=ODD_127, code_parity=4,
    wire=Wire(136, _kss_to_plain, _kss_to_stored), fallback="iq4_nl",
)  # fmt: skip

FORMATS = (IQ2_KS, IQ2_K, IQ2_KL, IQ3_KS, IQ3_K, IQ4_KSS, IQ4_KS, IQ4_K, IQ5_KS, IQ5_K, IQ6_K)
