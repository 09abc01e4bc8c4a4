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

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial

import torch
from torch import Tensor

from ..formats import get_format
from ..formats.base import Format, Parts, bits_to_float
from . import compiled
from .choose import make_chooser
from .encoder import LARGEST_FACTOR, Objective, Speed, encode_parts, pack
from .metric import BLOCK, Metric, RowFeedback, product, times_blocks
from .nearest import CELL_SEARCH_ENTRIES
from .search import ScaleGrid, StoredFloat, divide

#: Whether GPUs round by the Triton kernel where it can, not in torch: for whoever asks, until its tests have passed on a card.
BY_KERNEL = os.environ.get("IQTORCH_ROUNDING_KERNEL") == "1"
#: Rows rounded at a time.
ROWS = {"cpu": 1 << 10, "gpu": 1 << 13}


@dataclass(frozen=True)
class Feedback:
    """How hard to try: neighbouring scales (and minima) tried on each side and the relative distance between them, entries of a
    codebook with separate signs compared in full, and the search of the scales to start from."""

    reach: int = 5
    min_reach: int = 3
    stride: float = 0.03
    shortlist: int = 32
    start: Speed = "default"


def feedback_effort(fmt: Format, speed: Speed = "default") -> Feedback:
    """How hard to try for a format. By default rounding takes at most three times what rounding to nearest does, where that is possible:
    the larger the codebook, the longer each scale takes, and the better any scale fits. Affine formats combine scales with minima."""
    large, vectors = fmt.codebook.entries >= CELL_SEARCH_ENTRIES, fmt.vec >= 4
    reach = 1 if large else 3 if fmt.affine or "sign" in fmt.fields else 5
    if speed != "best" and vectors:
        reach = 0 if fmt.codebook.entries >= 1 << 15 else 1 if fmt.vec == 8 or large else 2
    if speed == "fast":
        reach = min(reach, 1)
    # Single values and pairs hardly depend on where the search of their scales starts, and the largest codebooks on how many entries are
    # compared with their signs.
    return Feedback(
        reach=reach,
        min_reach=min(reach, 3),
        shortlist=16 if speed != "best" and fmt.codebook.entries >= 1 << 15 else 32,
        start="default" if vectors or speed == "best" else "fast",
    )


def encode_with_feedback(
    weight: Tensor,
    fmt: Format,
    metric: Metric,
    objective: Objective = "model",
    effort: Feedback | None = None,
    rows: RowFeedback | None = None,
) -> Tensor:
    """Canonical bytes of a weight matrix, rounded with error feedback.

    Args:
        weight: float32 `[R, K]`, finite, K a multiple of the block size (and R of 4 for the `_r4` formats).
        fmt: the format.
        metric: made for this format (or the plain format of an `_r4` format) from the second moments of the layer's inputs.
        objective: as in `encode`, with the error measured by the moments.
        effort: how hard to try; None = `feedback_effort` of the format.
        rows: feedback from row to row as well, by the curvature of the loss in the layer's outputs.

    Returns:
        uint8 `[R, row_bytes]` on the device of `weight`.
    """
    if fmt.plain is not None:
        plain = get_format(fmt.plain)
        return fmt.pack(plain.unpack(encode_with_feedback(weight, plain, metric, objective, effort, rows)))
    fmt = fmt.for_encoding
    effort = effort or feedback_effort(fmt)
    out = torch.empty((len(weight), fmt.row_bytes(weight.shape[1])), dtype=torch.uint8, device=weight.device)
    if rows is None:
        step = ROWS["cpu" if weight.device.type == "cpu" else "gpu"]
        for i in range(0, len(weight), step):
            some = weight[i : i + step].float()
            rounding = Rounding(some, fmt, metric, effort)
            rounding.run(objective)
            out[i : i + step] = rounding.blocks()
        return out
    weight = weight.float()[rows.order]
    start = starting_scales(weight, fmt, metric, effort)
    left = weight.new_empty(weight.T.shape)  # L^T times the errors of the rows before
    for i in range(0, len(weight), rows.step):
        part = slice(i, i + rows.step)
        before = product(left[:, :i], rows.unit[:i, part])
        own = {name: values[part] for name, values in start.items()}
        rounding = Rounding(weight[part], fmt, metric, effort, before, own)
        rounding.run(objective)
        out[rows.order[part]] = rounding.blocks()
        left[:, part] = rounding.left() - before
    return out


def _has_kernel(fmt: Format, device: torch.device) -> bool:
    """Whether columns are rounded by a Triton kernel."""
    if device.type == "cpu" or not BY_KERNEL:
        return False
    from .. import kernels

    if kernels.supports(fmt, 1, fmt.block_size) is not None:
        return False
    from ..kernels import feedback

    return feedback.supports(fmt)


def starting_scales(weight: Tensor, fmt: Format, metric: Metric, effort: Feedback) -> Parts:
    """Scales, minima and variants of the weighted search, for each row."""
    parts = encode_parts(weight, fmt, metric.importance, "rmse", effort.start)
    return {name: values for name, values in parts.items() if name not in ("code", "sign")}


@lru_cache(maxsize=64)
def scale_grid(values: tuple[int, ...] | None, factor: float, device: torch.device) -> ScaleGrid:
    return ScaleGrid(values, factor, device)


@lru_cache(maxsize=64)
def neighbours(grid: ScaleGrid, reach: int, stride: float) -> Tensor:
    """int32 `[2 reach + 1, count]`: for each rank those whose values are 0, 1, .. strides away, at least as many ranks."""
    rank = torch.arange(grid.count, device=grid.sorted.device, dtype=torch.int32)
    value = grid.value(rank)
    found = []
    for i in range(-reach, reach + 1):
        there = grid.rank(value * (1 + i * stride))
        away = torch.where((there - rank).abs() < abs(i), rank + torch.where(value < 0, -i, i), there)
        found.append((away if i else rank).clamp(0, grid.count - 1))
    return torch.stack(found).to(torch.int32)


class Scales:
    """The scales (or minima) of the groups, and those that are tried instead: `unit * value[rank]`.

    Where groups store an integer, `unit` is what they share, and the neighbours of that integer are tried. Where each group has a
    float of its own, floats near it are tried: there is a `unit` for each rank.

    Attributes:
        unit: float32 `[1 or steps, U, rows]`: `d` (or `dmin`).
        value: float32 `[count]`, by rank.
        near: int32 `[steps, count]`: the ranks to try, for each rank.
        rank: int32 `[G, rows]`.
    """

    def __init__(self, unit: Tensor, rank: Tensor | None, grid: ScaleGrid, stored: StoredFloat, reach: int, stride: float) -> None:
        self.grid, self.stored = grid, stored
        if rank is not None:
            self.unit, self.value, self.rank = unit[None], grid.sorted, rank.contiguous()
            self.near = neighbours(grid, reach, stride)
            return
        away = torch.arange(-reach, reach + 1, dtype=torch.float32, device=unit.device)
        factors = 2.0 ** away[away.abs() <= 1] if stored.kind == "e8m0" else 1 + away * stride  # e8m0 has powers of two only
        self.unit = stored.round(unit * factors[:, None, None])
        self.value = grid.sorted.expand(len(factors)).contiguous()
        self.rank = torch.full_like(unit, len(factors) // 2, dtype=torch.int32)
        self.near = torch.arange(len(factors), device=unit.device, dtype=torch.int32)[:, None].expand(-1, len(factors)).contiguous()

    def of(self, rank: Tensor, unit: Tensor | int) -> Tensor:
        """The scales of some ranks `[.., rows]`, of groups whose `unit` is given."""
        own = self.unit[:, unit]
        return (own[0] if len(own) == 1 else own.gather(0, rank.long().view(-1, *own.shape[1:])).view(rank.shape)) * self.value[rank.long()]

    def settle(self, unit_of: Tensor) -> None:
        """Gives up the ranks that were not chosen, where each has a `unit` of its own."""
        if len(self.unit) > 1:
            chosen = self.unit[:, unit_of].gather(0, self.rank[None].long())
            self.unit = chosen[:, unit_of.argsort()]
            self.value, self.rank = self.value[:1], torch.zeros_like(self.rank)


class Rounding:
    """Some rows of a weight on their way: what they should be, and the integers found so far."""

    def __init__(
        self, weight: Tensor, fmt: Format, metric: Metric, effort: Feedback, pull: Tensor | None = None, start: Parts | None = None
    ) -> None:
        """
        Args:
            weight: float32 `[rows, K]`.
            fmt, metric, effort: as in `encode_with_feedback`.
            pull: float32 `[K, rows]`: L^T times what is added to the weight, besides what serves the inputs that the layer is handed.
            start: `starting_scales` of the weight, if they are known.
        """
        self.fmt, self.metric, self.effort = fmt, metric, effort
        rows, k = weight.shape
        device = weight.device
        self.rows, self.columns, self.n = rows, k, fmt.group_size
        order = metric.order
        self.group_order = order[:: self.n] // self.n
        per_row = "d" not in fmt.fields
        #: which `d` each group uses, in rounding order
        self.unit_of = torch.zeros_like(self.group_order) if per_row else self.group_order // (fmt.block_size // self.n)
        self.units = self.unit_of.tolist()
        # As in `encode`: rows are scaled by powers of two to about 1.
        self.exponent = torch.frexp(torch.maximum(weight.amax(1), -weight.amin(1))).exponent.clamp(-120, 126).to(torch.int32)
        self.stored = StoredFloat(fmt.d_kind, self.exponent)
        self.x = (weight * self.stored.down[:, None]).T.contiguous().index_select(0, order)
        self.narrow = self.x.to(metric.narrow.dtype)
        #: What each column should become with the errors of those before it; of those that are rounded what they are off by: z.
        self.rest = self.x.clone()
        served = metric.pull(self.narrow)
        if served is not None:
            self.rest += served
        if pull is not None:
            self.rest.addcmul_(pull, self.stored.down)
        self.kinds = fmt.codebook.variants if fmt.variant_size == self.n else 1
        parts = starting_scales(weight, fmt, metric, effort) if start is None else start
        self.scales = self._scales(parts, "d", "scale", scale_grid(fmt.scale_values, fmt.unit * fmt.runtime_scale, device), effort.reach)
        self.minima = None
        if fmt.affine:
            self.minima = self._scales(parts, "dmin", "min", scale_grid(fmt.min_values, fmt.runtime_scale, device), effort.min_reach)
        groups = (len(self.group_order), rows)
        self.kind = self._grouped(parts["variant"]).contiguous() if self.kinds > 1 else self.x.new_zeros(groups, dtype=torch.int32)
        #: `wanted`, and the factors by which scales were raised
        self.raised: tuple[Tensor, Tensor] | None = None
        self.value = torch.empty_like(self.x)
        self.code = torch.empty((k // fmt.vec, rows), dtype=torch.int32, device=device)

    def _grouped(self, part: Tensor) -> Tensor:
        """`[rows, G]` in storage order -> `[G, rows]` in rounding order."""
        return part.T[self.group_order]

    def _scales(self, parts: Parts, unit: str, rank: str, grid: ScaleGrid, reach: int) -> Scales:
        d = bits_to_float(parts[unit], self.fmt.d_kind) * self.stored.down[:, None]
        if rank not in parts:
            return Scales(d.T.contiguous(), None, grid, self.stored, reach, self.effort.stride)
        ranks = grid.stored.argsort().to(torch.int32)[self._grouped(parts[rank]).long()]
        return Scales(d.T.contiguous(), ranks, grid, self.stored, reach, self.effort.stride)

    # -- the passes ----------------------------------------------------------------------------------------

    def run(self, objective: Objective) -> None:
        # powers of two cannot be raised by a little
        wanted = self.wanted() if objective == "model" and self.stored.kind != "e8m0" else None
        self.sweep()
        for scales in self._both():
            scales.settle(self.unit_of)
        if wanted is not None:
            self.unshrink(wanted)

    def _both(self) -> list[Scales]:
        return [self.scales] if self.minima is None else [self.scales, self.minima]

    def wanted(self) -> Tensor:
        """float32 `[K, rows]`: L^T times what the weight should be."""
        found = torch.empty_like(self.rest)
        for start in range(0, self.columns, BLOCK):
            own = slice(start, start + BLOCK)
            found[own] = product(self.metric.narrow[: own.stop, own].T, self.narrow[: own.stop])
        return found.add_(self.rest)

    def sweep(self) -> None:
        """Rounds all columns."""
        metric, rest = self.metric, self.rest
        round_block = self._round_block
        if compiled.available(rest.device):
            round_block = self._round_block_compiled
        elif _has_kernel(self.fmt, rest.device):
            round_block = self._round_block_by_kernel
        errors = torch.empty_like(self.narrow)
        for start in range(0, self.columns, BLOCK):
            own, before = slice(start, start + BLOCK), slice(0, start)
            if start:
                rest[own] += product(metric.narrow[before, own].T, errors[before])
            error = torch.empty_like(rest[own])
            round_block(start, start + len(error), error)
            errors[own] = error

    def _round_block_compiled(self, start: int, stop: int, error: Tensor) -> None:
        form = self.metric.form[start // self.fmt.vec : stop // self.fmt.vec]
        square = self.metric.cached(f"square {start}", lambda: compiled.squares(self.fmt, form))
        self._round_columns(partial(compiled.feedback, shortlist=self.effort.shortlist, square=square), start, stop, error)

    def _round_block_by_kernel(self, start: int, stop: int, error: Tensor) -> None:
        from ..kernels.feedback import feedback

        self._round_columns(feedback, start, stop, error)

    def _round_columns(self, feedback: Callable[..., None], start: int, stop: int, error: Tensor) -> None:
        n, v = self.n, self.fmt.vec
        groups, steps = slice(start // n, stop // n), slice(start // v, stop // v)
        unit = self.unit_of[groups]
        feedback(
            self.fmt,
            self.metric.order[start:stop],
            self.metric.unit[start:stop, start:stop].T,
            self.metric.form[steps],
            self.x[start:stop],
            [(s.unit[:, unit], s.value, s.near, s.rank[groups]) for s in self._both()],
            (self.rest[start:stop], self.kind[groups], self.code[steps], self.value[start:stop], error),
        )

    def _round_block(self, start: int, stop: int, error: Tensor) -> None:
        """The same in torch: the oracle, and what other devices run. `error` is written."""
        if not hasattr(self, "chooser"):
            self.chooser = make_chooser(self.fmt, self.metric, self.effort)
        lower, n = self.metric.unit.T, self.n
        for a in range(start, stop, n):
            b = a + n
            own = error[a - start : b - start]
            own.copy_(self._round_group(a // n))
            self.rest[b:stop].addmm_(lower[b:stop, a:b], own)

    def _round_group(self, group: int) -> Tensor:
        """Rounds the columns of a group with each candidate scale and keeps the best; returns the errors."""
        n, rows, v = self.n, self.rows, self.fmt.vec
        unit, first = self.units[group], group * n
        scale_rank, min_rank, kind = self._candidates(group)
        candidates = len(scale_rank)
        s = self.scales.of(scale_rank, unit).flatten()
        x, w = (t[:, None].expand(n, candidates, rows).reshape(n, -1) for t in (self.rest[first : first + n], self.x[first : first + n]))
        if self.minima is not None:
            low = self.minima.of(min_rank, unit).flatten()
            x, w = x + low, w + low
        lower, form = self.metric.unit[first : first + n, first : first + n].T, self.metric.form
        error, left, values = (torch.empty_like(x) for _ in range(3))
        codes = torch.empty((n // v, x.shape[1]), dtype=torch.int32, device=x.device)
        cost = torch.zeros_like(s)
        self.chooser.enter(group, s, kind.flatten())
        for j in range(0, n, v):
            step = (first + j) // v
            codes[j // v], value = self.chooser.choose(step, j, x[j : j + v])
            values[j : j + v] = value
            left[j : j + v] = torch.addcmul(x[j : j + v], value, s, value=-1)
            cost += ((form[step] @ left[j : j + v]) * left[j : j + v]).sum(0)
            error[j : j + v] = torch.addcmul(w[j : j + v], value, s, value=-1)
            x[j + v :].addmm_(lower[j + v :, j : j + v], error[j : j + v])
        best = cost.view(candidates, rows).argmin(0, keepdim=True)

        def pick(t: Tensor) -> Tensor:
            return t.view(-1, candidates, rows).gather(1, best[None].expand(t.shape[0], 1, rows))[:, 0]

        self.rest[first : first + n] = pick(left)
        self.value[first : first + n] = pick(values)
        self.code[first // v : (first + n) // v] = pick(codes)
        self.kind[group] = kind.gather(0, best)[0]
        for scales, ranks in zip(self._both(), (scale_rank, min_rank), strict=False):
            scales.rank[group] = ranks.gather(0, best)[0]
        return pick(error)

    def _candidates(self, group: int) -> tuple[Tensor, Tensor, Tensor]:
        """Ranks of scale and minimum, and variants: `[candidates, rows]` each."""
        scale, *low = [s.near[:, s.rank[group].long()] for s in self._both()]
        minimum = low[0] if low else scale[:1]
        kinds = torch.arange(self.kinds, device=self.x.device, dtype=torch.int32)[:, None, None, None]
        shape = (self.kinds, len(scale), len(minimum), self.rows)
        each = (scale[None, :, None], minimum[None, None], kinds)
        found = [t.expand(shape).reshape(-1, self.rows) for t in each]
        return found[0], found[1], found[2]

    # -- result --------------------------------------------------------------------------------------------

    def _effective(self) -> Tensor:
        """Weights as decoded, `[K, rows]`."""
        found = self.value.unflatten(0, (-1, self.n)) * self.scales.of(self.scales.rank, self.unit_of)[:, None]
        if self.minima is not None:
            found = found - self.minima.of(self.minima.rank, self.unit_of)[:, None]
        return found.flatten(0, 1)

    def unshrink(self, wanted: Tensor) -> None:
        """As in `encode`: one factor per row, so that outputs are not too small on average; measured by the moments. With u = L^T w as
        `wanted`, and z = L^T e from the sweep, w H w = u D u and w H e = u D z."""
        seen = times_blocks(self.metric.form, wanted)
        kept = 1 - divide((seen * self.rest).sum(0), seen.mul_(wanted).sum(0))
        factor = torch.where(kept > 1 / LARGEST_FACTOR, 1 / kept, 1.0).clamp(min=1.0)
        for scales in self._both():
            scales.unit = self.stored.round(scales.unit * factor)
        self.raised = wanted, factor

    def left(self) -> Tensor:
        """float32 `[K, rows]`: L^T times the errors."""
        rest = self.rest if self.raised is None else torch.lerp(self.raised[0], self.rest, self.raised[1])
        return rest * self.stored.up

    def blocks(self) -> Tensor:
        fmt, rows = self.fmt, self.rows
        groups = self.metric.places(self.n)
        parts: Parts = {}
        for scales, name in zip(self._both(), ("d", "dmin"), strict=False):
            parts[name] = self.stored.bits(scales.unit[0]).T
        small = fmt.vec == 1 and compiled.available(self.code.device)  # what the compiled `pack` takes, and is moved sooner
        code = self.code.to(torch.uint8) if small else self.code
        code = code.index_select(0, self.metric.places(fmt.vec)).T
        variant = self.kind[groups].T
        if "variant" in fmt.fields and fmt.variant_size == fmt.vec:
            variant, code = code // fmt.codebook.entries, code % fmt.codebook.entries
        parts["code"] = code
        found = {"variant": variant}
        for scales, name in zip(self._both(), ("scale", "min"), strict=False):
            found[name] = scales.grid.stored[scales.rank[groups].T]
        if "sign" in fmt.fields:
            found["sign"] = fmt.fold_signs(torch.signbit(self.value.index_select(0, self.metric.places(1)).T))
        parts.update({name: t.contiguous() for name, t in found.items() if name in fmt.fields})
        return pack({name: parts[name].reshape(rows, -1) for name in parts}, fmt)
