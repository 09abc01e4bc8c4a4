"""Which code a step of error feedback takes: the best by the quadratic form of the step, for a given scale (see `feedback`)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from ..formats.base import Format
from .nearest import SCORE_ELEMENTS, SMALLEST_SCALE, TableNearest, nearest

if TYPE_CHECKING:
    from .feedback import Feedback
    from .metric import Metric

__all__ = ["Chooser", "GridChooser", "SignedChooser", "TableChooser", "make_chooser", "parity_words"]


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
        search = nearest(fmt, metric.order.device)
        if not isinstance(search, TableNearest):
            raise TypeError(f"{fmt.name} has no table of single values")
        self.search, self.lookup = search, search.lookup

    def enter(self, group: int, s: Tensor, kind: Tensor) -> None:
        self.twice = torch.where(s.abs() < SMALLEST_SCALE, 0.0, 2.0 / s)
        self.kind = kind.to(torch.int32)
        if self.fmt.code_parity:
            self.first_code = (kind * self.fmt.codebook.entries).to(torch.int32)
            n, words = self.fmt.group_size, self.search.words
            self.word = parity_words(self.search, self.metric.order[group * n : (group + 1) * n] % n)
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
        value = book[entry] * torch.where((x < 0) ^ (s < 0)[:, None], -1.0, 1.0)[:, None].to(book.dtype)
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


def make_chooser(fmt: Format, metric: Metric, effort: Feedback) -> Chooser:
    if fmt.vec == 1:
        return TableChooser(fmt, metric, effort)
    return (SignedChooser if "sign" in fmt.fields else GridChooser)(fmt, metric, effort)


def parity_words(search: TableNearest, places: Tensor) -> list[int]:
    """The parity word of the codes at some places of a group."""
    word_of = torch.empty(len(search.order), dtype=torch.int64, device="cpu")
    word_of[search.order.cpu()] = torch.arange(len(search.order), device="cpu") // search.words
    return word_of[places.cpu()].tolist()
