"""`encode`: any format, by one search (`search`, or `affine` for the formats with minima)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import replace
from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor

from ..formats import get_format
from ..formats.base import Format, Parts, bits_to_float, float_to_bits
from . import compiled
from .affine import search_affine
from .nearest import nearest
from .search import Effort, Found, Units, large_codebook, search, two_signs

Objective = Literal["model", "rmse"]
Speed = Literal["fast", "default", "best"]

#: For codebooks of vectors, which are slow to search, and of single values, which are not.
EFFORTS = {
    "fast": Effort(trials=6, keep=6, steps=12, shortlist=2, rounds=1, trial_depth=0.25, depth=0.25),
    "default": Effort(trials=10, keep=5, steps=12, shortlist=2, rounds=1, trial_depth=0.25, depth=0.5),
    "best": Effort(trials=24, keep=16, steps=48, shortlist=6, rounds=4, trial_depth=1.0, depth=1.0),
}
SINGLE_EFFORTS = {
    "fast": Effort(trials=8, keep=5, steps=12, shortlist=2, rounds=1, trial_depth=1.0, depth=1.0),
    "default": Effort(trials=24, keep=8, steps=24, shortlist=2, rounds=1, trial_depth=1.0, depth=1.0),
    "best": Effort(trials=64, keep=16, steps=64, shortlist=6, rounds=4, trial_depth=1.0, depth=1.0),
}
#: Weights encoded at a time (on a CPU, per thread): temporaries of the search in torch are some hundred bytes per weight, the
#: compiled one needs some for sixteen units at a time only. What is prepared per call, or per column, is shared by all rows of a chunk.
CHUNK = {"cpu": 1 << 19, "columns": 1 << 23, "gpu": 1 << 22}
#: Bytes that a search takes at most for each of them (with what malloc keeps), and the fewest weights that are worth one (see `workspace`).
CHUNK_BYTES = {"cpu": 32, "columns": 64, "gpu": 128}
CHUNK_LEAST = {"cpu": 1 << 18, "columns": 1 << 18, "gpu": 1 << 16}
#: Rows that share a pass of the compiled search, if `d` is per row.
LANES = 16
#: Least importance relative to the mean: columns without importance still choose their own best codes.
LEAST_IMPORTANCE = 1e-8
#: Rows whose largest weight lies within 2 ** +-NEAR_ONE are searched as they are.
NEAR_ONE = 8
#: Rows that lost more than half of themselves (too small for a float16 `d`) are beyond repair by a factor.
LARGEST_FACTOR = 2.0


def encode(weight: Tensor, fmt: Format, importance: Tensor | None, objective: Objective = "model", speed: Speed = "default") -> Tensor:
    """Canonical bytes of a weight matrix.

    Args:
        weight: floating `[R, K]`, finite, K a multiple of the block size (and R of 4 for the `_r4` formats); taken as float32. The
            same bytes wherever the weights lie in memory.
        fmt: the format.
        importance: float32 `[K]`, finite and not negative: error weight of each column; None = all equal.
        objective: `"rmse"`: least importance-weighted squared error of the effective weights (`runtime_scale` included);
            `"model"`: the same codes, with `d` raised until the row is reproduced without shrinking.
        speed: how hard to search.

    Returns:
        uint8 `[R, row_bytes]` on the device of `weight`; the same bytes on every run and for every number of threads.
    """
    if fmt.plain is not None:
        plain = get_format(fmt.plain)
        blocks = encode(weight, plain, importance, objective, speed)
        return fmt.pack(plain.unpack(blocks))
    fmt = fmt.for_encoding
    blocks, done = torch.empty((len(weight), fmt.row_bytes(weight.shape[1])), dtype=torch.uint8, device=weight.device), 0
    for parts in _encode(weight, fmt, importance, objective, speed):
        some = pack(parts, fmt)
        blocks[done : done + len(some)] = some
        done += len(some)
        del parts, some  # before those of the next rows are there
    return blocks


def encode_parts(weight: Tensor, fmt: Format, importance: Tensor | None, objective: Objective, speed: Speed) -> Parts:
    """What `encode` finds, as the integers of the fields, for a format that is not interleaved."""
    found = list(_encode(weight, fmt.for_encoding, importance, objective, speed))
    return {name: torch.cat([parts[name] for parts in found]) for name in found[0]}


def pack(parts: Parts, fmt: Format) -> Tensor:
    """`Format.pack` of a plain format, compiled where that is possible."""
    return compiled.pack(parts, fmt) if compiled.available(parts["code"].device) else fmt.pack(parts)


def _encode(weight: Tensor, fmt: Format, importance: Tensor | None, objective: Objective, speed: Speed) -> Iterator[Parts]:
    """Some rows at a time."""
    weights = _error_weights(importance, weight.shape[1], weight.device)
    effort = effort_of(fmt, speed)
    for part in weight.split(_rows_at_a_time(fmt, weight.shape[1], weight.device)):
        # a copy of these rows only; sums of a transposed view would be rounded in another order
        yield _encode_rows(part.float().contiguous(), fmt, weights, objective, effort)


_workspace: ContextVar[int | None] = ContextVar("workspace", default=None)


@contextmanager
def workspace(nbytes: int) -> Iterator[None]:
    """Searches that this thread starts take no more than this (but 32 MiB, or 16 MiB for each thread that helps) beside a weight and its
    blocks, where that is less than their most."""
    token = _workspace.set(nbytes)
    try:
        yield
    finally:
        _workspace.reset(token)


def _chunk(kind: str, threads: int = 1) -> int:
    """How many weights are searched for at a time."""
    most, nbytes = CHUNK[kind] * threads, _workspace.get()
    return most if nbytes is None else min(most, max(nbytes // CHUNK_BYTES[kind], CHUNK_LEAST[kind]))


def _rows_at_a_time(fmt: Format, k: int, device: torch.device) -> int:
    if device.type != "cpu":
        return max(1, _chunk("gpu") // k)
    if large_codebook(fmt):
        return max(1, _chunk("columns") // k)
    return -(-_chunk("cpu", torch.get_num_threads()) // k // LANES) * LANES


@lru_cache(maxsize=256)
def effort_of(fmt: Format, speed: Speed) -> Effort:
    """How hard to search for a format."""
    if fmt.vec == 1:
        effort = SINGLE_EFFORTS[speed]
        if fmt.block_size == fmt.group_size and "d" in fmt.fields and not fmt.affine:  # no other group has a say in its scale
            effort = replace(effort, keep=1)
            if speed != "best" and (fmt.codebook.entries > 64 or fmt.d_kind == "e8m0"):
                # Powers of two are all tried; of many levels, some trials find most of what there is, and settling nothing more.
                effort = replace(effort, trials=min(effort.trials, 10), rounds=0)
        return replace(effort, trials=effort.trials // 2) if fmt.code_parity else effort  # its trials take four times as long
    effort = EFFORTS[speed]
    if large_codebook(fmt):
        # The luck of each trial is another: one of four values has two variants and two signs, of eight values two signs or one.
        tenths, half = (6, 1) if fmt.vec == 4 else (3 if two_signs(fmt) else 5, 2)
        trials = max(2, effort.trials * tenths // 10)
        return replace(effort, trials=trials, shortlist=effort.shortlist // half, rounds=effort.rounds - 1)
    if fmt.codebook.entries >= 2048:  # little is left to find after the first choice, and each trial takes 10 ns per weight
        return replace(effort, trials=effort.trials * 4 // 10, shortlist=effort.shortlist // 2, rounds=effort.rounds - 1)
    return replace(effort, trials=effort.trials // 2) if fmt.vec >= 4 else effort


def _error_weights(importance: Tensor | None, k: int, device: torch.device) -> Tensor:
    if importance is None:
        return torch.ones(k, dtype=torch.float32, device=device)
    wide = importance.to(device, torch.float64)
    mean = wide.mean()
    if mean <= 0:
        return torch.ones(k, dtype=torch.float32, device=device)
    return (wide / mean).clamp(min=LEAST_IMPORTANCE).float()


def _known_near_one(largest: Tensor) -> bool:
    """Whether all rows are near 1, by their largest weights; a device is not asked, which would be to wait for it."""
    return largest.is_cpu and float(largest.amin()) >= 2.0 ** -(NEAR_ONE + 1) and float(largest.amax()) < 2.0**NEAR_ONE


def _encode_rows(weight: Tensor, fmt: Format, importance: Tensor, objective: Objective, effort: Effort) -> Parts:
    rows, k = weight.shape
    # Rows far from 1 are scaled to about 1 by powers of two, so that squares of tiny and huge weights stay finite.
    largest = torch.maximum(weight.amax(1), -weight.amin(1))
    exponent = torch.zeros(rows, dtype=torch.int32, device=weight.device)
    down = torch.ones_like(largest)[:, None]
    if not _known_near_one(largest):
        exponent = torch.frexp(largest).exponent.clamp(-120, 126).to(torch.int32)
        exponent = torch.where(exponent.abs() <= NEAR_ONE, 0, exponent)
        down = torch.ldexp(down, -exponent[:, None])
        weight = weight * down  # the caller keeps no copy of what it was
    per_row = "d" not in fmt.fields
    unit = k if per_row else fmt.block_size
    n = fmt.group_size
    units = Units(
        weight.reshape(-1, n),
        importance,
        unit // n,
        exponent.repeat_interleave(k // unit),
    )
    found = _search(units, fmt, effort, objective)
    parts = _parts(found, fmt, rows)
    if objective == "model":
        _unshrink(parts, fmt, weight, importance, down, found.product)
    return parts


def _search(units: Units, fmt: Format, effort: Effort, objective: Objective) -> Found:
    if compiled.available(units.x.device) and compiled.supported(fmt):
        return compiled.run(units, fmt, effort, objective == "model")
    near = nearest(fmt, units.x.device)
    return (search_affine if fmt.affine else search)(units, fmt, near, effort)


def _unshrink(parts: Parts, fmt: Format, weight: Tensor, importance: Tensor, down: Tensor, product: Tensor | None) -> None:
    """Multiplies `d` (and `dmin`) of each row by one factor, so that sum w x q = sum w x x for its decoded weights q.

    Least squares shrinks: its q is the projection of the row x, with sum w x q = sum w q q < sum w x x, so every output comes out
    too small by that factor on average. The squared error grows only in second order; divergence of a model falls.
    `product`: sums w x q of parts of the rows, where the search knows them.
    """
    step = max(1, _chunk("cpu" if weight.is_cpu else "gpu") // weight.shape[1])
    ratios = []
    for i in range(0, len(weight), step):  # what is decoded takes several times the memory of the weights
        rows = slice(i, i + step)
        weighted = importance * weight[rows]
        if product is None:
            decoded = fmt.weights({name: values[rows] for name, values in parts.items()}).mul_(down[rows] * fmt.runtime_scale)
            outer = decoded.mul_(weighted).sum(1)
        else:
            outer = product.view(len(weight), -1)[rows].sum(1)
        ratios.append(outer / weighted.mul_(weight[rows]).sum(1))
    kept = torch.cat(ratios)
    factor = torch.where(kept > 1 / LARGEST_FACTOR, 1 / kept, 1.0).clamp(min=1.0)[:, None]
    for name in ("d", "dmin") if fmt.affine else ("d",):
        parts[name] = float_to_bits(bits_to_float(parts[name], fmt.d_kind) * factor, fmt.d_kind)


def _parts(found: Found, fmt: Format, rows: int) -> Parts:
    """The search's integers as the fields of the format."""
    parts: Parts = {"d": found.d.view(rows, -1)}
    if fmt.affine and found.dmin is not None:
        parts["dmin"] = found.dmin.view(rows, -1)
    code, variant = found.code, found.variant
    if "variant" in fmt.fields and fmt.variant_size == fmt.vec:
        variant = code // fmt.codebook.entries
        code = code % fmt.codebook.entries
    for name, values in (("scale", found.scale), ("min", found.minimum), ("variant", variant), ("code", code)):
        if name in fmt.fields and values is not None:
            parts[name] = values.reshape(rows, -1)
    if found.negative is not None:
        parts["sign"] = fmt.fold_signs(found.negative.reshape(rows, -1))
    return parts
