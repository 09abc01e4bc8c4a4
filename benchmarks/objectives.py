"""Which objective of the encoders serves a model better: divergence from the original, packed by rounding to nearest.

    python benchmarks/objectives.py                                  # the embedded model, every format with a reference
    python benchmarks/objectives.py --second cache.pt                # the second model of quality_models.py (trained first, minutes)

Protocol of quality.py: every matrix of the layers in one format, the embedding in q8_0, importance from 48 calibration windows, scores
on the held-out text, float activations. `"rmse"`: the least weighted squared error; `"model"`: the same codes, `d` raised until each
row is reproduced without shrinking. Lines go to results/objectives.csv; those it has already are not computed again.
"""

from __future__ import annotations

import argparse
import copy
import csv
import logging
from pathlib import Path

import torch
from quality import RESULTS, Remembered, dense, read, token_windows

import iqtorch
from iqtorch import evaluate
from iqtorch.data import calibration_text, heldout_text, load_tiny_llama

COLUMNS = ("model", "format", "objective", "windows", "mean_kl", "stderr", "perplexity", "same_top", "reference_kl", "ratio")


def main() -> None:
    reference = {row["format"]: row["mean_kl"] for row in read(RESULTS / "quality_reference.csv")}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--formats", nargs="+", default=list(reference), metavar="NAME")
    parser.add_argument("--objectives", nargs="+", default=["model", "rmse"], choices=["model", "rmse"])
    parser.add_argument("--second", type=Path, help="weights of the second model, or where to keep them")
    parser.add_argument("--windows", type=int, default=100, help="held-out windows of 512 tokens")
    parser.add_argument("--csv", type=Path, default=RESULTS / "objectives.csv")
    options = parser.parse_args()
    logging.getLogger("transformers").setLevel(logging.ERROR)

    model, tokenizer = load_tiny_llama()
    heldout, calibration = (torch.tensor(tokenizer(t, add_special_tokens=False).input_ids) for t in (heldout_text(), calibration_text()))
    if options.second:
        from quality_models import trained

        model = trained(options.second, model, calibration)
        reference = {}
    base = Remembered(model)
    windows = token_windows(calibration, 48, 0, model.config.bos_token_id)
    importance = iqtorch.collect_importance(model, windows.split(8))
    name = "qwen2-512" if options.second else "tiny-llama"
    for fmt in options.formats:
        for objective in options.objectives:
            key = {"model": name, "format": fmt, "objective": objective, "windows": str(options.windows)}
            if any(all(row[k] == v for k, v in key.items()) for row in read(options.csv)):
                continue
            packed = copy.deepcopy(model)
            iqtorch.quantize_model(
                packed, {r"layers\.": fmt, r"embed_tokens": "q8_0"}, importance=importance, objective=objective, progress=False
            )
            score = evaluate.kl_divergence(dense(packed), base, heldout[: options.windows * 512])
            row = key | {
                "mean_kl": f"{score.mean_kl:.5f}",
                "stderr": f"{score.stderr:.5f}",
                "perplexity": f"{score.perplexity:.3f}",
                "same_top": f"{score.same_top:.4f}",
                "reference_kl": reference.get(fmt, ""),
                "ratio": f"{score.mean_kl / float(reference[fmt]):.3f}" if fmt in reference else "",
            }
            print(row, flush=True)
            rows = [*read(options.csv), row]
            with options.csv.open("w", newline="") as file:
                writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
                writer.writeheader()
                writer.writerows(rows)


if __name__ == "__main__":
    main()
