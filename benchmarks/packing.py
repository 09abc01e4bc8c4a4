"""Speed of packing: canonical bytes to the CPU layout and back, every format.

    python benchmarks/packing.py --csv benchmarks/results/packing.csv

A matrix of random bytes is packed into fresh memory, as when a model is loaded, and unpacked. Figures are gigabytes of canonical
bytes per second, medians over repeats; `memcpy` is a copy of the same bytes into fresh memory, timed beside each. With one
thread the clock is the thread's CPU time.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import results_file
import torch

from iqtorch import cpu_ext
from iqtorch.formats import get_format, list_formats

COLUMNS = ("format", "n", "k", "threads", "megabytes", "extra_percent", "pack_gb_per_s", "unpack_gb_per_s", "memcpy_gb_per_s")


def main() -> None:
    plain = [name for name in list_formats() if get_format(name).interleave == 1]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--formats", nargs="+", default=plain)
    parser.add_argument("--n", type=int, default=8192)
    parser.add_argument("--k", type=int, default=4096)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--csv", type=Path, help="file to write; a header of comment lines describes the machine")
    args = parser.parse_args()

    torch.set_num_threads(args.threads)
    clock = time.thread_time if args.threads == 1 else time.perf_counter
    header = results_file.machine(args.threads)
    print("\n".join(header))

    def seconds(call: Callable[[], object]) -> float:
        start = clock()
        call()
        return clock() - start

    rows = []
    for name in args.formats:
        fmt = get_format(name)
        blocks = torch.randint(0, 256, (args.n, fmt.row_bytes(args.k)), dtype=torch.uint8)
        packed = cpu_ext.pack(blocks, fmt)
        calls = (
            lambda b=blocks, f=fmt: cpu_ext.pack(b, f),
            lambda p=packed, f=fmt: cpu_ext.unpack(p, f, args.n, args.k),
            lambda b=blocks: cpu_ext.copy(b),
        )
        times = [[seconds(call) for call in calls] for _ in range(args.repeats + 1)][1:]
        speeds = [round(blocks.nbytes / statistics.median(column) / 1e9, 2) for column in zip(*times)]
        extra = round(100 * (packed.nbytes / blocks.nbytes - 1), 3)
        rows.append((name, args.n, args.k, args.threads, round(blocks.nbytes / 1e6, 1), extra, *speeds))
        results_file.show(COLUMNS, rows[-1])
    if args.csv:
        results_file.write(args.csv, header, COLUMNS, rows)


if __name__ == "__main__":
    main()
