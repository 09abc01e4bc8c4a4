"""Experts for a few tokens (decoding): two kernels per layer, expert ids read on the device.

    gated      gate and up projection of each (token, expert), and the activation between them
    weighted   down projection, and the sum over a token's experts with their routing weights

Both are the vector kernel of vector.py around other rows. Nothing is sorted, no shape depends on the routing, sums have a fixed order.
"""

# mypy: ignore-errors

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..errors import ShapeError, UnsupportedOperationError
from . import launch
from .asm import follow
from .choices import compiler_options, gemv_registers, gemv_tile
from .decode import prepare
from .layout import Layout
from .library import ACTIVATIONS
from .planes import load_planes, prefetch_rows
from .scales import prepare_scales, row_scale
from .vector import all_digits, all_sums, digits, item_number, load_run, row_sums, row_totals, run_products


@triton.jit
def activate(g, ACTIVATION: tl.constexpr):
    """The activation function of a gate, float32."""
    if ACTIVATION == "silu":
        v = g / (1.0 + tl.exp(-g))
    elif ACTIVATION == "gelu":
        v = 0.5 * g * (1.0 + tl.erf(g * 0.7071067811865476))
    elif ACTIVATION == "gelu_tanh":
        # (1 + tanh z) / 2 = 1 / (1 + exp(-2 z))
        v = g / (1.0 + tl.exp(-1.5957691216057308 * (g + 0.044715 * g * g * g)))
    else:
        tl.static_assert(ACTIVATION == "relu")
        v = tl.where(g < 0.0, 0.0, g)
    return v


@triton.jit
def matrix_of(data, ids, at, pairs, matrix_bytes, experts):
    """The matrix of the expert `ids[at]` of `pairs`, and whether there is such an expert."""
    expert = tl.load(ids + at, mask=at < pairs, other=-1).to(tl.int64)
    valid = (expert >= 0) & (expert < experts)
    return data + tl.where(valid, expert, 0) * matrix_bytes, valid


@triton.jit(do_not_specialize=["pairs", "experts"])
def gated(
    x,
    data,
    book,
    lut,
    ids,
    y,
    pairs,
    rows,
    runs,
    x_stride,
    matrix_bytes,
    experts,
    slots,
    S: tl.constexpr,
    ACTIVATION: tl.constexpr,
    DIGITS: tl.constexpr,
    ROWS: tl.constexpr,
    RUNS: tl.constexpr,
    ASM: tl.constexpr,
    AHEAD: tl.constexpr,
):
    """y[p, n] = activate(gate) * up of the expert ids[p] and token p / slots; its matrix has `rows` of gate, then as many of up."""
    if AHEAD:
        follow()
    pair = item_number().to(tl.int64)
    data, valid = matrix_of(data, ids, pair, pairs, matrix_bytes, experts)
    if AHEAD:
        prefetch_rows(data, tl.program_id(0) * ROWS, ROWS, 2 * rows, runs, S)
        prefetch_rows(data, rows + tl.program_id(0) * ROWS, ROWS, 2 * rows, runs, S)
    n = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    row = tl.minimum(n, rows - 1)[:, None]
    held = prepare(book, S, ASM)
    lut = prepare_scales(lut, S, ASM)
    present = pair + tl.arange(0, 1) < pairs
    at = x + (pair // slots + tl.arange(0, 1)) * x_stride
    both = 2 * rows
    sums = row_sums(at, present, data, row, rows, both, runs, held, lut, S, DIGITS, 1, ROWS, 2, RUNS, ASM)
    i = tl.arange(0, 2 * ROWS)
    rows_of_sums = tl.minimum(tl.program_id(0) * ROWS + i % ROWS, rows - 1) + i // ROWS * rows
    totals = row_totals(sums, data, rows_of_sums[:, None], both, runs, S)
    gate, up = tl.split(tl.permute(tl.reshape(totals, (1, 2, ROWS)), (0, 2, 1)))
    out = activate(gate, ACTIVATION) * up
    out = tl.where(valid, out, 0.0)
    n = n[None, :]
    tl.store(y + pair * rows + n, out.to(y.dtype.element_ty), mask=(n < rows) & present[:, None])


@triton.jit(do_not_specialize=["pairs", "experts"])
def weighted(
    x,
    data,
    book,
    lut,
    ids,
    weights,
    y,
    pairs,
    rows,
    runs,
    matrix_bytes,
    experts,
    slots,
    S: tl.constexpr,
    DIGITS: tl.constexpr,
    ROWS: tl.constexpr,
    RUNS: tl.constexpr,
    ASM: tl.constexpr,
    AHEAD: tl.constexpr,
):
    """y[t, n] = sum over s < slots of weights[t, s] * (row n of expert ids[t, s]) . x[t, s]; no expert adds nothing.

    One long row for every n: the runs of the first expert, those of the second, and so on, all in flight together.
    """
    if AHEAD:
        follow()
    pair = item_number().to(tl.int64) * slots
    n = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    row = tl.minimum(n, rows - 1)[:, None]
    held = prepare(book, S, ASM)
    lut = prepare_scales(lut, S, ASM)
    present = pair + tl.arange(0, 1) < pairs
    at = x + (pair + tl.arange(0, 1)) * (runs * S.run)
    total = tl.zeros((1, ROWS, RUNS), tl.float32)
    for first in range(0, slots * runs, RUNS):
        run = first + tl.arange(0, RUNS)[None, :]
        slot = tl.minimum(run // runs, slots - 1)
        inside = present[:, None] & (run < slots * runs)
        matrix, valid = matrix_of(data, ids, tl.where(inside, pair + slot, pairs), pairs, matrix_bytes, experts)
        mix = tl.load(weights + pair + slot, mask=inside, other=0.0).to(tl.float32)
        q, step = digits(load_run(at, run, inside, tl.constexpr(S.run), ASM), DIGITS, ASM)
        parts = all_digits(q, DIGITS, ASM)
        sums = all_sums(parts, S, DIGITS, ASM)
        planes = load_planes(matrix, row, tl.minimum(run - slot * runs, runs - 1), rows, runs, S, ASM)
        part = run_products(parts, sums, planes, held, lut, S, DIGITS, ASM) * (step * mix)[:, None, :]
        if S.d_size == 0:
            part *= row_scale(matrix, row, rows, runs, S)[None, :, :]
        total += tl.where(valid[:, None, :], part, 0.0)
    out = tl.sum(total, axis=2) * S.factor
    mask = (n < rows)[None, :] & present[:, None]
    tl.store(y + item_number().to(tl.int64) * rows + n[None, :], out.to(y.dtype.element_ty), mask=mask)


# -- operators -----------------------------------------------------------------------------------------------


def _prepare(x: Tensor, data: Tensor, format: int, rows: int, ids: Tensor, leading: tuple[int, ...]) -> tuple[Layout, int, Tensor]:
    """Layout, K, and activations as rows that the kernels can read."""
    _fmt, plan, k = launch._prepare(x, data, format, rows)
    launch._same_device("expert ids", ids, data)
    if ids.dim() != 2 or tuple(x.shape[:-1]) != leading or data.dim() != 2:
        raise ShapeError(f"activations {tuple(x.shape)}, ids {tuple(ids.shape)} and {data.dim() - 1}-fold experts do not fit together")
    flat = launch._rows_of(x, k)
    return plan, k, flat.float() if x.dtype == torch.float64 else flat


def routed_gated(x: Tensor, data: Tensor, ids: Tensor, format: int, rows: int, activation: str, precision: int) -> Tensor:
    if activation not in ACTIVATIONS:
        raise UnsupportedOperationError(f"no kernel for the activation {activation!r}; there is {', '.join(ACTIVATIONS)}")
    if rows % 2:
        raise ShapeError(f"a gate and an up projection have an even number of rows together, got {rows}")
    plan, k, flat = _prepare(x, data, format, rows, ids, tuple(ids.shape[:1]))
    out = torch.empty((*ids.shape, rows // 2), dtype=flat.dtype, device=x.device)
    s, facts = plan.scheme, launch._facts(x.device)
    runs, pairs = k // s.run, ids.numel()
    if pairs:
        digits = launch._digits(flat.dtype, precision)
        tile = gemv_tile(rows, runs, pairs, facts.processors, s, digits, 1, facts.tile_rows)
        tile_rows = max(tile.rows * tile.passes // 2, 1)  # of the gate, and as many of up
        with launch._on(x.device):
            gated[launch.items_grid(triton.cdiv(rows // 2, tile_rows), pairs)](
                flat, data, *plan.tables(x.device), ids.contiguous(), out, pairs, rows // 2, runs, flat.stride(0),
                data.shape[-1], data.shape[0], ids.shape[1], S=s, ACTIVATION=activation, DIGITS=digits, ROWS=tile_rows, RUNS=tile.runs,
                ASM=facts.asm, AHEAD=facts.ahead, **compiler_options(facts, tile.warps, gemv_registers(facts, s, tile.warps, digits)),
            )  # fmt: skip
    return out.to(x.dtype)


def routed_weighted(x: Tensor, data: Tensor, ids: Tensor, weights: Tensor, format: int, rows: int, precision: int) -> Tensor:
    plan, k, flat = _prepare(x, data, format, rows, ids, tuple(ids.shape))
    launch._same_device("routing weights", weights, data)
    if weights.shape != ids.shape:
        raise ShapeError(f"routing weights {tuple(weights.shape)} for ids {tuple(ids.shape)}")
    out = torch.empty((ids.shape[0], rows), dtype=flat.dtype, device=x.device)
    s, facts = plan.scheme, launch._facts(x.device)
    runs, (tokens, slots) = k // s.run, ids.shape
    if ids.numel():
        digits = launch._digits(flat.dtype, precision)
        tile = gemv_tile(rows, runs * slots, tokens, facts.processors, s, digits, 1, facts.tile_rows)
        tile_rows = max(tile.rows, tile.rows * tile.passes // 2)
        with launch._on(x.device):
            weighted[launch.items_grid(triton.cdiv(rows, tile_rows), tokens)](
                flat.contiguous(), data, *plan.tables(x.device), ids.contiguous(), weights.contiguous(), out, ids.numel(), rows, runs,
                data.shape[-1], data.shape[0], slots, S=s, DIGITS=digits, ROWS=tile_rows, RUNS=tile.runs, ASM=facts.asm,
                AHEAD=facts.ahead, **compiler_options(facts, tile.warps, gemv_registers(facts, s, tile.warps, digits)),
            )  # fmt: skip
    else:
        out.zero_()
    return out.to(x.dtype)
