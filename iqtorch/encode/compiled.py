"""The same search in C++ (`iqtorch/cpu_ext/csrc/encode.inl`), many times faster; the versions in torch are its oracle.

Every number and table of a format is prepared here, so that the C++ side knows no format: two lists of scalars and two
concatenated arrays of tables, in the order in which `Reader` of encode_binding.cpp takes them.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from ..formats import get_format
from ..formats.base import Field, Format, Parts
from ..host import on_host
from . import affine, search
from .choose import parity_words
from .nearest import GridNearest, IntegerLookup, TableNearest, nearest
from .search import Effort, Found, ScaleGrid, Units

SIGNS = {"none": 0, "free": 1, "even": 2}
#: Parts into which boxes divide a coordinate, at the finest.
QUANTILES = 16
#: Room for the parts of codebooks of vectors (csrc/encode.h).
MOST_QUARTERS, MOST_HALVES = 32, 192
MOST_POSITIONS, MOST_BOX_ENTRIES = 8, 1 << 16
#: Cells of codebooks of vectors of four, entries of a tile (csrc/feedback.h), and entries from which on not all are compared in float.
CELLS, TILE, SEARCHED_WHOLE = 16, 16, 2048
#: Codebooks of single values with more than two, and at most 2 ** this many, are searched in registers.
LARGEST_TREE = 5
NOWHERE = 1e6
FLOAT_KINDS = {"f16": 0, "f32": 1, "e8m0": 2}


def available(device: torch.device) -> bool:
    """Whether the compiled search can run on this device."""
    return device.type == "cpu" and _loaded()


@lru_cache(maxsize=1)
def _loaded() -> bool:
    """Raises KernelUnavailableError: `IQTORCH_ISA` asks for an instruction set that this CPU lacks."""
    from .. import cpu_ext

    return cpu_ext.supports(get_format("q8_0"), 1, 32) is None


@dataclass(frozen=True)
class ValueTable:
    """A codebook of single values as csrc/encode_values.inl takes it.

    Attributes:
        bits: levels of the search tree; 0: all integers from `low` to `high`.
        tree: float32 `[bits + 2, 32]` (see `_search_tree`); empty if there is none.
        shift: float32 `[variants]`, added to the values of variant 0.
        code: int32 `[high - low + 1]`: code of each value of variant 0, less `low`.
    """

    bits: int
    low: float
    high: float
    tree: Tensor
    shift: Tensor
    code: Tensor


@lru_cache(maxsize=64)
@on_host
def value_table(fmt: Format) -> ValueTable:
    """Of a format with single values."""
    book = fmt.codebook.values[:, :, 0].astype(np.int64)
    values, first = np.unique(book[0], return_index=True)
    bits = 0 if (np.diff(values) == 1).all() else int(np.ceil(np.log2(len(values))))
    codes = np.zeros(values[-1] - values[0] + 1, np.int32)
    codes[values - values[0]] = first
    return ValueTable(
        bits,
        float(values[0]),
        float(values[-1]),
        _search_tree(values, first, bits) if 1 < bits <= LARGEST_TREE else torch.zeros(0, dtype=torch.float32),
        torch.from_numpy((book - book[0])[:, 0].astype(np.float32)),
        torch.from_numpy(codes),
    )


class _Tables:
    """Scalars and tables in the order of the C++ reader; a table is its offset, or -1 for none."""

    def __init__(self) -> None:
        self.ints: list[int] = []
        self.floats: list[float] = []
        self.int_tables: list[Tensor] = []
        self.float_tables: list[Tensor] = []
        self.sizes = [0, 0]

    def add(self, values: Tensor | list[float] | None, kind: torch.dtype) -> None:
        if values is None:
            self.ints.append(-1)
            return
        table = torch.as_tensor(values, dtype=kind).reshape(-1)
        which = kind.is_floating_point
        self.ints.append(self.sizes[which])
        padding = -len(table) % 16
        (self.float_tables if which else self.int_tables).append(torch.nn.functional.pad(table, (0, padding)))
        self.sizes[which] += len(table) + padding

    def floats_table(self, values: Tensor | list[float] | None) -> None:
        self.add(values, torch.float32)

    def ints_table(self, values: Tensor | None) -> None:
        self.add(values, torch.int32)

    def lookup(self, lookup: IntegerLookup | None) -> None:
        self.ints.append(lookup.cells if lookup else 0)
        self.ints_table(lookup.index if lookup else None)
        self.floats_table(lookup.value if lookup else None)
        self.floats += [lookup.low, lookup.high] if lookup else [0.0, 0.0]

    def grid(self, grid: ScaleGrid) -> None:
        self.lookup(grid.lookup)
        self.ints.append(grid.count)
        self.floats_table(grid.sorted)
        self.ints_table(grid.stored)
        self.floats += [grid.factor, grid.largest]

    def single_values(self, fmt: Format | None) -> None:
        """`ValueTable` of a codebook of single values."""
        table = value_table(fmt) if fmt else None
        self.ints.append(table.bits if table else 0)
        self.floats_table(table.tree if table and len(table.tree) else None)
        self.floats_table(table.shift if table else None)
        # Codes that count up, perhaps through 255 to 0, need no table: only the value whose code is 0.
        first = table.low - int(table.code[0]) if table else 0.0
        counted = table is None or bool(((torch.arange(len(table.code)) + int(table.low - first) & 255) == table.code).all())
        self.ints_table(None if table is None or counted else table.code)
        self.floats += [table.low, table.high, first] if table else [0.0, 0.0, 0.0]

    def halves(self, values: np.ndarray | None) -> None:
        """`HalfTables` of a codebook int8 `[variants, entries, vec]`."""
        if values is None:
            self.ints += [-1] * 6
            return
        variants, entries, vec = values.shape
        count = np.zeros((variants, 16), np.int32)
        quarters = np.zeros((variants, 4, MOST_QUARTERS, vec // 4), np.float32)
        parts = np.zeros((variants, 2, MOST_HALVES, 2), np.int32)
        first = np.zeros((variants, MOST_HALVES + 16), np.int32)
        second, entry = (np.zeros((variants, entries + 4 * MOST_HALVES), np.int32) for _ in range(2))
        for v, book in enumerate(values):
            found = [np.unique(part, axis=0, return_inverse=True) for part in np.split(book, 4, axis=1)]
            pairs = [np.stack([found[2 * h][1].ravel(), found[2 * h + 1][1].ravel()], 1) for h in range(2)]
            halves = [np.unique(pair, axis=0, return_inverse=True) for pair in pairs]
            count[v, :6] = [len(f[0]) for f in found + halves]
            for k, (part, _) in enumerate(found):
                quarters[v, k, : len(part)] = part
            for h, (pair, _) in enumerate(halves):
                parts[v, h, : len(pair)] = pair
            own = np.split(np.argsort(halves[0][1].ravel(), kind="stable"), np.cumsum(np.bincount(halves[0][1].ravel()))[:-1])
            own = [np.pad(codes, (0, -len(codes) % 4), mode="edge") for codes in own]
            first[v, 1 : len(own) + 1] = np.cumsum([len(codes) for codes in own])
            entry[v, : first[v, len(own)]] = np.concatenate(own)
            second[v] = 32 * halves[1][1].ravel()[entry[v]]
        self.ints_table(torch.from_numpy(count))
        self.floats_table(torch.from_numpy(quarters))
        for table in (parts, first, second, entry):
            self.ints_table(torch.from_numpy(table))

    def boxes(self, values: np.ndarray | None) -> None:
        """`BoxTables` of a codebook int8 `[variants, entries, vec]`: bytes, quantiles, and their least and largest values."""
        if values is None:
            self.ints += [-1, -1, -1, -1]
            return
        entries, vec = values.shape[1:]
        cuts = np.sort(values, 1)[:, entries * np.arange(1, QUANTILES) // QUANTILES]  # [variants, 15, vec]
        quantile = (values[:, :, None, :] >= cuts[:, None]).sum(2)
        member = quantile[:, :, None, :] == np.arange(QUANTILES)[:, None]
        wide = values[:, :, None, :].astype(np.float32)
        self.ints_table(torch.from_numpy((values.view(np.uint8) ^ 128).reshape(-1, 4).copy()).view(torch.int32))
        self.ints_table(torch.from_numpy((quantile << (4 * np.arange(vec))).sum(-1).astype(np.uint32).view(np.int32)))
        for of, nothing in ((np.min, NOWHERE), (np.max, -NOWHERE)):
            self.floats_table(torch.from_numpy(of(np.where(member, wide, nothing), axis=1).swapaxes(1, 2).copy()))

    def counted(self, values: list[float]) -> None:
        self.ints.append(len(values))
        self.floats_table(values)

    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        empty = torch.zeros(16, dtype=torch.float32)
        return (
            torch.tensor(self.ints, dtype=torch.int32),
            torch.tensor(self.floats, dtype=torch.float32),
            torch.cat([*self.int_tables, empty.int()]),
            torch.cat([*self.float_tables, empty]),
        )


def _search_tree(values: np.ndarray, codes: np.ndarray, bits: int) -> Tensor:
    """float32 `[bits + 2, 32]`: thresholds by level, values, and their codes, at the index whose bits are the turns taken, first turn
    lowest."""
    tree = np.full((bits + 2, 32), np.inf, np.float32)
    tree[bits:] = 0
    padded, padded_codes = (np.pad(a, (0, (1 << bits) - len(values)), mode="edge") for a in (values, codes))
    middle = np.where(np.diff(padded) > 0, (padded[1:] + padded[:-1]) / 2, np.inf)
    for level in range(bits + 1):
        for way in range(1 << level):
            place = sum((way >> i & 1) << (bits - 1 - i) for i in range(level))  # of the first value below this node
            if level < bits:
                tree[level, way] = middle[place + (1 << (bits - 1 - level)) - 1]
            else:
                tree[level:, way] = padded[place], padded_codes[place]
    return torch.from_numpy(tree)


@lru_cache(maxsize=256)
def supported(fmt: Format) -> bool:
    """Whether the compiled search can encode this format: its lanes want variants that differ by a shift, evenly spaced scales and, beside
    minima, codes of all integers; codebooks of vectors must fit its memory (csrc/encode.h)."""
    if fmt.group_size % 16 or fmt.codebook.variants > 2:
        return False
    if fmt.vec > 1:
        return not fmt.affine and _room_for_vectors(fmt)
    if fmt.affine and value_table(fmt).bits:
        return False
    book = fmt.codebook.values.astype(np.int64)
    scales = [np.unique(np.diff(np.sort(v))) for v in (fmt.scale_values, fmt.min_values) if v is not None and len(v) > 1]
    return bool((np.ptp(book - book[:1], axis=1) == 0).all()) and all(len(steps) == 1 for steps in scales) and fmt.group_size <= 32


def _room_for_vectors(fmt: Format) -> bool:
    if fmt.vec not in (4, 8):
        return fmt.vec == 2
    if search.large_codebook(fmt):
        return fmt.group_size // fmt.vec <= MOST_POSITIONS and fmt.codebook.entries * fmt.codebook.variants <= MOST_BOX_ENTRIES
    halves = [half for book in fmt.codebook.values for half in np.split(book, 2, axis=1)]
    quarters = [quarter for half in halves for quarter in np.split(half, 2, axis=1)]
    return all(len(np.unique(part, axis=0)) <= most for parts, most in ((halves, MOST_HALVES), (quarters, MOST_QUARTERS)) for part in parts)


@lru_cache(maxsize=256)
@on_host
def _prepared(fmt: Format, groups: int, effort: Effort) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    near = nearest(fmt, torch.device("cpu"))
    scales = ScaleGrid(fmt.scale_values, fmt.unit * fmt.runtime_scale, near.device)
    minima = ScaleGrid(fmt.min_values, fmt.runtime_scale, near.device)
    merged = isinstance(near, GridNearest) and near.merged
    variants = 1 if merged else fmt.codebook.variants
    entries = fmt.codebook.entries * fmt.codebook.variants // variants
    boxes = search.large_codebook(fmt)
    table = near if isinstance(near, TableNearest) else None
    parity = table if fmt.code_parity else None
    signs = "none" if "sign" not in fmt.fields else "even" if fmt.sign_parity else "free"
    t = _Tables()
    t.ints += [fmt.group_size, groups, fmt.vec, entries, variants]
    t.ints += [fmt.code_parity, SIGNS[signs], FLOAT_KINDS[fmt.d_kind], fmt.affine, search.two_signs(fmt), min(fmt.min_values or (1,)) < 0]
    t.ints += [
        affine.kept_forms(effort) if fmt.affine else effort.keep,
        effort.shortlist if effort.rounds or fmt.vec > 1 else 0,
        effort.rounds,
        int(np.log2(entries) / 2 + 2) if boxes else 0,
        search.sure_trials(fmt, effort.trials) if not fmt.affine else 0,
    ]
    t.floats += [search.reference(fmt), float(np.abs(fmt.codebook.values).min()), effort.trial_depth, effort.depth]
    t.lookup(table.lookup if table else None)
    t.single_values(fmt if table else None)
    t.floats_table(torch.from_numpy(fmt.codebook.values.copy()))
    t.ints_table(parity.other if parity else None)
    t.ints_table(parity.odd if parity else None)
    t.ints_table(parity.order if parity else None)
    t.halves(fmt.codebook.values.reshape(variants, entries, fmt.vec) if fmt.vec >= 4 and not boxes else None)
    t.boxes(fmt.codebook.values.reshape(variants, entries, fmt.vec) if boxes else None)
    t.grid(scales)
    t.grid(minima)
    if fmt.affine:
        t.counted(affine.trial_ratios(fmt, effort.trials))
        t.counted(list(affine.offset_ratios(fmt)))
        t.counted(affine.scale_ratios(scales, effort.steps))
        t.counted(affine.minimum_ratios(minima, effort.steps))
    else:
        t.counted(search.trial_ratios(fmt, effort.trials))
        t.counted([])
        t.counted(search.reach_ratios(scales, effort.steps))
        t.counted([])
    return t.tensors()


@on_host
def run(units: Units, fmt: Format, effort: Effort, products: bool) -> Found:
    """`search.search` or `affine.search_affine`, compiled; with `Found.product`, if that is wanted."""
    count, groups = units.count, units.groups
    n = units.x.shape[1]
    heads = torch.empty((2, count), dtype=torch.int32)
    shared = torch.zeros((3, count * groups), dtype=torch.int32)
    codes = torch.empty((count * groups, n // fmt.vec), dtype=torch.uint8 if fmt.vec == 1 else torch.int32)
    negative = torch.empty((count * groups, n) if "sign" in fmt.fields else (0,), dtype=torch.uint8)
    product = torch.empty(count if products else 0, dtype=torch.float32)
    tables = _prepared(fmt, groups, effort)
    torch.ops.iqtorch_cpu.encode(
        units.x.contiguous(), units.importance.contiguous(), units.exponent.contiguous(), *tables, heads, shared, codes, negative, product
    )
    return Found(
        d=heads[0],
        scale=shared[0],
        variant=shared[2],
        code=codes,
        negative=negative if "sign" in fmt.fields else None,
        dmin=heads[1] if fmt.affine else None,
        minimum=shared[1] if fmt.affine else None,
        product=product if products else None,
    )


@on_host
def pack(parts: Parts, fmt: Format) -> Tensor:
    """`Format.pack` of a plain format, compiled."""
    rows, codes = parts["code"].shape
    blocks = codes * fmt.vec // fmt.block_size
    header, block_bytes = (0, fmt.wire.plain_bytes) if fmt.wire else (fmt.row_header_bytes, fmt.block_bytes)
    out = torch.zeros((rows, header + blocks * block_bytes), dtype=torch.uint8)
    head = parts["d"].to(torch.int32).flatten().view(torch.uint8).view(rows, -1)[:, : fmt.row_header_bytes]  # d first, little-endian
    for name, values in parts.items():
        if name in fmt.fields:
            plan = _plan(fmt.fields[name])
            wide = values if values.dtype == torch.uint8 else values.to(torch.int32)
            torch.ops.iqtorch_cpu.write_field(wide.contiguous(), plan, header, fmt.fields[name].count, block_bytes, out)
    if fmt.wire:
        body = fmt.wire.to_stored(out.view(rows, blocks, block_bytes)).flatten(1)
        return torch.cat([head, body], dim=1)
    out[:, :header] = head
    return out


@lru_cache(maxsize=256)
@on_host
def _plan(field: Field) -> Tensor:
    """int32 `[n, 6]`: for each stretch of bits its byte, its element, shifts right and left, and its mask; and for how many bytes and
    elements on the same holds."""
    terms: list[list[int]] = []
    low = 0
    for run in field.runs:
        for element, start in enumerate(run.start.tolist()):
            bit = start
            while bit < start + run.width:
                count = min(8 - bit % 8, start + run.width - bit)
                terms.append([bit // 8, element, low + bit - start, bit % 8, (1 << count) - 1])
                bit += count
        low += run.width
    runs: list[list[int]] = []
    for byte, element, *same in sorted(terms, key=lambda term: (term[2:], term[0])):
        if runs and runs[-1][2:5] == same and (byte, element) == (runs[-1][0] + runs[-1][5], runs[-1][1] + runs[-1][5]):
            runs[-1][5] += 1
        else:
            runs.append([byte, element, *same, 1])
    return torch.tensor(runs, dtype=torch.int32)


@on_host
def feedback(
    fmt: Format,
    order: Tensor,
    lower: Tensor,
    form: Tensor,
    weight: Tensor,
    scales: list[tuple[Tensor, Tensor, Tensor, Tensor]],
    out: tuple[Tensor, Tensor, Tensor, Tensor, Tensor],
    *,
    shortlist: int,
    square: Tensor,
) -> None:
    """`Rounding._round_block`, compiled (csrc/feedback.inl), for some whole groups of columns.

    Args:
        order: int64 `[B]`: the columns.
        lower, form: their part of the metric, `[B, B]` and `[B / vec, vec, vec]`.
        weight: float32 `[B, R]`.
        scales: of `feedback.Scales`, and of those of the minima, if there are any: `unit` `[1 or steps, G, R]`, `value`, `near`, and
            `rank` `[G, R]`, which is overwritten.
        out: targets float32 `[B, R]`, overwritten with what remains of them (z); variants int32 `[G, R]`, codes int32 `[B / vec, R]`,
            values and errors float32 `[B, R]`.
        shortlist: entries of a codebook with separate signs that are compared in full.
        square: what `squares` makes of `form`.
    """
    empty = torch.zeros(0, dtype=torch.float32)
    scale, minimum = [*scales, (empty, empty, empty.int(), empty.int())][:2]
    near = nearest(fmt, torch.device("cpu"))
    table = near if isinstance(near, TableNearest) else None
    kinds = fmt.codebook.variants if fmt.variant_size == fmt.group_size else 1
    entries = fmt.codebook.entries * (fmt.codebook.variants // kinds)
    signs = "none" if "sign" not in fmt.fields else "even" if fmt.sign_parity else "free"
    none = empty.int()
    word = torch.tensor(parity_words(table, order % fmt.group_size), dtype=torch.int32) if table and fmt.code_parity else none
    values = value_table(fmt) if table else None
    lookup = table.lookup if table else None
    book = _book(fmt, kinds)
    torch.ops.iqtorch_cpu.feedback(
        weight,
        lower.contiguous(),
        form,
        square,
        book.values,
        book.tiles,
        book.bytes,
        book.cuts,
        *scale,
        *minimum,
        values.tree.flatten() if values else empty,
        values.shift[:kinds] if values else empty,
        values.code if values else none,
        lookup.value[: lookup.cells] if lookup else empty,
        table.other[: lookup.cells] if table and lookup and fmt.code_parity else none,
        table.odd.to(torch.int32) if table and fmt.code_parity else none,
        word,
        *out,
        [fmt.group_size, fmt.vec, entries, kinds, SIGNS[signs], shortlist, values.bits if values else 0, lookup.cells if lookup else 0],
        [values.low, values.high, lookup.low, lookup.high] if values and lookup else [0.0] * 4,
    )
    if book.code is not None:
        _, kind, code, _, _ = out
        own = kind.long().repeat_interleave(fmt.group_size // fmt.vec, 0)
        code.copy_(book.code[own if kinds > 1 else 0, code.long()])


def can_factor(columns: int, step: int) -> bool:
    """Whether `unit_factor` serves (csrc/factor.inl: sixteen columns at a time, and no further blocks for the caches)."""
    return columns % TILE == 0 and columns <= 1024 and step <= 8 and TILE % step == 0


def unit_factor(form: Tensor, step: int, block: int) -> tuple[Tensor, list[Tensor]]:
    """`metric.unit_factor`, compiled, for float32 with contiguous rows: the upper part becomes L. Returns D and the inverses."""
    k = len(form)
    blocks, inverse = form.new_empty((k // step, step, step)), form.new_empty((k, block))
    torch.ops.iqtorch_cpu.unit_factor(form, step, blocks, inverse)
    return blocks, [own[:, : len(own)] for own in inverse.split(block)]


@on_host
def squares(fmt: Format, form: Tensor) -> Tensor:
    """float32 `[steps, kinds * entries]`: each entry's quadratic form `[steps, vec, vec]`; with separate signs, the diagonal's part.
    Empty for codebooks of single values."""
    if fmt.vec == 1:
        return form[:0].flatten()
    i, j = torch.triu_indices(fmt.vec, fmt.vec)
    kinds = fmt.codebook.variants if fmt.variant_size == fmt.group_size else 1
    if "sign" in fmt.fields:
        return form.diagonal(0, 1, 2) @ _products(fmt, kinds)[i == j]
    return (form[:, i, j] * (2 - (i == j).to(form.dtype))) @ _products(fmt, kinds)


@lru_cache(maxsize=8)
@on_host
def _products(fmt: Format, kinds: int) -> Tensor:
    """float32 `[vec (vec + 1) / 2, kinds * entries]`: products of each two values of each entry."""
    i, j = torch.triu_indices(fmt.vec, fmt.vec)
    book = _book(fmt, kinds).values.flatten(0, 1).T
    return book[i] * book[j]


@dataclass(frozen=True)
class _Book:
    """A codebook of vectors as csrc/feedback.h has it.

    Attributes:
        values: float32 `[kinds, entries, vec]`.
        tiles, bytes, cuts: for the search of large ones; empty otherwise.
        code: int32 `[kinds, entries]`: the code of each entry; None if they are in order.
    """

    values: Tensor
    tiles: Tensor
    bytes: Tensor
    cuts: Tensor
    code: Tensor | None


@lru_cache(maxsize=64)
@on_host
def _book(fmt: Format, kinds: int) -> _Book:
    values = torch.from_numpy(fmt.codebook.values.astype(np.float32)).reshape(kinds, -1, fmt.vec).contiguous()
    tiles, small = torch.zeros(0, dtype=torch.float32), torch.zeros(0, dtype=torch.uint8)
    entries, cuts, code = values.shape[1], tiles, None
    if fmt.vec < 4 or entries < SEARCHED_WHOLE:
        return _Book(values, tiles, small, cuts, None)
    if fmt.vec == 4:
        cuts = torch.zeros(kinds, 1 + CELLS, CELLS, dtype=torch.float32)
        slab = values[..., 0].argsort(dim=1, stable=True).view(kinds, CELLS, -1)
        cell = slab.gather(2, values[..., 1].gather(1, slab.flatten(1)).view_as(slab).argsort(dim=2, stable=True))
        code = cell.flatten(1)
        values = values.gather(1, code[..., None].expand_as(values))
        for i, ordered in enumerate((values[..., 0][:, None], values[..., 1].view(kinds, CELLS, -1))):
            ends = ordered.unflatten(2, (CELLS, -1))
            cuts[:, i : i + ends.shape[1], :-1] = (ends[:, :, 1:, 0] + ends[:, :, :-1, -1]) / 2
    else:
        small = (values + (0 if "sign" in fmt.fields else 128)).to(torch.uint8)
    tiles = values.view(kinds, -1, TILE, fmt.vec).mT.contiguous()
    return _Book(values, tiles, small, cuts, None if code is None else code.to(torch.int32))
