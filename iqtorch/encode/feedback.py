"""Rounding with error feedback, for every format by one algorithm.

An output of the layer is off by `e x`, with `e` the error of one row of the weight and `x` an activation; its mean square over
the calibration text is `e H e^T`, with the second moments H = mean(x x^T). With H^-1 = U^T U, U upper triangular, that equals
`|e U^-1|^2`: the columns can be rounded one after the other, and what column i got wrong is corrected in the columns after it
by row i of U. (The procedure of GPTQ, arXiv 2210.17323, which is LDLQ of arXiv 2307.13304.)

Here the columns are taken in steps of `fmt.vec`, the weights that one code stands for. Within a step the error is the quadratic
form A = (U_b^T U_b)^-1 of the step's diagonal block, and the best code is exact: A is folded into the codebook once per step,
and one matrix product with a minimum over the entries serves all rows. Scale, minimum and variant of a group are chosen on the
way: each group is rounded with several of them, and every row keeps what cost it least.

Everything is transposed here, `[columns, rows]`, and columns are in rounding order.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product

import numpy as np
import torch
from torch import Tensor

from ..formats import get_format
from ..formats.base import Format, Parts, bits_to_float
from .encoder import LARGEST_FACTOR, Objective, encode
from .nearest import SCORE_ELEMENTS, SMALLEST_SCALE, TableNearest, nearest
from .search import ScaleGrid, StoredFloat, divide

#: Columns after which errors are propagated to the rest of the row, in one product.
BLOCK = 256
#: Rows rounded at a time.
ROWS = {"cpu": 1 << 10, "gpu": 1 << 13}


@dataclass(frozen=True)
class Feedback:
    """How hard to try: `passes` over the columns, neighbouring scales (and minima) tried on each side and the relative distance
    between them, entries of a codebook with separate signs compared in full."""

    passes: int = 1
    reach: int = 4
    stride: float = 0.03
    shortlist: int = 32


def encode_with_feedback(
    weight: Tensor,
    fmt: Format,
    metric: Metric,
    objective: Objective = "model",
    effort: Feedback | None = None,
    start: Tensor | None = None,
) -> Tensor:
    """Canonical bytes of a weight matrix, rounded with error feedback.

    Args:
        weight: float32 `[R, K]`, finite, K a multiple of the block size (and R of 4 for the `_r4` formats).
        fmt: the format.
        metric: made for this format (or the plain format of an `_r4` format) from the second moments of the layer's inputs.
        objective: as in `encode`, with the error measured by the moments.
        effort: how hard to try.
        start: canonical bytes whose scales and minima to start from; None = those of `encode`.

    Returns:
        uint8 `[R, row_bytes]` on the device of `weight`.
    """
    if fmt.plain is not None:
        plain = get_format(fmt.plain)
        start = None if start is None else plain.pack(fmt.unpack(start))
        return fmt.pack(plain.unpack(encode_with_feedback(weight, plain, metric, objective, effort, start)))
    fmt = fmt.for_encoding
    effort = effort or Feedback()
    if start is None:
        start = encode(weight, fmt, metric.importance, "rmse")
    step = ROWS["cpu" if weight.device.type == "cpu" else "gpu"]
    out = torch.empty_like(start)
    for i in range(0, len(weight), step):
        rounding = Rounding(weight[i : i + step].float(), start[i : i + step], fmt, metric, effort)
        rounding.run(objective)
        out[i : i + step] = rounding.blocks()
    return out


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
        wide = moments.to(torch.float64)
        mean = wide.diagonal().mean()
        wide = wide + torch.eye(len(wide), device=wide.device, dtype=wide.dtype) * (damping * torch.where(mean > 0, mean, 1.0))
        self.order = rounding_order(wide.diagonal(), fmt)
        wide = wide[self.order][:, self.order]
        upper = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(wide)), upper=True)
        v = fmt.vec
        inverse = torch.linalg.inv(torch.stack([upper[i : i + v, i : i + v] for i in range(0, len(upper), v)]))
        self.moments = wide.float()
        #: `[K, K]`, transposed: row i is what the errors of all columns before contribute to column i.
        self.lower = upper.T.float().contiguous()
        #: `[K / vec, vec, vec]`: what turns the error of a step into what is fed back (transposed), and the form of the step.
        self.inverse = inverse.mT.float().contiguous()
        self.form = (inverse @ inverse.mT).float()


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
        self.chooser = _chooser(fmt, metric, effort)
        parts = fmt.unpack(blocks)
        values = fmt.values(parts)[:, order].T.contiguous()

        def grouped(name: str) -> Tensor:
            if name not in parts:
                return torch.zeros((len(self.group_order), rows), dtype=torch.int64, device=device)
            return parts[name].long().T[self.group_order]

        self.state = {
            "d": torch.ldexp(bits_to_float(parts["d"], fmt.d_kind), -self.exponent[:, None]).T.contiguous(),
            "scale": self.scales.stored.argsort()[grouped("scale")],
            "kind": grouped("variant") if fmt.variant_size == self.n else grouped(""),
            "value": values,
            "code": torch.zeros((k // fmt.vec, rows), dtype=torch.int64, device=device),
        }
        if self.minima is not None:
            self.state["dmin"] = torch.ldexp(bits_to_float(parts["dmin"], fmt.d_kind), -self.exponent[:, None]).T.contiguous()
            self.state["min"] = self.minima.stored.argsort()[grouped("min")]

    # -- the passes ----------------------------------------------------------------------------------------

    def run(self, objective: Objective) -> None:
        best: dict[str, Tensor] = {}
        least = torch.full((self.rows,), float("inf"), device=self.x.device)
        for _ in range(self.effort.passes):
            self.sweep()
            cost = self.refit()
            better = cost < least
            least = torch.where(better, cost, least)
            best = {name: torch.where(better, now, best.get(name, now)) for name, now in self.state.items()}
            self.state = dict(best)
        if objective == "model":
            self.unshrink()

    def sweep(self) -> None:
        """Rounds all columns once, with `d` (and `dmin`) as they are."""
        x = self.x.clone()
        lower, n = self.metric.lower, self.n
        for start in range(0, self.columns, BLOCK):
            stop = min(start + BLOCK, self.columns)
            for a in range(start, stop, n):
                b = a + n
                fed = self._round_group(x[a:b], a // n)
                x[a:b] = fed  # from here on these columns hold what is fed back
                x[b:stop].addmm_(lower[b:stop, a:b], fed, alpha=-1)
            x[stop:].addmm_(lower[stop:, start:stop], x[start:stop], alpha=-1)

    def _round_group(self, x: Tensor, group: int) -> Tensor:
        """Rounds the columns `x` `[n, rows]` of a group with each candidate scale, keeps the best; returns what is fed back."""
        n, rows, v = self.n, self.rows, self.fmt.vec
        unit = int(self.unit_of[group])
        scale_rank, min_rank, kind = self._candidates(group, unit)
        candidates = len(scale_rank)
        s = (self.state["d"][unit] * self.scales.value(scale_rank)).flatten()
        x = x[:, None].expand(n, candidates, rows).reshape(n, -1)
        if self.minima is not None:
            x = x + (self.state["dmin"][unit] * self.minima.value(min_rank)).flatten()
        first = group * n
        lower = self.metric.lower[first : first + n, first : first + n]
        fed, values = torch.empty_like(x), torch.empty_like(x)
        codes = torch.empty((n // v, x.shape[1]), dtype=torch.int64, device=x.device)
        self.chooser.enter(group, s, kind.flatten())
        for j in range(0, n, v):
            step = (first + j) // v
            codes[j // v], value = self.chooser.choose(step, j, x[j : j + v])
            values[j : j + v] = value
            error = torch.addcmul(x[j : j + v], value, s, value=-1)
            fed[j : j + v] = self.metric.inverse[step] @ error if v > 1 else error * self.metric.inverse[step, 0, 0]
            x[j + v :].addmm_(lower[j + v :, j : j + v], fed[j : j + v], alpha=-1)
        best = fed.square().sum(0).view(candidates, rows).argmin(0, keepdim=True)

        def pick(t: Tensor) -> Tensor:
            return t.view(-1, candidates, rows).gather(1, best[None].expand(t.shape[0], 1, rows))[:, 0]

        self.state["value"][first : first + n] = pick(values)
        self.state["code"][first // v : (first + n) // v] = pick(codes)
        for name, ranks in (("scale", scale_rank), ("min", min_rank), ("kind", kind)):
            if name in self.state:
                self.state[name][group] = ranks.gather(0, best)[0]
        return pick(fed)

    def _candidates(self, group: int, unit: int) -> tuple[Tensor, Tensor, Tensor]:
        """Ranks of scale and minimum, and variants: `[candidates, rows]` each."""
        reach = self.effort.reach
        scale_steps = range(-reach, reach + 1) if self.scales.count > 1 else (0,)
        # Every scale is tried with every minimum, so there are fewer of the latter.
        min_steps = range(-(reach // 2), reach // 2 + 1) if self.minima is not None and self.minima.count > 1 else (0,)
        kinds = range(self.fmt.codebook.variants) if self.fmt.variant_size == self.n else (0,)
        scale = [self._neighbour(self.scales, self.state["scale"][group], i) for i in scale_steps]
        low = [torch.zeros_like(scale[0])]
        if self.minima is not None:
            low = [self._neighbour(self.minima, self.state["min"][group], i) for i in min_steps]
        found = list(product(kinds, scale, low))
        return (
            torch.stack([s for _, s, _ in found]),
            torch.stack([m for _, _, m in found]),
            torch.tensor([k for k, _, _ in found], device=self.x.device)[:, None].expand(-1, self.rows),
        )

    def _neighbour(self, grid: ScaleGrid, rank: Tensor, i: int) -> Tensor:
        """The rank `i` strides away, at least `i` ranks."""
        if i == 0:
            return rank
        value = grid.value(rank)
        there = grid.rank(value * (1 + i * self.effort.stride)).long()
        away = torch.where((there - rank).abs() < abs(i), rank + torch.where(value < 0, -i, i), there)
        return away.clamp(0, grid.count - 1)

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

    def refit(self) -> Tensor:
        """Moves each `d` (and `dmin`) to the storable optimum for the integers of now, one after the other; cost of each row."""
        moments, n = self.metric.moments, self.n
        error = self.x - self._effective()
        pull = moments @ error
        columns = torch.arange(self.columns, device=self.x.device).view(-1, n)
        for unit in range(len(self.state["d"])):
            groups = (self.unit_of == unit).nonzero()[:, 0]
            index = columns[groups].flatten()
            direction = [self._direction("value", self.scales, "scale", groups)]
            if self.minima is not None:
                direction.append(self._direction("", self.minima, "min", groups))
            names = ("d", "dmin")[: len(direction)]
            seen = [moments[:, index] @ b for b in direction]
            gradient = [(pull[index] * b).sum(0) for b in direction]
            moves = _solve(gradient, [[(a[index] * b).sum(0) for b in direction] for a in seen])
            for name, move, b, hb in zip(names, moves, direction, seen, strict=True):
                old = self.state[name][unit].clone()
                new = self.stored.round(old + move)
                self.state[name][unit] = new
                pull.addcmul_(hb, new - old, value=-1)
                error[index] = torch.addcmul(error[index], b, new - old, value=-1)
        return (error * pull).sum(0)

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
            negative = torch.signbit(self.state["value"][back].T).to(torch.int32)
            if fmt.sign_parity:
                shifts = torch.arange(7, device=negative.device, dtype=torch.int32)
                negative = (negative.unflatten(1, (-1, 8))[..., :7] << shifts).sum(-1, dtype=torch.int32)
            found["sign"] = negative
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


# -- the best code of a step -------------------------------------------------------------------------------


class Chooser:
    """Finds the codes of a step. `enter` comes first for each group, then `choose` for each of its steps in order."""

    def __init__(self, fmt: Format, metric: Metric, effort: Feedback) -> None:
        self.fmt, self.metric, self.effort = fmt, metric, effort

    def enter(self, group: int, s: Tensor, kind: Tensor) -> None:
        """Scales `[P]` and variants `[P]` of what follows."""
        raise NotImplementedError

    def choose(self, step: int, j: int, x: Tensor) -> tuple[Tensor, Tensor]:
        """Codes `[P]` and values `[vec, P]` for the wanted weights `x` `[vec, P]`, at column `j` of the group."""
        raise NotImplementedError


class TableChooser(Chooser):
    """Single values: the nearest one."""

    def __init__(self, fmt: Format, metric: Metric, effort: Feedback) -> None:
        super().__init__(fmt, metric, effort)
        search = nearest(fmt, metric.order.device, 1)
        if not isinstance(search, TableNearest):
            raise TypeError(f"{fmt.name} has no table of single values")
        self.search, self.lookup = search, search.lookup

    def enter(self, group: int, s: Tensor, kind: Tensor) -> None:
        self.twice = torch.where(s.abs() < SMALLEST_SCALE, 0.0, 2.0 / s)
        self.kind = kind.to(torch.int32)
        if self.fmt.code_parity:
            self.first_code = (kind * self.fmt.codebook.entries).to(torch.int32)
            n, words = self.fmt.group_size, self.search.words
            word_of = torch.empty(n, dtype=torch.int64)
            word_of[self.search.order.cpu()] = torch.arange(n) // words
            place = self.metric.order[group * n : (group + 1) * n].cpu() % n
            self.word = word_of[place].tolist()
            self.last = {w: j for j, w in enumerate(self.word)}
            self.odd = s.new_zeros((n // words, len(s)), dtype=torch.bool)

    def choose(self, step: int, j: int, x: Tensor) -> tuple[Tensor, Tensor]:
        cell = self.lookup.cell(x[0] * self.twice, self.kind)
        code, value = self.lookup.index.index_select(0, cell), self.lookup.value.index_select(0, cell)
        if self.fmt.code_parity:
            word = self.word[j]
            odd = self.odd[word] ^ self.search.odd.index_select(0, code)
            if self.last[word] == j:  # the last of its word makes the parity even
                other = self.search.other.index_select(0, cell)
                code = torch.where(odd, other, code)
                value = torch.where(odd, self.search.book.index_select(0, other + self.first_code), value)
            self.odd[word] = odd
        return code, value[None]


class GridChooser(Chooser):
    """Vectors, by the quadratic form of the step."""

    def __init__(self, fmt: Format, metric: Metric, effort: Feedback) -> None:
        super().__init__(fmt, metric, effort)
        book = torch.from_numpy(fmt.codebook.values.astype(np.float32)).to(metric.order.device)
        self.books = book.flatten(0, 1)[None] if fmt.variant_size == fmt.vec else book

    def enter(self, group: int, s: Tensor, kind: Tensor) -> None:
        self.s = s
        # Variants come one after the other (see `_candidates`).
        self.share = len(s) // (len(self.books) if self.fmt.variant_size == self.fmt.group_size else 1)

    def choose(self, step: int, j: int, x: Tensor) -> tuple[Tensor, Tensor]:
        form = self.metric.form[step]
        found = [
            self._best(step, j, part, s, form, book)
            for part, s, book in zip(x.T.split(self.share), self.s.split(self.share), self.books, strict=True)
        ]
        return torch.cat([code for code, _ in found]), torch.cat([value for _, value in found]).T

    def _best(self, step: int, j: int, x: Tensor, s: Tensor, form: Tensor, book: Tensor) -> tuple[Tensor, Tensor]:
        folded = book @ form
        matrix = torch.cat([-2 * folded, (folded * book).sum(1, keepdim=True)], 1).T
        query = torch.cat([torch.where((s < 0)[:, None], -x, x), s.abs()[:, None]], 1)
        rows = max(1, SCORE_ELEMENTS["cpu" if x.device.type == "cpu" else "gpu"] // len(book))
        code = torch.cat([(part @ matrix).min(1)[1] for part in query.split(rows)])
        return code, book[code]


class SignedChooser(GridChooser):
    """Magnitudes and separate signs: a shortlist by the diagonal of the form, then each with its best signs by the whole form."""

    def enter(self, group: int, s: Tensor, kind: Tensor) -> None:
        super().enter(group, s, kind)
        self.odd = s.new_zeros(len(s), dtype=torch.bool)

    def _best(self, step: int, j: int, x: Tensor, s: Tensor, form: Tensor, book: Tensor) -> tuple[Tensor, Tensor]:
        rows = max(1, SCORE_ELEMENTS["cpu" if x.device.type == "cpu" else "gpu"] // len(book))
        found = [self._part(j, *part, form, book) for part in zip(x.split(rows), s.split(rows), self.odd.split(rows), strict=True)]
        code, value = (torch.cat(t) for t in zip(*found, strict=True))
        return code, value

    def _part(self, j: int, x: Tensor, s: Tensor, odd: Tensor, form: Tensor, book: Tensor) -> tuple[Tensor, Tensor]:
        weight = form.diagonal()
        matrix = torch.cat([-2 * book * weight, (book * book) @ weight[:, None]], 1).T
        scores = torch.cat([x.abs(), s.abs()[:, None]], 1) @ matrix
        # The best of each slice of the codebook: nearly as good as the best of all, and much faster to find.
        slices = min(self.effort.shortlist, len(book))
        width = len(book) // slices
        entry = scores[:, : slices * width].unflatten(1, (slices, width)).min(2)[1] + torch.arange(slices, device=x.device) * width
        value = book[entry] * torch.where((x < 0) ^ (s < 0)[:, None], -1.0, 1.0)[:, None]
        scale = s[:, None, None]
        error = x[:, None] - scale * value
        for i in range(self.fmt.vec):  # turn each sign that is better turned
            gain = self._turn(error, scale[..., 0] * value[..., i], form, i)
            self._apply(error, value, scale[..., 0], i, gain < 0)
        if self.fmt.sign_parity:
            wrong = odd[:, None] ^ (torch.signbit(value).sum(2) & 1).bool()
            if (j + self.fmt.vec) % 8 == 0:
                gains = torch.stack([self._turn(error, scale[..., 0] * value[..., i], form, i) for i in range(self.fmt.vec)], -1)
                cheapest = gains.argmin(-1)
                for i in range(self.fmt.vec):
                    self._apply(error, value, scale[..., 0], i, wrong & (cheapest == i))
        best = ((error @ form) * error).sum(-1).argmin(1, keepdim=True)
        value = value.gather(1, best[..., None].expand(-1, 1, self.fmt.vec))[:, 0]
        odd.logical_xor_((torch.signbit(value).sum(1) & 1).bool())
        if (j + self.fmt.vec) % 8 == 0:
            odd.zero_()
        return entry.gather(1, best)[:, 0], value

    @staticmethod
    def _turn(error: Tensor, weight: Tensor, form: Tensor, i: int) -> Tensor:
        """Change of the cost if weight `i` changes its sign."""
        return 4 * weight * (error @ form[:, i] + weight * form[i, i])

    @staticmethod
    def _apply(error: Tensor, value: Tensor, scale: Tensor, i: int, turn: Tensor) -> None:
        error[..., i] += torch.where(turn, 2 * scale * value[..., i], 0.0)
        value[..., i] = torch.where(turn, -value[..., i], value[..., i])


def _chooser(fmt: Format, metric: Metric, effort: Feedback) -> Chooser:
    if fmt.vec == 1:
        return TableChooser(fmt, metric, effort)
    return (SignedChooser if "sign" in fmt.fields else GridChooser)(fmt, metric, effort)
