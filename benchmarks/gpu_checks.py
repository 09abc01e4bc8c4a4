"""The part `correctness` of benchmarks/gpu.py: every kernel against float64 products of the weights decoded by plain torch."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from gpu_jobs import in_words, poisoned
from gpu_plan import Plan
from torch import Tensor

from iqtorch import kernels
from iqtorch.formats import Format, get_format
from iqtorch.kernels import launch
from iqtorch.kernels.layout import layout

EPS = {torch.float32: 2.0**-23, torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7}


def random_blocks(fmt: Format, rows: int, k: int, device: torch.device, seed: int = 0, scale: float = 1e-4) -> Tensor:
    """Random bytes with floats of ordinary size (`scale` to twice that): every pattern of codes, signs and small scales occurs."""
    generator = torch.Generator(device=device).manual_seed(seed)
    blocks = torch.randint(0, 256, (rows, fmt.row_bytes(k)), dtype=torch.uint8, device=device, generator=generator)
    step = max(1, (1 << 24) // k)
    for i in range(0, rows, step):
        parts = fmt.unpack(blocks[i : i + step])
        for name in ("d", "dmin"):
            if name in parts:
                size = scale * (1 + torch.rand(parts[name].shape, device=device, generator=generator))
                if fmt.d_kind == "e8m0":
                    parts[name] = torch.randint(110, 118, parts[name].shape, device=device, dtype=torch.int32, generator=generator)
                elif fmt.d_kind == "f16":
                    parts[name] = size.half().view(torch.int16).to(torch.int32) & 0xFFFF
                else:
                    parts[name] = size.view(torch.int32)
        blocks[i : i + step] = fmt.pack(parts)
    return blocks


def check_product(y: Tensor, x: Tensor, w: Tensor, size: Tensor, dtype: torch.dtype, precision: int, fmt: Format) -> float:
    """Largest error of y as a share of its bound (see docs/gpu.md, "Error bounds")."""
    exact = x.double() @ w.double().T
    sizes = x.double().abs() @ size.double().T
    tokens, run = x.shape[0], layout(fmt).scheme.run
    if tokens <= launch.vector_tokens(dtype):
        top = {1: 127, 2: 32767, 3: 8388544}[launch._digits(dtype, precision)]
        step = x.double().abs().unflatten(1, (-1, run)).amax(-1) / top
        error = 0.505 * step.repeat_interleave(run, 1) @ w.double().abs().T
    elif dtype != torch.float32 and tokens <= launch._fused_up_to(fmt, w.shape[0], w.shape[1], w.device):
        error = sizes * 1.5 * 2.0**-10
    else:
        error = sizes * EPS[dtype]
    error += sizes * 2.0**-19 + EPS[dtype] * exact.abs() + 1e-30
    share = ((y.double() - exact).abs() / error).max()
    return float(share) if torch.isfinite(y).all() else float("inf")


#: A check: kernel, dtype, tokens, precision; and what runs it and gives the largest error as a share of its bound.
Check = tuple[tuple[str, Any, int, int], Callable[[], float]]


def correctness(name: str, plan: Plan) -> Iterator[dict[str, Any]]:
    """The checks of a format, one row each; what fails is a row too, unless it takes the process with it."""
    for part in (checks, large_checks):
        for (kernel, dtype, tokens, precision), call in part(name, plan):
            started, note = time.perf_counter(), ""
            try:
                share = call()
            except Exception as error:
                if poisoned():
                    raise RuntimeError(f"{kernel} {dtype} {tokens} {precision}: {in_words(error)}") from error
                traceback.print_exc()
                share, note = float("inf"), in_words(error)
            yield {
                "format": name, "kernel": kernel, "dtype": str(dtype).removeprefix("torch."), "tokens": tokens, "precision": precision,
                "error_of_bound": f"{share:.4g}", "ok": share <= 1.0, "seconds": f"{time.perf_counter() - started:.2f}", "note": note,
            }  # fmt: skip


def same(a: Tensor, b: Tensor) -> float:
    return 0.0 if torch.equal(a, b) else 9.0


@dataclass
class Case:
    """A matrix of random bytes: packed, decoded, and bounds of the terms of its weights."""

    fmt: Format
    blocks: Tensor
    packed: Tensor
    w: Tensor
    size: Tensor


def case(name: str, rows: int, k: int, device: torch.device) -> Case:
    fmt = get_format(name)
    blocks = random_blocks(fmt, rows, k, device)
    w = fmt.decode(blocks) * fmt.runtime_scale
    low = fmt.scales(fmt.unpack(blocks))[1]
    size = w.abs() if low is None else w.abs() + 2 * low.abs().repeat_interleave(k // low.shape[1], 1)
    return Case(fmt, blocks, layout(fmt).pack(blocks), w, size)


def product(c: Case, x: Tensor, precision: int, rows: int) -> float:
    """Twice, into memory that holds something else: the same bits."""
    y = kernels.linear(x, c.packed, c.fmt, rows, None, precision)
    torch.full_like(y, float("nan"))
    if not torch.equal(y, kernels.linear(x, c.packed, c.fmt, rows, None, precision)):
        return 99.0
    return check_product(y, x, c.w, c.size, x.dtype, precision, c.fmt)


def large_checks(name: str, plan: Plan) -> Iterator[Check]:
    """Products with a matrix for which the kernels have their full tiles."""
    rows, k = plan.checked[1]
    c = case(name, rows, k, plan.device)
    for tokens in plan.large_tokens:
        x = torch.randn(tokens, k, device=plan.device, dtype=torch.bfloat16)
        for precision in (0, 1) if tokens <= launch.vector_tokens(x.dtype) else (0,):
            yield (f"linear {rows}x{k}", x.dtype, tokens, precision), partial(product, c, x, precision, rows)


def checks(name: str, plan: Plan) -> Iterator[Check]:
    """Every operator with a small matrix of an odd number of rows."""
    device, (rows, k) = plan.device, plan.checked[0]
    blocks = random_blocks(get_format(name), rows, k, device)
    fmt = get_format(name)
    yield ("pack", "uint8", 0, 0), lambda: same(kernels.pack(blocks, fmt), layout(fmt).pack(blocks))
    yield ("unpack", "uint8", 0, 0), lambda: same(kernels.unpack(layout(fmt).pack(blocks), fmt, rows, k), blocks)
    c = case(name, rows, k, device)
    w, size = c.w, c.size
    ids = torch.randint(0, rows, (3, 5), device=device)
    experts = torch.stack([c.packed, c.packed, c.packed])
    ends = torch.tensor([3, 3, 90], dtype=torch.int32, device=device)
    chosen, mix = torch.randint(0, 3, (4, 2), device=device), torch.rand(4, 2, device=device)
    even = rows // 2 * 2
    half = kernels.pack(blocks[:even], fmt).expand(3, -1).contiguous()
    for dtype in plan.dtypes:
        if dtype in plan.exact:
            yield ("dequantize", dtype, 0, 0), lambda d=dtype: same(kernels.dequantize(c.packed, fmt, rows, k, d), w.to(d))
            yield ("embedding", dtype, 0, 0), lambda d=dtype: same(kernels.embedding(ids, c.packed, fmt, rows, k, d), w[ids].to(d))
        for tokens in plan.tokens:
            x = torch.randn(tokens, k, device=device, dtype=dtype)
            for precision in (0, 1) if tokens <= launch.vector_tokens(dtype) else (0,):
                yield ("linear", dtype, tokens, precision), partial(product, c, x, precision, rows)
        x = torch.randn(100, k, device=device, dtype=dtype)

        def transposed(x: Tensor = x) -> float:
            g = torch.randn(9, rows, device=device, dtype=x.dtype)
            back, exact = kernels.linear_transposed(g, c.packed, fmt, k), g.double() @ w.double()
            bound = (16 if x.dtype == torch.float32 else 2) * EPS[x.dtype] * (g.double().abs() @ size.double()) + 1e-30
            return float(((back.double() - exact).abs() / bound).max())

        def grouped(x: Tensor = x) -> float:
            y = kernels.grouped_linear(x, experts, ends, fmt, rows, 0)
            if float(y[90:].abs().max()) != 0.0:
                return 99.0
            return check_grouped(y[:90], x[:90], w, size, x.dtype, fmt)

        def routed(x: Tensor = x) -> float:
            y = kernels.routed_linear(x[:4], experts, chosen, fmt, rows, 1).reshape(8, rows)
            return max(check_product(y[i : i + 1], x[i // 2 : i // 2 + 1], w, size, x.dtype, 1, fmt) for i in range(8))

        def weighted(x: Tensor = x) -> float:
            y = kernels.routed_weighted(x[:8].view(4, 2, k), experts, chosen, mix, fmt, rows, 0)
            each, sizes = x[:8].double() @ w.double().T, x[:8].double().abs() @ size.double().T
            exact = (each.view(4, 2, rows) * mix.double()[..., None]).sum(1)
            bound = (2.0**-10 + EPS[x.dtype]) * (sizes.view(4, 2, rows) * mix.double()[..., None]).sum(1) + 1e-30
            return float(((y.double() - exact).abs() / bound).max())

        def gated(x: Tensor = x) -> float:
            y = kernels.routed_gated(x[:4], half, chosen, fmt, even, "silu", 0)[:, 0]
            gate, up = (x[:4].double() @ w[:even].double().T).chunk(2, -1)
            gate_size, up_size = (x[:4].double().abs() @ size[:even].double().T).chunk(2, -1)
            exact = torch.nn.functional.silu(gate) * up
            bound = (2.0**-9 + EPS[x.dtype]) * (gate_size * up.abs() + gate.abs() * up_size + gate_size * up_size * 2.0**-9) + 1e-30
            return float(((y.double() - exact).abs() / bound).max())

        yield ("linear_transposed", dtype, 9, 0), transposed
        yield ("grouped_linear", dtype, 100, 0), grouped
        yield ("routed_linear", dtype, 8, 1), routed
        yield ("routed_weighted", dtype, 8, 0), weighted
        yield ("routed_gated", dtype, 4, 0), gated


def check_grouped(y: Tensor, x: Tensor, w: Tensor, size: Tensor, dtype: torch.dtype, fmt: Format) -> float:
    if dtype == torch.float32:
        return max(check_product(y[i : i + 4], x[i : i + 4], w, size, dtype, 0, fmt) for i in range(0, len(x) - 3, 4))
    return check_product(y, x, w, size, dtype, 0, fmt)
