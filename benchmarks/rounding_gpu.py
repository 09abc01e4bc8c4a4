"""Calibrated rounding on a GPU: whole calls of `quantize_model` on one block of the shape of Llama 8B or 70B, and what whole models take.

    python benchmarks/rounding_gpu.py [--seconds 70] [--out FILE]

Weights and token ids are drawn at random; the block is in bfloat16. `passes` are the runs of the text through the block, original and
packed, `moments` the sums of products, `rounding` what is left: factors, the correction for the layers before, codes, and the check on
activations kept aside. `peak GB` is the most memory that tensors took at a time, the block and its inputs included. A whole model takes
`blocks x (rounding + (passes + moments) x tokens / tokens measured)`, here for 128 Ki tokens; embedding and output are left out.

With yaqa, rows are rounded in 16 steps one after the other. Rounding on the host is that of the compiled pass, with all threads.
"""

from __future__ import annotations

import argparse
import copy
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import results_file
import torch
from torch import nn

import iqtorch
from iqtorch.calibration.sequence import _Pairs, _Statistics

#: hidden and intermediate size, heads, heads of keys and values, blocks
SHAPES = {"tiny": (256, 512, 4, 2, 2), "8B": (4096, 14336, 32, 8, 32), "70B": (8192, 28672, 64, 8, 80)}
TEXT = 128 * 1024
PARTS = ("nearest", "ldlq", "yaqa", "visit", "host")
COLUMNS = (
    "model", "format", "rounding by", "weights", "million", "device", "tokens", "passes s", "moments s", "rounding s", "peak GB",
    "model minutes",
)  # fmt: skip


class Clock:
    """Seconds by name, the device having finished; what one part spends inside another counts for the inner one only."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.spent, self.inside = device, dict[str, float](), 0.0

    def now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def timed(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            start, inside = self.now(), self.inside
            try:
                return call(*args, **kwargs)
            finally:
                whole = self.now() - start
                self.spent[name] = self.spent.get(name, 0.0) + whole - (self.inside - inside)
                self.inside = inside + whole

        return wrapped


def block(shape: str, device: torch.device, dtype: torch.dtype = torch.bfloat16) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    hidden, wide, heads, kv, _ = SHAPES[shape]
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=hidden, intermediate_size=wide, num_attention_heads=heads, num_key_value_heads=kv, num_hidden_layers=1, vocab_size=512
    )
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:
            return LlamaForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(before)


def whole_call(
    model: nn.Module, recipe: str, fmt: str, rounding: str, tokens: int, device: torch.device, visit: bool = False
) -> tuple[dict[str, float], float]:
    """Seconds by part, and peak gigabytes on the device."""
    ids = torch.randint(512, (max(1, tokens // 1024), min(tokens, 1024)), generator=torch.Generator().manual_seed(1))
    batches = [part.to(next(model.parameters()).device) for part in ids.split(4)]
    clock = Clock(device)
    plain = _Statistics.round, _Pairs.add
    _Statistics.round, _Pairs.add = clock.timed("rounding", plain[0]), clock.timed("moments", plain[1])  # type: ignore[method-assign]
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    try:
        call = clock.timed("passes", iqtorch.quantize_model)
        call(copy.deepcopy(model), {recipe: fmt}, calibration=batches, rounding=rounding, progress=False, device=device if visit else None)
    finally:
        _Statistics.round, _Pairs.add = plain  # type: ignore[method-assign]
    return clock.spent, torch.cuda.max_memory_allocated(device) / 1e9 if device.type == "cuda" else float("nan")


def minutes(shape: str, spent: dict[str, float], tokens: int) -> float:
    passes = (spent["passes"] + spent.get("moments", 0.0)) * TEXT / tokens
    return SHAPES[shape][4] * (passes + spent["rounding"]) / 60


def matrix(rows: int, k: int, fmt: str, device: torch.device, statistics: _Statistics) -> dict[str, float]:
    """Rounding of one matrix by statistics that are there, on a device."""
    weight = torch.randn(rows, k, generator=torch.Generator().manual_seed(0)).to(device)
    clock = Clock(device)
    shared = _Statistics(statistics.moments, statistics.cross, statistics.x, statistics.y, rows)
    clock.timed("rounding", shared.round)([weight], iqtorch.get_format(fmt), "model")
    return clock.spent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--formats", nargs="+", default=["iq4_ks", "iq2_kl"])
    parser.add_argument("--models", nargs="+", choices=tuple(SHAPES), default=["8B", "70B"])
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--seconds", type=float, default=70, help="no part is begun after this time")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        parser.error("no CUDA or ROCm device is available to this PyTorch; --device cpu --models tiny runs without")
    begin = time.perf_counter()
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else results_file.cpu_name()
    header = [
        *results_file.machine(torch.get_num_threads()),
        f"device: {name}; model minutes: {TEXT // 1024} Ki tokens, blocks alone; no part begun after {options.seconds:.0f} s",
    ]
    rows: list[tuple[object, ...]] = []

    def add(what: tuple[object, ...], spent: dict[str, float], peak: float = float("nan"), whole: float = float("nan")) -> None:
        parts = (f"{spent[part]:.3f}" if part in spent else "" for part in ("passes", "moments", "rounding"))
        rows.append((*what, *parts, *("" if math.isnan(x) else f"{x:.2f}" for x in (peak, whole))))
        results_file.show(COLUMNS, rows[-1])
        if options.out:
            results_file.write(options.out, header, COLUMNS, rows)

    def left(what: str) -> bool:
        spent = time.perf_counter() - begin
        if spent > options.seconds:
            print(f"left out after {spent:.0f} s: {what}", flush=True)
        return spent <= options.seconds

    tiny = block("tiny", device)
    for fmt in options.formats:  # compiles kernels and makes tables
        for by in ("ldlq", "yaqa"):
            whole_call(tiny, r"layers\..*proj", fmt, by, 1024, device)
        iqtorch.quantize(torch.randn(16, 256, device=device), fmt)
    print(f"ready after {time.perf_counter() - begin:.1f} s", flush=True)
    for shape in options.models:
        model = block(shape, device)
        hidden, wide, _, _, blocks = SHAPES[shape]
        weights = [p.detach() for n, p in model.named_parameters() if n.endswith("proj.weight")]
        million = round(sum(p.numel() for p in weights) / 1e6, 1)
        for fmt in options.formats:
            if "nearest" in options.parts and left(f"{shape} {fmt} nearest"):
                clock = Clock(device)
                for p in weights:
                    clock.timed("rounding", iqtorch.quantize)(p, fmt, torch.rand(p.shape[1], device=device))
                add((shape, fmt, "nearest", "block", million, name, 0), clock.spent, whole=clock.spent["rounding"] * blocks / 60)
            for by in ("ldlq", "yaqa"):
                if by in options.parts and left(f"{shape} {fmt} {by}"):
                    spent, peak = whole_call(model, r"layers\..*proj", fmt, by, options.tokens, device)
                    add((shape, fmt, by, "block", million, name, options.tokens), spent, peak, minutes(shape, spent, options.tokens))
        fmt = options.formats[0]
        if "visit" in options.parts and left(f"{shape} {fmt} ldlq, the model on the host"):
            model = model.to("cpu")
            spent, peak = whole_call(model, r"layers\..*proj", fmt, "ldlq", options.tokens, device, visit=True)
            what = "block, from the host and back"
            add((shape, fmt, "ldlq", what, million, name, options.tokens), spent, peak, minutes(shape, spent, options.tokens))
        if "host" in options.parts and device.type == "cuda":
            for k in (hidden, wide):
                if left(f"{hidden} x {k} on the host"):
                    x = torch.randn(8192, k, device=device)
                    h = x.T @ x / len(x)
                    found = (h, 0.01 * h, x[:512].clone(), x[:512].clone())
                    del x
                    for where in (device, torch.device("cpu")):
                        spent = matrix(hidden, k, fmt, where, _Statistics(*(t.to(where) for t in found), hidden))
                        label = name if where.type == "cuda" else f"host, {torch.get_num_threads()} threads"
                        add((shape, fmt, "ldlq", f"{hidden} x {k}", round(hidden * k / 1e6, 1), label, 0), spent)
                    del found, h
        del model, weights
    print(f"done after {time.perf_counter() - begin:.1f} s", flush=True)


if __name__ == "__main__":
    main()
