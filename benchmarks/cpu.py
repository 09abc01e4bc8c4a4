"""Speed of the compiled CPU kernels: every format x rows of activations x instruction set, beside a bfloat16 `nn.Linear`.

    python benchmarks/cpu.py                                   # all formats, M = 1, 8, 512, the best instruction set
    python benchmarks/cpu.py --formats iq2_kl q4_k --isa avx2 avx512 amx --m 1 --megabytes 200
    python benchmarks/cpu.py --transposed --m 8 512 --dtype float32

Products are `x [M, K] @ W.T` with weights `[N, K]` of random bytes; `--transposed`: `x [M, N] @ W`, as gradients need it.
`--megabytes` weights are used in turn, so that they come from memory (at least 190 on a machine with large caches) or from a cache.
Few rows of activations are multiplied once by all of them before that is timed, so that a cache holds them if it can.
Each repeat times the dense product directly before the packed one, and with `--ik` the same product of a local ik_llama.cpp directly
after it; figures are medians over repeats, and ratios medians of the ratios of neighbours. For one row of activations the same weights are
also read by torch's reductions, in turn with the products: `of_read` is the speed of the product over that of the fastest reduction.
With one thread the clock is the thread's CPU time.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import ik_ggml
import results_file
import torch
import torch.nn.functional as F
from torch import Tensor

from iqtorch import cpu_ext
from iqtorch.cpu_ext import memory
from iqtorch.formats import Format, get_format, list_formats

COLUMNS = ("format", "isa", "precision", "m", "n", "k", "threads", "weights_mb", "ms", "gb_per_s", "gflops", "dense_bf16_ms", "speedup")
COLUMNS += ("read_gb_per_s", "of_read")
IK_COLUMNS = ("ik_ms", "over_ik", "difference")


def random_blocks(fmt: Format, n: int, k: int) -> Tensor:
    """Random bytes whose float scales are small: canonical blocks of a matrix."""
    generator = torch.Generator().manual_seed(0)
    blocks = torch.randint(0, 256, (n, fmt.row_bytes(k)), dtype=torch.uint8, generator=generator)
    for name in {"d", "dmin"} & fmt.fields.keys():  # the top byte of a half near 0.01 (or its upper part), or the exponent of 2^-8
        run = fmt.fields[name].runs[-1]
        end, width = int(run.start[0]) + run.width, min(run.width, 8)
        top = blocks[:, fmt.row_header_bytes :].view(n, -1, fmt.block_bytes)[..., (end - 1) // 8]
        shift = (end - width) % 8
        top.bitwise_and_(~(((1 << width) - 1) << shift) & 255).bitwise_or_((0x20 if fmt.d_kind == "f16" else 120) >> (8 - width) << shift)
    if fmt.row_header_bytes:
        header = torch.full((n, 1), 0.01, dtype=torch.float16 if fmt.row_header_bytes == 2 else torch.float32)
        blocks[:, : fmt.row_header_bytes] = header.view(torch.uint8)
    return blocks


def timed(call: Callable[[int], object], count: int, clock: Callable[[], float], warm: bool = False) -> float:
    """Milliseconds per call with each of `count` matrices in turn; `warm`: after a round that does not count."""
    for i in range(count if warm else 0):
        call(i)
    start = clock()
    for i in range(count):
        call(i)
    return (clock() - start) / count * 1e3


def reads(data: Tensor) -> list[Callable[[], object]]:
    """Ways to read bytes and do next to nothing else."""
    whole = data.flatten()[: data.numel() // 64 * 64]
    floats, integers = whole.view(torch.float32), whole.view(torch.int64)
    return [lambda: torch.sum(floats), lambda: torch.sum(integers), lambda: torch.amax(floats)]


def read_bandwidth(megabytes: float, threads: int) -> float:
    """GB/s of the fastest way found to read `megabytes` of memory in huge pages."""
    data = memory.empty(round(megabytes * 1e6) // 64 * 64).zero_()
    clock = clock_of(threads)
    return max(data.nbytes / timed(lambda _, read=read: read(), 1, clock) / 1e6 for read in reads(data) for _ in range(5))


def clock_of(threads: int) -> Callable[[], float]:
    """CPU time of the thread if there is only one, which other processes disturb less than wall time."""
    return time.thread_time if threads == 1 else time.perf_counter


class Case:
    """One format: packed weights, the same weights for ik_llama.cpp, and what is compared with them."""

    def __init__(self, fmt: Format, args: argparse.Namespace, dense: list[Tensor], library: ik_ggml.Library | None) -> None:
        self.fmt, self.args, self.dense = fmt, args, dense
        blocks = random_blocks(fmt, args.n, args.k)
        first = cpu_ext.pack(blocks, fmt)
        count = max(1, round(args.megabytes * 1e6 / first.nbytes))
        self.weights = [first, *(memory.empty(first.nbytes).copy_(first) for _ in range(count - 1))]
        self.reads = list(zip(*map(reads, self.weights)))
        self.peer = ik_ggml.Matrices(library, blocks, fmt.ggml_type, args.k, len(self.weights)) if library else None

    def measure(self, m: int) -> Iterator[dict[str, object]]:
        """A row of results for each instruction set and precision."""
        args, fmt = self.args, self.fmt
        x = torch.randn(m, args.n if args.transposed else args.k, dtype=args.dtype)
        peer = ik_ggml.Products(self.peer, x.float()) if self.peer else None
        for isa in args.isa:
            cpu_ext.select_isa(isa)
            for precision in args.precision:
                code = int(precision == "int8")

                def product(i: int, code: int = code) -> Tensor:
                    if args.transposed:
                        return cpu_ext.linear_transposed(x, self.weights[i], fmt, args.k)
                    return cpu_ext.linear(x, self.weights[i], fmt, args.n, None, code)

                calls: list[tuple[Callable[[int], object], int]] = [
                    (lambda i: x @ self.dense[i] if args.transposed else F.linear(x, self.dense[i]), len(self.dense)),
                    (product, len(self.weights)),
                ]
                if peer:
                    calls.append((peer.run, len(self.weights)))
                extra = len(calls)
                if m == 1:
                    calls += [(lambda i, read=read: read[i](), len(self.weights)) for read in self.reads]
                clock, warm = clock_of(args.threads), m <= 8  # else what ran before would have emptied the cache
                times = torch.tensor([[timed(*call, clock, warm) for call in calls] for _ in range(args.repeats + 1)])[1:]
                ms = times.median(0).values.tolist()
                ratios = (times / times[:, 1:2]).median(0).values.tolist()
                row: dict[str, object] = {
                    "format": fmt.name,
                    "isa": isa,
                    "precision": precision,
                    "m": m,
                    "n": args.n,
                    "k": args.k,
                    "threads": args.threads,
                    "weights_mb": round(sum(w.nbytes for w in self.weights) / 1e6),
                    "ms": round(ms[1], 3),
                    "gb_per_s": round(self.weights[0].nbytes / ms[1] / 1e6, 2),
                    "gflops": round(2 * m * args.n * args.k / ms[1] / 1e6, 1),
                    "dense_bf16_ms": round(ms[0], 3),
                    "speedup": round(ratios[0], 2),
                }
                if m == 1:
                    read = self.weights[0].nbytes / min(ms[extra:]) / 1e6
                    row |= {"read_gb_per_s": round(read, 2), "of_read": round(self.weights[0].nbytes / ms[1] / 1e6 / read, 3)}
                if peer:
                    mine, theirs = product(0).double(), peer.result(0).double()
                    row |= {
                        "ik_ms": round(ms[2], 3),
                        "over_ik": round(ratios[2], 2),
                        "difference": f"{float((mine - theirs).norm() / mine.norm()):.1e}",
                    }
                yield row
        cpu_ext.select_isa(None)
        if peer:
            peer.close()

    def close(self) -> None:
        """Frees the memory outside torch."""
        if self.peer:
            self.peer.close()


def main() -> None:
    plain = [name for name in list_formats() if get_format(name).interleave == 1]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--formats", nargs="+", default=plain)
    parser.add_argument("--m", nargs="+", type=int, default=[1, 8, 512])
    parser.add_argument("--isa", nargs="+", default=[cpu_ext.capabilities()["isa"]])
    parser.add_argument("--precision", nargs="+", choices=["float", "int8"], default=["int8"])
    parser.add_argument("--transposed", action="store_true", help="products with the matrix itself, which are always in float precision")
    parser.add_argument("--dtype", type=lambda name: getattr(torch, name), default=torch.bfloat16, help="of activations and dense weights")
    parser.add_argument("--n", type=int, default=4096)
    parser.add_argument("--k", type=int, default=4096)
    parser.add_argument("--megabytes", type=float, default=24, help="packed weights used in turn")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--ik", type=Path, help="a build directory of ik_llama.cpp with a shared libggml, to measure beside (ik_ggml.py)")
    parser.add_argument("--csv", type=Path, help="file to write; a header of comment lines describes the machine")
    args = parser.parse_args()
    if args.transposed:
        args.precision, args.ik = ["float"], None

    torch.set_num_threads(args.threads)
    header = results_file.machine(args.threads)
    header.append(f"read bandwidth: {read_bandwidth(args.megabytes, args.threads):.1f} GB/s of {args.megabytes:g} MB")
    if args.ik:
        header.append(
            "ik: products of ik_llama.cpp's ggml in the same process; over_ik: its time / ours; difference: of the results, relative"
        )
    if args.transposed or args.dtype != torch.bfloat16:
        header.append(f"{'transposed products; ' if args.transposed else ''}activations and dense weights: {str(args.dtype)[6:]}")
    print("\n".join(header))
    library = ik_ggml.Library(args.ik, args.threads) if args.ik else None
    # as many dense matrices as keep them in the same kind of memory as the packed ones
    dense_count = max(1, min(8, round(args.megabytes * 1e6 / (2 * args.n * args.k))))
    dense = [torch.randn(args.n, args.k, dtype=args.dtype) for _ in range(dense_count)]
    rows: list[dict[str, object]] = []
    for name in args.formats:
        case = Case(get_format(name), args, dense, library)
        for m in args.m:
            for row in case.measure(m):
                rows.append(row)
                shown = ("format", "isa", "precision", "m", "ms", "gb_per_s", "speedup", "of_read", "over_ik", "difference")
                print("  ".join(f"{key} {row[key]}" for key in shown if key in row), flush=True)
        case.close()
    if args.csv:
        columns = COLUMNS + IK_COLUMNS if library else COLUMNS
        results_file.write(args.csv, header, columns, ([row.get(key, "") for key in columns] for row in rows))


if __name__ == "__main__":
    main()
