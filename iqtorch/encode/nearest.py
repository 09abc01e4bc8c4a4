"""Exact nearest codes: for weights `x`, error weights `w` and a scale `s` per group, the codes that minimise sum w (x - s c)^2.

Two searches cover every codebook:

* single values (`vec` 1): the midpoints between neighbouring integers are multiples of 1/2, so `floor(2 x / s)` decides, and
  a small lookup table gives the nearest value exactly;
* codebooks of vectors: the error of every entry is a matrix product, `[w x, s w] @ [-2 c, c^2]`. Large ones (trellis formats) can
  be searched in part: in the cells of a partition that are nearest.

All take `x`, `w` as `[P, n]` (P groups of n weights) and `s` as `[P]`, on one device.
"""

from __future__ import annotations

import copy
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from ..formats.base import Format

#: Codebooks of at least this many entries may be searched by cells.
CELL_SEARCH_ENTRIES = 4096
#: Scales below this (weights are about 1) count as zero: their reciprocal could overflow.
SMALLEST_SCALE = 1e-36
#: Scores computed at a time (float32 elements): small enough to stay in a CPU cache.
SCORE_ELEMENTS = {"cpu": 1 << 20, "gpu": 1 << 26}


class IntegerLookup:
    """Nearest entry of a list of integers, exactly, for each of several lists (`[lists, entries]`)."""

    def __init__(self, lists: np.ndarray, device: torch.device) -> None:
        low, high = int(lists.min()), int(lists.max())
        self.low, self.high = 2 * low - 1.0, 2 * high + 0.0
        self.cells = 2 * (high - low) + 2
        middle = (np.arange(self.cells) + 2 * low - 1 + 0.5) / 2
        # stable argmin: among equal values the first code, whatever the platform
        index = np.abs(middle[None, :, None] - lists[:, None, :].astype(np.float64)).argmin(-1)
        value = np.take_along_axis(lists, index, 1)
        self.index = torch.from_numpy(index.reshape(-1).astype(np.int32)).to(device)
        self.value = torch.from_numpy(value.reshape(-1).astype(np.float32)).to(device)

    def cell(self, twice: Tensor, which: Tensor | int = 0) -> Tensor:
        """int32 cell of each element of `twice`, twice the number to look up (overwritten)."""
        cell = twice.clamp_(self.low, self.high).floor_().sub_(self.low).to(torch.int32)
        return cell.add_(which * self.cells) if isinstance(which, Tensor) or which else cell


class Nearest:
    """Search of one format's codebook. `variant` is an int, or a tensor `[P]`."""

    def __init__(self, fmt: Format, device: torch.device) -> None:
        self.fmt = fmt
        self.device = device

    def values(self, x: Tensor, w: Tensor, s: Tensor, variant: Tensor | int) -> Tensor:
        """Codebook values `[P, n]` of the best codes, signs applied."""
        return self.codes(x, w, s, variant)[1]

    def codes(self, x: Tensor, w: Tensor, s: Tensor, variant: Tensor | int) -> tuple[Tensor, Tensor]:
        """The best codes `[P, n / vec]` (int32, counted through the variants of `merged` formats) and their values `[P, n]`."""
        raise NotImplementedError


class TableNearest(Nearest):
    """Codebooks of single values, with an even count of ones among `code_parity` codes if the format asks for it."""

    def __init__(self, fmt: Format, device: torch.device) -> None:
        super().__init__(fmt, device)
        book = fmt.codebook.values[:, :, 0].astype(np.int64)
        self.lookup = IntegerLookup(book, device)
        if fmt.code_parity:
            odd = np.array([int(c).bit_count() & 1 for c in range(fmt.codebook.entries)], bool)
            self.order, self.words = _parity_words(fmt, device)
            self.book = torch.from_numpy(book.reshape(-1).astype(np.float32)).to(device)
            self.other = torch.from_numpy(_other_parity(book, odd, self.lookup).astype(np.int32)).to(device)
            self.odd = torch.from_numpy(odd).to(device)

    def _cells(self, x: Tensor, s: Tensor, variant: Tensor | int) -> Tensor:
        inverse = torch.where(s.abs() < SMALLEST_SCALE, 0.0, 2.0 / s)
        which = variant[:, None].to(torch.int32) if isinstance(variant, Tensor) else variant
        return self.lookup.cell(x * inverse[:, None], which)

    def values(self, x: Tensor, w: Tensor, s: Tensor, variant: Tensor | int) -> Tensor:
        if self.fmt.code_parity:
            return self.codes(x, w, s, variant)[1]
        return _take(self.lookup.value, self._cells(x, s, variant))

    def codes(self, x: Tensor, w: Tensor, s: Tensor, variant: Tensor | int) -> tuple[Tensor, Tensor]:
        cell = self._cells(x, s, variant)
        code, value = _take(self.lookup.index, cell), _take(self.lookup.value, cell)
        if not self.fmt.code_parity:
            return code, value
        # Exactly optimal: in each word of odd parity, the one code changes that costs least to change.
        other = _take(self.other, cell)
        first = variant[:, None] * self.fmt.codebook.entries if isinstance(variant, Tensor) else variant * self.fmt.codebook.entries
        other_value = _take(self.book, other + first)
        scale = s[:, None]
        cost = w * ((x - scale * other_value).square() - (x - scale * value).square())
        wrong = (_take(self.odd, code)[:, self.order].unflatten(1, (-1, self.words)).sum(-1) & 1).bool()
        cheapest = cost[:, self.order].unflatten(1, (-1, self.words)).argmin(-1)
        change = torch.zeros_like(code, dtype=torch.bool)
        position = self.order.view(-1, self.words).expand(len(code), -1, -1).gather(2, cheapest[..., None])[..., 0]
        change.scatter_(1, position, wrong)
        return torch.where(change, other, code), torch.where(change, other_value, value)


class GridNearest(Nearest):
    """Codebooks of vectors, by a full search; with separate signs the grid holds magnitudes."""

    def __init__(self, fmt: Format, device: torch.device) -> None:
        super().__init__(fmt, device)
        #: Variants that change as often as codes are part of the code here.
        self.merged = fmt.codebook.variants > 1 and fmt.variant_size == fmt.vec
        book = torch.from_numpy(fmt.codebook.values.astype(np.float32)).to(device)
        self.books = book.flatten(0, 1)[None] if self.merged else book
        self.smallest = float(np.abs(fmt.codebook.values).min())
        self.matrices = [torch.cat([-2 * b, b * b], 1).T.contiguous() for b in self.books]
        #: Scores stay in the registers of a Triton kernel.
        self.fused = fmt.vec >= 4 and _has_kernels(fmt, device)

    def codes(self, x: Tensor, w: Tensor, s: Tensor, variant: Tensor | int) -> tuple[Tensor, Tensor]:
        if isinstance(variant, Tensor) and len(self.books) > 1:  # all of them: to pick the groups of each would wait for the device
            found = [self.codes(x, w, s, v) for v in range(len(self.books))]
            index = variant.long()[None, :, None]
            code, value = (torch.stack(t).take_along_dim(index, 0)[0] for t in zip(*found, strict=True))
            return code, value
        which = 0 if isinstance(variant, Tensor) else variant
        target, negative = self._magnitudes(x, w, s)
        query = torch.cat([(w * target).unflatten(1, (-1, self.fmt.vec)), (w * s.abs()[:, None]).unflatten(1, (-1, self.fmt.vec))], -1)
        code = self._best(query.flatten(0, 1), which)
        value = self.books[which].index_select(0, code).view(x.shape)
        if negative is not None:
            value = torch.where(negative, -value, value)
        return code.view(x.shape[0], -1), value

    def _magnitudes(self, x: Tensor, w: Tensor, s: Tensor) -> tuple[Tensor, Tensor | None]:
        """What the entries should approximate, and which weights get a sign bit."""
        target = torch.where((s < 0)[:, None], -x, x)
        if "sign" not in self.fmt.fields:
            return target, None
        negative = target < 0
        target = target.abs()
        if self.fmt.sign_parity:
            # Eight signs with an even count of ones: turn the one that costs least.
            low = self.smallest * s.abs()[:, None]
            cost = (w * ((target + low).square() - (low - target).clamp(min=0).square())).unflatten(1, (-1, 8))
            cheapest = torch.zeros_like(cost, dtype=torch.bool).scatter_(2, cost.argmin(2, keepdim=True), True)
            odd = (negative.unflatten(1, (-1, 8)).sum(2, keepdim=True) & 1).bool()
            turn = (cheapest & odd).flatten(1)
            negative = negative ^ turn
            target = torch.where(turn, -target, target)
        return target, negative

    def _best(self, query: Tensor, which: int) -> Tensor:
        """int32 entry with the lowest score for each query `[Q, 2 vec]`."""
        matrix = self.matrices[which]
        if self.fused:
            from ..kernels.scores import best_entries

            return best_entries(query, matrix)
        step = max(1, SCORE_ELEMENTS["cpu" if query.device.type == "cpu" else "gpu"] // matrix.shape[1])
        found = [(part @ matrix).min(1)[1] for part in query.split(step)]
        return torch.cat(found).to(torch.int32)


class CellNearest(GridNearest):
    """Large codebooks: entries are partitioned into cells, and only the cells whose centres score best are searched.

    The queries are sorted by cell, so that each cell is one matrix product of its queries with its members.
    """

    def __init__(self, fmt: Format, device: torch.device) -> None:
        super().__init__(fmt, device)
        self.probes = 1
        self.centres, self.members, self.member_matrices = [], [], []
        for book, matrix in zip(self.books, self.matrices, strict=True):
            label, centre = _partition(book.cpu(), 2 ** round(np.log2(len(book)) / 2 + 1))
            members = [m.to(device) for m in torch.argsort(label, stable=True).split(torch.bincount(label, minlength=len(centre)).tolist())]
            spread = torch.stack([book[m].square().mean(0) if len(m) else centre[i].square() for i, m in enumerate(members)])
            self.centres.append(torch.cat([-2 * centre.to(device), spread.to(device)], 1).T.contiguous())
            self.members.append(members)
            self.member_matrices.append([matrix[:, m].contiguous() for m in members])

    def probing(self, probes: int) -> CellNearest:
        """The same search with this many cells."""
        other = copy.copy(self)
        other.probes = probes
        return other

    def _best(self, query: Tensor, which: int) -> Tensor:
        step = 1 << 16
        return torch.cat([self._best_part(part, which) for part in query.split(step)])

    def _best_part(self, query: Tensor, which: int) -> Tensor:
        centres = self.centres[which]
        probes = min(self.probes, centres.shape[1])
        step = max(1, SCORE_ELEMENTS["cpu" if query.device.type == "cpu" else "gpu"] // centres.shape[1])
        cell = torch.cat([(part @ centres).topk(probes, 1, largest=False, sorted=False)[1] for part in query.split(step)])
        cell, order = cell.flatten().sort(stable=True)
        counts = torch.bincount(cell, minlength=centres.shape[1]).tolist()
        asking = query.index_select(0, order // probes)
        score = query.new_empty(len(order))
        entry = torch.empty(len(order), dtype=torch.int64, device=query.device)
        start = 0
        for count, members, matrix in zip(counts, self.members[which], self.member_matrices[which], strict=True):
            if count:
                best, at = (asking[start : start + count] @ matrix).min(1)
                score[start : start + count] = best
                entry[start : start + count] = members[at]
                start += count
        back = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device)).view(-1, probes)
        chosen = score[back].argmin(1, keepdim=True)
        return entry[back.gather(1, chosen)[:, 0]].to(torch.int32)


def nearest(fmt: Format, device: torch.device, probes: int | None = None) -> Nearest:
    """The search for a format; its tables are built once per device. `probes`: search only so many cells of a large codebook."""
    found = _built(fmt, device, probes is not None and fmt.codebook.entries >= CELL_SEARCH_ENTRIES)
    return found.probing(probes) if isinstance(found, CellNearest) and probes else found


@lru_cache(maxsize=128)
def _built(fmt: Format, device: torch.device, cells: bool) -> Nearest:
    return (TableNearest if fmt.vec == 1 else CellNearest if cells else GridNearest)(fmt, device)


def _has_kernels(fmt: Format, device: torch.device) -> bool:
    if device.type == "cpu":
        return False
    from .. import kernels

    return kernels.supports(fmt, 1, fmt.block_size) is None


def _take(table: Tensor, index: Tensor) -> Tensor:
    return table.index_select(0, index.reshape(-1)).view(index.shape)


def _parity_words(fmt: Format, device: torch.device) -> tuple[Tensor, int]:
    """Order of the codes of one group in which neighbouring `code_parity` codes share a word."""
    start = fmt.fields["code"].runs[0].start
    order = start[: fmt.group_size].argsort(kind="stable")
    return torch.from_numpy(order).to(device), fmt.code_parity


def _other_parity(book: np.ndarray, odd: np.ndarray, lookup: IntegerLookup) -> np.ndarray:
    """For each cell of `lookup`, the nearest code whose count of ones has the other parity."""
    middle = (np.arange(lookup.cells) + lookup.low + 0.5) / 2
    distance = np.abs(middle[None, :, None] - book[:, None, :])
    best = lookup.index.cpu().numpy().reshape(len(book), -1)
    return np.where(odd[best][:, :, None] == odd[None, None, :], np.inf, distance).argmin(-1).reshape(-1)


def _partition(book: Tensor, cells: int, rounds: int = 6) -> tuple[Tensor, Tensor]:
    """k-means with a fixed start: cell of each entry, and the centres."""
    centre = book[:: len(book) // cells][:cells].clone()
    label = torch.zeros(len(book), dtype=torch.int64, device="cpu")
    for _ in range(rounds):
        bias = centre.square().sum(1)
        label = torch.cat([(bias - 2 * (part @ centre.T)).argmin(1) for part in book.split(1 << 12)])
        count = torch.bincount(label, minlength=cells)
        total = torch.zeros_like(centre).index_add_(0, label, book)
        centre = torch.where((count > 0)[:, None], total / count.clamp(min=1)[:, None], centre)
    return label, centre
