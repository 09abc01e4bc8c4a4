"""What error feedback knows of a layer: the second moments of its inputs, factored (see `feedback`)."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..formats.base import Format
from . import compiled

T = TypeVar("T")

#: Columns after which errors are propagated to the rest of the row, in one product; also those factored together.
BLOCK = 256


@lru_cache(maxsize=1)
def _fast_bfloat16() -> bool:
    from .. import cpu_ext

    try:
        found = cpu_ext.capabilities()
    except RuntimeError:
        return False
    return "available" in (found.get("avx512bf16"), found.get("amx"))


def factor_dtype(device: torch.device) -> torch.dtype:
    """In what `product` multiplies: bfloat16 where the CPU has instructions for it, which are several times faster."""
    return torch.bfloat16 if device.type == "cpu" and _fast_bfloat16() else torch.float32


def product(a: Tensor, b: Tensor) -> Tensor:
    """float32 `a @ b`, for corrections of weights: they are about as large as the rounding errors, so three digits are plenty."""
    dtype = factor_dtype(a.device)
    return torch.mm(a.to(dtype), b.to(dtype)).float()


def _exact_product(a: Tensor, b: Tensor) -> Tensor:
    """`a @ b.T` in full precision: by oneDNN where `@` is MKL's, which uses half the width of vectors on CPUs that are not Intel's."""
    here = (
        a.dtype == torch.float32 and a.device.type == "cpu" and torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()
    )
    if here and hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        found: Tensor = torch.ops.mkldnn._linear_pointwise(a.contiguous(), b.contiguous(), None, "none", [], "")  # strides make it crawl
        return found
    return a @ b.T


def unit_factor(form: Tensor, step: int) -> tuple[Tensor, Tensor, list[Tensor]]:
    """`L` `[K, K]`, upper triangular with unit diagonal blocks of `step` columns, and `D` `[K / step, step, step]`, such that
    form = L D L^T; and the inverses of L's diagonal blocks of about 256 columns. L takes the place of `form`. (The last block may be
    smaller, and is padded in D.)

    One such block at a time, from the last to the first, each in one product with the columns before it.
    """
    k, block = len(form), step * max(1, BLOCK // step)
    fast = form.dtype == torch.float32 and compiled.available(form.device)
    if fast and compiled.can_factor(k, step):
        blocks, inverses = compiled.unit_factor(form, step, block)
        return form.triu_(), blocks, inverses
    parts, inverses = [], []
    for start in reversed(range(0, k, block)):
        own = slice(start, min(start + block, k))
        if fast and compiled.can_factor(own.stop - start, step):
            own_blocks, (inverse,) = compiled.unit_factor(form[own, own], step, block)
        else:
            form[own, own], own_blocks = _dense_unit_factor(form[own, own], step)
            inverse = inverse_unit(form[own, own])
        parts.append(own_blocks)
        inverses.append(inverse)
        if not start:
            break
        scaled = _exact_product(form[:start, own], inverse)  # columns of L D
        columns = form[:start, own].copy_(_over_blocks(scaled, inverse_blocks(own_blocks)))
        for left in range(0, start, block):  # the upper part is enough
            right = left + block
            form[:right, left:right] -= _exact_product(scaled[:right], columns[left:right])
    return form.triu_(), torch.cat(parts[::-1]), inverses[::-1]


def inverse_unit(unit: Tensor) -> Tensor:
    """Inverse of an upper triangular matrix with ones on its diagonal: by halves, which makes products of most of it."""
    k = len(unit)
    if k <= 64:
        return torch.linalg.solve_triangular(unit, torch.eye(k, dtype=unit.dtype, device=unit.device), upper=True, unitriangular=True)
    first, second = slice(0, k // 2), slice(k // 2, None)
    found = torch.zeros_like(unit)
    found[first, first], found[second, second] = inverse_unit(unit[first, first]), inverse_unit(unit[second, second])
    found[first, second] = -(found[first, first] @ unit[first, second]) @ found[second, second]
    return found


def inverse_blocks(blocks: Tensor) -> Tensor:
    """Of matrices `[n, step, step]`."""
    return 1 / blocks if blocks.shape[1] == 1 else torch.linalg.inv(blocks)


def times_blocks(blocks: Tensor, right: Tensor) -> Tensor:
    """The block diagonal of `[K / step, step, step]` times `[K, R]`."""
    step = blocks.shape[1]
    return blocks[:, :, 0] * right if step == 1 else (blocks @ right.unflatten(0, (-1, step))).flatten(0, 1)


def _over_blocks(columns: Tensor, inverse: Tensor) -> Tensor:
    """`[R, K]` times the block diagonal of `inverse` `[K / step, step, step]`."""
    k, step = columns.shape[1], inverse.shape[1]
    if step == 1:
        return columns * inverse[:, 0, 0]
    padded = torch.nn.functional.pad(columns, (0, -k % step)).unflatten(1, (-1, step))
    return (padded.transpose(0, 1) @ inverse).transpose(0, 1).flatten(1)[:, :k]


def _dense_unit_factor(form: Tensor, step: int) -> tuple[Tensor, Tensor]:
    """L and D by one Cholesky factorisation."""
    factor = torch.linalg.cholesky(form.flip(0, 1)).flip(0, 1)
    k, missing = len(form), -len(form) % step
    if missing:
        factor = torch.block_diag(factor, torch.eye(missing, dtype=form.dtype, device=form.device))
    index = torch.arange(len(factor) // step, device=form.device)
    blocks = factor.unflatten(0, (-1, step)).unflatten(2, (-1, step))[index, :, index]
    unit = _over_blocks(factor, inverse_blocks(blocks))
    return unit[:k, :k], blocks @ blocks.mT


def reordered(form: Tensor, order: Tensor) -> Tensor:
    """float32 copy, rows and columns in the order given."""
    found = torch.empty_like(form, dtype=torch.float32)
    for i in range(0, len(form), BLOCK):  # in parts that stay in the cache
        torch.index_select(form.index_select(0, order[i : i + BLOCK]).float(), 1, order, out=found[i : i + BLOCK])
    return found


def damped(form: Tensor, order: Tensor, damping: float) -> Tensor:
    """`reordered`, with `damping` times the mean of the diagonal (1 if that is zero) added to the diagonal. No eigenvalue exceeds K
    times that mean, so float32 keeps the damped form positive definite, and can factor it."""
    found = reordered(form, order)
    mean = found.diagonal().mean()
    found.diagonal().add_(damping * torch.where(mean > 0, mean, 1.0))
    return found


class Metric:
    """Second moments, damped, and what the rounding needs of them; columns in rounding order. Serves all weights of the same
    inputs and format.

    Args:
        moments: H, `[K, K]` float32 or float64, symmetric, on the device of the weights.
        fmt: the format.
        damping: added to the diagonal, relative to its mean.
        drift: C^T, float32 `[K, K]`, if the layer is handed inputs y in place of x: mean(y (x - y)^T).
        rows: of all weights that will be rounded by this metric.
    """

    def __init__(self, moments: Tensor, fmt: Format, damping: float, drift: Tensor | None = None, rows: int = 0) -> None:
        self.importance = moments.diagonal().float().contiguous()
        self.order = rounding_order(moments.diagonal(), fmt)
        #: L `[K, K]`, upper triangular, and D `[K / vec, vec, vec]`, of the damped moments
        self.unit, self.form, self.inverse = unit_factor(damped(moments, self.order, damping), fmt.vec)
        #: L - 1 as `product` takes it
        self.narrow = self.unit.to(factor_dtype(moments.device), copy=True)
        self.narrow.diagonal().zero_()
        self.drift = drift if drift is not None and bool(drift.any()) else None
        self.rows = rows
        self._cache: dict[str, Any] = {}

    def cached(self, key: str, make: Callable[[], T]) -> T:
        """What depends on metric and format alone, made once for all rows."""
        if key not in self._cache:
            self._cache[key] = make()
        found: T = self._cache[key]
        return found

    def places(self, size: int) -> Tensor:
        """int64 `[K / size]`: where the units of `size` columns that are rounded one after the other are, in the order of the columns."""
        return self.cached(f"places {size}", lambda: (self.order[::size] // size).argsort())

    def pull(self, weight: Tensor) -> Tensor | None:
        """float32 `[K, R]`: L^T times (W' - W)^T, with W' = W (I + C H^-1): the weight that serves inputs y as W served x. None without
        drift. `weight` is `[K, R]`, in rounding order.

        C H^-1 L is C L^-T D^-1: one half of a solve with H.
        """
        if self.drift is None:
            return None
        drift, dtype = self.drift, self.narrow.dtype
        if self.rows >= len(drift):
            return product(self.cached("pull", lambda: self._half_solved(reordered(drift, self.order)).to(dtype)), weight)
        return self._half_solved(product(self.cached("drift", lambda: reordered(drift, self.order).to(dtype)), weight))

    def _half_solved(self, right: Tensor) -> Tensor:
        """D^-1 L^-1 times `right` `[K, R]`, which is overwritten."""
        solved = torch.empty_like(right, dtype=self.narrow.dtype)
        for i, inverse in reversed(list(enumerate(self.inverse))):
            start, stop = i * BLOCK, i * BLOCK + len(inverse)
            if stop < len(right):
                right[start:stop] -= product(self.narrow[start:stop, stop:], solved[stop:])
            right[start:stop] = product(inverse, right[start:stop])
            solved[start:stop] = right[start:stop]
        return times_blocks(inverse_blocks(self.form), right)


class RowFeedback:
    """Feedback from row to row: the error of a weight costs tr(E H E^T O), with `O` the curvature of the loss in the outputs. With
    O = L D L^T, what was got wrong in the rows before is added to the rows that follow, as among the columns. (YAQA, arXiv 2505.22988;
    here rows are rounded several at a time, so that within such a step no row makes up for another.)

    Args:
        curvature: `[N, N]`, symmetric, on the device of the weights.
        damping: added to the diagonal, relative to its mean.
    """

    def __init__(self, curvature: Tensor, damping: float) -> None:
        self.step = max(16, len(curvature) // 16)
        self.order = curvature.diagonal().argsort(descending=True, stable=True)
        #: `[N, N]`, L
        self.unit = unit_factor(damped(curvature, self.order, damping), self.step)[0]


def rounding_order(importance: Tensor, fmt: Format) -> Tensor:
    """Order of the columns: groups by importance, and within them the units that belong together, the most important first."""
    unit = _unit(fmt)
    index = torch.arange(len(importance), device=importance.device).view(-1, fmt.group_size // unit, unit)
    weight = importance[index].sum(-1)
    inner = weight.argsort(dim=1, descending=True, stable=True)
    index = index.gather(1, inner[..., None].expand_as(index))
    return index[weight.sum(1).argsort(dim=0, descending=True, stable=True)].flatten()


def _unit(fmt: Format) -> int:
    """Weights that must stay neighbours: those of a code, or of eight signs with a parity."""
    return max(fmt.vec, 8 if fmt.sign_parity else 1)
