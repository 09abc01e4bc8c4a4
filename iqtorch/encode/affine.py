"""The search for formats with minima, w = s c - o: as `search`, with two numbers per group instead of one.

With its codes fixed the error of a group is a quadratic form in the scale `s` and the offset `o`; `d` and `dmin` are shared,
chosen and refitted together.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..formats.base import Format
from .nearest import Nearest
from .search import INF, Effort, Found, ScaleGrid, StoredFloat, Units, divide

#: Trial ranges relative to (largest - smallest weight) by bits of code, and trial offsets relative to -(smallest weight).
SPANS = {2: (0.5, 1.25), 3: (0.6, 1.15), 4: (0.7, 1.1), 5: (0.8, 1.08)}
OFFSETS = {2: (0.5, 0.7, 0.85, 1.0, 1.1), 3: (0.6, 0.8, 0.9, 1.0), 4: (0.75, 0.9, 1.0, 1.05), 5: (0.85, 0.95, 1.0)}


def _bits(fmt: Format) -> int:
    """Of a code, as far as the tables above go."""
    return min(max(int(np.log2(fmt.codebook.entries)), min(SPANS)), max(SPANS))


def trial_ratios(fmt: Format, trials: int) -> list[float]:
    low, high = SPANS[_bits(fmt)]
    return np.linspace(low, high, trials).tolist()


def offset_ratios(fmt: Format) -> tuple[float, ...]:
    return OFFSETS[_bits(fmt)]


def scale_ratios(grid: ScaleGrid, steps: int) -> list[float]:
    """Trial values of `d`: the largest scale of a unit becomes this multiple of the largest integer."""
    return [1.0] if grid.count == 1 else np.linspace(0.7, 1.2, steps // 2).tolist()


def minimum_ratios(grid: ScaleGrid, steps: int) -> list[float]:
    """The same for `dmin`; the constant minimum -1 of `q4_1` turns the sign."""
    return [-1.0] if grid.count == 1 else np.linspace(0.8, 1.15, steps // 3).tolist()


def kept_forms(effort: Effort) -> int:
    return max(3, effort.keep // 2)


@dataclass
class Form:
    """Error as a function of scale and offset: sxx - 2 s sxc + 2 o sx + s^2 scc - 2 s o sc + o^2 sw."""

    sxx: Tensor
    sx: Tensor
    sw: Tensor
    sxc: Tensor
    sc: Tensor
    scc: Tensor

    def error(self, s: Tensor, o: Tensor) -> Tensor:
        return self.sxx + s * (s * self.scc - 2 * self.sxc - 2 * o * self.sc) + o * (2 * self.sx + o * self.sw)

    def optimum(self, positive: bool) -> tuple[Tensor, Tensor]:
        """The best scale and offset; with `positive`, of the offsets that are not negative."""
        s = divide(self.sw * self.sxc - self.sx * self.sc, self.sw * self.scc - self.sc * self.sc)
        o = divide(s * self.sc - self.sx, self.sw)
        if positive:
            s = torch.where(o < 0, divide(self.sxc, self.scc), s)
            o = o.clamp(min=0)
        return s, o

    def best_offset(self, s: Tensor) -> Tensor:
        return divide(s * self.sc - self.sx, self.sw)

    def pick(self, index: Tensor) -> Form:
        return Form(self.sxx, self.sx, self.sw, *(t.gather(0, index) for t in (self.sxc, self.sc, self.scc)))


def search_affine(units: Units, fmt: Format, near: Nearest, effort: Effort) -> Found:
    """Encodes `units`."""
    x, w, groups, count = units.x, units.w, units.groups, units.count
    scales = ScaleGrid(fmt.scale_values, fmt.unit * fmt.runtime_scale, x.device)
    minima = ScaleGrid(fmt.min_values, fmt.runtime_scale, x.device)
    stored = StoredFloat(fmt.d_kind, units.exponent)
    positive = min(fmt.min_values or (1,)) >= 0
    wx = w * x
    fixed = (wx.mul(x).sum(1), wx.sum(1), w.sum(1))

    def form(c: Tensor) -> Form:
        wc = w * c
        return Form(*fixed, wc.mul(x).sum(1), wc.sum(1), wc.mul_(c).sum(1))

    # propose
    low, high = x.amin(1), x.amax(1)
    if positive:
        low = low.clamp(max=0)
    lowest = float(fmt.codebook.values.min())
    span = float(fmt.codebook.values.max()) - lowest
    found: list[tuple[Tensor, ...]] = []
    for offset_ratio in offset_ratios(fmt):
        for ratio in trial_ratios(fmt, effort.trials):
            s = (high - low) * (ratio / span)
            o = low * -offset_ratio
            if lowest:
                o = o + s * lowest
            q = form(near.values(x + o[:, None], w, s, 0))
            found.append((q.error(*q.optimum(positive)), q.sxc, q.sc, q.scc))
    keep = min(kept_forms(effort), len(found))
    errors, index = torch.stack([f[0] for f in found]).topk(keep, 0, largest=False)
    kept = Form(*fixed, *(torch.stack([f[i] for f in found]).gather(0, index) for i in (1, 2, 3)))

    def spread(per_unit: Tensor) -> Tensor:
        return per_unit[:, None].expand(-1, groups).reshape(-1)

    def shared_fit(q: Form, multiple: Tensor, minimum: Tensor) -> tuple[Tensor, Tensor]:
        """Least-squares `d` and `dmin` `[U]` for given integers."""
        terms = (multiple * q.sxc, minimum * q.sx, multiple * multiple * q.scc, multiple * minimum * q.sc, minimum * minimum * q.sw)
        xc, xm, cc, cm, mm = (t.view(count, groups).sum(1) for t in terms)
        determinant = cc * mm - cm * cm
        usable = determinant > 1e-6 * cc * mm
        d = torch.where(usable, divide(xc * mm - xm * cm, determinant), divide(xc, cc))
        return d, torch.where(usable, divide(xc * cm - xm * cc, determinant), torch.where(cc == 0, divide(-xm, mm), 0.0))

    # share
    best_s, best_o = kept.optimum(positive)
    first = torch.argmin(errors, 0, keepdim=True)
    reach_s = best_s.gather(0, first)[0].view(count, groups).amax(1)
    reach_o = best_o.gather(0, first)[0].view(count, groups)
    reach_o = reach_o.gather(1, reach_o.abs().argmax(1, keepdim=True))[:, 0]
    total = torch.full((count,), INF, dtype=torch.float32, device=x.device)
    d, dmin, fit_d, fit_dmin = (torch.zeros_like(total) for _ in range(4))

    def consider(d_try: Tensor, dmin_try: Tensor) -> None:
        nonlocal total, d, dmin, fit_d, fit_dmin
        d_try, dmin_try = stored.round(d_try), stored.round(dmin_try)
        each_d, each_m = spread(d_try)[None], spread(dmin_try)[None]
        multiple = scales.value(scales.rank(divide(best_s, each_d)))
        minimum = minima.value(minima.rank(divide(kept.best_offset(each_d * multiple), each_m)))
        error, chosen = kept.error(each_d * multiple, each_m * minimum).min(0, keepdim=True)
        fit = shared_fit(kept.pick(chosen), multiple.gather(0, chosen), minimum.gather(0, chosen))
        error = error.view(count, groups).sum(1)
        better = error < total
        total = torch.where(better, error, total)
        d, dmin = torch.where(better, d_try, d), torch.where(better, dmin_try, dmin)
        fit_d, fit_dmin = torch.where(better, fit[0], fit_d), torch.where(better, fit[1], fit_dmin)

    for ratio_s in scale_ratios(scales, effort.steps):
        for ratio_o in minimum_ratios(minima, effort.steps):
            consider(reach_s / (scales.largest * ratio_s), reach_o / (minima.largest * ratio_o))
    for _ in range(3):
        consider(fit_d, fit_dmin)

    # settle
    best_error = torch.full_like(x[:, 0], INF)
    rank_s, rank_m = (torch.zeros_like(best_error, dtype=torch.int32) for _ in range(2))
    best_value = torch.zeros_like(x)
    best_code = torch.zeros_like(x, dtype=torch.int32)

    def attempt(rs: Tensor, rm: Tensor) -> None:
        nonlocal best_error, rank_s, rank_m, best_value, best_code
        s = spread(d) * scales.value(rs)
        target = x + (spread(dmin) * minima.value(rm))[:, None]
        code, value = near.codes(target, w, s, 0)
        error = target.addcmul_(s[:, None], value, value=-1).square_().mul_(w).sum(1)
        better = error < best_error
        best_error = torch.where(better, error, best_error)
        rank_s, rank_m = torch.where(better, rs, rank_s), torch.where(better, rm, rank_m)
        best_value = torch.where(better[:, None], value, best_value)
        best_code = torch.where(better[:, None], code, best_code)

    def refit() -> None:
        nonlocal d, dmin, best_error
        multiple, minimum = scales.value(rank_s), minima.value(rank_m)
        fits = [stored.round(f) for f in shared_fit(form(best_value), multiple, minimum)]
        s, o = spread(fits[0]) * multiple, spread(fits[1]) * minimum
        error = (x + o[:, None]).addcmul_(s[:, None], best_value, value=-1).square_().mul_(w).sum(1)
        better = error.view(count, groups).sum(1) < best_error.view(count, groups).sum(1)
        d, dmin = torch.where(better, fits[0], d), torch.where(better, fits[1], dmin)
        best_error = torch.where(spread(better), error, best_error)

    each_d, each_m = spread(d)[None], spread(dmin)[None]
    rs = scales.rank(divide(best_s, each_d))
    rm = minima.rank(divide(kept.best_offset(each_d * scales.value(rs)), each_m))
    predicted = kept.error(each_d * scales.value(rs), each_m * minima.value(rm))
    for _ in range(min(effort.shortlist, keep)):
        chosen = predicted.argmin(0, keepdim=True)
        attempt(rs.gather(0, chosen)[0], rm.gather(0, chosen)[0])
        predicted = predicted.masked_fill((rs == rs.gather(0, chosen)) & (rm == rm.gather(0, chosen)), INF)
    refit()
    for _ in range(effort.rounds):
        s_now, m_now = rank_s.clone(), rank_m.clone()
        for ds in (0, -1, 1) if scales.count > 1 else (0,):
            for dm in (0, -1, 1) if minima.count > 1 else (0,):
                attempt((s_now + ds).clamp(0, scales.count - 1), (m_now + dm).clamp(0, minima.count - 1))
        refit()
    return Found(
        d=stored.bits(d),
        scale=scales.stored[rank_s.long()],
        variant=torch.zeros_like(rank_s),
        code=best_code,
        dmin=stored.bits(dmin),
        minimum=minima.stored[rank_m.long()],
    )
