"""Canonical bytes <-> device layout in one pass over memory: a kernel that moves bits as a table tells it.

Within a block, every bit of the planes is a bit of the block, or the exclusive or of a few (IQ4_KSS), and the other way round. The
table is not written down: it is read off `Layout.pack` and `Layout.unpack`, the plain-torch definition, by packing blocks with one bit
set. So there is one description of the layout, and a format needs nothing for these kernels.
Not moved here: a `d` per row, which is copied, and the exponents of rows, which are computed from `d`.
"""

# mypy: ignore-errors

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..formats import get_format
from .choices import power_of_two
from .layout import layout


@triton.jit(do_not_specialize=["row_items", "start"])
def move_bits(
    source,
    target,
    table,
    places,
    row_items,
    start,
    row_bytes,
    matrix_bytes,
    source_bytes,
    SIZE: tl.constexpr,
    SEGMENTS: tl.constexpr,
    PLACES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """SIZE bytes for each block of a row, `row_items` in all, from byte `start + row * row_bytes` of the target on; one row per program.

    `table` int32 `[SIZE, SEGMENTS]`: each segment as `entry` packs it. `places` int64 `[PLACES, 3]`: first byte, bytes per row and bytes
    per block of what segments are taken from.
    """
    row = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = i < row_items
    block = i // SIZE
    j = i - block * SIZE
    source += tl.program_id(2).to(tl.int64) * source_bytes
    target += tl.program_id(2).to(tl.int64) * matrix_bytes + (start + row * row_bytes)
    out = tl.zeros((BLOCK,), tl.int32)
    if PLACES == 1:
        source += tl.load(places) + row * tl.load(places + 1)
        first = block * tl.load(places + 2).to(tl.int32)
    for s in tl.static_range(SEGMENTS):
        entry = tl.load(table + (j * SEGMENTS + s))
        if PLACES == 1:
            byte = tl.load(source + (first + (entry >> 17)), mask=inside, other=0).to(tl.int32)
        else:
            place = places + (entry >> 14 & 7) * 3
            at = tl.load(place) + row * tl.load(place + 1) + block * tl.load(place + 2) + (entry >> 17)
            byte = tl.load(source + at, mask=inside, other=0).to(tl.int32)
        out ^= ((byte >> (entry & 7)) & (entry >> 6 & 255)) << (entry >> 3 & 7)
    tl.store(target + i, out.to(tl.uint8), mask=inside)


def entry(place: int, byte: int, right: int, left: int, width: int) -> int:
    """A segment: `width` bits from bit `right` of a byte of a place, to bit `left`."""
    return right | left << 3 | ((1 << width) - 1) << 6 | place << 14 | byte << 17


@dataclass(frozen=True)
class Moves:
    """Tables of one format: for each plane of one item per block and more, and for the block.

    Attributes:
        planes: the planes that are moved.
        sizes: bytes of each per block.
        pack: table of each.
        unpack: table of the block's bytes.
    """

    planes: tuple[int, ...]
    sizes: tuple[int, ...]
    pack: tuple[Tensor, ...]
    unpack: Tensor


def _segments(sources: list[tuple[int, int, int, int]]) -> list[int]:
    """`(place, byte, bit of it, bit of the target)` -> entries of a table, neighbouring bits together."""
    runs: list[list[int]] = []  # place, byte, first bit there, first bit here, width
    for place, byte, there, here in sorted(sources, key=lambda s: (s[0], s[1], s[3] - s[2], s[2])):
        last = runs[-1] if runs else None
        if last and last[:2] == [place, byte] and last[2] + last[4] == there and last[3] + last[4] == here:
            last[4] += 1
        else:
            runs.append([place, byte, there, here, 1])
    return [entry(*run) for run in runs]


def _table(sources: list[list[tuple[int, int, int, int]]]) -> Tensor:
    entries = [_segments(s) for s in sources]
    longest = max(max(map(len, entries)), 1)
    return torch.tensor([e + [0] * (longest - len(e)) for e in entries], dtype=torch.int32)


def _bits(data: Tensor) -> Tensor:
    """uint8 `[R, n]` -> bool `[R, 8 n]`."""
    return ((data[:, :, None] >> torch.arange(8, dtype=torch.uint8)) & 1).bool().flatten(1)


def _one_bit_each(count: int, first: int, size: int) -> Tensor:
    """uint8 `[8 size, count]`: row i has bit i of the bytes from `first` on."""
    out = torch.zeros((8 * size, count), dtype=torch.uint8)
    i = torch.arange(8 * size)
    out[i, first + i // 8] = (1 << (i % 8)).to(torch.uint8)
    return out


@lru_cache(maxsize=64)
def moves(name: str) -> Moves:
    """The tables of a plain format, on the CPU."""
    fmt = get_format(name)
    plan, k, header = layout(fmt), fmt.block_size, fmt.row_header_bytes
    kept = [i for i, plane in enumerate(plan.planes) if plane.size]
    sizes = [plan.planes[i].row_bytes(k) for i in kept]
    rows = 8 * fmt.block_bytes
    packed = plan.pack(_one_bit_each(fmt.row_bytes(k), header, fmt.block_bytes))
    starts = plan.starts(rows, k)
    pack = []
    for i, size in zip(kept, sizes, strict=True):
        found = _bits(packed[starts[i] : starts[i] + rows * size].view(rows, size))
        sources: list[list[tuple[int, int, int, int]]] = [[] for _ in range(size)]
        for bit, to in found.nonzero().tolist():
            sources[to // 8].append((0, bit // 8, bit % 8, to % 8))
        pack.append(_table(sources))
    back: list[list[tuple[int, int, int, int]]] = [[] for _ in range(fmt.block_bytes)]
    for place, (i, size) in enumerate(zip(kept, sizes, strict=True)):
        rows = 8 * size
        data = torch.zeros((plan.packed_bytes(rows, k),), dtype=torch.uint8)
        at = plan.starts(rows, k)[i]
        data[at : at + rows * size] = _one_bit_each(size, 0, size).flatten()
        for bit, to in _bits(plan.unpack(data, rows, k)[:, header:]).nonzero().tolist():
            back[to // 8].append((place, bit // 8, bit % 8, to % 8))
    return Moves(tuple(kept), tuple(sizes), tuple(pack), _table(back))


@lru_cache(maxsize=64)
def _on_device(name: str, device: torch.device) -> Moves:
    m = moves(name)
    return Moves(m.planes, m.sizes, tuple(t.to(device) for t in m.pack), m.unpack.to(device))


def _move(
    source: Tensor, target: Tensor, table: Tensor, places: list[tuple[int, int, int]], rows: int, blocks: int, start: int, row_bytes: int
) -> None:
    """Runs `move_bits` on matrices `source [E, n]`, `target [E, m]`."""
    size, segments = table.shape
    items = blocks * size
    block = min(power_of_two(items), 1024)
    where = torch.tensor(places, dtype=torch.int64).to(source.device, non_blocking=True)
    move_bits[(rows, triton.cdiv(items, block), source.shape[0])](
        source, target, table, where, items, start, row_bytes, target.shape[1], source.shape[1],
        SIZE=size, SEGMENTS=segments, PLACES=len(places), BLOCK=block, num_warps=min(max(block // 256, 1), 4),
    )  # fmt: skip


def pack(blocks: Tensor, name: str) -> Tensor:
    """`Layout.pack` on a GPU: the same bytes."""
    fmt = get_format(name)
    plan, m, rows, k = layout(fmt), _on_device(name, blocks.device), blocks.shape[-2], fmt.row_length(blocks.shape[-1])
    starts, n = plan.starts(rows, k), k // fmt.block_size
    flat = blocks.reshape(-1, rows * blocks.shape[-1]).contiguous()
    out = torch.zeros((flat.shape[0], starts[-1]), dtype=torch.uint8, device=blocks.device)
    source = [(fmt.row_header_bytes, blocks.shape[-1], fmt.block_bytes)]
    for i, size, table in zip(m.planes, m.sizes, m.pack, strict=True):
        _move(flat, out, table, source, rows, n, starts[i], n * size)
    s = plan.scheme
    if fmt.row_header_bytes:
        size, at = fmt.row_header_bytes, starts[s.d_plane]
        out[:, at : at + rows * size].view(-1, rows, size).copy_(flat.view(-1, rows, blocks.shape[-1])[:, :, :size])
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
    plan, m = layout(fmt), _on_device(name, data.device)
    starts, n, row_bytes = plan.starts(rows, k), k // fmt.block_size, fmt.row_bytes(k)
    flat = data.reshape(-1, starts[-1]).contiguous()
    out = torch.empty((flat.shape[0], rows * row_bytes), dtype=torch.uint8, device=data.device)
    places = [(starts[i], n * size, size) for i, size in zip(m.planes, m.sizes, strict=True)]
    _move(flat, out, m.unpack, places, rows, n, fmt.row_header_bytes, row_bytes)
    if fmt.row_header_bytes:
        size, at = fmt.row_header_bytes, starts[plan.scheme.d_plane]
        out.view(-1, rows, row_bytes)[:, :, :size] = flat[:, at : at + rows * size].view(-1, rows, size)
    return out.reshape(*data.shape[:-1], rows, row_bytes)
