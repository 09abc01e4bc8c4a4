"""Checks every GPU kernel, then times it: `python benchmarks/gpu.py --out results/`. One NVIDIA or AMD GPU, no network, no model.

    linear        N = K = 8192 and other shapes: microseconds, GB/s of packed bytes, share of the copy bandwidth, ratio to cuBLAS bf16
    correctness   every format x activation dtype x M, against float64 products of the weights decoded by plain torch
    experts       top 8 of 128, gate and up to routing weights, against bfloat16 experts fused in Triton (gpu_experts.py)
    model         Llama-8B-shaped: compiled decoding and a prompt of 2048 tokens, against bfloat16 (gpu_model.py)
    pack          canonical bytes -> device layout and back
    tiles         the vector and the matrix kernel with other tiles than the closed-form choice
    aims          what was asked for beside what was measured

Each part writes a CSV whose first lines are the conditions, row by row, so that a run that is cut off keeps what it has. The most
telling comes first: products with 8192 x 8192 in a few formats, each checked right before it is timed; then the correctness of
everything, in processes beside each other (most of that time is compiling); then the rest. `--minutes` ends a part, and the run, in time.

Timings: one CUDA graph that runs the kernel over copies of the weights that together exceed the L2 cache several times, replayed; the
median of the replays, divided by the copies. `--quick` takes a few formats and is meant for eight minutes. The exit status is 1 if any
product is outside its error bound (timings are still written).
`TRITON_INTERPRET=1 python benchmarks/gpu.py --rehearse` runs all of it on the CPU in tiny sizes.
"""

# ruff: noqa: E402

from __future__ import annotations

import argparse
import csv
import dataclasses
import datetime
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]  # in processes of its own, and without an installation

from gpu_checks import case, check_product, correctness, random_blocks
from gpu_model import Model
from gpu_plan import REHEARSAL, Plan
from torch import Tensor

import iqtorch
from iqtorch import kernels
from iqtorch.formats import Format, get_format, list_formats
from iqtorch.kernels import launch, tuning
from iqtorch.kernels.timing import REPLAYS, copies_of, microseconds, synchronize

#: Of the run; `main` replaces it.
plan = Plan()


def plain_formats(quick: bool) -> list[str]:
    return list(plan.quick) if quick else [n for n in list_formats() if get_format(n).interleave == 1]


# -- timing --------------------------------------------------------------------------------------------------


def timed(call: Callable[[int], object], copies: int) -> float:
    return microseconds(call, copies, plan.device)


def copy_bandwidth() -> float:
    """Bytes per second of reading and writing of a large device copy."""
    source = torch.empty(plan.copy_bytes, dtype=torch.uint8, device=plan.device)
    target = torch.empty_like(source)
    return 2 * source.numel() / (timed(lambda i: target.copy_(source), 1) * 1e-6)


def linear_times(
    names: list[str], bandwidth: float, shapes: Sequence[tuple[int, int]], counts: Sequence[int], share: float
) -> Iterator[dict[str, Any]]:
    """Each product is checked, then timed. Ends when this share of the run's time is over."""
    for rows, k in shapes:
        dense = torch.randn(copies_of(2 * rows * k, plan.device), rows, k, device=plan.device, dtype=torch.bfloat16)
        baseline = {}
        for tokens in counts:
            x = torch.randn(tokens, k, device=plan.device, dtype=torch.bfloat16)
            baseline[tokens] = timed(lambda i, x=x, dense=dense: torch.mm(x, dense[i].t()), len(dense))
        del dense
        for name in names:
            if plan.late(share):
                return
            c = case(name, rows, k, plan.device)
            fmt, packed = c.fmt, c.packed
            data = packed.expand(copies_of(packed.numel(), plan.device), -1).contiguous()
            for tokens in counts:
                x = torch.randn(tokens, k, device=plan.device, dtype=torch.bfloat16)
                for precision in (0, 1) if tokens <= launch.vector_tokens(x.dtype) else (0,):
                    started = time.perf_counter()
                    y = kernels.linear(x, data[0], fmt, rows, None, precision)
                    synchronize(plan.device)
                    first = time.perf_counter() - started
                    error = check_product(y, x, c.w, c.size, x.dtype, precision, fmt)
                    us = timed(lambda i, x=x, p=precision, f=fmt, d=data, n=rows: kernels.linear(x, d[i], f, n, None, p), len(data))
                    yield {
                        "format": name, "bpw": f"{fmt.bits_per_weight(k):.3f}", "rows": rows, "k": k, "tokens": tokens,
                        "precision": ("float", "int8")[precision], "us": f"{us:.2f}", "GB/s": f"{packed.numel() / us / 1e3:.0f}",
                        "share_of_copy_bandwidth": f"{packed.numel() / us * 1e6 / bandwidth:.3f}",
                        "TFLOPS": f"{2 * rows * k * tokens / us / 1e6:.1f}", "cublas_bf16_us": f"{baseline[tokens]:.2f}",
                        "speedup": f"{baseline[tokens] / us:.3f}", "first_call_s": f"{first:.2f}", "rotating_copies": len(data),
                        "error_of_bound": f"{error:.3f}", "ok": error <= 1.0,
                    }  # fmt: skip
            del data, c


def expert_times(names: list[str]) -> Iterator[dict[str, Any]]:
    """A layer of experts, gate and up, activation, down and routing weights: packed against bfloat16 fused in Triton."""
    import gpu_experts

    experts, top, inner, hidden = plan.experts
    dense = [
        torch.randn(experts, n, k, device=plan.device, dtype=torch.bfloat16) / k**0.5 for n, k in ((2 * inner, hidden), (hidden, inner))
    ]
    for name in names:
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

            def fused(i: int, x: Tensor = x, routes: list[Tensor] = routes, mix: Tensor = mix, fmt: Format = fmt) -> Tensor:
                h = kernels.routed_gated(x, gate_up, routes[i], fmt, 2 * inner, "silu", 1)  # noqa: B023
                return kernels.routed_weighted(h, down, routes[i], mix, fmt, hidden, 1)  # noqa: B023

            def grouped(i: int, x: Tensor = x, routes: list[Tensor] = routes, mix: Tensor = mix, fmt: Format = fmt) -> Tensor:
                chosen, order = torch.sort(routes[i].reshape(-1))
                ends = torch.searchsorted(chosen, torch.arange(experts, device=plan.device), right=True).to(torch.int32)
                y = kernels.grouped_linear(x[order // top], gate_up, ends, fmt, 2 * inner, 1)  # noqa: B023
                gate, up = y.chunk(2, -1)
                y = kernels.grouped_linear(torch.nn.functional.silu(gate) * up, down, ends, fmt, hidden, 1)  # noqa: B023
                return (y[order.argsort()].view(len(x), top, hidden) * mix[..., None]).sum(1)

            if plan.late(0.8):
                return
            base = timed(lambda i, x=x, r=routes, m=mix: gpu_experts.experts(x, dense[0], dense[1], r[i], m), len(routes))
            for kernel, call in (("fused", fused), ("grouped", grouped)):
                if kernel == "fused" and tokens * top > 1024:
                    continue  # every pair reads its expert again
                us = timed(call, len(routes))
                yield {
                    "format": name, "experts": experts, "top": top, "inner": inner, "hidden": hidden, "tokens": tokens, "kernel": kernel,
                    "us": f"{us:.2f}", "bf16_triton_us": f"{base:.2f}", "speedup": f"{base / us:.3f}",
                }  # fmt: skip


def pack_times(names: list[str]) -> Iterator[dict[str, Any]]:
    rows, k = plan.shapes[0]
    for name in names:
        fmt = get_format(name)
        blocks = random_blocks(fmt, rows, k, plan.device)
        kernels.pack(blocks[: rows // 2], fmt)
        kernels.unpack(kernels.pack(blocks[: rows // 2], fmt), fmt, rows // 2, k)
        synchronize(plan.device)
        started = time.perf_counter()
        packed = kernels.pack(blocks, fmt)
        synchronize(plan.device)
        there = time.perf_counter() - started
        same = torch.equal(kernels.unpack(packed, fmt, rows, k), blocks)
        synchronize(plan.device)
        back = time.perf_counter() - started - there
        yield {
            "format": name, "rows": rows, "k": k, "pack_ms": f"{there * 1e3:.2f}", "pack_GB/s": f"{blocks.numel() / there / 1e9:.2f}",
            "unpack_ms": f"{back * 1e3:.2f}", "bytes_ratio": f"{packed.numel() / blocks.numel():.4f}", "ok": same,
        }  # fmt: skip
        if plan.late():
            return


def tile_times(names: list[str], bandwidth: float) -> Iterator[dict[str, Any]]:
    """Other tiles than the closed-form choice, for the largest matrix: what `iqtorch bench --tune` would find."""
    rows, k = plan.shapes[0]
    for name, tokens in [(name, tokens) for name in names for tokens in (1, 16)]:
        fmt = get_format(name)
        packed = kernels.pack(random_blocks(fmt, rows, k, plan.device), fmt)
        data = packed.expand(copies_of(packed.numel(), plan.device), -1).contiguous()
        x = torch.randn(tokens, k, device=plan.device, dtype=torch.bfloat16)
        if tokens <= launch.vector_tokens(x.dtype):
            kernel, key = "gemv", launch.key("gemv", name, rows, k, tokens, 1)
        else:
            kernel, key = "gemm", launch.key("gemm", name, rows, k, tokens)
        options = list(tuning.candidates(kernel))
        for option in [{}, *(options[: plan.tiles] if plan.tiles else options)]:
            if plan.late():
                return
            launch.override = {key: option} if option else {}
            try:
                us = timed(lambda i, x=x, f=fmt, d=data: kernels.linear(x, d[i], f, rows, None, 1), len(data))
            except Exception as error:  # registers or shared memory do not suffice
                print(f"{name} {option}: {type(error).__name__}")
                continue
            finally:
                launch.override = None
            yield {
                "format": name, "rows": rows, "k": k, "tokens": tokens, "kernel": kernel,
                "tile": " ".join(f"{field} {value}" for field, value in option.items()) or "closed form", "us": f"{us:.2f}",
                "share_of_copy_bandwidth": f"{packed.numel() / us * 1e6 / bandwidth:.3f}",
            }  # fmt: skip


def model_times(names: list[str]) -> Iterator[dict[str, Any]]:
    """A Llama-8B-shaped model, compiled: decoding of one sequence and a prompt, a CUDA graph each, against bfloat16 in the same run."""
    shape, dtype = plan.model, torch.bfloat16

    def packed(fmt: Format) -> Callable[[int, int], Tensor]:
        made: dict[tuple[int, int], Tensor] = {}

        def make(rows: int, k: int) -> Tensor:
            if (rows, k) not in made:
                made[rows, k] = kernels.pack(random_blocks(fmt, rows, k, plan.device), fmt)
            return iqtorch.IQTensor(made[rows, k].clone(), fmt, "triton", (rows, k), dtype)

        return make

    def dense(rows: int, k: int) -> Tensor:
        return torch.randn(rows, k, device=plan.device, dtype=dtype) / k**0.5

    reference: dict[str, float] = {}
    for name, make in [("bf16", dense), *((n, packed(get_format(n))) for n in names)]:
        if plan.late(0.9):
            return
        found, error = model_run(Model(shape, make, plan.device, dtype))
        torch._dynamo.reset()
        reference = reference or found
        yield {
            "format": name, "layers": shape.layers, "hidden": shape.hidden, "prompt": plan.prompt,
            "decode_tokens_per_s": f"{1e6 / found['decode']:.1f}", "decode_speedup": f"{reference['decode'] / found['decode']:.3f}",
            "prefill_tokens_per_s": f"{plan.prompt * 1e6 / found['prefill']:.0f}",
            "prefill_speedup": f"{reference['prefill'] / found['prefill']:.3f}",
            "decode_against_prompt": f"{error:.4f}", "ok": error < 0.05,
        }  # fmt: skip


@torch.no_grad()
def model_run(model: Model) -> tuple[dict[str, float], float]:
    """Microseconds of a decoded token and of the prompt; the difference of the last logits read as a prompt and decoded."""
    prompt = torch.randint(0, model.shape.vocabulary, (plan.prompt,), device=plan.device)
    positions = torch.arange(plan.prompt, device=plan.device)
    whole = model.forward(prompt, positions).float()
    model.forward(prompt[:-1], positions[:-1])
    alone = model.forward(prompt[-1:], positions[-1:]).float()
    model.compile(**plan.compile)
    decode_us = timed(lambda i: model.forward(prompt[-1:], positions[-1:]), 1)
    prefill_us = timed(lambda i: model.forward(prompt, positions), 1)
    return {"decode": decode_us, "prefill": prefill_us}, float((whole - alone).norm() / whole.norm())


# -- the aims ------------------------------------------------------------------------------------------------


def aims(results: dict[str, list[dict[str, Any]]]) -> Iterator[dict[str, Any]]:
    """What was asked of the kernels beside what was measured."""

    def linear(name: str, tokens: int, field: str) -> list[float]:
        return [
            float(r[field])
            for r in results.get("linear", [])
            if r.get("format") == name and r["tokens"] == tokens and r["rows"] == plan.shapes[0][0]
        ]

    def aim(what: str, values: list[float], limit: float, most: bool = False) -> dict[str, Any]:
        best = (min if most else max)(values) if values else float("nan")
        return {"aim": what, "measured": f"{best:.3f}", "limit": limit, "reached": best <= limit if most else best >= limit}

    tables = ("iq4_k", "iq4_ks", "iq4_nl", "iq4_xs", "mxfp4")
    for name, share in [("iq2_kl", 0.6), ("iq2_kt", 0.4), ("iq4_kt", 0.65), *((n, 0.75) for n in tables)]:
        yield aim(f"{name}, 1 token: share of the copy bandwidth", linear(name, 1, "share_of_copy_bandwidth"), share)
    yield aim("iq2_kl, 1 token: times cuBLAS bf16", linear("iq2_kl", 1, "speedup"), 4.0)
    for name in sorted({str(r["format"]) for r in results.get("linear", []) if "format" in r}):
        one, sixteen = linear(name, 1, "us"), linear(name, 16, "us")
        yield aim(f"{name}, 16 tokens: time of 1", [sixteen[0] / min(one)] if one and sixteen else [], 1.2, most=True)
        for tokens, share in ((512, 0.7), (1024, 0.7), (2048, 0.9), (4096, 0.9)):
            yield aim(f"{name}, {tokens} tokens: share of cuBLAS bf16", linear(name, tokens, "speedup"), share)
    for tokens in plan.expert_tokens[:2]:
        found = [float(r["speedup"]) for r in results.get("experts", []) if r.get("tokens") == tokens and r["format"] == "iq2_kl"]
        yield aim(f"iq2_kl experts, {tokens} tokens: times bf16 in Triton", found, 3.0)
    for speed, limit in (("decode_speedup", 3.5), ("prefill_speedup", 0.9)):
        yield aim(f"iq2_kl model: {speed}", [float(r[speed]) for r in results.get("model", []) if r.get("format") == "iq2_kl"], limit)


# -- output --------------------------------------------------------------------------------------------------


def conditions(bandwidth: float) -> list[str]:
    import triton

    lines = [
        f"# {datetime.datetime.now(datetime.timezone.utc):%Y-%m-%d %H:%M} UTC, iqtorch {iqtorch.__version__}",
        f"# torch {torch.__version__}, Triton {triton.__version__}, Python {sys.version.split()[0]}",
        f"# measured copy bandwidth {bandwidth / 1e9:.1f} GB/s; median of {REPLAYS[plan.device.type]} replays over rotating weights",
    ]
    if plan.device.type != "cuda":
        return ["# REHEARSAL in the interpreter: these are no timings", *lines]
    card = torch.cuda.get_device_properties(0)
    facts = f"{card.multi_processor_count} processors, {card.total_memory >> 30} GiB, L2 {card.L2_cache_size >> 20} MiB"
    return [f"# {card.name}, {facts}", *lines]


def write(path: Path, header: list[str], rows: Iterator[dict[str, Any]], more: bool = False) -> list[dict[str, Any]]:
    """Writes rows as they come, so that an interrupted run keeps what it has; `more`: behind what is there."""
    done: list[dict[str, Any]] = []
    more &= path.exists()
    with path.open("a" if more else "w", newline="") as file:
        if not more:
            file.write("\n".join(header) + "\n")
        writer = None
        try:
            for row in rows:
                if writer is None:
                    writer = csv.DictWriter(file, list(row))
                    if not more:
                        writer.writeheader()
                writer.writerow(row)
                file.flush()
                done.append(row)
        except Exception as error:
            traceback.print_exc()
            file.write(f"# failed: {type(error).__name__}: {error}\n")
            done.append({"ok": False})
    print(f"{path}: {len(done)} rows", flush=True)
    return done


def main(arguments: list[str] | None = None) -> int:
    global plan
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("gpu-results"), help="folder for the CSV files")
    parser.add_argument("--quick", action="store_true", help=f"only {', '.join(plan.quick)}")
    parser.add_argument("--formats", help="comma-separated names instead of all")
    parser.add_argument("--skip-checks", action="store_true", help="without the part `correctness`")
    parser.add_argument("--minutes", type=float, help="time of the whole run; default: 8 with --quick, else no limit")
    parser.add_argument("--rehearse", action="store_true", help="every step on the CPU in tiny sizes, in Triton's interpreter")
    options = parser.parse_args(arguments)
    if options.rehearse:
        if not kernels.library.INTERPRETED:
            parser.error("a rehearsal needs the environment variable TRITON_INTERPRET=1")
        plan = REHEARSAL
    elif not torch.cuda.is_available():
        parser.error("no CUDA or ROCm device is available to this PyTorch; --rehearse runs without")
    minutes = options.minutes or (8 if options.quick else None)
    if minutes:
        plan = dataclasses.replace(plan, seconds=60 * minutes, deadline=time.time() + 60 * minutes)
    names = options.formats.split(",") if options.formats else plain_formats(options.quick or options.rehearse)
    some = names if options.formats else list(plan.quick)
    options.out.mkdir(parents=True, exist_ok=True)
    bandwidth = copy_bandwidth()
    header = conditions(bandwidth)
    print("\n".join(header))
    parts: list[tuple[str, Callable[[], Iterator[dict[str, Any]]]]] = [
        ("linear", lambda: linear_times(some, bandwidth, plan.shapes[:1], plan.first_tokens, 0.35)),
        ("correctness", lambda: correctness(names, plan)),
        ("experts", lambda: expert_times(some[:1] if options.quick else some)),
        ("model", lambda: model_times(some[:1] if options.quick else some)),
        ("pack", lambda: pack_times(names)),
        ("tiles", lambda: tile_times(some[:2], bandwidth)),
        ("linear", lambda: linear_times(names, bandwidth, plan.shapes, plan.timed, 1.0)),
    ]
    results: dict[str, list[dict[str, Any]]] = {}
    for part, rows in parts:
        if plan.late() or (part == "correctness" and options.skip_checks):
            continue
        found = write(options.out / f"{part}.csv", header, rows(), part in results)
        results[part] = results.get(part, []) + found
        wrong = [row for row in found if not row.get("ok", True)]
        print(
            f"{part}: {len(found) - len(wrong)} of {len(found)} rows good", *(f"  WRONG {row}" for row in wrong[:40]), sep="\n", flush=True
        )
    good = all(row.get("ok", True) for found in results.values() for row in found)
    for row in write(options.out / "aims.csv", header, aims(results)):
        print("  ".join(f"{k} {v}" for k, v in row.items()))
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
