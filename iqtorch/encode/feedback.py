"""Rounding with error feedback, for every format by one algorithm.

An output of the layer is off by `e x`, with `e` the error of one row of the weight and `x` an activation; its mean square over
the calibration text is `e H e^T`, with the second moments H = mean(x x^T). Write H = L D L^T with L unit upper triangular. Then the
error is the sum over columns j of `D_j z_j^2` with `z_j = e_j + sum over i < j of e_i L_ij`: the columns can be rounded one after
the other, each to the nearest code of its weight plus what the errors before it add. (LDLQ of arXiv 2307.13304, which is the
procedure of GPTQ, arXiv 2210.17323.)

Here the columns are taken in steps of `fmt.vec`, the weights that one code stands for. Within a step the error is the quadratic
form D_j, and the best code is exact: D_j is folded into the codebook once per step, and one matrix product with a minimum over the
entries serves all rows. Scale, minimum and variant of a group are chosen on the way: each group is rounded with several of them, and
every row keeps what cost it least.

Everything is transposed here, `[columns, rows]`, and columns are in rounding order.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import product
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..formats import get_format
from ..formats.base import Format, Parts, bits_to_float
from . import compiled
from .choose import make_chooser
from .encoder import LARGEST_FACTOR, Objective, encode
from .nearest import CELL_SEARCH_ENTRIES
from .search import ScaleGrid, StoredFloat, divide

T = TypeVar("T")

#: Columns after which errors are propagated to the rest of the row, in one product.
BLOCK = 256
#: Rows rounded at a time.
ROWS = {"cpu": 1 << 10, "gpu": 1 << 13}


@dataclass(frozen=True)
class Feedback:
    """How hard to try: `passes` over the columns, neighbouring scales (and minima) tried on each side and the relative distance
    between them, entries of a codebook with separate signs compared in full. Codebooks of thousands of entries, which fit any scale
    well and take long, get fewer scales."""

    passes: int = 2
    reach: int = 4
    stride: float = 0.03
    shortlist: int = 32

    def for_format(self, fmt: Format) -> Feedback:
        return replace(self, reach=min(self.reach, 1)) if fmt.codebook.entries >= CELL_SEARCH_ENTRIES else self


def encode_with_feedback(
    weight: Tensor,
    fmt: Format,
    metric: Metric,
    objective: Objective = "model",
    effort: Feedback | None = None,
    start: Tensor | None = None,
    rows: RowFeedback | None = None,
) -> Tensor:
    """Canonical bytes of a weight matrix, rounded with error feedback.

    Args:
        weight: float32 `[R, K]`, finite, K a multiple of the block size (and R of 4 for the `_r4` formats).
        fmt: the format.
        metric: made for this format (or the plain format of an `_r4` format) from the second moments of the layer's inputs.
        objective: as in `encode`, with the error measured by the moments.
        effort: how hard to try.
        start: canonical bytes whose scales and minima to start from; None = those of `encode`.
        rows: feedback from row to row as well, by the curvature of the loss in the layer's outputs.

    Returns:
        uint8 `[R, row_bytes]` on the device of `weight`.
    """
    if fmt.plain is not None:
        plain = get_format(fmt.plain)
        start = None if start is None else plain.pack(fmt.unpack(start))
        return fmt.pack(plain.unpack(encode_with_feedback(weight, plain, metric, objective, effort, start, rows)))
    fmt = fmt.for_encoding
    effort = (effort or Feedback()).for_format(fmt)
    if start is None:
        start = encode(weight, fmt, metric.importance, "rmse")
    out = torch.empty_like(start)
    if rows is None:
        step = ROWS["cpu" if weight.device.type == "cpu" else "gpu"]
        for i in range(0, len(weight), step):
            rounding = Rounding(weight[i : i + step].float(), start[i : i + step], fmt, metric, effort)
            rounding.run(objective)
            out[i : i + step] = rounding.blocks()
        return out
    weight = weight.float()[rows.order]
    error = torch.empty_like(weight)
    for i in range(0, len(weight), rows.step):
        part = slice(i, i + rows.step)
        index = rows.order[part]
        wanted = torch.addmm(weight[part], rows.unit[:i, part].T, error[:i]) if i else weight[part]
        rounding = Rounding(wanted, start[index], fmt, metric, effort)
        rounding.run(objective)
        out[index] = rounding.blocks()
        error[part] = weight[part] - rounding.decoded()
    return out


def unit_factor(form: Tensor, step: int) -> tuple[Tensor, Tensor]:
    """`L` `[K, K]`, upper triangular with unit diagonal blocks of `step` columns, and `D` `[K / step, step, step]`, such that
    form = L D L^T; float64 in and out. (The last block may be smaller, and is padded in D.)"""
    factor = torch.linalg.cholesky(form.flip(0, 1)).flip(0, 1)
    k, missing = len(form), -len(form) % step
    if missing:
        factor = torch.block_diag(factor, torch.eye(missing, dtype=form.dtype, device=form.device))
    columns = factor.unflatten(1, (-1, step))
    index = torch.arange(columns.shape[1], device=form.device)
    blocks = factor.unflatten(0, (-1, step)).unflatten(2, (-1, step))[index, :, index]
    inverse = torch.linalg.inv(blocks) if step > 1 else 1 / blocks
    unit = (columns.transpose(0, 1) @ inverse).transpose(0, 1).flatten(1)
    return unit[:k, :k], blocks @ blocks.mT


def damped(form: Tensor, damping: float) -> Tensor:
    """float64, with `damping` times the mean of its diagonal (1 if that is zero) added to the diagonal."""
    wide = form.to(torch.float64)
    mean = wide.diagonal().mean()
    return wide + torch.diag((damping * torch.where(mean > 0, mean, 1.0)).expand(len(wide)))


class Metric:
    """Second moments, damped, and what the rounding needs of them; columns in rounding order. Serves all weights of the same
    inputs and format.

    Args:
        moments: `[K, K]` float32 or float64, symmetric, on the device of the weights.
        fmt: the format.
        damping: added to the diagonal, relative to its mean.
    """

    def __init__(self, moments: Tensor, fmt: Format, damping: float) -> None:
        self.importance = moments.diagonal().float().contiguous()
        wide = damped(moments, damping)
        self.order = rounding_order(wide.diagonal(), fmt)
        wide = wide[self.order][:, self.order]
        unit, form = unit_factor(wide, fmt.vec)
        self.moments = wide.float()
        #: `[K, K]`, L transposed: row j is what the errors of all columns before add to column j.
        self.lower = unit.T.float().contiguous()
        #: `[K / vec, vec, vec]`: D
        self.form = form.float().contiguous()
        self._cache: dict[str, Any] = {}

    def cached(self, key: str, make: Callable[[], T]) -> T:
        """What depends on metric and format alone, made once for all rows."""
        if key not in self._cache:
            self._cache[key] = make()
        found: T = self._cache[key]
        return found

    def solve(self, right: Tensor) -> Tensor:
        """float32 `[R, K]`: `right` times the inverse of the damped moments; columns in their natural order."""
        lower, step = self.lower, self.form.shape[1]
        x = torch.linalg.solve_triangular(lower, right[:, self.order], upper=False, left=False, unitriangular=True)
        x = torch.linalg.solve(self.form, x.view(len(x), -1, step).permute(1, 2, 0)).permute(2, 0, 1).reshape(x.shape)
        x = torch.linalg.solve_triangular(lower.T, x, upper=True, left=False, unitriangular=True)
        return x[:, self.order.argsort()]


class RowFeedback:
    """Feedback from row to row: the error of a weight costs tr(E H E^T O), with `O` the curvature of the loss in the outputs. With
    O = L D L^T, what was got wrong in the rows before is added to the rows that follow, as among the columns. (YAQA, arXiv 2505.22988;
    here rows are rounded several at a time, so that within such a step no row makes up for another.)

    Args:
        curvature: `[N, N]`, symmetric, on the device of the weights.
        damping: added to the diagonal, relative to its mean.
    """

    def __init__(self, curvature: Tensor, damping: float) -> None:
        wide = damped(curvature, damping)
        self.step = max(16, len(wide) // 64)
        self.order = wide.diagonal().argsort(descending=True, stable=True)
        wide = wide[self.order][:, self.order]
        #: `[N, N]`, L
        self.unit = unit_factor(wide, self.step)[0].float()


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


def neighbours(grid: ScaleGrid, reach: int, stride: float) -> Tensor:
    """int32 `[2 reach + 1, count]`: for each rank those whose values are 0, 1, .. strides away, at least as many ranks."""
    rank = torch.arange(grid.count, device=grid.sorted.device, dtype=torch.int32)
    value = grid.value(rank)
    found = []
    for i in range(-reach, reach + 1) if grid.count > 1 else (0,):
        there = grid.rank(value * (1 + i * stride))
        away = torch.where((there - rank).abs() < abs(i), rank + torch.where(value < 0, -i, i), there)
        found.append((away if i else rank).clamp(0, grid.count - 1))
    return torch.stack(found).to(torch.int32)


class Rounding:
    """Some rows of a weight on their way: what they should be, and the integers found so far."""

    def __init__(self, weight: Tensor, blocks: Tensor, fmt: Format, metric: Metric, effort: Feedback) -> None:
        self.fmt, self.metric, self.effort = fmt, metric, effort
        rows, k = weight.shape
        device = weight.device
        self.rows, self.columns, self.n = rows, k, fmt.group_size
        order = metric.order
        self.group_order = order[:: self.n] // self.n
        per_row = "d" not in fmt.fields
        #: which `d` each group uses, in rounding order
        self.unit_of = torch.zeros_like(self.group_order) if per_row else self.group_order // (fmt.block_size // self.n)
        # As in `encode`: rows are scaled by powers of two to about 1.
        self.exponent = torch.frexp(weight.abs().amax(1)).exponent.clamp(-120, 126).to(torch.int32)
        self.x = torch.ldexp(weight, -self.exponent[:, None])[:, order].T.contiguous()
        self.stored = StoredFloat(fmt.d_kind, self.exponent)
        self.scales = ScaleGrid(fmt.scale_values, fmt.unit * fmt.runtime_scale, device)
        self.minima = ScaleGrid(fmt.min_values, fmt.runtime_scale, device) if fmt.affine else None
        # Every scale is tried with every minimum, so there are fewer of the latter.
        self.scale_near = neighbours(self.scales, effort.reach, effort.stride)
        self.min_near = neighbours(self.minima, effort.reach // 2, effort.stride) if self.minima else self.scale_near[:1, :1]
        self.kinds = fmt.codebook.variants if fmt.variant_size == self.n else 1
        parts = fmt.unpack(blocks)
        values = fmt.values(parts)[:, order].T.contiguous()

        def grouped(name: str) -> Tensor:
            if name not in parts:
                return torch.zeros((len(self.group_order), rows), dtype=torch.int32, device=device)
            return parts[name].T[self.group_order]

        def ranks(name: str, grid: ScaleGrid) -> Tensor:
            return grid.stored.argsort().to(torch.int32)[grouped(name).long()].contiguous()

        self.state = {
            "d": torch.ldexp(bits_to_float(parts["d"], fmt.d_kind), -self.exponent[:, None]).T.contiguous(),
            "scale": ranks("scale", self.scales),
            "kind": grouped("variant" if self.kinds > 1 else "").contiguous(),
            "value": values,
            "code": torch.zeros((k // fmt.vec, rows), dtype=torch.int32, device=device),
        }
        if self.minima is not None:
            self.state["dmin"] = torch.ldexp(bits_to_float(parts["dmin"], fmt.d_kind), -self.exponent[:, None]).T.contiguous()
            self.state["min"] = ranks("min", self.minima)

    # -- the passes ----------------------------------------------------------------------------------------

    def run(self, objective: Objective) -> None:
        best: dict[str, Tensor] = {}
        least = torch.full((self.rows,), float("inf"), device=self.x.device)
        for _ in range(self.effort.passes):
            cost = self.refit(self.sweep())
            better = cost < least
            least = torch.where(better, cost, least)
            best = {name: torch.where(better, now, best.get(name, now)) for name, now in self.state.items()}
            self.state = dict(best)
        if objective == "model":
            self.unshrink()

    def sweep(self) -> Tensor:
        """Rounds all columns once, with `d` (and `dmin`) as they are; the error that it leaves in each row."""
        x = self.x.clone()
        total = torch.zeros(self.rows, device=x.device)
        round_block = self._round_block_compiled if compiled.available(x.device) else self._round_block
        for start in range(0, self.columns, BLOCK):
            stop = min(start + BLOCK, self.columns)
            error = torch.empty_like(x[start:stop])
            round_block(x, start, stop, error, total)
            x[stop:].addmm_(self.metric.lower[stop:, start:stop], error)
        return total

    def _round_block_compiled(self, x: Tensor, start: int, stop: int, error: Tensor, total: Tensor) -> None:
        n, v, state = self.n, self.fmt.vec, self.state
        groups, steps = slice(start // n, stop // n), slice(start // v, stop // v)
        unit = self.unit_of[groups]
        nothing = x[:0]
        compiled.feedback(
            self.fmt,
            self.effort.shortlist,
            self.metric.order[start:stop],
            self.metric.lower[start:stop, start:stop],
            self.metric.form[steps],
            self.metric.cached(f"square {start}", lambda: compiled.squares(self.fmt, self.metric.form[steps])),
            (x[start:stop], self.x[start:stop], state["d"][unit], state["dmin"][unit] if self.minima else nothing),
            (self.scales.sorted, self.scale_near, self.minima.sorted if self.minima else nothing, self.min_near),
            (state["scale"][groups], state["min"][groups] if self.minima else state["kind"][:0], state["kind"][groups]),
            (state["code"][steps], state["value"][start:stop], error, total),
        )

    def _round_block(self, x: Tensor, start: int, stop: int, error: Tensor, total: Tensor) -> None:
        """The same in torch: the oracle, and what other devices run. `error` is written, `total` added to."""
        if not hasattr(self, "chooser"):
            self.chooser = make_chooser(self.fmt, self.metric, self.effort)
        lower, n = self.metric.lower, self.n
        for a in range(start, stop, n):
            b = a + n
            own = error[a - start : b - start]
            own.copy_(self._round_group(x[a:b], a // n, total))
            x[b:stop].addmm_(lower[b:stop, a:b], own)

    def _round_group(self, x: Tensor, group: int, total: Tensor) -> Tensor:
        """Rounds the columns `x` `[n, rows]` of a group with each candidate scale and keeps the best; returns the errors."""
        n, rows, v = self.n, self.rows, self.fmt.vec
        unit, first = int(self.unit_of[group]), group * n
        scale_rank, min_rank, kind = self._candidates(group)
        candidates = len(scale_rank)
        s = (self.state["d"][unit] * self.scales.value(scale_rank)).flatten()
        x, w = (t[:, None].expand(n, candidates, rows).reshape(n, -1) for t in (x, self.x[first : first + n]))
        if self.minima is not None:
            low = (self.state["dmin"][unit] * self.minima.value(min_rank)).flatten()
            x, w = x + low, w + low
        lower, form = self.metric.lower[first : first + n, first : first + n], self.metric.form
        error, values = torch.empty_like(x), torch.empty_like(x)
        codes = torch.empty((n // v, x.shape[1]), dtype=torch.int32, device=x.device)
        cost = torch.zeros_like(s)
        self.chooser.enter(group, s, kind.flatten())
        for j in range(0, n, v):
            step = (first + j) // v
            codes[j // v], value = self.chooser.choose(step, j, x[j : j + v])
            values[j : j + v] = value
            left = torch.addcmul(x[j : j + v], value, s, value=-1)
            cost += ((form[step] @ left) * left).sum(0)
            error[j : j + v] = torch.addcmul(w[j : j + v], value, s, value=-1)
            x[j + v :].addmm_(lower[j + v :, j : j + v], error[j : j + v])
        least, best = cost.view(candidates, rows).min(0, keepdim=True)
        total += least[0]

        def pick(t: Tensor) -> Tensor:
            return t.view(-1, candidates, rows).gather(1, best[None].expand(t.shape[0], 1, rows))[:, 0]

        self.state["value"][first : first + n] = pick(values)
        self.state["code"][first // v : (first + n) // v] = pick(codes)
        for name, ranks in (("scale", scale_rank), ("min", min_rank), ("kind", kind)):
            if name in self.state:
                self.state[name][group] = ranks.gather(0, best)[0]
        return pick(error)

    def _candidates(self, group: int) -> tuple[Tensor, Tensor, Tensor]:
        """Ranks of scale and minimum, and variants: `[candidates, rows]` each."""
        scale = list(self.scale_near[:, self.state["scale"][group].long()])
        low = list(self.min_near[:, self.state["min"][group].long()]) if self.minima is not None else [torch.zeros_like(scale[0])]
        found = list(product(range(self.kinds), scale, low))
        return (
            torch.stack([s for _, s, _ in found]),
            torch.stack([m for _, _, m in found]),
            torch.tensor([k for k, _, _ in found], device=self.x.device, dtype=torch.int32)[:, None].expand(-1, self.rows),
        )

    # -- d and dmin ----------------------------------------------------------------------------------------

    def _effective(self) -> Tensor:
        """Weights as decoded, `[K, rows]`."""
        s, low = self._group_scales()
        q = (self.state["value"].unflatten(0, (-1, self.n)) * s[:, None]).flatten(0, 1)
        return q if low is None else (q.unflatten(0, (-1, self.n)) - low[:, None]).flatten(0, 1)

    def _group_scales(self) -> tuple[Tensor, Tensor | None]:
        s = self.state["d"][self.unit_of] * self.scales.value(self.state["scale"])
        if self.minima is None:
            return s, None
        return s, self.state["dmin"][self.unit_of] * self.minima.value(self.state["min"])

    def refit(self, cost: Tensor) -> Tensor:
        """Moves each `d` (and `dmin`) to the storable optimum for the integers of now, one after the other; `cost` of each row before,
        and after."""
        error = self.x - self._effective()
        for unit, (groups, index, own, inner) in enumerate(self.metric.cached("units", self._units)):
            pull = own @ error
            direction = [self._direction("value", self.scales, "scale", groups)]
            if self.minima is not None:
                direction.append(self._direction("", self.minima, "min", groups))
            names = ("d", "dmin")[: len(direction)]
            seen = [inner @ b for b in direction]
            gradient = [(pull * b).sum(0) for b in direction]
            form = [[(a * b).sum(0) for b in direction] for a in seen]
            moves = []
            for name, move in zip(names, _solve(gradient, form), strict=True):
                old = self.state[name][unit].clone()
                self.state[name][unit] = self.stored.round(old + move)
                moves.append(self.state[name][unit] - old)
            for i, move in enumerate(moves):
                error[index] = torch.addcmul(error[index], direction[i], move, value=-1)
                cost = cost - 2 * gradient[i] * move + sum(form[i][j] * move * moves[j] for j in range(len(moves)))
        return cost

    def _units(self) -> list[tuple[Tensor, Tensor, Tensor, Tensor]]:
        """For each `d`: its groups, their columns, and the moments of these with all columns and with each other."""
        moments, found = self.metric.moments, []
        columns = torch.arange(self.columns, device=self.x.device).view(-1, self.n)
        for unit in range(len(self.state["d"])):
            groups = (self.unit_of == unit).nonzero()[:, 0]
            index = columns[groups].flatten()
            own = moments if len(index) == self.columns else moments[index]
            found.append((groups, index, own, own if own is moments else own[:, index]))
        return found

    def _direction(self, values: str, grid: ScaleGrid, ranks: str, groups: Tensor) -> Tensor:
        """How the weights of some groups change with `d` (or `dmin`)."""
        each = grid.value(self.state[ranks][groups])[:, None].expand(-1, self.n, -1)
        if not values:
            return -each.flatten(0, 1)
        return (each * self.state[values].unflatten(0, (-1, self.n))[groups]).flatten(0, 1)

    def unshrink(self) -> None:
        """As in `encode`: one factor per row, so that outputs are not too small on average; measured by the moments."""
        seen = self.metric.moments @ self.x
        kept = divide((seen * self._effective()).sum(0), (seen * self.x).sum(0))
        factor = torch.where(kept > 1 / LARGEST_FACTOR, 1 / kept, 1.0).clamp(min=1.0)
        for name in ("d", "dmin"):
            if name in self.state:
                self.state[name] = self.stored.round(self.state[name] * factor)

    def decoded(self) -> Tensor:
        """Weights as decoded, `[rows, K]` in their natural order and size."""
        return torch.ldexp(self._effective().T[:, self.metric.order.argsort()], self.exponent[:, None])

    # -- result --------------------------------------------------------------------------------------------

    def blocks(self) -> Tensor:
        fmt, rows = self.fmt, self.rows
        back = self.metric.order.argsort()
        groups = self.group_order.argsort()
        steps = (self.metric.order[:: fmt.vec] // fmt.vec).argsort()
        parts: Parts = {}
        for name in ("d", "dmin"):
            if name in self.state:
                parts[name] = self.stored.bits(self.state[name]).T
        code = self.state["code"][steps].T.to(torch.int32)
        variant = self.state["kind"][groups].T.to(torch.int32)
        if "variant" in fmt.fields and fmt.variant_size == fmt.vec:
            variant, code = code // fmt.codebook.entries, code % fmt.codebook.entries
        parts["code"] = code
        found = {"scale": self.scales.stored[self.state["scale"][groups].T], "variant": variant}
        if self.minima is not None:
            found["min"] = self.minima.stored[self.state["min"][groups].T]
        if "sign" in fmt.fields:
            found["sign"] = fmt.fold_signs(torch.signbit(self.state["value"][back].T))
        parts.update({name: t.contiguous() for name, t in found.items() if name in fmt.fields})
        return fmt.pack({name: parts[name].reshape(rows, -1) for name in parts})


def _solve(gradient: list[Tensor], form: list[list[Tensor]]) -> list[Tensor]:
    """Minimum of a quadratic in one or two variables, elementwise."""
    if len(gradient) == 1:
        return [divide(gradient[0], form[0][0])]
    (a, b), (_, c) = form
    determinant = a * c - b * b
    usable = determinant > 1e-6 * a * c
    x = torch.where(usable, divide(gradient[0] * c - gradient[1] * b, determinant), divide(gradient[0], a))
    return [x, torch.where(usable, divide(gradient[1] * a - gradient[0] * b, determinant), 0.0)]
