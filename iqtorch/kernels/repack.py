"""Canonical bytes <-> device layout in one pass over memory: a kernel that moves bits as a table tells it.

Within a block, every bit of the planes is a bit of the block, or the exclusive or of a few (IQ4_KSS), and the other way round. The
table is not written down: it is read off `Layout.pack` and `Layout.unpack`, the plain-torch definition, by packing blocks with one bit
set. So there is one description of the layout, and a format needs nothing for these kernels.

A thread makes words of the target. It is put together from *segments*: a word of the source (of the block: blocks need not begin at
words), rotated, as far as a mask goes. Where a word's bits come in another order (codes sliced into nibbles), its places are first
renamed: a permutation of the five bits of a bit's number, chosen so that few segments remain, and undone by a few swaps of bits.
Masks that all units take are constants; segments that move alike from unit to unit are a *stream*, and only where a stream begins comes
from a table.
Not moved here: a `d` per row, which is copied, and the exponents of rows, which are computed from `d`.
"""

# mypy: ignore-errors

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from functools import cache, lru_cache
from itertools import groupby, permutations
from math import gcd

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from ..formats import get_format
from ..host import on_host
from .choices import power_of_two
from .layout import layout

#: Instructions, about, of a stream, of a word that it loads, of a segment, of one with its own mask, and of a swap: what `_plan` weighs.
STREAM_COST, WORD_COST, SEGMENT_COST, OWN_COST, SWAP_COST = 5, 1, 2, 9, 4

#: Launches of `unpack`, at most.
MOST_REGIONS = 8

Swaps = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Stream:
    """Segments that move alike from unit to unit.

    Attributes:
        rotates: whether a unit has a rotation of its own, to which those of the segments are added.
        words: the words that are loaded, from that of the table on.
        segments: of each, the index into `words`, its rotation to the right, and its mask, or None: one per unit, from the table.
    """

    rotates: bool
    words: tuple[int, ...]
    segments: tuple[tuple[int, int, int | None], ...]


#: A segment with masks of its own.
OWN = Stream(True, (0,), ((0, 0, None),))


@dataclass(frozen=True)
class Place:
    """Constants of one source of `move_bits`.

    Attributes:
        streams: what is taken from it.
        bits: bits per block.
        origin: bit of the block where its words are thought to begin.
        aligned: whether these are words of the memory; else each is taken from two.
        swaps: bits of words that are swapped before they are used (see `_swaps`).
    """

    streams: tuple[Stream, ...]
    bits: int
    origin: int
    aligned: bool
    swaps: Swaps


@dataclass(frozen=True)
class Move:
    """Constants of one launch of `move_bits`.

    Attributes:
        size: units of the target per block.
        unit: bytes of one: 1, 2 or 4.
        store: bytes that are stored at once.
        stride: of a block in the target, in these.
        places: what comes from where.
        after: bits of the target's words that are swapped at the end.
        clamped: the source may end with the last word that is used.
    """

    size: int
    unit: int
    store: int
    stride: int
    places: tuple[Place, ...]
    after: Swaps
    clamped: bool


@triton.jit
def swap_bits(v, swaps: tl.constexpr):
    """Exchanges the bits that each `(distance, mask)` selects with those `distance` above them."""
    for i in tl.static_range(tl.constexpr(len(swaps))):
        t = (v ^ (v >> swaps[i][0])) & swaps[i][1]
        v = v ^ t ^ (t << swaps[i][0])
    return v


@triton.jit
def funnel(low, high, n):
    """32 bits of two words from bit `n % 32` on."""
    both = high.to(tl.uint64) << 32 | low.to(tl.uint64)
    return (both >> (n & 31).to(tl.uint64)).to(tl.uint32)


@triton.constexpr_function
def loaded_words(aligned, stream):
    """Words of the memory that a stream loads."""
    return tuple(sorted({w + i for w in stream.words for i in ((0,) if aligned else (0, 1))}))


@triton.constexpr_function
def index_of(words, word):
    return words.index(word)


@triton.constexpr_function
def item(records, i):
    return records[i]


@triton.constexpr_function
def swaps_of(place):
    return place.swaps


@triton.constexpr_function
def last_swaps(move):
    return move.after


@triton.jit
def load_words(words, at, last, which: tl.constexpr, CLAMPED: tl.constexpr, I: tl.constexpr):  # noqa: E741
    """Words `at + which[I:]` as a tuple; none behind `last` if CLAMPED."""
    if CLAMPED:
        v = (tl.load(words + tl.minimum(at + which[I], last)).to(tl.uint32, bitcast=True),)
    else:
        v = (tl.load(words + at + which[I]).to(tl.uint32, bitcast=True),)
    if len(which) > I + 1:
        v = v + load_words(words, at, last, which, CLAMPED, I + 1)
    return v


@triton.jit
def block_words(loaded, bit, P: tl.constexpr, T: tl.constexpr, I: tl.constexpr):  # noqa: E741
    """The words of the block that stream T takes from, as a tuple."""
    which: tl.constexpr = loaded_words(P.aligned, T)
    v = loaded[index_of(which, T.words[I])]
    if not P.aligned:
        v = funnel(v, loaded[index_of(which, T.words[I] + 1)], bit)
    v = (swap_bits(v, swaps_of(P)),)
    if len(T.words) > I + 1:
        v = v + block_words(loaded, bit, P, T, I + 1)
    return v


@triton.jit
def turned(v, by, ROTATES: tl.constexpr, TURN: tl.constexpr):
    """v rotated to the right by TURN, and if ROTATES by `by` too."""
    if ROTATES:
        v = v >> ((by + TURN) & 31) | v << ((32 - by - TURN) & 31)
    elif TURN != 0:
        v = v >> TURN | v << (32 - TURN)
    return v


@triton.jit
def take(words, bit, table, last, P: tl.constexpr, T: tl.constexpr, CLAMPED: tl.constexpr, SIZE: tl.constexpr):
    """What stream T of place P gives to the units (`bit`: where words of the block begin), and the rest of the table."""
    here = tl.load(table)
    table += SIZE
    loaded = load_words(words, (bit >> 5) + (here >> 5), last, loaded_words(P.aligned, T), tl.constexpr(CLAMPED and not P.aligned), 0)
    of_block = block_words(loaded, bit, P, T, 0)
    out = of_block[0] & 0
    for i in tl.static_range(tl.constexpr(len(T.segments))):
        v = turned(of_block[T.segments[i][0]], here, T.rotates, T.segments[i][1])
        if T.segments[i][2] is None:
            out ^= v & tl.load(table).to(tl.uint32, bitcast=True)
            table += SIZE
        else:
            out ^= v & T.segments[i][2]
    return out, table


@triton.jit
def take_all(words, bit, table, last, P: tl.constexpr, CLAMPED: tl.constexpr, SIZE: tl.constexpr):
    """What the streams of place P give to the units, and the rest of the table."""
    out, table = take(words, bit, table, last, P, item(P.streams, 0), CLAMPED, SIZE)
    for t in tl.static_range(1, tl.constexpr(len(P.streams))):
        more, table = take(words, bit, table, last, P, item(P.streams, t), CLAMPED, SIZE)
        out ^= more
    return out, table


@triton.jit(do_not_specialize=["row_items", "first", "row_bytes", "matrix_bytes", "source_bytes", "source_words"])
def move_bits(
    source, target, table, places, rows, row_items, first, row_bytes, matrix_bytes, source_bytes, source_words,
    M: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """`M.size` units for each block of a row, `row_items` in all, from byte `first + row * row_bytes` of each matrix of the target on.

    `source` points to words, `target` to units. `table` int32 `[rows, M.size]`: for each stream the word and the rotation
    (32 word + rotation), for segments without a mask also this. `places` int64 `[places, 2]`: first byte and bytes per row.
    `source_words`: in all. There must be a word behind the last that is used, if not `M.clamped`.
    """
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)[None, :]
    inside = (row < rows) & (i < row_items)
    row, i = tl.minimum(row, rows - 1), tl.minimum(i, row_items - 1)
    block = (i.to(tl.uint32) // M.size).to(tl.int32)
    j = i - block * M.size
    table += j
    matrix = tl.program_id(2).to(tl.int64)
    out = tl.zeros((ROWS, BLOCK), tl.uint32)
    for p in tl.static_range(tl.constexpr(len(M.places))):
        at = matrix * source_bytes + tl.load(places + 2 * p) + row * tl.load(places + 2 * p + 1)
        words = source + (at >> 2)
        last = tl.minimum(source_words - 1 - (at >> 2), 2147483647).to(tl.int32)
        bit = block * M.places[p].bits + M.places[p].origin
        if not M.places[p].aligned:
            bit += (at & 3).to(tl.int32) * 8
        more, table = take_all(words, bit, table, last, item(M.places, p), M.clamped, M.size)
        out ^= more
    out = swap_bits(out, last_swaps(M))
    to = (matrix * matrix_bytes + first + row * row_bytes) // M.store
    target += to + (block * M.stride + j * (M.unit // M.store))
    for b in tl.static_range(M.unit // M.store):
        tl.store(target + b, (out >> (8 * M.store * b)).to(target.dtype.element_ty), mask=inside)


# -- tables --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Region:
    """Units of each block that one launch makes.

    Attributes:
        first: byte of the block (or of the plane's part of it) where they begin.
        places: numbers of the planes they are taken from; of the canonical blocks, 0.
        move: constants.
        table: see `move_bits`.
    """

    first: int
    places: tuple[int, ...]
    move: Move
    table: Tensor


def _swaps(order: tuple[int, ...]) -> Swaps:
    """Swaps that move each bit to the place whose number has, as its bit b, bit `order[b]` of the number of the old place."""
    at, swaps = list(range(5)), []
    for b in range(5):
        c = at.index(order[b]) if b < len(order) else b
        if c != b:
            low, high = min(b, c), max(b, c)
            swaps.append(((1 << high) - (1 << low), sum(1 << i for i in range(32) if i >> low & 1 and not i >> high & 1)))
            at[b], at[c] = at[c], at[b]
    return tuple(swaps)


def _renamed(bits: np.ndarray, order: tuple[int, ...]) -> np.ndarray:
    """Numbers whose bit `order[b]` is bit b of the given ones."""
    return sum((bits >> b & 1) << c for b, c in enumerate(order))


def _inverse(order: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(order.index(b) for b in range(len(order)))


@dataclass(frozen=True)
class Plan:
    """One way to move the bits of a place: its cost, the place, swaps at the end, and rows of the table `[rows, units]`."""

    cost: float
    place: Place
    after: Swaps
    table: np.ndarray


def _segments(pairs: np.ndarray, units: int, unit: int, order: tuple[int, ...], origin: int, of_source: bool) -> np.ndarray:
    """Segments `[units, n, 3]`: word, rotation and mask of each, in the order of masks; those that a unit lacks have mask 0."""
    source, to, number = pairs[:, 0] - origin, pairs[:, 1] % (8 * unit), pairs[:, 1] // (8 * unit)
    word, bit = source // 32, source % 32
    bit, to = (_renamed(bit, order), to) if of_source else (bit, _renamed(to, order))
    keys, of = np.unique((number << 32) + (word << 5) + (bit - to) % 32, return_inverse=True)
    masks = np.zeros(len(keys), np.int64)
    np.bitwise_or.at(masks, of, 1 << to)
    sort = np.lexsort((keys, masks, keys >> 32))
    keys, masks = keys[sort], masks[sort]
    counts = np.bincount(keys >> 32, minlength=units)
    out = np.zeros((units, counts.max(), 3), np.int64)
    out[keys >> 32, np.arange(len(keys)) - (np.cumsum(counts) - counts)[keys >> 32]] = np.stack(
        [(keys >> 5) & 0x7FFFFFF, keys & 31, masks], 1
    )
    return out


def _streams(found: np.ndarray) -> tuple[list[Stream], list[np.ndarray]]:
    """Segments with the same masks in all units as streams, and their rows of the table."""
    word, rotation = found[:, :, 0], found[:, :, 1]
    ways = np.concatenate([word - word[:1], (rotation - rotation[:1]) % 32])
    streams, rows = [], []
    for way in np.unique(ways, axis=1).T:
        mine = np.flatnonzero((ways == way[:, None]).all(0))
        start = mine[word[0, mine].argmin()]
        turns = bool((rotation[:, start] != rotation[0, start]).any())
        words = np.unique(word[0, mine] - word[0, start])
        places = np.searchsorted(words, word[0, mine] - word[0, start])
        turn = (rotation[0, mine] - (rotation[0, start] if turns else 0)) % 32
        streams.append(
            Stream(turns, tuple(words.tolist()), tuple(zip(places.tolist(), turn.tolist(), found[0, mine, 2].tolist(), strict=True)))
        )
        rows.append(word[:, start] * 32 + (rotation[:, start] if turns else 0))
    return streams, rows


def _common(found: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Segments `[units, n, 3]` as those with masks that all units have, in one order, and the others."""
    wanted = Counter(found[0, :, 2].tolist())
    for unit in found[1:]:
        wanted &= Counter(unit[:, 2].tolist())
    rank = np.zeros(found.shape[:2], np.int64)  # of a segment among those of its unit with the same mask
    for i in range(1, found.shape[1]):
        rank[:, i] = np.where(found[:, i, 2] == found[:, i - 1, 2], rank[:, i - 1] + 1, 0)
    taken = rank < np.vectorize(lambda mask: wanted[mask] if mask else 0, otypes=[np.int64])(found[:, :, 2])
    return found[taken].reshape(len(found), -1, 3), found[~taken].reshape(len(found), -1, 3)


def _plan(pairs: np.ndarray, units: int, unit: int, bits: int, aligned: bool, alone: bool) -> Plan:
    """How bits `pairs [n, 2]` (of the source, of the target) are best moved; `alone`: they are all that the region is made of.

    The order renames the bits of the source's words or, if `alone`, of the target's.
    """
    best = None
    for origin in [o for o in (0, 8, 16, 24) if o == 0 or (not aligned and o <= pairs[:, 0].min())]:
        for of_source in (False, True) if alone else (True,):
            for order in permutations(range(5 if of_source else (8 * unit).bit_length() - 1)):
                swaps = _swaps(_inverse(order)) if of_source else _swaps(order)
                each, once = (len(swaps) * SWAP_COST, 0) if of_source else (0, len(swaps) * SWAP_COST)
                each += WORD_COST + (0 if aligned else 2)
                if best and best.cost <= STREAM_COST + SEGMENT_COST + each + once:  # no order with these swaps costs less
                    continue
                common, own = _common(_segments(pairs, units, unit, order, origin, of_source))
                streams, table = _streams(common)
                cost = once + len(streams) * STREAM_COST + sum(len(s.segments) * (SEGMENT_COST + s.rotates) for s in streams)
                cost += own.shape[1] * OWN_COST + (sum(len(s.words) for s in streams) + own.shape[1]) * each
                if best and best.cost <= cost:
                    continue
                for i in range(own.shape[1]):
                    table += [own[:, i, 0] * 32 + own[:, i, 1], own[:, i, 2]]
                place = Place((*streams, *[OWN] * own.shape[1]), bits, origin, aligned, swaps if of_source else ())
                best = Plan(cost, place, () if of_source else swaps, np.stack(table))
    return best


def _region(
    parts: dict[int, np.ndarray], first: int, size: int, stride: int, store: int, places: list[tuple[int, bool]], clamped: bool
) -> Region:
    """The region of `size` bytes from `first` on, every `stride` bytes, of which `store` can be stored at once.

    It is made of bits `parts[place] [n, 2]` (of the source's block, of the region); `places`: bits per block, whether whole words.
    """
    unit = gcd(size, 4)
    plans = [_plan(pairs, size // unit, unit, *places[place], len(parts) == 1) for place, pairs in parts.items()]
    table = torch.from_numpy(np.concatenate([plan.table for plan in plans]).astype(np.uint32, order="C").view(np.int32))
    move = Move(size // unit, unit, store, stride // store, tuple(plan.place for plan in plans), plans[0].after, clamped)
    return Region(first, tuple(parts), move, table)


def _pairs(data: Tensor) -> np.ndarray:
    """uint8 `[R, n]` -> `(row, bit)` of its set bits."""
    return ((data[:, :, None] >> torch.arange(8, dtype=torch.uint8)) & 1).flatten(1).nonzero().numpy()


def _one_bit_each(count: int, first: int, size: int) -> Tensor:
    """uint8 `[8 size, count]`: row i has bit i of the bytes from `first` on."""
    out = torch.zeros((8 * size, count), dtype=torch.uint8)
    i = torch.arange(8 * size)
    out[i, first + i // 8] = (1 << (i % 8)).to(torch.uint8)
    return out


def _planes(name: str) -> tuple[list[int], list[int]]:
    """The planes that are moved, those of one item per block and more, and the bytes of each per block."""
    fmt = get_format(name)
    planes = [i for i, plane in enumerate(layout(fmt).planes) if plane.size]
    return planes, [layout(fmt).planes[i].row_bytes(fmt.block_size) for i in planes]


@lru_cache(maxsize=64)
@on_host
def packing(name: str) -> tuple[Region, ...]:
    """For each plane that is moved, its part of a block."""
    fmt = get_format(name)
    plan, k, header = layout(fmt), fmt.block_size, fmt.row_header_bytes
    rows = 8 * fmt.block_bytes
    packed, starts = plan.pack(_one_bit_each(fmt.row_bytes(k), header, fmt.block_bytes)), plan.starts(rows, k)
    out = []
    for i, size in zip(*_planes(name), strict=True):
        pairs = _pairs(packed[starts[i] : starts[i] + rows * size].view(rows, size))
        aligned = header % 4 == 0 and fmt.block_bytes % 4 == 0
        out.append(_region({0: pairs}, 0, size, size, gcd(size, 4), [(8 * fmt.block_bytes, aligned)], False))
    return tuple(out)


@lru_cache(maxsize=64)
@on_host
def unpacking(name: str) -> tuple[Region, ...]:
    """Parts of a block, each made of the same planes throughout."""
    fmt = get_format(name)
    plan, k, header = layout(fmt), fmt.block_size, fmt.row_header_bytes
    planes, sizes = _planes(name)
    store = gcd(4, header, fmt.block_bytes)
    found = []
    for place, (i, size) in enumerate(zip(planes, sizes, strict=True)):
        rows = 8 * size
        data, at = torch.zeros((plan.packed_bytes(rows, k),), dtype=torch.uint8), plan.starts(rows, k)[i]
        data[at : at + rows * size] = _one_bit_each(size, 0, size).flatten()
        pairs = _pairs(plan.unpack(data, rows, k)[:, header:])
        found.append(np.concatenate([np.full((len(pairs), 1), place), pairs], 1))
    moved = np.concatenate(found)
    number = moved[:, 2] // (8 * store)
    kinds = [tuple(np.unique(moved[number == n, 0]).tolist()) for n in range(fmt.block_bytes // store)]
    runs = [kind for kind, _ in groupby(kinds)]
    if len(runs) > MOST_REGIONS:  # planes take turns: those are made together
        turns = {kind for kind in runs if runs.count(kind) > 1}
        kinds = [tuple(sorted(set().union(*turns))) if kind in turns else kind for kind in kinds]
    out, n = [], 0
    for kind, same in groupby(kinds):
        count = len(list(same))
        here = moved[(number >= n) & (number < n + count)] - np.array([0, 0, 8 * store * n])
        parts = {place: here[here[:, 0] == place, 1:] for place in kind}
        out.append(_region(parts, store * n, store * count, fmt.block_bytes, store, [(8 * s, s % 4 == 0) for s in sizes], True))
        n += count
    return tuple(out)


# -- launches ------------------------------------------------------------------------------------------------


@cache
def _on_device(name: str, way: str, device: torch.device) -> tuple[tuple[Region, Tensor], ...]:
    return tuple((r, r.table.to(device)) for r in {"pack": packing, "unpack": unpacking}[way](name))


def _words(data: Tensor) -> Tensor:
    """The same bytes as words (a view, but for data that begin within one; up to three bytes at the end are left out)."""
    data = data.flatten() if data.data_ptr() % 4 == 0 else data.flatten().clone()
    return data[: data.numel() // 4 * 4].view(torch.int32)


def tile(rows: int, items: int) -> tuple[int, int, int]:
    """Rows and units of a program, and its warps: addresses are shared by the units of a row, tables by the rows."""
    block = min(power_of_two(items), 512)
    tile_rows = min(power_of_two(rows), 2048 // block)
    return tile_rows, block, max(min(tile_rows * block // 512, 4), 1)


def _move(
    source: Tensor, target: Tensor, region: Region, table: Tensor, places: list[tuple[int, int]], rows: int, blocks: int, row_bytes: int,
    first: int,
) -> None:  # fmt: skip
    """Runs `move_bits` on matrices `source [E, n]`, `target [E, m]`; `places`: first byte and bytes per row of each."""
    move, items = region.move, blocks * region.move.size
    tile_rows, block, warps = tile(rows, items)
    where = torch.tensor(places, dtype=torch.int64, device="cpu").to(source.device, non_blocking=True)
    units = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[move.store]
    words = _words(source)
    move_bits[(triton.cdiv(rows, tile_rows), triton.cdiv(items, block), source.shape[0])](
        words, target.view(units), table, where, rows, items, first + region.first, row_bytes, target.shape[1], source.shape[1],
        words.numel(), M=move, ROWS=tile_rows, BLOCK=block, num_warps=warps,
    )  # fmt: skip


def pack(blocks: Tensor, name: str) -> Tensor:
    """`Layout.pack` on a GPU: the same bytes."""
    fmt = get_format(name)
    plan, rows, row_bytes, header = layout(fmt), *blocks.shape[-2:], fmt.row_header_bytes
    k = fmt.row_length(row_bytes)
    starts, n = plan.starts(rows, k), k // fmt.block_size
    flat = blocks.reshape(-1, rows * row_bytes).contiguous()
    out = torch.zeros((flat.shape[0], starts[-1]), dtype=torch.uint8, device=blocks.device)
    # the kernel reads the words around a row: the first and the last row are given such words in a copy
    ends = flat.view(-1, rows, row_bytes)[:, :: max(rows - 1, 1)].flatten(1)
    ends = torch.nn.functional.pad(ends, (4, 4 + -ends.shape[1] % 4))
    for i, size, (region, table) in zip(*_planes(name), _on_device(name, "pack", blocks.device), strict=True):
        size *= n
        _move(ends, out, region, table, [(4 + header, row_bytes)], min(rows, 2), n, (rows - 1) * size, starts[i])
        if rows > 2:
            _move(flat, out, region, table, [(header + row_bytes, row_bytes)], rows - 2, n, size, starts[i] + size)
    s = plan.scheme
    if fmt.row_header_bytes:
        size, at = fmt.row_header_bytes, starts[s.d_plane]
        out[:, at : at + rows * size].view(-1, rows, size).copy_(flat.view(-1, rows, row_bytes)[:, :, :size])
    if s.exponent_plane >= 0:
        at = starts[s.exponent_plane]
        for matrix in out:
            floats = {}
            for field, plane in (("d", s.d_plane), ("dmin", s.dmin_plane)):
                if plane >= 0:
                    stored = matrix[starts[plane] : starts[plane] + rows * plan.planes[plane].row_bytes(k)]
                    wide = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[fmt.d_bytes]
                    values = stored.view(wide).view(rows, -1).to(torch.int32)
                    floats[field] = values & 0xFFFF if fmt.d_bytes == 2 else values
            matrix[at : at + rows] = (plan._exponent(floats) & 255).to(torch.uint8)[:, 0]
    return out.reshape(*blocks.shape[:-2], starts[-1])


def unpack(data: Tensor, name: str, rows: int, k: int) -> Tensor:
    """`Layout.unpack` on a GPU: the same bytes."""
    fmt = get_format(name)
    plan, (planes, sizes) = layout(fmt), _planes(name)
    starts, n, row_bytes = plan.starts(rows, k), k // fmt.block_size, fmt.row_bytes(k)
    flat = data.reshape(-1, starts[-1]).contiguous()
    out = torch.empty((flat.shape[0], rows * row_bytes), dtype=torch.uint8, device=data.device)
    for region, table in _on_device(name, "unpack", data.device):
        places = [(starts[planes[p]], n * sizes[p]) for p in region.places]
        _move(flat, out, region, table, places, rows, n, row_bytes, fmt.row_header_bytes)
    if fmt.row_header_bytes:
        size, at = fmt.row_header_bytes, starts[plan.scheme.d_plane]
        out.view(-1, rows, row_bytes)[:, :, :size] = flat[:, at : at + rows * size].view(-1, rows, size)
    return out.reshape(*data.shape[:-1], rows, row_bytes)
