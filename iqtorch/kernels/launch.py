"""From operators to kernels: shapes, tiles and the closed-form choice of a kernel. No autotuning, no host synchronisation."""

from __future__ import annotations

import dataclasses
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import triton
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from ..errors import BlockSizeError, UnsupportedOperationError
from ..formats import Format, format_by_ggml_type
from . import matrix, vector
from .choices import (
    Device,
    GemmTile,
    GemvTile,
    compiler_options,
    device_facts,
    gemm_tile,
    gemv_registers,
    gemv_tile,
    key,
    power_of_two,
    tuned,
)
from .layout import ALIGN, Layout, layout
from .tuning import Choices

__all__ = ["Device", "GemmTile", "GemvTile", "device_facts", "gemm_tile", "gemv_tile", "key", "layout"]

#: float32 products with up to this many tokens use `gemv`; of 16-bit activations, up to GEMV_GROUP: with more, `gemm` takes fewer
#: instructions in every format (docs/gpu.md).
GEMV_TOKENS = 4
#: Tokens that a program of `gemv` handles together.
GEMV_GROUP = 2
#: Weights dequantized at a time for the large products: bounds the temporary copy (half a GiB in bfloat16).
LARGE_SLICE = 1 << 28
#: Programs along the second and third axis of a grid (CUDA).
MOST_PROGRAMS = 65535


#: Set by `tuning.tune` while it measures: choices instead of the card's.
override: Choices | None = None


def _facts(device: torch.device) -> Device:
    facts = device_facts(device)
    return facts if override is None else dataclasses.replace(facts, tuned=override)


def _on(device: torch.device) -> AbstractContextManager[Any]:
    """Triton launches on the current device."""
    if device.type == "cuda" and device.index is not None and device.index != torch.cuda.current_device():
        return torch.cuda.device(device)
    return nullcontext()


def items_grid(tiles: int, items: int) -> tuple[int, int, int]:
    """Programs for `items` of `tiles` each, along the second axis and, as that has 65535 at most, the third (`vector.item_number`)."""
    layers = -(-items // MOST_PROGRAMS)
    return tiles, -(-items // layers), layers


# -- checks --------------------------------------------------------------------------------------------------


def _prepare(x: Tensor, data: Tensor, format: int, rows: int) -> tuple[Format, Layout, int]:
    """Format, layout and K of a product of `x [..., K]` with a packed matrix.

    Raises:
        UnsupportedOperationError: operands on different devices, or a dtype that is no float.
        BlockSizeError: `data` is not a packed matrix of `rows` rows for this K.
    """
    _same_device("activations", x, data)
    if not x.is_floating_point():
        raise UnsupportedOperationError(
            f"activations must be float32, bfloat16, float16 or float64, got {x.dtype}; convert them with .to(dtype)"
        )
    fmt = format_by_ggml_type(format)
    k = x.shape[-1]
    plan = layout(fmt)
    _check_data(data, plan, rows, k)
    return fmt, plan, k


def _same_device(what: str, tensor: Tensor | None, data: Tensor) -> None:
    if tensor is not None and tensor.device != data.device:
        raise UnsupportedOperationError(f"{what} are on {tensor.device}, the packed weight is on {data.device}; move one with .to(device)")


def _check_data(data: Tensor, plan: Layout, rows: int, k: int) -> None:
    plan.fmt.row_bytes(k)
    if data.shape[-1] != plan.packed_bytes(rows, k):
        raise BlockSizeError(
            f"a packed {plan.fmt.name} matrix [{rows}, {k}] has {plan.packed_bytes(rows, k)} bytes on the GPU, got {data.shape[-1]}; "
            "check the number of features of the activations"
        )
    if not _aligned(data):
        raise UnsupportedOperationError(f"a packed matrix must start at a multiple of {ALIGN} bytes; copy it with .clone()")


def _rows_of(x: Tensor, k: int) -> Tensor:
    """`[..., K]` -> `[M, K]` with neighbouring columns and rows aligned for 16-byte loads; a copy only where strides demand it."""
    flat = x.reshape(-1, k)
    if flat.shape[0] == 0 or (flat.stride(1) == 1 and _aligned(flat)):
        return flat
    return flat.clone(memory_format=torch.contiguous_format)


def _aligned(x: Tensor) -> bool:
    """Rows (of a matrix, or the whole of a vector) start at multiples of 16 bytes."""
    if x.ndim > 1 and x.stride(0) * x.element_size() % ALIGN:
        return False
    if isinstance(x, FakeTensor):  # no memory
        return x.storage_offset() * x.element_size() % ALIGN == 0
    return x.data_ptr() % ALIGN == 0


# -- operators -----------------------------------------------------------------------------------------------


def linear(x: Tensor, data: Tensor, format: int, rows: int, bias: Tensor | None, precision: int) -> Tensor:
    fmt, plan, k = _prepare(x, data, format, rows)
    _same_device("biases", bias, data)
    flat = _rows_of(x, k)
    tokens = flat.shape[0]
    if tokens == 0:
        return x.new_empty((*x.shape[:-1], rows))
    if bias is not None:
        bias = bias.contiguous()
    with _on(x.device):
        if tokens <= vector_tokens(x.dtype) and x.dtype != torch.float64:
            out = _gemv(flat, data, plan, rows, bias, precision)
        elif tokens <= _fused_up_to(fmt, rows, k, x.device) and x.dtype in (torch.float16, torch.bfloat16):
            out = _gemm(flat, data, plan, rows, bias)
        else:
            out = _large(flat, data, fmt, rows, bias)
    return out.reshape(*x.shape[:-1], rows)


def _fused_up_to(fmt: Format, rows: int, k: int, device: torch.device) -> int:
    """Tokens above which dequantizing the matrix is faster."""
    facts = _facts(device)
    return facts.tuned.get(key("large", fmt.name, rows, k, 0), {}).get("above", facts.fused_tokens)


def vector_tokens(dtype: torch.dtype) -> int:
    """Products with up to this many tokens use `gemv`."""
    return GEMV_TOKENS if dtype == torch.float32 else GEMV_GROUP


def _digits(dtype: torch.dtype, precision: int) -> int:
    """Int8 digits per activation: one if rounding to 8 bits is allowed; two carry the 8 or 11 bits of a 16-bit float, three float32."""
    return 1 if precision else 3 if dtype == torch.float32 else 2


def _gemv(
    x: Tensor, data: Tensor, plan: Layout, rows: int, bias: Tensor | None, precision: int, ids: Tensor | None = None, mode: str = "one"
) -> Tensor:
    """Vector products: all tokens with one matrix, or each with the matrix that `ids` names (see `vector.gemv`)."""
    s, facts = plan.scheme, _facts(x.device)
    runs = x.shape[1] // s.run
    tokens, per_token = x.shape[0], 1
    if mode == "ids" and ids is not None:
        tokens, per_token = ids.numel(), ids.numel() // x.shape[0]
    group = min(power_of_two(tokens), GEMV_GROUP) if mode == "one" else 1
    digits = _digits(x.dtype, precision)
    tile = gemv_tile(rows, runs, -(-tokens // group), facts.processors, s, digits, group, facts.tile_rows)
    if mode == "one":
        tile = tuned(tile, facts, "gemv", plan.fmt.name, rows, x.shape[1], group, digits)
    book, lut = plan.tables(x.device)
    experts = data.shape[0] if data.ndim > 1 else 1
    out = torch.empty((tokens, rows), dtype=x.dtype, device=x.device)
    vector.gemv[items_grid(triton.cdiv(rows, tile.rows * tile.passes), triton.cdiv(tokens, group))](
        x, data, book, lut, bias, ids, out, tokens, rows, runs, x.stride(0), data.shape[-1], experts, per_token,
        S=s, MODE=mode, DIGITS=digits, TOKENS=group, ROWS=tile.rows, PASSES=tile.passes, RUNS=tile.runs,
        EP=power_of_two(experts), ASM=facts.asm, AHEAD=facts.ahead,
        **compiler_options(facts, tile.warps, gemv_registers(facts, s, tile.warps, digits, group)),
    )  # fmt: skip
    return out


def _gemm(x: Tensor, data: Tensor, plan: Layout, rows: int, bias: Tensor | None, offsets: Tensor | None = None) -> Tensor:
    """Matrix products on tensor cores; with `offsets`, each row of x with its expert's matrix."""
    s, facts = plan.scheme, _facts(x.device)
    tokens, k = x.shape
    runs = k // s.run
    steps = -(-runs // 4)
    k_padded = 4 * s.run * steps
    experts = data.shape[0] if offsets is not None else 1
    tile = gemm_tile(rows, -(-tokens // experts), steps, facts.processors, facts.tile_tokens)
    if offsets is None:
        tile = tuned(tile, facts, "gemm", plan.fmt.name, rows, k, power_of_two(tokens))
    split = min(tile.split, steps) if offsets is None else 1
    xs = torch.empty((tokens, k_padded), dtype=torch.float16, device=x.device)
    scale = torch.empty((tokens,), dtype=torch.float32, device=x.device)
    block = min(power_of_two(k_padded), 16384)
    warps = max(min(block // 512, 16), 1)
    matrix.stage[(tokens,)](
        x, xs, scale, tokens, k, x.stride(0), k_padded, RUN=s.run, BLOCK=block, ONCE=block >= k_padded, FRAGMENT=facts.fragments,
        AHEAD=facts.ahead, **compiler_options(facts, warps),
    )  # fmt: skip
    out = (torch.zeros if offsets is not None else torch.empty)((tokens, rows), dtype=x.dtype, device=x.device)
    parts = out if split == 1 else torch.empty((split, tokens, rows), dtype=torch.float32, device=x.device)
    # Without the ends on the host: every expert may end with one tile that is not full.
    token_tiles = triton.cdiv(tokens, tile.tokens) + (experts if offsets is not None else 0)
    book, lut = plan.tables(x.device)
    row_tiles = triton.cdiv(rows, tile.rows)
    matrix.gemm[(row_tiles, token_tiles, split) if offsets is None else items_grid(row_tiles, token_tiles)](
        xs, scale, data, book, lut, bias if split == 1 else None, offsets, parts, tokens, rows, runs, k_padded, data.shape[-1], experts,
        split, S=s, GROUPED=offsets is not None, BN=tile.rows, BM=tile.tokens, EP=power_of_two(experts),
        FRAGMENT=facts.fragments, ASM=facts.asm, AHEAD=facts.ahead, num_stages=tile.stages, **compiler_options(facts, tile.warps),
    )  # fmt: skip
    if split > 1:
        count = tokens * rows
        matrix.combine[(triton.cdiv(count, 512),)](
            parts, bias, out, count, rows, split, BLOCK=512, AHEAD=facts.ahead, **compiler_options(facts, 4),
        )  # fmt: skip
    return out


def _large(x: Tensor, data: Tensor, fmt: Format, rows: int, bias: Tensor | None) -> Tensor:
    """Dequantize a slice of rows in the dtype of x, then torch.mm."""
    out = torch.empty((x.shape[0], rows), dtype=x.dtype, device=x.device)
    plan, k = layout(fmt), x.shape[1]
    for lo, hi in _large_slices(rows, k):
        w = _weights(data, plan, rows, k, x.dtype, lo, hi)
        if bias is None:
            torch.mm(x, w.t(), out=out[:, lo:hi])
        else:
            torch.addmm(bias[lo:hi].to(x.dtype), x, w.t(), out=out[:, lo:hi])
    return out


def _large_slices(rows: int, k: int) -> list[tuple[int, int]]:
    step = max(1, LARGE_SLICE // k)
    return [(i, min(i + step, rows)) for i in range(0, rows, step)]


def linear_transposed(g: Tensor, data: Tensor, format: int, k: int) -> Tensor:
    fmt = format_by_ggml_type(format)
    rows = g.shape[-1]
    _prepare_transposed(g, data, fmt, rows, k)
    flat = g.reshape(-1, rows)
    plan = layout(fmt)
    with _on(g.device):
        slices = _large_slices(rows, k)
        if len(slices) == 1:
            out = flat @ _weights(data, plan, rows, k, g.dtype, 0, rows)
        else:
            total = torch.zeros((flat.shape[0], k), dtype=torch.promote_types(g.dtype, torch.float32), device=g.device)
            for lo, hi in slices:
                total += flat[:, lo:hi] @ _weights(data, plan, rows, k, g.dtype, lo, hi)
            out = total.to(g.dtype)
    return out.reshape(*g.shape[:-1], k)


def _prepare_transposed(g: Tensor, data: Tensor, fmt: Format, rows: int, k: int) -> None:
    _same_device("gradients", g, data)
    _check_data(data, layout(fmt), rows, k)


def _weights(data: Tensor, plan: Layout, rows: int, k: int, dtype: torch.dtype, lo: int, hi: int) -> Tensor:
    """Rows lo .. hi of one matrix as `[hi - lo, K]`."""
    ids = None if (lo, hi) == (0, rows) else torch.arange(lo, hi, device=data.device)
    return _decode(data, plan, rows, k, dtype, hi - lo, ids)


def _decode(data: Tensor, plan: Layout, rows: int, k: int, dtype: torch.dtype, count: int, ids: Tensor | None) -> Tensor:
    """`count` rows of each matrix in `data [..., packed_bytes]`: `[..., count, K]`."""
    s, facts = plan.scheme, _facts(data.device)
    runs = k // s.run
    matrices = data.numel() // data.shape[-1]
    wanted = torch.float32 if dtype == torch.float64 else dtype
    out = torch.empty((*data.shape[:-1], count, k), dtype=wanted, device=data.device)
    if out.numel():
        # 64 runs for 128 threads: the fastest of 34 tiles on an H200, by a quarter
        tile_runs = min(power_of_two(runs), 64)
        tile_rows = 64 // tile_runs
        book, lut = plan.tables(data.device)
        matrix.dequantize[(triton.cdiv(runs, tile_runs) * triton.cdiv(count, tile_rows), matrices)](
            data, book, lut, ids, out, count, rows, runs, data.shape[-1],
            S=s, ROWS=tile_rows, RUNS=tile_runs, ASM=facts.asm, num_warps=4, enable_fp_fusion=False,
        )  # fmt: skip
    return out.to(dtype)


def dequantize(data: Tensor, format: int, rows: int, k: int, dtype: torch.dtype) -> Tensor:
    plan = layout(format_by_ggml_type(format))
    _check_data(data, plan, rows, k)
    with _on(data.device):
        return _decode(data, plan, rows, k, dtype, rows, None)


def embedding(ids: Tensor, data: Tensor, format: int, rows: int, k: int, dtype: torch.dtype) -> Tensor:
    plan = layout(format_by_ggml_type(format))
    _check_data(data, plan, rows, k)
    _same_device("ids", ids, data)
    flat = ids.reshape(-1)
    if flat.device.type == "cpu" and flat.numel() and (int(flat.min()) < 0 or int(flat.max()) >= rows):
        raise IndexError(f"embedding ids must be in 0 .. {rows - 1}, got {int(flat.min())} .. {int(flat.max())}")
    with _on(data.device):
        return _decode(data, plan, rows, k, dtype, flat.numel(), flat.contiguous()).reshape(*ids.shape, k)


def grouped_linear(x: Tensor, data: Tensor, offsets: Tensor, format: int, rows: int, precision: int) -> Tensor:
    _fmt, plan, k = _prepare(x, data, format, rows)
    _same_device("offsets", offsets, data)
    flat = _rows_of(x, k)
    tokens, experts = flat.shape[0], data.shape[0]
    if tokens == 0:
        return x.new_empty((0, rows))
    ends = offsets.to(torch.int32).contiguous()
    with _on(x.device):
        if x.dtype in (torch.float16, torch.bfloat16) and tokens > GEMV_TOKENS * min(experts, 16):
            return _gemm(flat, data, plan, rows, None, ends)
        wide = flat.float() if x.dtype == torch.float64 else flat
        return _gemv(wide, data, plan, rows, None, precision, ends, "sorted").to(x.dtype)


def routed_linear(x: Tensor, data: Tensor, ids: Tensor, format: int, rows: int, precision: int) -> Tensor:
    _fmt, plan, k = _prepare(x, data, format, rows)
    _same_device("expert ids", ids, data)
    flat = _rows_of(x, k)
    if ids.numel() == 0 or flat.shape[0] == 0:
        return x.new_empty((*ids.shape, rows))
    if ids.numel() % flat.shape[0]:
        raise UnsupportedOperationError(f"{ids.numel()} expert ids cannot be shared by {flat.shape[0]} rows of activations")
    with _on(x.device):
        wide = flat.float() if x.dtype == torch.float64 else flat
        out = _gemv(wide, data, plan, rows, None, precision, ids.reshape(-1).contiguous(), "ids")
        return out.to(x.dtype).reshape(*ids.shape, rows)
