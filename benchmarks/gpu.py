"""Checks every GPU kernel, then times it: `python benchmarks/gpu.py --out results/`. One NVIDIA or AMD GPU, no network, no model.

    correctness   every format x operator x activation dtype x M, against float64 products of the weights decoded by plain torch
    linear        N = K = 8192 and other shapes: microseconds, GB/s of packed bytes, share of the copy bandwidth, ratio to cuBLAS bf16
    trees         a small model compiled with CUDA graphs, from its first call on
    experts       top 8 of 128, gate and up to routing weights, against bfloat16 experts fused in Triton (gpu_experts.py)
    model         Llama-8B-shaped: compiled decoding and a prompt of 2048 tokens, against bfloat16 (gpu_model.py)
    pack          canonical bytes -> device layout and back
    tiles         the vector and the matrix kernel with other tiles than the closed-form choice
    aims          what was asked for beside what was measured

Each part writes a CSV whose first lines are the conditions, row by row, so that a run that is cut off keeps what it has. Formats are jobs
in processes of their own (gpu_jobs.py): a crash or a hang costs one of them. Correctness runs in many processes beside each other (most
of its time is compiling) and leaves the kernels in Triton's cache; what is timed runs alone. `--minutes` ends the run in time.

Timings: one CUDA graph that runs the kernel over copies of the weights that together exceed the L2 cache several times, replayed; the
median of the replays, divided by the copies. `--quick` takes a few formats. The exit status is 1 if any product is outside its error
bound or any job failed (timings are still written).
`TRITON_INTERPRET=1 python benchmarks/gpu.py --rehearse` runs all of it on the CPU in tiny sizes.
"""

# ruff: noqa: E402

from __future__ import annotations

import argparse
import csv
import dataclasses
import datetime
import itertools
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]  # in processes of its own, and without an installation

from gpu_checks import correctness
from gpu_jobs import Job, run_jobs
from gpu_parts import conditions, expert_times, graph_trees, linear_times, model_times, pack_times, tile_times
from gpu_plan import REHEARSAL, Plan

import iqtorch
from iqtorch import kernels
from iqtorch.formats import get_format, list_formats
from iqtorch.kernels import tuning
from iqtorch.kernels.timing import REPLAYS

# -- the aims ------------------------------------------------------------------------------------------------


def aims(results: dict[str, list[dict[str, Any]]], plan: Plan) -> Iterator[dict[str, Any]]:
    """What was asked of the kernels beside what was measured."""

    def linear(name: str, tokens: int, field: str) -> list[float]:
        return [
            float(r[field])
            for r in results.get("linear", [])
            if r.get("format") == name and r["tokens"] == tokens and r["rows"] == plan.shapes[0][0] and r[field]
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
    for what, limit in (("decode_us", 3.5), ("prefill_us", 0.9)):
        of = {str(r["format"]): r for r in reversed(results.get("model", [])) if r.get(what, "nan") != "nan"}
        for name in sorted(set(of) - {"bf16"}):
            found = [float(of["bf16"][what]) / float(of[name][what])] if "bf16" in of else []
            yield aim(f"{name} model: {what.removesuffix('_us')}, times bf16", found, limit)


# -- the run -------------------------------------------------------------------------------------------------


class Run:
    """Files, results and progress of a run."""

    def __init__(self, out: Path, until: float) -> None:
        self.out, self.until, self.started = out, until, time.time()
        self.header: list[str] = []
        self.results: dict[str, list[dict[str, Any]]] = {}
        self.failures = 0
        out.mkdir(parents=True, exist_ok=True)

    def say(self, text: str) -> None:
        print(f"[{time.time() - self.started:6.1f} s] {text}", flush=True)

    def write(self, part: str, row: dict[str, Any]) -> None:
        """Behind what is there, at once."""
        path, new = self.out / f"{part}.csv", part not in self.results
        self.results.setdefault(part, []).append(row)
        with path.open("w" if new else "a", newline="") as file:
            writer = csv.DictWriter(file, list(self.results[part][0]), extrasaction="ignore")
            if new:
                file.write("\n".join(self.header) + "\n")
                writer.writeheader()
            writer.writerow(row)

    def part(self, part: str, jobs: list[tuple[str, Job]], workers: int = 1, seconds: float = float("inf"), quiet: bool = False) -> None:
        """Runs the jobs of a part; `seconds` at most."""
        good: dict[str, int] = {}

        def row(name: str, found: dict[str, Any]) -> None:
            self.write(part, found)
            if found.get("ok", True):
                good[name] = good.get(name, 0) + 1
            else:
                self.failures += 1
            if not quiet or not found.get("ok", True):
                self.say(f"{part}{'' if found.get('ok', True) else ' WRONG'} " + " ".join(str(v) for v in found.values() if v != ""))

        def end(name: str, failure: str | None, rows: int, took: float) -> None:
            if failure is not None:
                self.failures += 1
                with (self.out / "failures.txt").open("a") as file:
                    file.write(f"{part} {name}: {failure}\n")
            if failure is not None or quiet:
                self.say(f"{part} {name}: {good.get(name, 0)} of {rows} good in {took:.1f} s{f', FAILED: {failure}' if failure else ''}")

        left = run_jobs(jobs, workers, min(self.until, time.time() + seconds), row, end)
        if left:
            self.say(f"{part}: time is over, not started: {' '.join(left)}")

    def aims(self, plan: Plan) -> None:
        for row in aims(self.results, plan):
            self.write("aims", row)
            if row["measured"] != "nan":
                print("  ".join(f"{k} {v}" for k, v in row.items()))


PARTS = ("correctness", "linear", "trees", "experts", "model", "pack", "tiles", "shapes")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("gpu-results"), help="folder for the CSV files")
    parser.add_argument("--parts", default=",".join(PARTS), help="comma-separated, in this order (shapes: linear, all shapes and M)")
    parser.add_argument("--quick", action="store_true", help="what is timed: only a few formats")
    parser.add_argument("--formats", help="comma-separated names: what is timed")
    parser.add_argument("--check", help="comma-separated names: what is checked; default: every format")
    parser.add_argument("--core", action="store_true", help="checks in bfloat16 with five M only")
    parser.add_argument("--minutes", type=float, help="time of the whole run; default: no limit")
    parser.add_argument("--check-seconds", type=float, default=float("inf"), help="time of the part correctness; default: no limit")
    parser.add_argument("--workers", type=int, help="processes of the part correctness")
    parser.add_argument("--rehearse", action="store_true", help="every step on the CPU in tiny sizes, in Triton's interpreter")
    options = parser.parse_args(arguments)
    plan = Plan()
    if options.rehearse:
        if not kernels.library.INTERPRETED:
            parser.error("a rehearsal needs the environment variable TRITON_INTERPRET=1")
        plan = REHEARSAL
    elif not torch.cuda.is_available():
        parser.error("no CUDA or ROCm device is available to this PyTorch; --rehearse runs without")
    if options.core and not options.rehearse:
        plan = dataclasses.replace(plan, dtypes=(torch.bfloat16,), tokens=(1, 2, 7, 33, 129), large_tokens=(1, 2, 16, 512))
    every = [n for n in list_formats() if get_format(n).interleave == 1]
    names = options.formats.split(",") if options.formats else list(plan.quick) if options.quick or options.rehearse else every
    checked = options.check.split(",") if options.check else names if options.rehearse else [*names, *(n for n in every if n not in names)]
    run = Run(options.out, time.time() + 60 * options.minutes if options.minutes else float("inf"))
    run.say(f"torch {torch.__version__}, {os.cpu_count()} cores, {options.out}")
    first: list[dict[str, Any]] = []
    run_jobs([("card", (conditions, (plan,)))], 1, run.until, lambda _, row: first.append(row), lambda *what: run.say(f"{what}"), 120.0)
    if not first:
        run.say("nothing runs on this card")
        return 1
    import triton

    run.header = [
        f"# {datetime.datetime.now(datetime.timezone.utc):%Y-%m-%d %H:%M} UTC, iqtorch {iqtorch.__version__}",
        f"# torch {torch.__version__}, Triton {triton.__version__}, Python {sys.version.split()[0]}",
        "# " + ", ".join(f"{k} {v}" for k, v in first[0].items()),
        f"# median of {REPLAYS[plan.device.type]} replays over rotating weights",
    ]
    print("\n".join(run.header), flush=True)
    tiles = [
        (f"{name} {tokens} {option}", (tile_times, (name, tokens, option, plan)))
        for name in names[:2]
        for tokens in (1, 16)
        for option in [{}, *itertools.islice(tuning.candidates("gemv" if tokens == 1 else "gemm"), plan.tiles or None)]
    ]
    for part in options.parts.split(","):
        if part == "correctness":
            run.part(part, [(n, (correctness, (n, plan))) for n in checked], options.workers or plan.workers, options.check_seconds, True)
        elif part == "linear":
            run.part(part, [(n, (linear_times, (n, plan, plan.shapes[:1], plan.first_tokens))) for n in names])
        elif part == "shapes":
            run.part(part, [(n, (linear_times, (n, plan, plan.shapes, plan.timed))) for n in names])
        elif part == "trees":
            run.part(part, [(n, (graph_trees, (n, plan))) for n in names[:2]], 2)
        elif part == "experts":
            run.part(part, [(n, (expert_times, (n, plan))) for n in names])
        elif part == "model":
            run.part(part, [(n, (model_times, (n, plan))) for n in ("bf16", *names[:1])], 2)
        elif part == "pack":
            run.part(part, [(n, (pack_times, (n, plan))) for n in names])
        elif part == "tiles":
            run.part(part, tiles)
        else:
            parser.error(f"no part {part!r}; there are {', '.join(PARTS)}")
    run.aims(plan)
    run.say(f"{run.failures} failures")
    return 0 if run.failures == 0 else 1


if __name__ == "__main__":
    sys.exit(main())
