"""Quality of the embedded model by format and rounding: divergence from the original and perplexity, on held-out text.

    python benchmarks/quality.py                          # every format and rounding, table, CSV and plot
    python benchmarks/quality.py --formats iq2_kl iq4_ks --windows 32 --seeds 0 1 2

Protocol: every matrix of the layers in one format, the tied embedding and output layer in q8_0; importance and calibration from
the package's calibration text, scores from its held-out text (100 windows of 512 tokens, second half scored), float activations.
`results/quality_reference.csv` has what ik_llama.cpp's own programs (commit 8337e4c) reach by the same protocol with int8
activations, whose noise is about 0.0003 nats. Rows that the CSV has already, of the present version, are not computed again.

`results/quality_losses.csv` has the mean loss of each held-out window, for comparing two roundings of a format window by window: the
perplexities of two models differ by less than either is uncertain, because a window that is hard for one is hard for the other.
"""

from __future__ import annotations

import argparse
import copy
import csv
import logging
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import iqtorch
from iqtorch import evaluate
from iqtorch.data import calibration_text, heldout_text, load_tiny_llama

RESULTS = Path(__file__).parent / "results"
ROUNDINGS = ("nearest", "ldlq", "yaqa", "yaqa+refine")
WINDOW = 512
#: Where labels stand beside their points, in typographic points, if not on the right: there they would cover another.
PLACES = {
    "iq2_kt": (-5, 0),
    "iq2_k": (0, -20),
    "iq3_kt": (-5, 0),
    "iq3_ks": (0, -10),
    "iq4_kss": (-5, 0),
    "iq4_xs": (-5, 4),
    "iq4_ks": (-5, -4),
}
#: What rounded a row. 1: two passes of error feedback; 2: one; 3: feedback in bfloat16, scales from a quicker search, and fewer of them for
#: codebooks of vectors; 4: large codebooks searched by bytes or cells, and q8_0 left to nearest, which is 8-bit activations' equal: this
#: changes some formats only. Rounding to nearest: 3 is by the encoders of the same day, 1 by earlier ones. Refined
#: rows: 5 trains on text that the model writes, too.
VERSION, BEFORE, REFINED = "4", "3", "5"
CHANGED = ("iq1_kt", "iq2_kt", "iq3_kt", "iq4_kt", "iq1_s", "iq1_m", "q8_0")
KEYS = ("format", "rounding", "windows", "seed")
COLUMNS = (
    "format", "bpw", "rounding", "windows", "seed", "mean_kl", "stderr", "perplexity", "same_top", "reference_kl", "ratio", "version"
)  # fmt: skip


class Watched(nn.Module):
    """A model, and the mean loss of the scored tokens of each window that it saw."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.config = model, model.config
        self.losses: list[float] = []

    def forward(self, ids: Tensor) -> Tensor:
        logits = self.model(ids).logits
        half = ids.shape[1] // 2
        for own, row in zip(logits[:, half:-1], ids[:, half + 1 :], strict=True):
            self.losses.append(float(nn.functional.cross_entropy(own.float(), row)))
        return logits


class Remembered(nn.Module):
    """A model whose answers are kept: the original runs over the text once, not once per format."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.config = model.config
        self.answers: dict[bytes, Tensor] = {}

    def forward(self, ids: Tensor) -> Tensor:
        key = ids.numpy().tobytes()
        if key not in self.answers:
            self.answers[key] = self.model(ids).logits
        return self.answers[key]


def token_windows(ids: Tensor, count: int, seed: int, bos: int) -> Tensor:
    """`count` calibration windows, in order for seed 0, otherwise from random places."""
    if seed:
        starts = torch.randint(len(ids) - WINDOW, (count,), generator=torch.Generator().manual_seed(seed))
    else:
        starts = torch.arange(min(count, len(ids) // WINDOW)) * WINDOW
    windows = ids[starts[:, None] + torch.arange(WINDOW)]
    windows[:, 0] = bos
    return windows


def quantized(base: nn.Module, windows: Tensor, every: Tensor, name: str, rounding: str) -> nn.Module:
    """The model in a format; `refine` sees all calibration windows."""
    model = copy.deepcopy(base)
    recipe = {r"layers\.": name, r"embed_tokens": "q8_0"}
    batches = windows.split(8)
    if rounding == "nearest":
        iqtorch.quantize_model(model, recipe, importance=iqtorch.collect_importance(model, batches), progress=False)
    else:
        iqtorch.quantize_model(model, recipe, calibration=batches, rounding=rounding.removesuffix("+refine"), progress=False)
    if rounding.endswith("+refine"):
        print(iqtorch.refine(model, base, every.split(4), codes=True, own_text=True), flush=True)
    return model


def measure(base: Remembered, ids: Tensor, windows: Tensor, every: Tensor, name: str, rounding: str) -> tuple[dict[str, Any], list[float]]:
    """Columns of the CSV, and the loss of each window."""
    model = Watched(dense(quantized(base.model, windows, every, name, rounding)))
    score = evaluate.kl_divergence(model, base, ids)
    return {
        "mean_kl": f"{score.mean_kl:.5f}",
        "stderr": f"{score.stderr:.5f}",
        "perplexity": f"{score.perplexity:.3f}",
        "same_top": f"{score.same_top:.4f}",
    }, model.losses


def dense(model: nn.Module) -> nn.Module:
    """Weights unpacked to float32: what the format does to them, without the noise of int8 activations."""
    for module in model.modules():
        for name, parameter in list(module._parameters.items()):
            if isinstance(parameter, iqtorch.IQTensor):
                module._parameters[name] = nn.Parameter(parameter.dequantize(torch.float32), requires_grad=False)
    return model


def paired(before: list[float], after: list[float]) -> tuple[float, float]:
    """By how many percent the perplexity of `after` is above that of `before`, and half of the 95 % interval of that, window by window."""
    change = torch.tensor(after, dtype=torch.float64) - torch.tensor(before, dtype=torch.float64)
    return 100 * float(change.mean()), 100 * 1.98 * float(change.std()) / len(change) ** 0.5


def comparison(path: Path, reference: str = "nearest") -> str:
    """Markdown: how perplexity changes from rounding to nearest to the others, where both are in the file of losses."""
    losses = {tuple(row[k] for k in KEYS): [float(v) for v in row["losses"].split()] for row in read(path)}
    lines = ["| format | rounding | perplexity against nearest, % | 95 % interval | |", "|---|---|---:|---:|---|"]
    for (name, rounding, *same), own in losses.items():
        other = losses.get((name, reference, *same))
        if rounding != reference and other is not None:
            change, half = paired(other, own)
            verdict = "lower" if change < -half else "higher" if change > half else "no difference seen"
            lines.append(f"| `{name}` | {rounding} | {change:+.3f} | {half:.3f} | {verdict} |")
    return "\n".join(lines)


def read(path: Path) -> list[dict[str, str]]:
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def write(path: Path, rows: list[dict[str, Any]], columns: tuple[str, ...]) -> None:
    def place(row: dict[str, Any]) -> tuple[object, ...]:
        bits = iqtorch.get_format(row["format"]).bits_per_weight()
        return bits, row["format"], ROUNDINGS.index(row["rounding"]), int(row["windows"]), int(row["seed"])

    rows = sorted(rows, key=place)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def table(rows: list[dict[str, str]], reference: dict[str, dict[str, str]]) -> str:
    """Markdown: a line per format, the three roundings side by side."""
    lines = [
        "| format | bpw | reference KL | nearest | ldlq | yaqa | of reference: ldlq, yaqa | perplexity: reference, nearest, ldlq, yaqa |",
        "|---|---:|---:|---:|---:|---:|---|---|",
    ]
    for name in dict.fromkeys(row["format"] for row in rows):
        found = {row["rounding"]: row for row in rows if row["format"] == name}
        own = [found.get(rounding, {}) for rounding in ROUNDINGS[:3]]
        kl = " | ".join(row.get("mean_kl", "-") for row in own)
        ratio = ", ".join(f"{float(row['ratio']):.2f}" if row.get("ratio") else "-" for row in own[1:])
        theirs = reference.get(name, {})
        perplexity = ", ".join(f"{float(row['perplexity']):.2f}" if row else "-" for row in (theirs, *own))
        bpw = f"{iqtorch.get_format(name).bits_per_weight():.3f}"
        lines.append(f"| `{name}` | {bpw} | {theirs.get('mean_kl', '-')} | {kl} | {ratio} | {perplexity} |")
    return "\n".join(lines)


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """KL divergence and perplexity against bits per weight, one line per rounding, of the formats that the reference was measured in."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    last = [r for r in rows if r["rounding"] == "yaqa" and r["reference_kl"]]
    series = {"ik_llama.cpp": read(RESULTS / "quality_reference.csv")}
    series |= {f"iqtorch, {rounding}": [r for r in rows if r["rounding"] == rounding] for rounding in ROUNDINGS}
    figure = Figure(figsize=(11, 5), layout="constrained", dpi=150)
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, 2)
    colors = ("#8a8a8a", "#1a1a1a", "#b3361e", "#2b62b0", "#3a8a4d")
    for (label, points), color, marker in zip(series.items(), colors, "xo^vs", strict=True):
        points = [p for p in points if float(p["bpw"]) < 6 and any(r["format"] == p["format"] for r in last)]
        for axis, key in zip(axes, ("mean_kl", "perplexity"), strict=True):
            axis.scatter([float(p["bpw"]) for p in points], [float(p[key]) for p in points], c=color, marker=marker, s=22, label=label)
    for p in (r for r in last if float(r["bpw"]) < 6):
        place = PLACES.get(p["format"], (5, 0))
        axes[0].annotate(
            p["format"], (float(p["bpw"]), float(p["mean_kl"])), place, textcoords="offset points",
            ha={-5: "right", 0: "center", 5: "left"}[place[0]], va="center", fontsize=7,
        )  # fmt: skip
    axes[0].set_yscale("log")
    axes[0].yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    figure.suptitle(
        "Embedded Llama (3.7 M parameters), its layers' matrices in one format, 25,500 predictions on held-out text", fontsize=11
    )
    for axis, name in zip(axes, ("mean KL divergence (nats per token)", "perplexity"), strict=True):
        axis.set(xlabel="bits per weight", ylabel=name)
        axis.margins(x=0.1)
        axis.grid(color="#e6e6e6", linewidth=0.6)
        axis.set_axisbelow(True)
        axis.legend(frameon=False)
    figure.savefig(path)


def main() -> None:
    reference = {row["format"]: row for row in read(RESULTS / "quality_reference.csv")}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--formats", nargs="+", default=list(reference), metavar="NAME")
    parser.add_argument("--roundings", nargs="+", default=ROUNDINGS[:3], choices=ROUNDINGS)
    parser.add_argument("--windows", type=int, default=48, help="calibration windows of 512 tokens")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="which windows: 0 = the first, others = random places")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--csv", type=Path, default=RESULTS / "quality.csv")
    parser.add_argument("--losses", type=Path, default=RESULTS / "quality_losses.csv")
    parser.add_argument("--plot", type=Path, default=RESULTS / "quality.png")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    logging.getLogger("transformers").setLevel(logging.ERROR)

    model, tokenizer = load_tiny_llama()
    base = Remembered(model)
    heldout, calibration = (torch.tensor(tokenizer(t, add_special_tokens=False).input_ids) for t in (heldout_text(), calibration_text()))
    for seed in options.seeds:
        windows = token_windows(calibration, options.windows, seed, model.config.bos_token_id)
        every = token_windows(calibration, len(calibration), 0, model.config.bos_token_id)
        for name in options.formats:
            for rounding in options.roundings:
                key = {"format": name, "rounding": rounding, "windows": str(len(windows)), "seed": str(seed)}
                known = [row for row in read(options.csv) if all(row[k] == v for k, v in key.items())]
                version = REFINED if rounding.endswith("+refine") else VERSION
                present = {version} if version == REFINED or (name in CHANGED and rounding != "nearest") else {VERSION, BEFORE}
                if any(row["version"] in present for row in known):
                    continue
                found, losses = measure(base, heldout, windows, every, name, rounding)
                row = {**key, "bpw": f"{iqtorch.get_format(name).bits_per_weight():.4f}", **found, "version": version}
                if name in reference:
                    row["reference_kl"] = reference[name]["mean_kl"]
                    row["ratio"] = f"{float(row['mean_kl']) / float(row['reference_kl']):.3f}"
                print({k: row[k] for k in COLUMNS if k in row}, flush=True)
                write(options.csv, [*(r for r in read(options.csv) if r not in known), row], COLUMNS)
                others = [r for r in read(options.losses) if any(r[k] != key[k] for k in KEYS)]
                write(options.losses, [*others, {**key, "losses": " ".join(f"{v:.5f}" for v in losses)}], (*KEYS, "losses"))
    rows = [r for r in read(options.csv) if r["seed"] == "0" and r["windows"] == "48"]
    print(table(rows, reference), comparison(options.losses), sep="\n\n")
    plot(rows, options.plot)


if __name__ == "__main__":
    main()
