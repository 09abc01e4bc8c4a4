"""What `torch.utils.flop_counter.FlopCounterMode` counts for our operators: as for products with plain weights, two per weight and row."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from typing import Any

import torch
from torch.utils.flop_counter import register_flop_formula

from . import ops
from .errors import KernelUnavailableError

Shape = Sequence[int]


def _linear(x: Shape, data: Shape, format: int, rows: int, *rest: Any, **kwargs: Any) -> int:
    return 2 * prod(x) * rows


def _linear_many(x: Shape, data: list[Shape], formats: list[int], rows: list[int], *rest: Any, **kwargs: Any) -> int:
    return 2 * prod(x) * sum(rows)


def _linear_transposed(g: Shape, data: Shape, format: int, k: int, **kwargs: Any) -> int:
    return 2 * prod(g) * k


def _grouped_linear(x: Shape, data: Shape, offsets: Shape, format: int, rows: int, *rest: Any, **kwargs: Any) -> int:
    return 2 * prod(x) * rows


def _routed(x: Shape, data: Shape, ids: Shape, format: int, rows: int, *rest: Any, **kwargs: Any) -> int:
    return 2 * prod(ids) * x[-1] * rows


def _routed_weighted(x: Shape, data: Shape, ids: Shape, weights: Shape, format: int, rows: int, *rest: Any, **kwargs: Any) -> int:
    return 2 * prod(ids) * x[-1] * rows


#: Lookups and decoding count as nothing, as PyTorch's do.
FORMULAS: dict[str, Callable[..., int]] = {
    "linear": _linear,
    "linear_many": _linear_many,
    "linear_transposed": _linear_transposed,
    "grouped_linear": _grouped_linear,
    "routed_linear": _routed,
    "routed_gated": _routed,
    "routed_weighted": _routed_weighted,
}


def register() -> None:
    """Registers the formula of every operator that exists here."""
    for backend, namespace in (("torch", "iqtorch"), ("cpu", "iqtorch_cpu"), ("triton", "iqtorch_triton")):
        try:
            ops.get_backend(backend)
        except KernelUnavailableError:
            continue
        for name, formula in FORMULAS.items():
            if hasattr(getattr(torch.ops, namespace), name):
                register_flop_formula(getattr(getattr(torch.ops, namespace), name))(formula)


register()
