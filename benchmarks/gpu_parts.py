"""The timed parts of benchmarks/gpu.py, each for one format: functions that yield rows, run as jobs (gpu_jobs.py)."""

from __future__ import annotations

import contextlib
import fcntl
import tempfile
import time
from collections.abc import Iterator
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import torch
from gpu_checks import case, check_product, random_blocks
from gpu_jobs import in_words, poisoned
from gpu_model import Model
from gpu_plan import Plan
from torch import Tensor

import iqtorch
from iqtorch import kernels
from iqtorch.formats import get_format
from iqtorch.kernels import launch
from iqtorch.kernels.layout import layout
from iqtorch.kernels.timing import copies_of, microseconds, synchronize


@contextlib.contextmanager
def turn(kind: int) -> Iterator[None]:
    """Jobs that prepare themselves (`LOCK_SH`) do so beside each other; one that measures (`LOCK_EX`) has the card alone."""
    with (Path(tempfile.gettempdir()) / "iqtorch-gpu-benchmark.lock").open("w") as file:
        fcntl.flock(file, kind)
        yield


@cache
def copy_bandwidth(device: torch.device, size: int) -> float:
    """Bytes per second of reading and writing of a large device copy by a kernel (a plain copy would be the copy engine's in a graph)."""
    source = torch.randn(size // 4, device=device)
    target = torch.empty_like(source)
    return 2 * size / (microseconds(lambda i: torch.mul(source, 1.5, out=target), 1, device) * 1e-6)


@cache
def dense_time(device: torch.device, rows: int, k: int, tokens: int) -> float:
    """Microseconds of the product in bfloat16 by cuBLAS."""
    dense = torch.randn(copies_of(2 * rows * k, device), rows, k, device=device, dtype=torch.bfloat16)
    x = torch.randn(tokens, k, device=device, dtype=torch.bfloat16)
    return microseconds(lambda i: torch.mm(x, dense[i].t()), len(dense), device)


def conditions(plan: Plan) -> Iterator[dict[str, Any]]:
    """What a reader of the figures must know; the first job, which shows whether anything runs."""
    bandwidth = copy_bandwidth(plan.device, plan.copy_bytes)
    card = torch.cuda.get_device_properties(0) if plan.device.type == "cuda" else None
    yield {
        "card": card.name if card else "none: REHEARSAL in the interpreter, these are no timings",
        "processors": card.multi_processor_count if card else 0, "GiB": card.total_memory >> 30 if card else 0,
        "L2_MiB": card.L2_cache_size >> 20 if card else 0, "copy_GB/s": f"{bandwidth / 1e9:.1f}",
    }  # fmt: skip


def linear_times(name: str, plan: Plan, shapes: tuple[tuple[int, int], ...], counts: tuple[int, ...]) -> Iterator[dict[str, Any]]:
    """Products of a format, each checked, then timed."""
    fmt, bandwidth = get_format(name), copy_bandwidth(plan.device, plan.copy_bytes)
    for rows, k in shapes:
        c = case(name, rows, k, plan.device)
        data = c.packed.expand(copies_of(c.packed.numel(), plan.device), -1).contiguous()
        for tokens in counts:
            x = torch.randn(tokens, k, device=plan.device, dtype=torch.bfloat16)
            for precision in (0, 1) if tokens <= launch.vector_tokens(x.dtype) else (0,):
                row: dict[str, Any] = {
                    "format": name, "bpw": f"{fmt.bits_per_weight(k):.3f}", "rows": rows, "k": k, "tokens": tokens,
                    "precision": ("float", "int8")[precision], "us": "", "GB/s": "", "share_of_copy_bandwidth": "", "TFLOPS": "",
                    "cublas_bf16_us": "", "speedup": "", "first_call_s": "", "error_of_bound": "", "ok": False, "note": "",
                }  # fmt: skip
                try:
                    started = time.perf_counter()
                    y = kernels.linear(x, data[0], fmt, rows, None, precision)
                    synchronize(plan.device)
                    row["first_call_s"] = f"{time.perf_counter() - started:.2f}"
                    error = check_product(y, x, c.w, c.size, x.dtype, precision, fmt)
                    row["error_of_bound"], row["ok"] = f"{error:.3f}", error <= 1.0

                    def call(i: int, x: Tensor = x, data: Tensor = data, rows: int = rows, precision: int = precision) -> Tensor:
                        return kernels.linear(x, data[i], fmt, rows, None, precision)

                    us = microseconds(call, len(data), plan.device)
                    dense = dense_time(plan.device, rows, k, tokens)
                    row |= {
                        "us": f"{us:.2f}", "GB/s": f"{c.packed.numel() / us / 1e3:.0f}",
                        "share_of_copy_bandwidth": f"{c.packed.numel() / us * 1e6 / bandwidth:.3f}",
                        "TFLOPS": f"{2 * rows * k * tokens / us / 1e6:.1f}",
                        "cublas_bf16_us": f"{dense:.2f}", "speedup": f"{dense / us:.3f}",
                    }  # fmt: skip
                except Exception as error:
                    if poisoned():
                        raise
                    row |= {"note": in_words(error), "ok": False}
                yield row


def expert_times(name: str, plan: Plan) -> Iterator[dict[str, Any]]:
    """A layer of experts, gate and up, activation, down and routing weights: packed against bfloat16 fused in Triton."""
    import gpu_experts

    experts, top, inner, hidden = plan.experts
    dense = [
        torch.randn(experts, n, k, device=plan.device, dtype=torch.bfloat16) / k**0.5 for n, k in ((2 * inner, hidden), (hidden, inner))
    ]
    fmt = get_format(name)
    gate_up, down = (
        kernels.pack(random_blocks(fmt, n, k, plan.device), fmt).expand(experts, -1).contiguous()
        for n, k in ((2 * inner, hidden), (hidden, inner))
    )
    for tokens in plan.expert_tokens:
        # another routing for every replay: the experts of one would stay in cache
        x = torch.randn(tokens, hidden, device=plan.device, dtype=torch.bfloat16)
        routes = [torch.rand(tokens, experts, device=plan.device).topk(top).indices for _ in range(plan.routes)]
        mix = torch.rand(tokens, top, device=plan.device)

        def fused(i: int, x: Tensor = x, routes: list[Tensor] = routes, mix: Tensor = mix) -> Tensor:
            h = kernels.routed_gated(x, gate_up, routes[i], fmt, 2 * inner, "silu", 1)
            return kernels.routed_weighted(h, down, routes[i], mix, fmt, hidden, 1)

        def grouped(i: int, x: Tensor = x, routes: list[Tensor] = routes, mix: Tensor = mix) -> Tensor:
            chosen, order = torch.sort(routes[i].reshape(-1))
            ends = torch.searchsorted(chosen, torch.arange(experts, device=plan.device), right=True).to(torch.int32)
            y = kernels.grouped_linear(x[order // top], gate_up, ends, fmt, 2 * inner, 1)
            gate, up = y.chunk(2, -1)
            y = kernels.grouped_linear(torch.nn.functional.silu(gate) * up, down, ends, fmt, hidden, 1)
            return (y[order.argsort()].view(len(x), top, hidden) * mix[..., None]).sum(1)

        base = microseconds(lambda i, x=x, r=routes, m=mix: gpu_experts.experts(x, dense[0], dense[1], r[i], m), len(routes), plan.device)
        for kernel, call in (("fused", fused), ("grouped", grouped)):
            if kernel == "fused" and tokens * top > 1024:
                continue  # every pair reads its expert again
            us = microseconds(call, len(routes), plan.device)
            yield {
                "format": name, "experts": experts, "top": top, "inner": inner, "hidden": hidden, "tokens": tokens, "kernel": kernel,
                "us": f"{us:.2f}", "bf16_triton_us": f"{base:.2f}", "speedup": f"{base / us:.3f}",
            }  # fmt: skip


def pack_times(name: str, plan: Plan) -> Iterator[dict[str, Any]]:
    """Canonical bytes -> device layout and back: the third call of each, after those that compile and warm up."""
    (rows, k), fmt = plan.shapes[0], get_format(name)
    blocks = random_blocks(fmt, rows, k, plan.device)
    seconds: list[list[float]] = []
    for _ in range(3):
        times = [time.perf_counter()]
        packed = kernels.pack(blocks, fmt)
        synchronize(plan.device)
        times.append(time.perf_counter())
        back = kernels.unpack(packed, fmt, rows, k)
        synchronize(plan.device)
        times.append(time.perf_counter())
        seconds.append([times[1] - times[0], times[2] - times[1]])
    there, again = seconds[-1]
    yield {
        "format": name, "rows": rows, "k": k, "pack_ms": f"{there * 1e3:.2f}", "pack_GB/s": f"{blocks.numel() / there / 1e9:.2f}",
        "unpack_ms": f"{again * 1e3:.2f}", "bytes_ratio": f"{packed.numel() / blocks.numel():.4f}",
        "first_s": f"{sum(seconds[0]):.2f}", "ok": torch.equal(back, blocks),
    }  # fmt: skip


def tile_times(name: str, tokens: int, option: dict[str, int], plan: Plan) -> Iterator[dict[str, Any]]:
    """One other tile than the closed-form choice (`{}`: that), for the largest matrix: what `iqtorch bench --tune` tries."""
    (rows, k), fmt = plan.shapes[0], get_format(name)
    data, x = tile_operands(name, rows, k, plan.device), torch.randn(tokens, k, device=plan.device, dtype=torch.bfloat16)
    vector = tokens <= launch.vector_tokens(x.dtype)
    kernel, key = ("gemv", launch.key("gemv", name, rows, k, tokens, 1)) if vector else ("gemm", launch.key("gemm", name, rows, k, tokens))
    launch.override = {key: option} if option else {}
    us, note = float("nan"), ""
    try:
        us = microseconds(lambda i: kernels.linear(x, data[i], fmt, rows, None, 1), len(data), plan.device)
    except Exception as error:  # registers or shared memory do not suffice
        if poisoned():
            raise
        note = in_words(error)
    finally:
        launch.override = None
    yield {
        "format": name, "rows": rows, "k": k, "tokens": tokens, "kernel": kernel,
        "tile": " ".join(f"{field} {value}" for field, value in option.items()) or "closed form", "us": f"{us:.2f}",
        "share_of_copy_bandwidth": f"{data.shape[1] / us * 1e6 / copy_bandwidth(plan.device, plan.copy_bytes):.3f}", "note": note,
    }  # fmt: skip


@lru_cache(maxsize=1)
def tile_operands(name: str, rows: int, k: int, device: torch.device) -> Tensor:
    """Rotating copies of a packed matrix."""
    fmt = get_format(name)
    packed = layout(fmt).pack(random_blocks(fmt, rows, k, device))
    return packed.expand(copies_of(packed.numel(), device), -1).contiguous()


@torch.no_grad()
def model_times(name: str, plan: Plan) -> Iterator[dict[str, Any]]:
    """A Llama-8B-shaped model with weights of a format (or `bf16`), in CUDA graphs: decoding of one sequence (compiled), and a prompt."""
    shape, dtype, device = plan.model, torch.bfloat16, plan.device
    made: dict[tuple[int, int], Tensor] = {}

    def packed(rows: int, k: int) -> Tensor:
        fmt = get_format(name)
        if (rows, k) not in made:
            # as large as the plain ones: with larger ones attention is a choice of one position, and small errors decide which
            deviation = float((fmt.decode(random_blocks(fmt, 64, k, device)) * fmt.runtime_scale).std())
            made[rows, k] = layout(fmt).pack(random_blocks(fmt, rows, k, device, scale=1e-4 / deviation / k**0.5))
        return iqtorch.IQTensor(made[rows, k].clone(), fmt, "triton", (rows, k), dtype)

    def dense(rows: int, k: int) -> Tensor:
        return torch.randn(rows, k, device=device, dtype=dtype) / k**0.5

    with turn(fcntl.LOCK_SH):
        model = Model(shape, dense if name == "bf16" else packed, device, dtype)
        prompt = torch.randint(0, shape.vocabulary, (plan.prompt,), device=device)
        started = time.perf_counter()
        # a prompt's activations are floats; decoding is compared with it in floats too, and timed with 8-bit ones
        iqtorch.set_activation_precision("float")
        whole = model.forward(prompt, 0).float()
        model.forward(prompt[:-1], 0)
        alone = model.forward(prompt[-1:], plan.prompt - 1).float()
        iqtorch.set_activation_precision("int8")
        plain = model.forward(prompt[-1:], plan.prompt - 1).float()
        model.compile(**plan.compile_model)
        compiled = model.forward(prompt[-1:], plan.prompt - 1).float()
        error, other = (float((a - b).norm() / b.norm()) for a, b in ((alone, whole), (compiled, plain)))
    with turn(fcntl.LOCK_EX):
        prefill = microseconds(lambda i: model.plain(prompt, 0), 1, device)
        for past in plan.pasts:
            decode = microseconds(lambda i, past=past: model.forward(prompt[-1:], past), 1, device)
            yield {
                "format": name, "layers": shape.layers, "hidden": shape.hidden, "past": past, "decode_us": f"{decode:.1f}",
                "decode_tokens_per_s": f"{1e6 / decode:.1f}", "prompt": plan.prompt, "prefill_us": f"{prefill:.1f}",
                "prefill_tokens_per_s": f"{plan.prompt * 1e6 / prefill:.0f}", "decoded_against_prompt": f"{error:.4f}",
                "compiled_against_plain": f"{other:.4f}", "ok": error < 0.1 and other < 0.03,
                "seconds": f"{time.perf_counter() - started:.1f}",
            }  # fmt: skip


@torch.no_grad()
def graph_trees(name: str, plan: Plan) -> Iterator[dict[str, Any]]:
    """A small model compiled with `mode="reduce-overhead"`, whose tables and kernels nothing has used before: the same as eagerly."""
    fmt, dtype, device = get_format(name), torch.bfloat16, plan.device
    k = min(512, plan.shapes[0][1])

    class Block(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            for i in range(3):
                weight = iqtorch.IQTensor(kernels.pack(random_blocks(fmt, k, k, device, i), fmt), fmt, "triton", (k, k), dtype)
                self.register_parameter(f"w{i}", torch.nn.Parameter(weight, requires_grad=False))
            self.register_buffer("cache", torch.zeros(4, k, dtype=dtype, device=device))

        def forward(self, x: Tensor) -> Tensor:
            for w in (self.w0, self.w1, self.w2):
                x = torch.nn.functional.rms_norm(torch.nn.functional.linear(x, w), (k,))
            self.cache.mul_(0.5).add_(x)
            return x + self.cache.sum(0)

    block = Block()
    for tokens in (1, 16):
        block.cache = torch.zeros(4 if tokens == 1 else tokens, k, dtype=dtype, device=device)
        step = torch.compile(block, fullgraph=True, dynamic=False, **plan.compile_decode)
        inputs = [torch.randn(tokens, k, dtype=dtype, device=device) for _ in range(5)]
        found = []
        for x in inputs:
            if device.type == "cuda":
                torch.compiler.cudagraph_mark_step_begin()
            found.append(step(x).clone())
        block.cache.zero_()
        error = max(float((a - block(x)).abs().max() / a.abs().max()) for a, x in zip(found, inputs, strict=True))
        yield {"format": name, "tokens": tokens, "difference": f"{error:.4f}", "ok": error < 0.02}
