"""Error and speed of the encoders, per format, against the reference quantizer.

    python benchmarks/quantize.py                              # every format, 128 rows, table and CSV
    python benchmarks/quantize.py --formats iq2_kl iq4_k --rows 1024 --speeds fast default best

Matrices of 1024 x 4096, Gaussian and Student-t (5 degrees of freedom), times 0.02; one log-normal importance per column. Errors
are relative, sqrt(sum w (x - q)^2 / sum w x^2), of the effective weights (`runtime_scale` included): `w` with importance, `ones`
with equal weights. objective="rmse". Seconds are CPU seconds of one thread per million weights, set-up excluded, canonical bytes
included. `results/quantize_reference.csv` has the figures of ik_llama.cpp's quantizer (commit 8337e4c) on all 1024 rows, timed on
another machine of two shared cores; its `plain` column is the quantizer without importance, `ones` with equal importance.
"""

from __future__ import annotations

import argparse
import csv
import platform
import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import iqtorch
from iqtorch import cpu_ext
from iqtorch.encode import compiled, encode
from iqtorch.encode.encoder import Speed
from iqtorch.formats import Format

RESULTS = Path(__file__).parent / "results"
K = 4096
ERRORS = ("w_gauss", "ones_gauss", "w_t5", "ones_t5")
COLUMNS = ("format", "bpw", "speed", "rows", *ERRORS, "seconds", *(f"{e}_reference" for e in ERRORS), "seconds_reference")


def matrices(rows: int) -> tuple[dict[str, Tensor], Tensor]:
    gauss = np.random.default_rng(20260101).standard_normal((1024, K))[:rows] * 0.02
    student = np.random.default_rng(20260102).standard_t(5, (1024, K))[:rows] * 0.02
    importance = np.exp(np.random.default_rng(20260103).normal(0.0, 1.5, K))
    return {"gauss": torch.tensor(gauss).float(), "t5": torch.tensor(student).float()}, torch.tensor(importance).float()


def measure(fmt: Format, speed: Speed, weights: dict[str, Tensor], importance: Tensor) -> dict[str, float]:
    found: dict[str, float] = {}
    seconds: list[float] = []
    encode(weights["gauss"][:4], fmt, importance, "rmse", speed)  # tables are built once
    for name, weight in weights.items():
        for kind, columns in (("w", importance), ("ones", None)):
            started = time.process_time()
            blocks = encode(weight, fmt, columns, "rmse", speed)
            seconds.append((time.process_time() - started) / weight.numel() * 1e6)
            w = importance.double() if columns is not None else torch.ones(K, dtype=torch.float64)
            error = w * (weight.double() - fmt.decode(blocks).double() * fmt.runtime_scale).square()
            found[f"{kind}_{name}"] = float((error.sum() / (w * weight.double().square()).sum()).sqrt())
    return found | {"seconds": min(seconds)}


def machine() -> str:
    cpu = next((line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line), "")
    isa = cpu_ext.capabilities()["isa"] if compiled.available(torch.device("cpu")) else "plain torch"
    return f"# {cpu or platform.processor()}, {isa}, torch {torch.__version__}, one thread"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--formats", nargs="+", default=[n for n in iqtorch.list_formats() if iqtorch.get_format(n).plain is None])
    parser.add_argument("--rows", type=int, default=128, help="rows of the matrices to use (of 1024)")
    parser.add_argument("--speeds", nargs="+", default=["default"], choices=["fast", "default", "best"])
    parser.add_argument("--out", type=Path, default=RESULTS / "quantize.csv")
    options = parser.parse_args()
    torch.set_num_threads(1)
    weights, importance = matrices(options.rows)
    with open(RESULTS / "quantize_reference.csv", newline="") as file:
        reference = {row["format"]: row for row in csv.DictReader(file)}
    lines: list[dict[str, object]] = []
    print(f"{'format':8} {'bpw':>6} {'speed':8} " + " ".join(f"{e:>10} {'vs ref':>7}" for e in ERRORS) + f" {'s/M':>6} {'ref':>6}")
    for name in options.formats:
        fmt = iqtorch.get_format(name)
        theirs = reference.get(name, {})
        for speed in options.speeds:
            ours = measure(fmt, speed, weights, importance)
            line = f"{name:8} {fmt.bits_per_weight():6.3f} {speed:8} "
            for e in ERRORS:
                ratio = f"{100 * (ours[e] / float(theirs[e]) - 1):+6.1f}%" if theirs.get(e) else "      -"
                line += f"{ours[e]:10.5f} {ratio} "
            print(line + f"{ours['seconds']:6.2f} {theirs.get('seconds_gauss', '-'):>6}", flush=True)
            row: dict[str, object] = {"format": name, "bpw": f"{fmt.bits_per_weight():.4f}", "speed": speed, "rows": options.rows}
            row |= {e: f"{ours[e]:.5f}" for e in ERRORS} | {"seconds": f"{ours['seconds']:.3f}"}
            row |= {f"{e}_reference": theirs.get(e, "") for e in ERRORS} | {"seconds_reference": theirs.get("seconds_gauss", "")}
            lines.append(row)
    with open(options.out, "w", newline="") as file:
        print(machine(), file=file)
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(lines)


if __name__ == "__main__":
    main()
