"""The search behind every encoder without minima: codes, group scales and `d`, jointly.

With its codes fixed, the error of a group is a parabola in its scale: sum w (x - s c)^2 = sxx - 2 s sxc + s^2 scc. So

1. *propose*: for a fan of trial scales (and both variants and signs) find the exact nearest codes of every group, and keep the
   parabolas with the lowest minima;
2. *share*: choose the `d` whose multiples serve the parabolas of all its groups best, no codes needed;
3. *settle*: with that `d`, try the best few (scale, variant) pairs of each group on the weights themselves, refit `d` by least
   squares, and repeat around the present choice until nothing changes or the effort is spent.

Every step compares true errors of exactly representable numbers, so the error never rises.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..formats.base import Format, float_to_bits, rounded
from .nearest import IntegerLookup, Nearest

INF = float("inf")


@dataclass(frozen=True)
class Effort:
    """How hard to search: `trials` scales per sign and variant, `keep` parabolas per group, `steps` values of `d`,
    `shortlist` pairs tried per group, `rounds` of settling. In large codebooks the entry found by a trial (or in the end) is at
    most 1 / `trial_depth` (1 / `depth`) times as far as the nearest, in practice nearly always the nearest; 1 is exact."""

    trials: int
    keep: int
    steps: int
    shortlist: int
    rounds: int
    trial_depth: float
    depth: float


@dataclass
class Units:
    """Weights in groups: `x` `[U * G, n]`, U units that share a `d` with G groups each; `importance` `[K]` by column;
    `exponent` int32 `[U]` undoes the scaling of `x`."""

    x: Tensor
    importance: Tensor
    groups: int
    exponent: Tensor

    @property
    def count(self) -> int:
        return len(self.exponent)

    @property
    def w(self) -> Tensor:
        """Error weights `[U * G, n]`."""
        return self.importance.expand(self.x.numel() // len(self.importance), -1).reshape(self.x.shape)


@dataclass
class Found:
    """The integers found: `d` (and `dmin`) bit patterns `[U]`, `scale`, `variant` (and `min`) `[U * G]`, codes `[U * G, n / vec]`,
    which weights are `negative` `[U * G, n]`, for formats with separate signs, and perhaps the `product` `[U]`, sum w x q of the weights
    and their stored values."""

    d: Tensor
    scale: Tensor
    variant: Tensor
    code: Tensor
    negative: Tensor | None = None
    dmin: Tensor | None = None
    minimum: Tensor | None = None
    product: Tensor | None = None


class ScaleGrid:
    """The integers that a stored scale (or minimum) may stand for."""

    def __init__(self, values: tuple[int, ...] | None, factor: float, device: torch.device) -> None:
        listed = np.array(values or (1,), np.int64)
        order = np.argsort(listed, kind="stable")
        self.count = len(order)
        self.sorted = torch.from_numpy((listed[order] * factor).astype(np.float32)).to(device)
        #: stored integer of each rank
        self.stored = torch.from_numpy(order.astype(np.int32)).to(device)
        self.lookup = IntegerLookup(listed[order][None], device)
        self.factor = factor
        self.largest = float(np.abs(listed).max()) * factor
        #: the largest integers, relative to the largest magnitude
        self.top = (listed[order][-4:] * factor / self.largest).astype(np.float32).tolist()

    def rank(self, ratio: Tensor) -> Tensor:
        """int32 rank of the nearest value to each ratio."""
        cell = self.lookup.cell(ratio * (2 / self.factor))
        return self.lookup.index.index_select(0, cell.reshape(-1)).view(cell.shape)

    def value(self, rank: Tensor) -> Tensor:
        return self.sorted.index_select(0, rank.reshape(-1)).view(rank.shape)


class StoredFloat:
    """`d` as it can be stored, in the scaled units of the search."""

    def __init__(self, kind: str, exponent: Tensor) -> None:
        self.kind = kind
        one = torch.ones_like(exponent, dtype=torch.float32)
        self.up, self.down = torch.ldexp(one, exponent), torch.ldexp(one, -exponent)

    def bits(self, value: Tensor) -> Tensor:
        return float_to_bits(value * self.up, self.kind)

    def round(self, value: Tensor) -> Tensor:
        return rounded(value * self.up, self.kind) * self.down


def divide(a: Tensor, b: Tensor) -> Tensor:
    """a / b, 0 where b is 0."""
    return torch.where(b == 0, 0.0, a / torch.where(b == 0, 1.0, b))


#: Useful range of trial scales by bits of code. Few levels clip large weights; many levels hardly do.
SPANS = {
    True: {2: (0.35, 1.5), 3: (0.45, 1.3), 4: (0.55, 1.2), 5: (0.7, 1.15), 6: (0.8, 1.1), 7: (0.85, 1.1), 8: (0.9, 1.05)},
    False: {5: (0.35, 2.0), 8: (0.65, 1.45), 13: (0.8, 1.2), 15: (0.95, 1.4), 16: (0.85, 1.15)},
}


def trial_ratios(fmt: Format, trials: int) -> list[float]:
    """Trial scales, relative to that of `reference`."""
    if fmt.d_kind == "e8m0":  # the trial scales are the only ones there are
        return [2.0**power for power in range(1, -9, -1)]
    spans, bits = SPANS[fmt.vec == 1], int(np.log2(fmt.codebook.entries))
    low, high = spans[max((b for b in spans if b <= bits), default=min(spans))]
    return np.linspace(low, high, trials).tolist()


def sure_trials(fmt: Format, trials: int) -> int:
    """How many of the trial scales are tried in any case; a later one only where that before it is the best so far. Powers of two below
    the fourth only serve groups whose largest weight hardly counts."""
    return 4 if fmt.d_kind == "e8m0" and trials < 64 else len(trial_ratios(fmt, trials))


def large_codebook(fmt: Format) -> bool:
    """Whether the compiled search goes column by column and sorts the codebook for each (the trellis formats)."""
    return fmt.vec >= 4 and fmt.codebook.entries >= 4096


def reference(fmt: Format) -> float:
    """The trial scale 1 makes this the largest weight of a group (single values), or the fourth root of its mean fourth power (vectors)."""
    book = fmt.codebook.values.astype(np.float64)
    return float(np.abs(book).max() if fmt.vec == 1 else (book**4).mean() ** 0.25)


def reach_ratios(grid: ScaleGrid, steps: int) -> list[float]:
    """Trial values of `d`: the largest scale of a unit becomes this multiple of the largest integer (or, without integers, of `d`)."""
    if grid.count > 1:
        # Besides a fan, those that give the largest scale exactly an integer: constant weights need it.
        return np.linspace(0.6, 1.25, steps).tolist() + grid.top
    return [1.0]


def two_signs(fmt: Format) -> bool:
    """Whether a negative scale is worth trying: not if the codebook is symmetric, `d` cannot be negative, or all groups of a block
    would have to turn together."""
    if "sign" in fmt.fields or fmt.d_kind == "e8m0" or min(fmt.scale_values or (-1,)) >= 0:
        return False
    values = np.unique(fmt.codebook.values) if fmt.vec == 1 and fmt.codebook.variants == 1 else np.ones(1)
    return not np.array_equal(values, -values[::-1])


def propose(units: Units, fmt: Format, near: Nearest, effort: Effort) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The best parabolas of each group: optimum scale, curvature, gain over zero (all `[keep, P]`) and variant."""
    x, w = units.x, units.w
    wx = w * x
    start = x.abs().amax(1) if fmt.vec == 1 else (x**4).mean(1).sqrt().sqrt()
    start = start / reference(fmt)
    powers = fmt.d_kind == "e8m0"
    if powers:
        start = StoredFloat(fmt.d_kind, units.exponent).round(start)
    ratios, sure = trial_ratios(fmt, effort.trials), sure_trials(fmt, effort.trials)
    optimum: list[Tensor] = []
    curvature: list[Tensor] = []
    gain: list[Tensor] = []
    kinds: list[int] = []

    def trial(variant: int, ratio: float, again: bool, sure: bool) -> None:
        c = near.values(x, w, start * ratio, variant)
        xc, cc = wx.mul(c).sum(1), c.square_().mul_(w).sum(1)
        best = start * ratio if powers else divide(xc, cc)
        won = best * (2 * xc - best * cc) if powers else best * xc
        if again:  # a parabola is kept once, not for every trial scale that leads to the same codes
            won = torch.where((best == optimum[-1]) & (cc == curvature[-1]), -INF, won)
        if not sure:
            won = torch.where(gain[-1] > torch.stack(gain[:-1]).amax(0), won, -INF)
        optimum.append(best)
        curvature.append(cc)
        gain.append(won)
        kinds.append(variant)

    variants = 1 if getattr(near, "merged", False) else fmt.codebook.variants
    signs = (1, -1) if two_signs(fmt) else (1,)
    for variant, sign in itertools.product(range(variants), signs):
        for i, ratio in enumerate(ratios):
            trial(variant, ratio * sign, i > 0, i < sure)
    keep = min(effort.keep, len(gain))
    top, index = torch.stack(gain, 1).topk(keep, 1)
    kind = torch.tensor(kinds, device=x.device, dtype=torch.int32)[index]
    optima, curvatures = torch.stack(optimum, 1).gather(1, index), torch.stack(curvature, 1).gather(1, index)
    return optima.T.contiguous(), curvatures.T.contiguous(), top.T.contiguous(), kind.T.contiguous()


def share(units: Units, grid: ScaleGrid, stored: StoredFloat, effort: Effort, optimum: Tensor, curvature: Tensor, gain: Tensor) -> Tensor:
    """float32 `[U]`: the storable `d` with the lowest sum over groups of the lowest parabola."""
    count, groups = units.count, units.groups

    def assess(d: Tensor) -> tuple[Tensor, Tensor]:
        """Error `[U]` of `d` (less that of zero), and the least-squares `d` for the choices it leads to."""
        each = d[:, None].expand(-1, groups).reshape(1, -1)
        multiple = grid.value(grid.rank(divide(optimum, each)))
        error = (each * multiple - optimum).square_().mul_(curvature).sub_(gain)
        error, chosen = error.min(0, keepdim=True)
        multiple, cc, best = (t.gather(0, chosen)[0] for t in (multiple, curvature, optimum))
        weight = (cc * multiple).view(count, groups)
        fit = divide((weight * best.view(count, groups)).sum(1), (weight * multiple.view(count, groups)).sum(1))
        return error.view(count, groups).sum(1), fit

    largest = optimum[0].view(count, groups)
    reach = largest.gather(1, largest.abs().argmax(1, keepdim=True))[:, 0]
    ratios = reach_ratios(grid, effort.steps)
    if grid.count == 1:
        candidates = [best * r / grid.largest for best in optimum for r in ratios]
    else:
        candidates = [reach / (grid.largest * r) for r in ratios]
        candidates += [-c for c in candidates]
    best_error = torch.full((count,), INF, dtype=torch.float32, device=reach.device)
    best_d = torch.zeros_like(best_error)
    best_fit = torch.zeros_like(best_error)

    def consider(d: Tensor) -> None:
        nonlocal best_error, best_d, best_fit
        d = stored.round(d)
        error, fit = assess(d)
        better = error < best_error
        best_error = torch.where(better, error, best_error)
        best_d = torch.where(better, d, best_d)
        best_fit = torch.where(better, fit, best_fit)

    for candidate in candidates:
        consider(candidate)
    for _ in range(3):
        consider(best_fit)
    return best_d


def search(units: Units, fmt: Format, near: Nearest, effort: Effort) -> Found:
    """Encodes `units`."""
    x, w, groups, count = units.x, units.w, units.groups, units.count
    grid = ScaleGrid(fmt.scale_values, fmt.unit * fmt.runtime_scale, x.device)
    stored = StoredFloat(fmt.d_kind, units.exponent)
    optimum, curvature, gain, kind = propose(units, fmt, near, effort)
    d = share(units, grid, stored, effort, optimum, curvature, gain)

    def spread(per_unit: Tensor) -> Tensor:
        return per_unit[:, None].expand(-1, groups).reshape(-1)

    best_error = torch.full_like(gain[0], INF)
    best_rank = torch.zeros_like(kind[0])
    best_kind = torch.zeros_like(kind[0])
    best_value = torch.zeros_like(x)
    best_code: Tensor = torch.zeros(0)

    def attempt(d: Tensor, rank: Tensor, variant: Tensor) -> None:
        nonlocal best_error, best_rank, best_kind, best_value, best_code
        s = spread(d) * grid.value(rank)
        code, value = near.codes(x, w, s, variant)
        error = torch.addcmul(x, s[:, None], value, value=-1).square_().mul_(w).sum(1)
        better = error < best_error
        if best_code.numel() == 0:
            best_code = torch.zeros_like(code)
        best_error = torch.where(better, error, best_error)
        best_rank = torch.where(better, rank, best_rank)
        best_kind = torch.where(better, variant, best_kind)
        best_value = torch.where(better[:, None], value, best_value)
        best_code = torch.where(better[:, None], code, best_code)

    # The distinct (scale, variant) pairs with the lowest parabolas.
    ratio = divide(optimum, spread(d)[None])
    rank = grid.rank(ratio)
    predicted = (spread(d) * grid.value(rank) - optimum).square_().mul_(curvature).sub_(gain)
    for _ in range(effort.shortlist):
        chosen = predicted.argmin(0, keepdim=True)
        r, v = rank.gather(0, chosen)[0], kind.gather(0, chosen)[0]
        attempt(d, r, v)
        predicted = predicted.masked_fill((rank == r) & (kind == v), INF)

    def refit() -> None:
        """Least-squares `d` for the codes and scales of now, if it lowers the error once rounded."""
        nonlocal d, best_error
        c = best_value * grid.value(best_rank)[:, None]
        wc = w * c
        xc, cc = wc.mul(x).sum(1).view(count, groups).sum(1), wc.mul_(c).sum(1).view(count, groups).sum(1)
        fit = stored.round(divide(xc, cc))
        error = torch.addcmul(x, spread(fit)[:, None], c, value=-1).square_().mul_(w).sum(1)
        better = error.view(count, groups).sum(1) < best_error.view(count, groups).sum(1)
        d = torch.where(better, fit, d)
        best_error = torch.where(spread(better), error, best_error)

    refit()
    variants = fmt.codebook.variants if "variant" in fmt.fields and fmt.variant_size > fmt.vec else 1
    for _ in range(effort.rounds):
        rank, variant = best_rank.clone(), best_kind.clone()
        attempt(d, rank, variant)
        if grid.count > 1:
            attempt(d, (rank - 1).clamp(min=0), variant)
            attempt(d, (rank + 1).clamp(max=grid.count - 1), variant)
        if variants > 1:
            attempt(d, rank, 1 - variant)
        refit()
    negative = torch.signbit(best_value) if "sign" in fmt.fields else None
    return Found(stored.bits(d), grid.stored[best_rank.long()], best_kind, best_code, negative)
