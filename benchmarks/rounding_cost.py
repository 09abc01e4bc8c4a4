"""Time of the three roundings on one block of a Llama, weights and inputs drawn at random, without the passes of the text.

    python benchmarks/rounding_cost.py [--width 1024] > benchmarks/results/rounding_cost.csv

A block of width W: query and output W x W, key and value W / 4 x W, gate and up 3 W x W, down W x 3 W. `nearest` is
`iqtorch.encode` by importance; `ldlq` and `yaqa` are what layer-by-layer rounding does with each weight once its statistics are
there: the factor of its input, the weight that makes up for the layers before, the rounding, and the check on activations kept
aside. CPU time of one thread, in seconds for a million weights.
"""

from __future__ import annotations

import argparse
import csv
import sys
import time

import results_file
import torch
from torch import Tensor

import iqtorch
from iqtorch.calibration.sequence import _Statistics
from iqtorch.encode import encode

FIELDS = ("format", "width", "nearest", "ldlq", "yaqa", "ldlq / nearest", "yaqa / nearest")


def statistics(k: int, rows: int) -> _Statistics:
    g = torch.Generator().manual_seed(k)
    x = torch.randn(2 * k, k, generator=g)
    x += 0.5 * x.roll(1, 1)  # neighbours go together
    y = x + 0.1 * torch.randn(2 * k, k, generator=g)
    return _Statistics(y.T @ y / len(y), y.T @ (x - y) / len(y), x[:512], y[:512], rows)


def stages(width: int) -> list[tuple[int, list[int]]]:
    """Inputs of a block's layers, and rows of the weights that share each."""
    wide = 3 * width
    return [(width, [width, width // 4, width // 4]), (width, [width]), (width, [wide, wide]), (wide, [width])]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--formats", nargs="+", default=["iq2_ks", "iq2_kl", "q2_k", "iq3_k", "iq4_xs", "iq4_ks", "q4_k", "q6_k"])
    parser.add_argument("--roundings", nargs="+", default=["nearest", "ldlq", "yaqa"])
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--repeats", type=int, default=2, help="of which the fastest counts")
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(*(f"# {line}" for line in results_file.machine(1)), sep="\n")
    writer = csv.DictWriter(sys.stdout, FIELDS, lineterminator="\n")
    writer.writeheader()
    g = torch.Generator().manual_seed(0)
    shapes = stages(options.width)
    weights = [[torch.randn(rows, k, generator=g) for rows in every] for k, every in shapes]
    found = {k: statistics(k, 0) for k, _ in shapes}
    curvatures = {
        rows: (own.T @ own / rows).contiguous() for _, every in shapes for rows in every for own in [torch.randn(rows, rows, generator=g)]
    }
    total = sum(w.numel() for every in weights for w in every) / 1e6

    def run(name: str, rounding: str) -> float:
        fmt = iqtorch.get_format(name)
        start = time.process_time()
        for (k, every), own in zip(shapes, weights, strict=True):
            base = found[k]
            shared = _Statistics(base.moments, base.cross, base.x, base.y, sum(every))
            for weight in own:
                if rounding == "nearest":
                    encode(weight, fmt, base.moments.diagonal().contiguous())
                else:
                    curvature: Tensor | None = curvatures[len(weight)] if rounding == "yaqa" else None
                    shared.round(weight, fmt, "model", curvature)
        return (time.process_time() - start) / total

    for name in options.formats:
        run(name, options.roundings[0])  # makes tables, and touches memory
        times = {rounding: min(run(name, rounding) for _ in range(options.repeats)) for rounding in options.roundings}
        row = {"format": name, "width": options.width} | {r: f"{t:.3f}" for r, t in times.items()}
        row |= {f"{r} / nearest": f"{t / times['nearest']:.2f}" for r, t in times.items() if r != "nearest" and "nearest" in times}
        writer.writerow(row)
        sys.stdout.flush()


if __name__ == "__main__":
    main()
