"""Checks every GPU kernel, then times it: `python benchmarks/gpu.py --out results/`. One NVIDIA or AMD GPU, no network, no model.

    correctness   every format x activation dtype x M, against float64 products of the weights decoded by plain torch
    linear        N = K = 8192 and other shapes: microseconds, GB/s of packed bytes, share of the copy bandwidth, ratio to cuBLAS bf16
    experts       routed products, top 8 of 128
    pack          canonical bytes -> device layout

Each part writes a CSV whose first lines are the conditions. Timings: one CUDA graph that runs the kernel over copies of the
weights that together exceed the L2 cache several times, replayed; the median of the replays, divided by the copies.
`--quick` takes a few formats. The exit status is 1 if any product is outside its error bound (timings are still written).
"""

from __future__ import annotations

import argparse
import csv
import datetime
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import iqtorch
from iqtorch import kernels
from iqtorch.formats import Format, get_format, list_formats
from iqtorch.kernels import launch
from iqtorch.kernels.layout import layout

TOKENS = (1, 2, 3, 4, 7, 8, 9, 16, 17, 33, 64, 65, 128, 129, 512, 1000, 4096)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
EPS = {torch.float32: 2.0**-23, torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7}
DEVICE = "cuda"
QUICK = ["iq2_kl", "iq2_kt", "iq4_k", "iq4_kt", "q4_k"]
#: Bytes of rotating weights per measurement, well above any L2 cache.
ROTATION = 512 << 20
REPLAYS = 30


def plain_formats(quick: bool) -> list[str]:
    return QUICK if quick else [n for n in list_formats() if get_format(n).interleave == 1]


def random_blocks(fmt: Format, rows: int, k: int, seed: int = 0) -> Tensor:
    """Random bytes with scales of ordinary size, on the GPU: every bit pattern of codes, signs and small scales occurs."""
    generator = torch.Generator(device=DEVICE).manual_seed(seed)
    blocks = torch.randint(0, 256, (rows, fmt.row_bytes(k)), dtype=torch.uint8, device=DEVICE, generator=generator)
    step = max(1, (1 << 24) // k)
    for i in range(0, rows, step):
        parts = fmt.unpack(blocks[i : i + step])
        for name in ("d", "dmin"):
            if name in parts:
                size = 1e-4 * (1 + torch.rand(parts[name].shape, device=DEVICE, generator=generator))
                if fmt.d_kind == "e8m0":
                    parts[name] = torch.randint(110, 118, parts[name].shape, device=DEVICE, dtype=torch.int32, generator=generator)
                elif fmt.d_kind == "f16":
                    parts[name] = size.half().view(torch.int16).to(torch.int32) & 0xFFFF
                else:
                    parts[name] = size.view(torch.int32)
        blocks[i : i + step] = fmt.pack(parts)
    return blocks


# -- correctness ---------------------------------------------------------------------------------------------


def check_product(y: Tensor, x: Tensor, w: Tensor, size: Tensor, dtype: torch.dtype, precision: int, run: int) -> float:
    """Largest error of y as a share of its bound (see docs/gpu.md, "Error bounds")."""
    exact = x.double() @ w.double().T
    sizes = x.double().abs() @ size.double().T
    tokens = x.shape[0]
    if tokens <= launch.GEMV_TOKENS:
        top = {1: 127, 2: 32767, 3: 8388544}[launch._digits(dtype, precision)]
        step = x.double().abs().unflatten(1, (-1, run)).amax(-1) / top
        error = 0.505 * step.repeat_interleave(run, 1) @ w.double().abs().T
    elif dtype != torch.float32 and tokens <= launch.GEMM_TOKENS:
        error = sizes * 1.5 * 2.0**-10
    else:
        error = sizes * EPS[dtype]
    error += sizes * 2.0**-19 + EPS[dtype] * exact.abs() + 1e-30
    share = ((y.double() - exact).abs() / error).max()
    return float(share) if torch.isfinite(y).all() else float("inf")


def correctness(names: list[str]) -> Iterator[dict[str, Any]]:
    rows, k = 257, 1024
    for name in names:
        fmt = get_format(name)
        blocks = random_blocks(fmt, rows, k)
        packed = kernels.pack(blocks, fmt)
        w = fmt.decode(blocks) * fmt.runtime_scale
        parts = fmt.unpack(blocks)
        low = fmt.scales(parts)[1]
        size = w.abs() if low is None else w.abs() + 2 * low.abs().repeat_interleave(k // low.shape[1], 1)
        run = layout(fmt).scheme.run

        def row(kernel: str, dtype: Any, tokens: int, precision: int, share: float, name: str = name) -> dict[str, Any]:
            return {
                "format": name, "kernel": kernel, "dtype": str(dtype), "tokens": tokens, "precision": precision,
                "error_of_bound": f"{share:.4g}", "ok": share <= 1.0,
            }  # fmt: skip

        yield row("pack", "uint8", 0, 0, 0.0 if torch.equal(kernels.unpack(packed, fmt, rows, k), blocks) else 9.0)
        for dtype in DTYPES:
            same = torch.equal(kernels.dequantize(packed, fmt, rows, k, dtype), w.to(dtype))
            yield row("dequantize", dtype, 0, 0, 0.0 if same else 9.0)
            ids = torch.randint(0, rows, (3, 5), device=DEVICE)
            same = torch.equal(kernels.embedding(ids, packed, fmt, rows, k, dtype), w[ids].to(dtype))
            yield row("embedding", dtype, 0, 0, 0.0 if same else 9.0)
            for tokens in TOKENS:
                x = torch.randn(tokens, k, device=DEVICE, dtype=dtype)
                for precision in (0, 1):
                    y = kernels.linear(x, packed, fmt, rows, None, precision)
                    yield row("linear", dtype, tokens, precision, check_product(y, x, w, size, dtype, precision, run))
                    again = kernels.linear(x, packed, fmt, rows, None, precision)
                    if not torch.equal(y, again):
                        yield row("linear: not deterministic", dtype, tokens, precision, 9.0)
            g = torch.randn(9, rows, device=DEVICE, dtype=dtype)
            back, exact = kernels.linear_transposed(g, packed, fmt, k), g.double() @ w.double()
            bound = (16 if dtype == torch.float32 else 2) * EPS[dtype] * (g.double().abs() @ size.double()) + 1e-30
            yield row("linear_transposed", dtype, 9, 0, float(((back.double() - exact).abs() / bound).max()))
            experts = torch.stack([packed, packed, packed])
            ends = torch.tensor([3, 3, 90], dtype=torch.int32, device=DEVICE)
            x = torch.randn(100, k, device=DEVICE, dtype=dtype)
            y = kernels.grouped_linear(x, experts, ends, fmt, rows, 0)
            # the same bound as a dense product of more than GEMV_TOKENS tokens, unless float32 (three digits)
            share = check_grouped(y[:90], x[:90], w, size, dtype, run)
            yield row("grouped_linear", dtype, 100, 0, share if bool((y[90:] == 0).all()) else 9.0)
            chosen = torch.randint(0, 3, (4, 2), device=DEVICE)
            y = kernels.routed_linear(x[:4], experts, chosen, fmt, rows, 1).reshape(8, rows)
            yield row("routed_linear", dtype, 8, 1, max(check_product(y[i::2], x[:4], w, size, dtype, 1, run) for i in (0, 1)))


def check_grouped(y: Tensor, x: Tensor, w: Tensor, size: Tensor, dtype: torch.dtype, run: int) -> float:
    if dtype == torch.float32:
        return max(check_product(y[i : i + 4], x[i : i + 4], w, size, dtype, 0, run) for i in range(0, len(x) - 3, 4))
    return check_product(y, x, w, size, dtype, 0, run)


# -- timing --------------------------------------------------------------------------------------------------


def microseconds(call: Callable[[int], object], copies: int) -> float:
    """Median time of `call(i)` for i over the copies, in one CUDA graph."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for i in range(2):
            call(i % copies)
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(copies):
            call(i)
    times = []
    for replay in range(REPLAYS + 3):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        if replay >= 3:
            times.append(start.elapsed_time(end) * 1e3 / copies)
    return statistics.median(times)


def copy_bandwidth() -> float:
    """Bytes per second of reading, measured as half of the traffic of a large device copy."""
    source = torch.empty(1 << 30, dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    return 2 * source.numel() / (microseconds(lambda i: target.copy_(source), 1) * 1e-6)


def linear_times(names: list[str], shapes: list[tuple[int, int]], bandwidth: float) -> Iterator[dict[str, Any]]:
    for rows, k in shapes:
        copies = max(2, min(64, ROTATION // (2 * rows * k)))
        dense = torch.randn(copies, rows, k, device=DEVICE, dtype=torch.bfloat16)
        baseline = {}
        for tokens in TIMED:
            x = torch.randn(tokens, k, device=DEVICE, dtype=torch.bfloat16)
            baseline[tokens] = microseconds(lambda i, x=x, dense=dense: torch.mm(x, dense[i].t()), copies)
        dense = None
        for name in names:
            fmt = get_format(name)
            if k % fmt.block_size:
                continue
            packed = kernels.pack(random_blocks(fmt, rows, k), fmt)
            copies = max(2, min(256, ROTATION // packed.numel()))
            data = packed.expand(copies, -1).contiguous()
            for tokens in TIMED:
                x = torch.randn(tokens, k, device=DEVICE, dtype=torch.bfloat16)
                for precision in (0, 1) if tokens <= launch.GEMV_TOKENS else (0,):
                    started = time.perf_counter()
                    kernels.linear(x, data[0], fmt, rows, None, precision)
                    torch.cuda.synchronize()
                    first = time.perf_counter() - started

                    def call(
                        i: int, x: Tensor = x, fmt: Format = fmt, data: Tensor = data, rows: int = rows, precision: int = precision
                    ) -> Tensor:
                        return kernels.linear(x, data[i], fmt, rows, None, precision)

                    us = microseconds(call, copies)
                    yield {
                        "format": name, "bpw": f"{fmt.bits_per_weight(k):.3f}", "rows": rows, "k": k, "tokens": tokens,
                        "precision": ("float", "int8")[precision], "us": f"{us:.2f}", "GB/s": f"{packed.numel() / us / 1e3:.0f}",
                        "share_of_copy_bandwidth": f"{packed.numel() / us * 1e6 / bandwidth:.3f}",
                        "TFLOPS": f"{2 * rows * k * tokens / us / 1e6:.1f}", "cublas_bf16_us": f"{baseline[tokens]:.2f}",
                        "speedup": f"{baseline[tokens] / us:.3f}", "first_call_s": f"{first:.2f}", "rotating_copies": copies,
                    }  # fmt: skip
            del data


TIMED = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)


def expert_times(names: list[str]) -> Iterator[dict[str, Any]]:
    """Top 8 of 128 experts of [1536, 4096] (gate and up of a Qwen3-30B-like layer), by ids and sorted."""
    experts, top, rows, k = 128, 8, 1536, 4096
    dense = torch.randn(experts, rows, k, device=DEVICE, dtype=torch.bfloat16)
    for name in names:
        fmt = get_format(name)
        one = kernels.pack(random_blocks(fmt, rows, k), fmt)
        data = one.expand(experts, -1).contiguous()
        for tokens in (1, 64, 1024):
            x = torch.randn(tokens, k, device=DEVICE, dtype=torch.bfloat16)
            ids = torch.stack([torch.randperm(experts, device=DEVICE)[:top] for _ in range(tokens)])
            order = ids.flatten().argsort()
            xs = x.repeat_interleave(top, 0)[order].contiguous()
            ends = torch.bincount(ids.flatten(), minlength=experts).cumsum(0).to(torch.int32)
            us = microseconds(lambda i, xs=xs, data=data, ends=ends, fmt=fmt: kernels.grouped_linear(xs, data, ends, fmt, rows, 1), 4)
            base = microseconds(lambda i, xs=xs, ends=ends: torch._grouped_mm(xs, dense.transpose(-2, -1), offs=ends), 4)
            found = {"format": name, "experts": experts, "top": top, "rows": rows, "k": k, "tokens": tokens}
            yield {**found, "kernel": "grouped", "us": f"{us:.2f}", "grouped_mm_bf16_us": f"{base:.2f}", "speedup": f"{base / us:.3f}"}
            if tokens <= 64:
                us = microseconds(lambda i, x=x, data=data, ids=ids, fmt=fmt: kernels.routed_linear(x, data, ids, fmt, rows, 1), 4)
                yield {**found, "kernel": "routed", "us": f"{us:.2f}", "grouped_mm_bf16_us": f"{base:.2f}", "speedup": f"{base / us:.3f}"}


def pack_times(names: list[str]) -> Iterator[dict[str, Any]]:
    rows, k = 8192, 8192
    for name in names:
        fmt = get_format(name)
        blocks = random_blocks(fmt, rows, k)
        kernels.pack(blocks[:64], fmt)
        torch.cuda.synchronize()
        started = time.perf_counter()
        packed = kernels.pack(blocks, fmt)
        torch.cuda.synchronize()
        seconds = time.perf_counter() - started
        yield {
            "format": name, "rows": rows, "k": k, "ms": f"{seconds * 1e3:.2f}", "GB/s": f"{blocks.numel() / seconds / 1e9:.2f}",
            "bytes_ratio": f"{packed.numel() / blocks.numel():.4f}",
        }  # fmt: skip


# -- output --------------------------------------------------------------------------------------------------


def conditions(bandwidth: float) -> list[str]:
    import triton

    card = torch.cuda.get_device_properties(0)
    return [
        f"# {datetime.datetime.now(datetime.timezone.utc):%Y-%m-%d %H:%M} UTC, iqtorch {getattr(iqtorch, '__version__', 'source')}",
        f"# {card.name}, {card.multi_processor_count} processors, {card.total_memory >> 30} GiB, L2 {card.L2_cache_size >> 20} MiB",
        f"# torch {torch.__version__}, Triton {triton.__version__}, Python {sys.version.split()[0]}",
        f"# measured copy bandwidth {bandwidth / 1e9:.0f} GB/s; median of {REPLAYS} CUDA-graph replays over rotating weights",
    ]


def write(path: Path, header: list[str], rows: Iterator[dict[str, Any]]) -> list[dict[str, Any]]:
    """Writes rows as they come, so that an interrupted run keeps what it has."""
    done: list[dict[str, Any]] = []
    with path.open("w", newline="") as file:
        file.write("\n".join(header) + "\n")
        writer = None
        try:
            for row in rows:
                if writer is None:
                    writer = csv.DictWriter(file, list(row))
                    writer.writeheader()
                writer.writerow(row)
                file.flush()
                done.append(row)
        except Exception as error:
            file.write(f"# failed: {type(error).__name__}: {error}\n")
            print(f"{path.name}: {type(error).__name__}: {error}", file=sys.stderr)
            done.append({"ok": False})
    print(f"{path}: {len(done)} rows")
    return done


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("gpu-results"), help="folder for the CSV files")
    parser.add_argument("--quick", action="store_true", help=f"only {', '.join(QUICK)}")
    parser.add_argument("--formats", help="comma-separated names instead of all")
    parser.add_argument("--skip-checks", action="store_true", help="time without checking first")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("no CUDA or ROCm device is available to this PyTorch")
    names = options.formats.split(",") if options.formats else plain_formats(options.quick)
    options.out.mkdir(parents=True, exist_ok=True)
    bandwidth = copy_bandwidth()
    header = conditions(bandwidth)
    print("\n".join(header))
    good = True
    if not options.skip_checks:
        checked = write(options.out / "correctness.csv", header, correctness(names))
        wrong = [r for r in checked if not r["ok"]]
        good = not wrong
        print(f"{len(checked) - len(wrong)} of {len(checked)} checks passed" + "".join(f"\n  WRONG {r}" for r in wrong[:40]))
    parts = {
        "linear": linear_times(names, [(8192, 8192), (4096, 4096), (14336, 4096), (4096, 14336)], bandwidth),
        "experts": expert_times(names if options.formats else QUICK),
        "pack": pack_times(names),
    }
    for part, rows in parts.items():
        good &= all(r.get("ok", True) for r in write(options.out / f"{part}.csv", header, rows))
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
