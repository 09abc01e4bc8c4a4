"""Canonical bytes <-> device layout in one pass over memory: a kernel that moves bits as a table tells it.

Within a block, every bit of the planes is a bit of the block, or the exclusive or of a few (IQ4_KSS), and the other way round. The
table is not written down: it is read off `Layout.pack` and `Layout.unpack`, the plain-torch definition, by packing blocks with one bit
set. So there is one description of the layout, and a format needs nothing for these kernels.

A thread makes words of the target. Bits that keep their distance come together: one *segment* is 32 neighbouring bits of the source, at
the distance that the table says, and a mask. Where a word's bits come in another order (codes sliced into nibbles), its places are first
renamed: a permutation of the five bits of a bit's number, chosen so that few segments remain, and undone by a few swaps of bits.
Not moved here: a `d` per row, which is copied, and the exponents of rows, which are computed from `d`.
"""

# mypy: ignore-errors

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby, permutations
from math import gcd

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from ..formats import get_format
from .choices import power_of_two
from .layout import layout

#: Instructions, about, of a segment and of a swap: what `_order` weighs.
SEGMENT_COST, SWAP_COST = 11, 4

#: With more segments, a loop.
UNROLLED = tl.constexpr(12)
#: Launches of `unpack`, at most.
MOST_REGIONS = 8

Swaps = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Move:
    """Constants of one launch of `move_bits`.

    Attributes:
        size: units of the target per block.
        stride: of a block in the target, in units.
        unit: bytes of one: 1, 2 or 4.
        segments: of each place in the source, how many a unit takes from it.
        bits: bits per block of each place.
        aligned: whether each place consists of whole words; else a segment may lie across two.
        swaps: bits of words of each place that are swapped before they are used (see `_swaps`).
        after: the same, of the target's words, at the end.
        clamped: the source may end with the last word that is used.
    """

    size: int
    stride: int
    unit: int
    segments: tuple[int, ...]
    bits: tuple[int, ...]
    aligned: tuple[bool, ...]
    swaps: tuple[Swaps, ...]
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
def segment(words, bit, table, last, p: tl.constexpr, M: tl.constexpr):
    """What a segment gives to the units: 32 bits of place p from `bit + table` on, as far as the mask goes.

    It may begin in the word before the block, or end in the one behind it, although nothing of those is used: there must be such words
    (but none behind the word `last`, if `M.clamped`).
    """
    here = bit + tl.load(table)
    mask = tl.load(table + M.size).to(tl.uint32, bitcast=True)
    word = here >> 5
    low = tl.load(words + word).to(tl.uint32, bitcast=True)
    low = swap_bits(low, M.swaps[p])
    high = low
    if not M.aligned[p]:
        if M.clamped:
            word = tl.minimum(word, last - 1)
        high = tl.load(words + word + 1).to(tl.uint32, bitcast=True)
    both = high.to(tl.uint64) << 32 | low.to(tl.uint64)
    return (both >> (here & 31).to(tl.uint64)).to(tl.uint32) & mask


@triton.jit(do_not_specialize=["rows", "row_items", "first", "row_bytes", "matrix_bytes", "source_bytes", "source_words"])
def move_bits(
    source, target, table, places, rows, row_items, first, row_bytes, matrix_bytes, source_bytes, source_words,
    M: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """`M.size` units for each block of a row, `row_items` in all, from byte `first + row * row_bytes` of each matrix of the target on.

    `source` points to words, `target` to units. `table` int32 `[segments, 2, M.size]`: of each segment the first bit within the block, and
    its mask. `places` int64 `[places, 2]`: first byte and bytes per row. `source_words`: in all.
    """
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)[None, :]
    inside = (row < rows) & (i < row_items)
    row, i = tl.minimum(row, rows - 1), tl.minimum(i, row_items - 1)
    block = i // M.size
    j = i - block * M.size
    table += j
    matrix = tl.program_id(2).to(tl.int64)
    out = tl.zeros((ROWS, BLOCK), tl.uint32)
    for p in tl.static_range(tl.constexpr(len(M.segments))):
        at = matrix * source_bytes + tl.load(places + 2 * p) + row * tl.load(places + 2 * p + 1)
        words = source + (at >> 2)
        last = tl.minimum(source_words - 1 - (at >> 2), 2147483647).to(tl.int32)
        bit = block * M.bits[p] + (at & 3).to(tl.int32) * 8
        if M.segments[p] <= UNROLLED:
            for _ in tl.static_range(tl.constexpr(M.segments[p])):
                out ^= segment(words, bit, table, last, p, M)
                table += 2 * M.size
        else:
            for _ in range(M.segments[p]):
                out ^= segment(words, bit, table, last, p, M)
                table += 2 * M.size
    out = swap_bits(out, M.after)
    to = (matrix * matrix_bytes + first + row * row_bytes) // M.unit
    tl.store(target + (to + block * M.stride + j), out.to(target.dtype.element_ty), mask=inside)


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


def _cheapest(pairs: np.ndarray, unit: int, aligned: bool, of_source: bool) -> tuple[float, int, bool, tuple[int, ...], np.ndarray]:
    """How bits `pairs [n, 2]` (of the source, of the target) are best moved.

    Returns the cost, the number of segments, whether they are of whole words, the order, and each pair's `(unit, offset)`.
    The order renames the bits of the source's words (`of_source`, if these are whole) or of the target's.
    """
    width = 8 * unit
    source, to, number = pairs[:, 0], pairs[:, 1] % width, pairs[:, 1] // width
    found = []
    for whole in (True, False) if aligned else (False,):
        count = 5 if of_source else width.bit_length() - 1
        for order in permutations(range(count)) if whole or not of_source else [tuple(range(count))]:
            there, here = (_renamed(source % 32, order) + source // 32 * 32, to) if of_source else (source, _renamed(to, order))
            offset = there // 32 * 32 + (there - here) % 32 if whole else there - here
            keys = number * (1 << 20) + offset + (1 << 10)
            segments = int(np.bincount(np.unique(keys) >> 20).max())
            swaps = len(_swaps(order))
            cost = segments * ((SEGMENT_COST - 4 if whole else SEGMENT_COST) + (swaps * SWAP_COST if of_source else 0)) + swaps * SWAP_COST
            found.append((cost, segments, whole, order, np.stack([number, offset], 1)))
            if segments == 1 and not swaps:
                break
    return min(found, key=lambda f: f[0])


def _region(
    parts: dict[int, np.ndarray], first: int, size: int, stride: int, unit: int, places: list[tuple[int, bool]], of_source: bool
) -> Region:
    """The region of `size` bytes from `first` on, every `stride` bytes.

    It is made of bits `parts[place] [n, 2]` (of the source's block, of the region); `places`: bits per block, whether whole words.
    """
    units, rows, segments, whole, swaps, after = size // unit, [], [], [], [], ()
    for place, pairs in parts.items():
        _, count, is_whole, order, where = _cheapest(pairs, unit, places[place][1], of_source)
        masks: list[dict[int, int]] = [defaultdict(int) for _ in range(units)]
        width = 8 * unit
        bit = pairs[:, 1] % width if of_source else _renamed(pairs[:, 1] % width, order)
        for (number, offset), b in zip(where.tolist(), bit.tolist(), strict=True):
            masks[number][offset] |= 1 << b
        for i in range(count):
            of_units = [list(m.items())[i] if i < len(m) else (0, 0) for m in masks]
            rows.append([[offset for offset, _ in of_units], [mask for _, mask in of_units]])
        segments.append(count)
        whole.append(is_whole)
        swaps.append(_swaps(_inverse(order)) if of_source else ())
        after = after if of_source else _swaps(order)
    table = torch.from_numpy(np.array(rows, np.int64).astype(np.uint32).view(np.int32))
    move = Move(
        units, stride // unit, unit, tuple(segments), tuple(places[p][0] for p in parts), tuple(whole), tuple(swaps), after, of_source
    )
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
def unpacking(name: str) -> tuple[Region, ...]:
    """Parts of a block, each made of the same planes throughout."""
    fmt = get_format(name)
    plan, k, header = layout(fmt), fmt.block_size, fmt.row_header_bytes
    planes, sizes = _planes(name)
    unit = gcd(4, header, fmt.block_bytes)
    found = []
    for place, (i, size) in enumerate(zip(planes, sizes, strict=True)):
        rows = 8 * size
        data, at = torch.zeros((plan.packed_bytes(rows, k),), dtype=torch.uint8), plan.starts(rows, k)[i]
        data[at : at + rows * size] = _one_bit_each(size, 0, size).flatten()
        pairs = _pairs(plan.unpack(data, rows, k)[:, header:])
        found.append(np.concatenate([np.full((len(pairs), 1), place), pairs], 1))
    moved = np.concatenate(found)
    number = moved[:, 2] // (8 * unit)
    kinds = [tuple(np.unique(moved[number == n, 0]).tolist()) for n in range(fmt.block_bytes // unit)]
    if len(list(groupby(kinds))) > MOST_REGIONS:  # planes take turns
        kinds = [tuple(range(len(planes)))] * len(kinds)
    out, n = [], 0
    for kind, same in groupby(kinds):
        count = len(list(same))
        here = moved[(number >= n) & (number < n + count)] - np.array([0, 0, 8 * unit * n])
        parts = {place: here[here[:, 0] == place, 1:] for place in kind}
        out.append(_region(parts, unit * n, unit * count, fmt.block_bytes, unit, [(8 * s, s % 4 == 0) for s in sizes], True))
        n += count
    return tuple(out)


# -- launches ------------------------------------------------------------------------------------------------


@lru_cache(maxsize=64)
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
    where = torch.tensor(places, dtype=torch.int64).to(source.device, non_blocking=True)
    units = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[move.unit]
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
