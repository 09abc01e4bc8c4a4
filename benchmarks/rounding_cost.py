"""Time of the three roundings on one block of a Llama, weights and inputs drawn at random, without the passes of the text.

    python benchmarks/rounding_cost.py [--width 1024] > benchmarks/results/rounding_cost.csv
    python benchmarks/rounding_cost.py --models embedded 1b > benchmarks/results/rounding_cost_models.csv

A block of width W: query and output W x W, key and value W / 4 x W, gate and up 3 W x W, down W x 3 W. `nearest` is
`iqtorch.encode` by importance; `ldlq` and `yaqa` are what layer-by-layer rounding does with each weight once its statistics are
there: the factor of its input, the weight that makes up for the layers before, the rounding, and the check on activations kept
aside. CPU time of one thread, in seconds for a million weights.

With --models, whole calls of `quantize_model` instead: the embedded model with 24 windows of 512 tokens, and one block of the shape of a
Llama of 1.1 B parameters (2048 and 5632 wide) with 8. `nearest` is the call with importance that is there already, `rounding` what the
call with `rounding="ldlq"` spends on the weights once their statistics are there, `passes` the rest of it: running the text through
the model, and the sums of products.
"""

from __future__ import annotations

import argparse
import copy
import csv
import sys
import time
from functools import lru_cache

import results_file
import torch
from torch import Tensor, nn

import iqtorch
from iqtorch.calibration.sequence import _Statistics
from iqtorch.data import calibration_text, load_tiny_llama
from iqtorch.encode import encode

FIELDS = ("format", "width", "nearest", "ldlq", "yaqa", "ldlq / nearest", "yaqa / nearest")
MODEL_FIELDS = ("model", "million weights", "format", "nearest", "passes", "rounding", "rounding / nearest", "whole / (3 nearest + passes)")


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


@lru_cache(maxsize=1)
def model_and_text(name: str) -> tuple[nn.Module, list[Tensor], iqtorch.Importance]:
    """A model, batches of token ids, and importance."""
    if name == "embedded":
        model, tokenizer = load_tiny_llama()
        ids = torch.tensor(tokenizer(calibration_text(), add_special_tokens=False).input_ids)
        batches = list(ids[: 24 * 512].view(-1, 512).split(8))
    else:
        from transformers import LlamaConfig, LlamaForCausalLM

        torch.manual_seed(0)
        shape = {"hidden_size": 2048, "intermediate_size": 5632, "num_attention_heads": 32, "num_key_value_heads": 4}
        model = LlamaForCausalLM(LlamaConfig(**shape, num_hidden_layers=1, vocab_size=512)).eval()
        batches = list(torch.randint(512, (8, 512)).split(4))
    return model, batches, iqtorch.collect_importance(model, batches)


def whole_call(name: str, fmt: str) -> dict[str, object]:
    """Times of `quantize_model` with importance, and with batches and rounding="ldlq"."""
    base, batches, importance = model_and_text(name)
    recipe = {r"layers\..*proj": fmt}
    rounding = 0.0

    def timed(self: _Statistics, *arguments: object) -> list[tuple[iqtorch.IQTensor, str]]:
        nonlocal rounding
        start = time.process_time()
        found = plain(self, *arguments)  # type: ignore[arg-type]
        rounding += time.process_time() - start
        return found

    def call(**how: object) -> float:
        model = copy.deepcopy(base)
        start = time.process_time()
        iqtorch.quantize_model(model, recipe, progress=False, **how)  # type: ignore[arg-type]
        return time.process_time() - start

    call(importance=importance)  # both make tables, and touch memory
    call(calibration=[batches[0][:1]], rounding="ldlq")
    nearest = call(importance=importance)
    plain, _Statistics.round = _Statistics.round, timed  # type: ignore[method-assign,assignment]
    try:
        whole = call(calibration=batches, rounding="ldlq")
    finally:
        _Statistics.round = plain  # type: ignore[method-assign]
    weights = sum(p.numel() for n, p in base.named_parameters() if n.endswith("proj.weight")) / 1e6
    limit = 3 * nearest + whole - rounding
    values = (name, f"{weights:.1f}", fmt, *(f"{t:.2f}" for t in (nearest, whole - rounding, rounding, rounding / nearest, whole / limit)))
    return dict(zip(MODEL_FIELDS, values, strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--formats", nargs="+", default=["iq2_ks", "iq2_kl", "q2_k", "iq3_k", "iq4_xs", "iq4_ks", "q4_k", "q6_k"])
    parser.add_argument("--roundings", nargs="+", default=["nearest", "ldlq", "yaqa"])
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--models", nargs="+", choices=("embedded", "1b"), help="whole calls, of these models")
    parser.add_argument("--repeats", type=int, default=2, help="of which the fastest counts")
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(*(f"# {line}" for line in results_file.machine(1)), sep="\n")
    writer = csv.DictWriter(sys.stdout, MODEL_FIELDS if options.models else FIELDS, lineterminator="\n")
    writer.writeheader()
    if options.models:
        for row in (whole_call(name, fmt) for name in options.models for fmt in options.formats):
            writer.writerow(row)
            sys.stdout.flush()
        return
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
            if rounding == "ldlq":
                shared.round(own, fmt, "model")
                continue
            for weight in own:
                if rounding == "nearest":
                    encode(weight, fmt, base.moments.diagonal().contiguous())
                else:
                    shared.round([weight], fmt, "model", curvatures[len(weight)])
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
