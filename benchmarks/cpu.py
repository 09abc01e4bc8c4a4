"""Speed of the compiled CPU kernels: every format x rows of activations x instruction set, beside a bfloat16 `nn.Linear`.

    python benchmarks/cpu.py                                   # all formats, M = 1, 8, 512, the best instruction set
    python benchmarks/cpu.py --formats iq2_kl q4_k --isa avx2 avx512 amx --m 1 --megabytes 200

Products are `x [M, K] @ W.T` with weights `[N, K]` of random bytes. `--megabytes` weights are used in turn, so that they come
from memory (at least 190 on a machine with large caches) or from a cache. Each repeat times the dense product directly before
the packed one; figures are medians over repeats, and the speed-up is the median of the ratios of neighbours. With one thread the
clock is the thread's CPU time, which other processes of a shared machine disturb less than wall time.
"""

from __future__ import annotations

import argparse
import csv
import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from datetime import date
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from iqtorch import cpu_ext
from iqtorch.formats import Format, get_format, list_formats

COLUMNS = ("format", "isa", "precision", "m", "n", "k", "threads", "weights_mb", "ms", "gb_per_s", "gflops", "dense_bf16_ms", "speedup")


def cpu_name() -> str:
    """The processor's name, as the system gives it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def machine(threads: int) -> list[str]:
    """What a reader of the figures must know."""
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else float("nan")
    return [
        f"date: {date.today()}; torch {torch.__version__}; {platform.system()} {platform.release()} {platform.machine()}",
        f"cpu: {cpu_name()}, {os.cpu_count()} logical cores; {torch.backends.cpu.get_cpu_capability()}",
        f"threads: {threads}; clock: {'CPU time of the thread' if threads == 1 else 'wall'}; load average at start: {load:.1f}",
    ]


def packed_weights(fmt: Format, n: int, k: int, megabytes: float) -> list[Tensor]:
    """Matrices of random bytes whose float scales are small, as many as fill `megabytes`."""
    generator = torch.Generator().manual_seed(0)
    blocks = torch.randint(0, 256, (n, fmt.row_bytes(k)), dtype=torch.uint8, generator=generator)
    for name in {"d", "dmin"} & fmt.fields.keys():  # the top byte of a half near 0.01, or the exponent of 2^-8
        top = fmt.fields[name].runs[-1]
        if top.width >= 8:
            blocks[:, fmt.row_header_bytes :].view(n, -1, fmt.block_bytes)[..., int(top.start[0] + top.width) // 8 - 1] = (
                0x20 if fmt.d_kind == "f16" else 120
            )
    if fmt.row_header_bytes:
        header = torch.full((n, 1), 0.01, dtype=torch.float16 if fmt.row_header_bytes == 2 else torch.float32)
        blocks[:, : fmt.row_header_bytes] = header.view(torch.uint8)
    first = cpu_ext.pack(blocks, fmt)
    return [first, *(cpu_ext.pack(blocks, fmt) for _ in range(max(1, round(megabytes * 1e6 / first.nbytes)) - 1))]


def timed(call: Callable[[Tensor], Tensor], weights: Sequence[Tensor], clock: Callable[[], float]) -> float:
    """Milliseconds per call over all weights in turn."""
    start = clock()
    for weight in weights:
        call(weight)
    return (clock() - start) / len(weights) * 1e3


def main() -> None:
    plain = [name for name in list_formats() if get_format(name).interleave == 1]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--formats", nargs="+", default=plain)
    parser.add_argument("--m", nargs="+", type=int, default=[1, 8, 512])
    parser.add_argument("--isa", nargs="+", default=[cpu_ext.capabilities()["isa"]])
    parser.add_argument("--precision", nargs="+", choices=["float", "int8"], default=["int8"])
    parser.add_argument("--n", type=int, default=4096)
    parser.add_argument("--k", type=int, default=4096)
    parser.add_argument("--megabytes", type=float, default=24, help="packed weights used in turn")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--csv", type=Path, help="file to write; a header of comment lines describes the machine")
    args = parser.parse_args()

    torch.set_num_threads(args.threads)
    clock = time.thread_time if args.threads == 1 else time.perf_counter
    header = machine(args.threads)
    print("\n".join(header))
    # as many dense matrices as keep them in the same kind of memory as the packed ones
    dense_count = max(1, min(8, round(args.megabytes * 1e6 / (2 * args.n * args.k))))
    dense = [torch.randn(args.n, args.k).bfloat16() for _ in range(dense_count)]
    rows: list[dict[str, object]] = []
    for name in args.formats:
        fmt = get_format(name)
        weights = packed_weights(fmt, args.n, args.k, args.megabytes)
        for m in args.m:
            x = torch.randn(m, args.k).bfloat16()
            for isa in args.isa:
                cpu_ext.select_isa(isa)
                for precision in args.precision:

                    def product(w: Tensor, x: Tensor = x, fmt: Format = fmt, code: int = int(precision == "int8")) -> Tensor:
                        return cpu_ext.linear(x, w, fmt, args.n, None, code)

                    def reference(w: Tensor, x: Tensor = x) -> Tensor:
                        return F.linear(x, w)

                    pairs = [(timed(reference, dense, clock), timed(product, weights, clock)) for _ in range(args.repeats + 1)][1:]
                    ms = statistics.median(mine for _, mine in pairs)
                    row = {
                        "format": name,
                        "isa": isa,
                        "precision": precision,
                        "m": m,
                        "n": args.n,
                        "k": args.k,
                        "threads": args.threads,
                        "weights_mb": round(sum(w.nbytes for w in weights) / 1e6),
                        "ms": round(ms, 3),
                        "gb_per_s": round(weights[0].nbytes / ms / 1e6, 2),
                        "gflops": round(2 * m * args.n * args.k / ms / 1e6, 1),
                        "dense_bf16_ms": round(statistics.median(dense_ms for dense_ms, _ in pairs), 3),
                        "speedup": round(statistics.median(dense_ms / mine for dense_ms, mine in pairs), 2),
                    }
                    rows.append(row)
                    print(
                        "  ".join(f"{key} {row[key]}" for key in ("format", "isa", "precision", "m", "ms", "gb_per_s", "speedup")),
                        flush=True,
                    )
        cpu_ext.select_isa(None)
    if args.csv:
        args.csv.parent.mkdir(parents=True, exist_ok=True)
        with args.csv.open("w", newline="") as file:
            file.writelines(f"# {line}\n" for line in header)
            writer = csv.DictWriter(file, COLUMNS)
            writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    main()
