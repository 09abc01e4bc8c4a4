"""The formats of 32-weight blocks: Q4_0, Q4_1, Q5_0, Q5_1, Q6_0, Q8_0, IQ4_NL and MXFP4.

One `d` per block and no integer scales; `_1` formats add a stored minimum. `j` below is the weight in the block (0..31).
Sources: llama.cpp ggml/src/ggml-common.h and ggml-quants.c; Q6_0: ik_llama.cpp ggml/src/ggml-common.h.
"""

from __future__ import annotations

from .base import Format, at, bits, integers, table
from .layout import bit, codes4, codes8, signed_bytes
from .tables import IQ4, MXFP4_VALUES

Q4_0 = Format(
    "q4_0", 2, 32, 18, integers(4, offset=8),
    {"d": at(0, 2), "code": bits(32, codes4(2, half=16))},
)  # fmt: skip

# w = d * q + m: the stored m is `dmin` with the constant minimum -1.
Q4_1 = Format(
    "q4_1", 3, 32, 20, integers(4),
    {"d": at(0, 2), "dmin": at(2, 2), "code": bits(32, codes4(4, half=16))},
    min_values=(-1,),
)  # fmt: skip

Q5_0 = Format(
    "q5_0", 6, 32, 22, integers(5, offset=16),
    {"d": at(0, 2), "code": bits(32, codes4(6, half=16), bit(2))},
)  # fmt: skip

Q5_1 = Format(
    "q5_1", 7, 32, 24, integers(5),
    {"d": at(0, 2), "dmin": at(2, 2), "code": bits(32, codes4(8, half=16), bit(4))},
    min_values=(-1,),
)  # fmt: skip

Q6_0 = Format(
    "q6_0", 133, 32, 26, integers(6, offset=32),
    {
        "d": at(0, 2),
        "code": bits(32, codes4(10, half=16), (lambda j: 8 * (2 + j % 8) + 4 * (j // 8 % 2) + 2 * (j // 16), 2)),
    },
)  # fmt: skip

# ik_llama.cpp's kernels add 127 to the codes: -128 would come out as +128.
Q8_0 = Format(
    "q8_0", 8, 32, 34, table(signed_bytes()),
    {"d": at(0, 2), "code": bits(32, codes8(2))},
    unused_codes=(128,),
)  # fmt: skip

IQ4_NL = Format(
    "iq4_nl", 20, 32, 18, table(IQ4),
    {"d": at(0, 2), "code": bits(32, codes4(2, half=16))},
)  # fmt: skip

MXFP4 = Format(
    "mxfp4", 39, 32, 17, table(MXFP4_VALUES),
    {"d": at(0, 1), "code": bits(32, codes4(1, half=16))},
    d_kind="e8m0",
)  # fmt: skip

FORMATS = (Q4_0, Q4_1, Q5_0, Q5_1, Q6_0, Q8_0, IQ4_NL, MXFP4)
