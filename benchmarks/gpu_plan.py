"""Sizes of a run of benchmarks/gpu.py, and of its rehearsal."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import Any

import torch
from gpu_model import TINY, Shape

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Plan:
    """Sizes of a run. `checked`: rows and K of the correctness part; `experts`: number, top, inner, hidden."""

    device: torch.device = field(default_factory=lambda: torch.device("cuda"))
    tokens: tuple[int, ...] = (1, 2, 3, 4, 7, 8, 9, 16, 17, 33, 64, 65, 128, 129, 512, 1000, 4096)
    timed: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
    checked: tuple[tuple[int, int], ...] = ((257, 1024), (8192, 8192))
    large_tokens: tuple[int, ...] = (1, 2, 16, 64, 129, 512)
    dtypes: tuple[torch.dtype, ...] = DTYPES
    exact: tuple[torch.dtype, ...] = DTYPES
    shapes: tuple[tuple[int, int], ...] = ((8192, 8192), (4096, 4096), (14336, 4096), (4096, 14336))
    copy_bytes: int = 1 << 30
    experts: tuple[int, int, int, int] = (128, 8, 768, 2048)
    expert_tokens: tuple[int, ...] = (1, 64, 4096)
    routes: int = 32
    model: Shape = field(default_factory=Shape)
    prompt: int = 2048
    pasts: tuple[int, ...] = (128, 2048)
    workers: int = min(12, os.cpu_count() or 1)
    tiles: int = 0
    compile_model: dict[str, Any] = field(default_factory=dict)
    compile_decode: dict[str, Any] = field(default_factory=lambda: {"mode": "reduce-overhead"})
    quick: tuple[str, ...] = ("iq2_kl", "iq4_ks", "iq2_kt", "iq4_kt", "iq4_k", "q4_k")
    first_tokens: tuple[int, ...] = (1, 2, 16, 512, 2048)


#: On the CPU in the interpreter (which is slow, and cannot round to bfloat16, hence `exact`): runs every line, measures nothing.
REHEARSAL = Plan(
    device=torch.device("cpu"), tokens=(1, 5), timed=(1, 16), checked=((9, 128), (5, 64)), large_tokens=(1,), workers=2,
    tiles=1, first_tokens=(1,), exact=(torch.float32, torch.float16),
    shapes=((16, 64),), copy_bytes=1 << 12, experts=(3, 2, 32, 64), expert_tokens=(1, 3), routes=1, model=TINY, prompt=3, pasts=(2,),
    compile_model={"backend": "eager"}, compile_decode={"backend": "eager"}, quick=("iq4_nl",),
)  # fmt: skip
