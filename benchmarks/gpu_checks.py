"""The part `correctness` of benchmarks/gpu.py: every kernel against float64 products of the weights decoded by plain torch."""

from __future__ import annotations

import concurrent.futures
import multiprocessing
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from gpu_plan import DTYPES, Plan
from torch import Tensor

from iqtorch import kernels
from iqtorch.formats import Format, get_format
from iqtorch.kernels import launch
from iqtorch.kernels.layout import layout

EPS = {torch.float32: 2.0**-23, torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7}


def random_blocks(fmt: Format, rows: int, k: int, device: torch.device, seed: int = 0) -> Tensor:
    """Random bytes with scales of ordinary size, on the GPU: every bit pattern of codes, signs and small scales occurs."""
    generator = torch.Generator(device=device).manual_seed(seed)
    blocks = torch.randint(0, 256, (rows, fmt.row_bytes(k)), dtype=torch.uint8, device=device, generator=generator)
    step = max(1, (1 << 24) // k)
    for i in range(0, rows, step):
        parts = fmt.unpack(blocks[i : i + step])
        for name in ("d", "dmin"):
            if name in parts:
                size = 1e-4 * (1 + torch.rand(parts[name].shape, device=device, generator=generator))
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


def correctness(names: list[str], plan: Plan) -> Iterator[dict[str, Any]]:
    """The checks of the formats, each in a process of its own, several at a time."""
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(min(plan.workers, len(names)), context) as pool:
        waiting = {pool.submit(checks_of, name, plan): name for name in names}
        try:
            left = plan.deadline - 0.3 * plan.seconds - time.time()
            for done in concurrent.futures.as_completed(waiting, None if left == float("inf") else max(left, 0.0)):
                yield from done.result()
        except concurrent.futures.TimeoutError:
            print(f"time is over: unchecked {[name for job, name in waiting.items() if not job.done()]}")
            for process in list(pool._processes.values()):
                process.terminate()


def checks_of(name: str, plan: Plan) -> list[dict[str, Any]]:
    try:
        return [*checks(name, plan), *large_checks(name, plan)]
    except Exception as error:
        traceback.print_exc()
        failed = {"kernel": f"{type(error).__name__}: {error}"[:300].replace("\n", " "), "dtype": "", "tokens": 0, "precision": 0}
        return [{"format": name, **failed, "error_of_bound": "", "ok": False}]


def check_row(name: str, kernel: str, dtype: Any, tokens: int, precision: int, share: float) -> dict[str, Any]:
    return {
        "format": name, "kernel": kernel, "dtype": str(dtype), "tokens": tokens, "precision": precision,
        "error_of_bound": f"{share:.4g}", "ok": share <= 1.0,
    }  # fmt: skip


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
    return Case(fmt, blocks, kernels.pack(blocks, fmt), w, size)


def large_checks(name: str, plan: Plan) -> Iterator[dict[str, Any]]:
    """Products with a matrix for which the kernels have their full tiles."""
    rows, k = plan.checked[1]
    c = case(name, rows, k, plan.device)
    for tokens in plan.large_tokens:
        x = torch.randn(tokens, k, device=plan.device, dtype=torch.bfloat16)
        for precision in (0, 1) if tokens <= launch.vector_tokens(x.dtype) else (0,):
            y = kernels.linear(x, c.packed, c.fmt, rows, None, precision)
            share = check_product(y, x, c.w, c.size, x.dtype, precision, c.fmt)
            yield check_row(name, f"linear {rows}x{k}", x.dtype, tokens, precision, share)


def checks(name: str, plan: Plan) -> Iterator[dict[str, Any]]:
    rows, k = plan.checked[0]
    for c in (case(name, rows, k, plan.device),):
        fmt, blocks, packed, w, size = c.fmt, c.blocks, c.packed, c.w, c.size

        def row(kernel: str, dtype: Any, tokens: int, precision: int, share: float) -> dict[str, Any]:
            return check_row(name, kernel, dtype, tokens, precision, share)

        same = torch.equal(packed, layout(fmt).pack(blocks)) and torch.equal(kernels.unpack(packed, fmt, rows, k), blocks)
        yield row("pack", "uint8", 0, 0, 0.0 if same else 9.0)
        for dtype in DTYPES:
            if dtype in plan.exact:
                same = torch.equal(kernels.dequantize(packed, fmt, rows, k, dtype), w.to(dtype))
                yield row("dequantize", dtype, 0, 0, 0.0 if same else 9.0)
                ids = torch.randint(0, rows, (3, 5), device=plan.device)
                same = torch.equal(kernels.embedding(ids, packed, fmt, rows, k, dtype), w[ids].to(dtype))
                yield row("embedding", dtype, 0, 0, 0.0 if same else 9.0)
            for tokens in plan.tokens:
                x = torch.randn(tokens, k, device=plan.device, dtype=dtype)
                for precision in (0, 1):
                    y = kernels.linear(x, packed, fmt, rows, None, precision)
                    yield row("linear", dtype, tokens, precision, check_product(y, x, w, size, dtype, precision, fmt))
                    again = kernels.linear(x, packed, fmt, rows, None, precision)
                    if not torch.equal(y, again):
                        yield row("linear: not deterministic", dtype, tokens, precision, 9.0)
            g = torch.randn(9, rows, device=plan.device, dtype=dtype)
            back, exact = kernels.linear_transposed(g, packed, fmt, k), g.double() @ w.double()
            bound = (16 if dtype == torch.float32 else 2) * EPS[dtype] * (g.double().abs() @ size.double()) + 1e-30
            yield row("linear_transposed", dtype, 9, 0, float(((back.double() - exact).abs() / bound).max()))
            experts = torch.stack([packed, packed, packed])
            ends = torch.tensor([3, 3, 90], dtype=torch.int32, device=plan.device)
            x = torch.randn(100, k, device=plan.device, dtype=dtype)
            y = kernels.grouped_linear(x, experts, ends, fmt, rows, 0)
            # the same bound as a dense product of more than GEMV_TOKENS tokens, unless float32 (three digits)
            share = check_grouped(y[:90], x[:90], w, size, dtype, fmt)
            yield row("grouped_linear", dtype, 100, 0, share if bool((y[90:] == 0).all()) else 9.0)
            chosen = torch.randint(0, 3, (4, 2), device=plan.device)
            y = kernels.routed_linear(x[:4], experts, chosen, fmt, rows, 1).reshape(8, rows)
            yield row(
                "routed_linear",
                dtype,
                8,
                1,
                max(check_product(y[i : i + 1], x[i // 2 : i // 2 + 1], w, size, dtype, 1, fmt) for i in range(8)),
            )
            mix = torch.rand(4, 2, device=plan.device)
            y = kernels.routed_weighted(x[:8].view(4, 2, k), experts, chosen, mix, fmt, rows, 0)
            each, sizes = x[:8].double() @ w.double().T, x[:8].double().abs() @ size.double().T
            exact = (each.view(4, 2, rows) * mix.double()[..., None]).sum(1)
            bound = (2.0**-10 + EPS[dtype]) * (sizes.view(4, 2, rows) * mix.double()[..., None]).sum(1) + 1e-30
            yield row("routed_weighted", dtype, 8, 0, float(((y.double() - exact).abs() / bound).max()))
            even = rows // 2 * 2
            part = kernels.pack(blocks[:even], fmt).expand(3, -1).contiguous()
            y = kernels.routed_gated(x[:4], part, chosen, fmt, even, "silu", 0)[:, 0]
            gate, up = (x[:4].double() @ w[:even].double().T).chunk(2, -1)
            gate_size, up_size = (x[:4].double().abs() @ size[:even].double().T).chunk(2, -1)
            exact = torch.nn.functional.silu(gate) * up
            bound = (2.0**-9 + EPS[dtype]) * (gate_size * up.abs() + gate.abs() * up_size + gate_size * up_size * 2.0**-9) + 1e-30
            yield row("routed_gated", dtype, 4, 0, float(((y.double() - exact).abs() / bound).max()))


def check_grouped(y: Tensor, x: Tensor, w: Tensor, size: Tensor, dtype: torch.dtype, fmt: Format) -> float:
    if dtype == torch.float32:
        return max(check_product(y[i : i + 4], x[i : i + 4], w, size, dtype, 0, fmt) for i in range(0, len(x) - 3, 4))
    return check_product(y, x, w, size, dtype, 0, fmt)
