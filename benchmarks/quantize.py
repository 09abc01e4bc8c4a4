"""Error and speed of the encoders, per format, against the reference quantizer.

    python benchmarks/quantize.py                              # every format, table and CSV
    python benchmarks/quantize.py --formats iq2_kl iq4_k --rows 1024 --speeds fast default best
    python benchmarks/quantize.py --ik libggml.so              # beside ik_llama.cpp, format by format in the same run
    python benchmarks/quantize.py --embedded                   # the matrices of the embedded model instead
    python benchmarks/quantize.py --device cuda                # the search in torch on a GPU

Matrices of 1024 x 4096 (32 rows of them; all for the trellis formats, whose work is partly per column), Gaussian and Student-t (5
degrees of freedom), times 0.02; one log-normal importance per column (`--seed` and `--columns` for others). `--embedded`: the
attention and the MLP matrices of the package's model, with their importance. Errors are relative, sqrt(sum w (x - q)^2 / sum w x^2),
of the effective weights (`runtime_scale` included): `w` with importance, `ones` with equal weights. objective="rmse". Seconds are CPU
seconds of one thread per million weights (on a GPU: wall seconds), set-up excluded, canonical bytes included.
`results/quantize_reference.csv` has the figures of ik_llama.cpp's quantizer (commit 8337e4c) on all 1024 rows, timed on another machine
of two shared cores; with `--ik` they are measured here, on the same rows. Its `plain` column is the quantizer without importance, `ones`
with equal importance.
"""

from __future__ import annotations

import argparse
import csv
import ctypes
import itertools
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import results_file
import torch
from torch import Tensor

import iqtorch
from iqtorch import cpu_ext
from iqtorch.data import calibration_text, load_tiny_llama
from iqtorch.encode import compiled, encode
from iqtorch.encode.encoder import Speed
from iqtorch.encode.search import large_codebook
from iqtorch.formats import Format

RESULTS = Path(__file__).parent / "results"
#: Weights with their importance, by name of the sample; the errors of a sample are summed over its matrices.
Samples = dict[str, list[tuple[Tensor, Tensor]]]


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

    def measure(self, fmt: Format, samples: Samples) -> dict[str, float]:
        kinds = ["w", "ones"] + ["plain"] * (not self.dll.ggml_quantize_requires_imatrix(fmt.ggml_type))
        return errors_and_seconds(fmt, samples, self.encode, kinds)


def matrices(rows: int, seed: int, columns: int = 4096) -> tuple[dict[str, Tensor], Tensor]:
    gauss = np.random.default_rng(seed).standard_normal((1024, columns))[:rows] * 0.02
    student = np.random.default_rng(seed + 1).standard_t(5, (1024, columns))[:rows] * 0.02
    importance = np.exp(np.random.default_rng(seed + 2).normal(0.0, 1.5, columns))
    return {"gauss": torch.tensor(gauss).float(), "t5": torch.tensor(student).float()}, torch.tensor(importance).float()


def embedded() -> Samples:
    """The matrices of the layers of the package's model; rows that a format cannot hold are not among them."""
    model, tokenizer = load_tiny_llama()
    ids = torch.tensor(tokenizer(calibration_text(), add_special_tokens=False).input_ids)
    importance = iqtorch.collect_importance(model, ids[: len(ids) // 512 * 512].view(-1, 512)[:48].split(8))
    found: Samples = {"attention": [], "mlp": []}
    for name, weight in model.named_parameters():
        if "layers." in name and weight.dim() == 2:
            found["mlp" if ".mlp." in name else "attention"].append((weight.detach().clone(), importance[name]))
    return found


def relative_error(weight: Tensor, fmt: Format, blocks: Tensor, importance: Tensor) -> float:
    error, norm = squared_error(weight, fmt, blocks, importance)
    return (error / norm) ** 0.5


def squared_error(weight: Tensor, fmt: Format, blocks: Tensor, importance: Tensor) -> tuple[float, float]:
    w = importance.double()
    error = w * (weight.double() - fmt.decode(blocks).double() * fmt.runtime_scale).square()
    return float(error.sum()), float((w * weight.double().square()).sum())


def errors_and_seconds(fmt: Format, samples: Samples, run: Callable[..., Tensor], kinds: list[str]) -> dict[str, float]:
    """Errors by kind and sample, and the least seconds per million weights of a sample."""
    found: dict[str, float] = {}
    seconds: list[float] = []
    first, importance = next(iter(samples.values()))[0]
    clock = time.process_time if first.device.type == "cpu" else time.perf_counter
    run(first[:4], fmt, importance)  # tables are built once
    timings = 5 if first.numel() <= 1 << 18 else 1  # the least of them: the first of a process waits for fresh memory
    for (name, sample), kind in itertools.product(samples.items(), kinds):
        error = norm = spent = 0.0
        for weight, importance in sample:
            ones = torch.ones_like(importance)
            taken = []
            for _ in range(timings if kind == "w" else 1):
                synchronize(weight.device)
                started = clock()
                blocks = run(weight, fmt, {"w": importance, "ones": ones, "plain": None}[kind])
                synchronize(weight.device)
                taken.append(clock() - started)
            spent += min(taken)
            parts = squared_error(weight, fmt, blocks, importance if kind == "w" else ones)
            error, norm = error + parts[0], norm + parts[1]
        found[f"{kind}_{name}"] = (error / norm) ** 0.5
        if kind == "w":
            seconds.append(spent / sum(weight.numel() for weight, _ in sample) * 1e6)
    return found | {"seconds": min(seconds)}


def measure(fmt: Format, speed: Speed, samples: Samples) -> dict[str, float]:
    def run(weight: Tensor, fmt: Format, importance: Tensor | None) -> Tensor:
        return encode(weight, fmt, importance, "rmse", speed)

    return errors_and_seconds(fmt, samples, run, ["w", "ones"])


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def published_reference() -> dict[str, dict[str, float]]:
    """The reference's figures on all 1024 rows, by format."""
    with open(RESULTS / "quantize_reference.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    known = {row.pop("format"): {k: float(v) for k, v in row.items() if v} for row in rows}
    return {name: row | {"seconds": row["seconds_gauss"]} for name, row in known.items()}


def machine(device: torch.device, reference: str) -> str:
    isa = cpu_ext.capabilities()["isa"] if compiled.available(device) else "plain torch"
    processor = torch.cuda.get_device_name(device) if device.type == "cuda" else results_file.cpu_name()
    return f"{processor}, {isa}, torch {torch.__version__}, one thread; {reference}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--formats", nargs="+", default=[n for n in iqtorch.list_formats() if iqtorch.get_format(n).plain is None])
    parser.add_argument("--rows", type=int, help="rows of the matrices to use, of 1024 (default: 32, of trellis formats all)")
    parser.add_argument("--columns", type=int, default=4096, help="of the matrices")
    parser.add_argument("--speeds", nargs="+", default=["default"], choices=["fast", "default", "best"])
    parser.add_argument("--seed", type=int, default=20260101)
    parser.add_argument("--embedded", action="store_true", help="matrices of the embedded model")
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--ik", type=Path, help="a shared library of ik_llama.cpp's ggml, to measure beside")
    parser.add_argument("--out", type=Path, default=RESULTS / "quantize.csv")
    options = parser.parse_args()
    torch.set_num_threads(1)

    @cache
    def samples_of(rows: int) -> Samples:
        if options.embedded:
            return embedded()
        weights, importance = matrices(rows, options.seed, options.columns)
        return {name: [(weight, importance)] for name, weight in weights.items()}

    samples = samples_of(1024)
    beside = Reference(options.ik) if options.ik else None
    reference = {} if options.embedded or options.columns != 4096 else published_reference()
    errors = [f"{kind}_{name}" for name in samples for kind in ("w", "ones")]
    compared = [*errors, *(f"plain_{name}" for name in samples), "seconds"]
    lines: list[list[object]] = []
    heads = [*(f"{e:>10} {'vs ref':>7}" + (f" {'vs plain':>8}" if e.startswith("ones") else "") for e in errors)]
    print(f"{'format':8} {'bpw':>6} {'speed':8} " + " ".join(heads) + f" {'s/M':>6} {'ref':>6}")
    for name in options.formats:
        fmt = iqtorch.get_format(name)
        if any(w.shape[1] % fmt.block_size for sample in samples.values() for w, _ in sample):
            print(f"{name}: rows do not fit")
            continue
        rows = options.rows or (1024 if large_codebook(fmt) else 32)
        if not options.embedded:
            samples = samples_of(rows)
        on_device = {name: [(w.to(options.device), i.to(options.device)) for w, i in sample] for name, sample in samples.items()}
        theirs = beside.measure(fmt, samples) if beside else reference.get(name, {})
        for speed in options.speeds:
            ours = measure(fmt, speed, on_device)
            line = f"{name:8} {fmt.bits_per_weight():6.3f} {speed:8} "
            for e in errors:
                line += f"{ours[e]:10.5f} {relative(ours[e], theirs.get(e)):>7} "
                if e.startswith("ones"):
                    line += f"{relative(ours[e], theirs.get(e.replace('ones', 'plain'))):>8} "
            print(line + f"{ours['seconds']:6.3f} {theirs.get('seconds', float('nan')):6.3f}", flush=True)
            known = [f"{theirs[e]:.4f}" if e == "seconds" and e in theirs else f"{theirs[e]:.5f}" if e in theirs else "" for e in compared]
            own = [*(f"{ours[e]:.5f}" for e in errors), f"{ours['seconds']:.4f}"]
            used = "" if options.embedded else rows
            lines.append([name, f"{fmt.bits_per_weight(samples_width(samples)):.4f}", speed, used, *own, *known])
    columns = ["format", "bpw", "speed", "rows", *errors, "seconds", *(f"{e}_reference" for e in compared)]
    header = [machine(options.device, "reference measured beside" if beside else "reference from quantize_reference.csv")]
    if not options.embedded:
        header.append(f"1024 x {options.columns}, seed {options.seed}")
    results_file.write(options.out, header, columns, lines)


def samples_width(samples: Samples) -> int:
    """Columns of the first matrix."""
    return next(iter(samples.values()))[0][0].shape[1]


def relative(ours: float, theirs: float | None) -> str:
    return f"{100 * (ours / theirs - 1):+.1f}%" if theirs else "-"


if __name__ == "__main__":
    main()
