"""Error and speed of the encoders, per format, against the reference quantizer.

    python benchmarks/quantize.py                              # every format, 128 rows, table and CSV
    python benchmarks/quantize.py --formats iq2_kl iq4_k --rows 1024 --speeds fast default best
    python benchmarks/quantize.py --ik libggml.so              # beside ik_llama.cpp, format by format in the same run
    python benchmarks/quantize.py --device cuda                # the search in torch on a GPU

Matrices of 1024 x 4096, Gaussian and Student-t (5 degrees of freedom), times 0.02; one log-normal importance per column (`--seed`
for others). Errors are relative, sqrt(sum w (x - q)^2 / sum w x^2), of the effective weights (`runtime_scale` included): `w` with
importance, `ones` with equal weights. objective="rmse". Seconds are CPU seconds of one thread per million weights (on a GPU: wall
seconds), set-up excluded, canonical bytes included. `results/quantize_reference.csv` has the figures of ik_llama.cpp's quantizer
(commit 8337e4c) on all 1024 rows, timed on another machine of two shared cores; with `--ik` they are measured here, on the same
rows. Its `plain` column is the quantizer without importance, `ones` with equal importance.
"""

from __future__ import annotations

import argparse
import csv
import ctypes
import time
from pathlib import Path

import numpy as np
import results_file
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
PLAIN = ("plain_gauss", "plain_t5")
COLUMNS = ("format", "bpw", "speed", "rows", *ERRORS, "seconds", *(f"{e}_reference" for e in (*ERRORS, *PLAIN)), "seconds_reference")


class Reference:
    """The quantizer in a shared library of ik_llama.cpp's `ggml`."""

    def __init__(self, path: Path) -> None:
        self.dll = ctypes.CDLL(str(path))
        pointer, integer = ctypes.c_void_p, ctypes.c_int64
        self.dll.ggml_quantize_chunk.restype = ctypes.c_size_t
        self.dll.ggml_quantize_requires_imatrix.restype = ctypes.c_bool
        self.dll.ggml_quantize_chunk.argtypes = [ctypes.c_int, pointer, pointer, integer, integer, integer, pointer, pointer]

    def encode(self, weight: Tensor, fmt: Format, importance: Tensor | None) -> Tensor:
        rows, k = weight.shape
        out = torch.empty((rows, fmt.row_bytes(k)), dtype=torch.uint8)
        default = ctypes.create_string_buffer(2)  # struct quantize_user_data: two switches, off
        columns = None if importance is None else importance.data_ptr()
        self.dll.ggml_quantize_init(fmt.ggml_type)
        self.dll.ggml_quantize_chunk(fmt.ggml_type, weight.data_ptr(), out.data_ptr(), 0, rows, k, columns, default)
        return out

    def measure(self, fmt: Format, weights: dict[str, Tensor], importance: Tensor) -> dict[str, str]:
        found: dict[str, str] = {}
        ones = torch.ones_like(importance)
        self.encode(weights["gauss"][:4], fmt, importance)  # tables are built once
        for name, weight in weights.items():
            for kind, columns in (("w", importance), ("ones", ones), ("plain", None)):
                if columns is None and self.dll.ggml_quantize_requires_imatrix(fmt.ggml_type):
                    continue
                started = time.process_time()
                blocks = self.encode(weight, fmt, columns)
                seconds = (time.process_time() - started) / weight.numel() * 1e6
                found[f"{kind}_{name}"] = f"{relative_error(weight, fmt, blocks, importance if kind == 'w' else ones):.5f}"
                if kind == "w":
                    found[f"seconds_{name}"] = f"{seconds:.3f}"
        return found


def matrices(rows: int, seed: int) -> tuple[dict[str, Tensor], Tensor]:
    gauss = np.random.default_rng(seed).standard_normal((1024, K))[:rows] * 0.02
    student = np.random.default_rng(seed + 1).standard_t(5, (1024, K))[:rows] * 0.02
    importance = np.exp(np.random.default_rng(seed + 2).normal(0.0, 1.5, K))
    return {"gauss": torch.tensor(gauss).float(), "t5": torch.tensor(student).float()}, torch.tensor(importance).float()


def relative_error(weight: Tensor, fmt: Format, blocks: Tensor, importance: Tensor) -> float:
    w = importance.double()
    error = w * (weight.double() - fmt.decode(blocks).double() * fmt.runtime_scale).square()
    return float((error.sum() / (w * weight.double().square()).sum()).sqrt())


def measure(fmt: Format, speed: Speed, weights: dict[str, Tensor], importance: Tensor) -> dict[str, float]:
    found: dict[str, float] = {}
    seconds: list[float] = []
    device = importance.device
    clock = time.process_time if device.type == "cpu" else time.perf_counter
    encode(weights["gauss"][:4], fmt, importance, "rmse", speed)  # tables are built once
    for name, weight in weights.items():
        for kind, columns in (("w", importance), ("ones", None)):
            synchronize(device)
            started = clock()
            blocks = encode(weight, fmt, columns, "rmse", speed)
            synchronize(device)
            if kind == "w":
                seconds.append((clock() - started) / weight.numel() * 1e6)
            found[f"{kind}_{name}"] = relative_error(weight, fmt, blocks, importance if kind == "w" else torch.ones_like(importance))
    return found | {"seconds": min(seconds)}


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def machine(device: torch.device, reference: str) -> str:
    isa = cpu_ext.capabilities()["isa"] if compiled.available(device) else "plain torch"
    processor = torch.cuda.get_device_name(device) if device.type == "cuda" else results_file.cpu_name()
    return f"# {processor}, {isa}, torch {torch.__version__}, one thread; {reference}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--formats", nargs="+", default=[n for n in iqtorch.list_formats() if iqtorch.get_format(n).plain is None])
    parser.add_argument("--rows", type=int, default=128, help="rows of the matrices to use (of 1024)")
    parser.add_argument("--speeds", nargs="+", default=["default"], choices=["fast", "default", "best"])
    parser.add_argument("--seed", type=int, default=20260101)
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--ik", type=Path, help="a shared library of ik_llama.cpp's ggml, to measure beside")
    parser.add_argument("--out", type=Path, default=RESULTS / "quantize.csv")
    options = parser.parse_args()
    torch.set_num_threads(1)
    weights, importance = matrices(options.rows, options.seed)
    beside = Reference(options.ik) if options.ik else None
    on_device = {name: weight.to(options.device) for name, weight in weights.items()}
    with open(RESULTS / "quantize_reference.csv", newline="") as file:
        reference = {row["format"]: row for row in csv.DictReader(file)}
    lines: list[dict[str, object]] = []
    print(f"{'format':8} {'bpw':>6} {'speed':8} " + " ".join(f"{e:>10} {'vs ref':>7}" for e in ERRORS) + f" {'s/M':>6} {'ref':>6}")
    for name in options.formats:
        fmt = iqtorch.get_format(name)
        theirs = beside.measure(fmt, weights, importance) if beside else reference.get(name, {})
        for speed in options.speeds:
            ours = measure(fmt, speed, on_device, importance.to(options.device))
            line = f"{name:8} {fmt.bits_per_weight():6.3f} {speed:8} "
            for e in ERRORS:
                ratio = f"{100 * (ours[e] / float(theirs[e]) - 1):+6.1f}%" if theirs.get(e) else "      -"
                line += f"{ours[e]:10.5f} {ratio} "
            print(line + f"{ours['seconds']:6.2f} {theirs.get('seconds_gauss', '-'):>6}", flush=True)
            row: dict[str, object] = {"format": name, "bpw": f"{fmt.bits_per_weight():.4f}", "speed": speed, "rows": options.rows}
            row |= {e: f"{ours[e]:.5f}" for e in ERRORS} | {"seconds": f"{ours['seconds']:.3f}"}
            row |= {f"{e}_reference": theirs.get(e, "") for e in (*ERRORS, *PLAIN)} | {"seconds_reference": theirs.get("seconds_gauss", "")}
            lines.append(row)
    with open(options.out, "w", newline="") as file:
        print(machine(options.device, "reference measured beside" if beside else "reference from quantize_reference.csv"), file=file)
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(lines)


if __name__ == "__main__":
    main()
