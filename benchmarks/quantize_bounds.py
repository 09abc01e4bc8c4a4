"""How far the encoders are from the best that their formats allow, and whether a target lies beyond that.

    python benchmarks/quantize_bounds.py                        # every format of the table below, 4 rows, CSV
    python benchmarks/quantize_bounds.py --ik libggml.so        # the reference's errors on the same rows (else of all 1024)

For each group of weights that shares a scale, the least error over *all real* scales (and offsets), each with its nearest codes: no
encoding of the format can be better, since its scales are rounded and share a `d`. Same matrices and columns as quantize.py.

scale    single values: exact. The error is made of pieces between the scales at which a code changes; all pieces are visited.
affine   two dimensions: a grid of ranges, each followed by alternating fits; `--grid` sets its density.
vectors  `iq2_kl`: a dense grid of scales with an exhaustive search of the codebook, refitted.
row      `iq2_kl`: as the format stores it, every scale of a fan of `d` for the whole row: not a bound, but an encoding.

`needed` is the lowest error that a target asks for: 5 % below the reference without importance (`ones`), and with importance 8 and 9 %
below it for iq2_kl.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import results_file
import torch
from quantize import RESULTS, Reference, matrices, published_reference, relative_error
from torch import Tensor

import iqtorch
from iqtorch.encode import encode
from iqtorch.formats import Format

FORMATS = (
    "q4_0", "q5_0", "q6_0", "q8_0", "iq4_nl", "q4_1", "q5_1", "q2_k", "q3_k", "q4_k", "q5_k", "q6_k", "iq4_xs",
    "iq2_ks", "iq2_k", "iq3_ks", "iq3_k", "iq4_ks", "iq4_k", "iq5_ks", "iq5_k", "iq6_k", "iq2_kl",
)  # fmt: skip
WEIGHTED_TARGETS = {"iq2_kl": (0.92, 0.91)}
COLUMNS = ("format", "matrix", "weights", "rows", "bound", "best", "default", "reference", "plain_reference", "needed", "verdict")


def scale_bound(x: np.ndarray, w: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Least error of each group `[P, n]` over all positive scales, for a sorted list of values: exact."""
    xx = (w * x * x).sum(1)
    thresholds = (values[1:] + values[:-1]) / 2
    # As s grows from 0, x / s falls from its sign's extreme value towards 0; at x / t the value beyond t changes to the one before it.
    with np.errstate(divide="ignore", invalid="ignore"):
        at = x[:, :, None] / thresholds
    away = np.where(x[:, :, None] > 0, values[1:], values[:-1])
    near = np.where(x[:, :, None] > 0, values[:-1], values[1:])
    happens = (at > 0) & np.isfinite(at)
    order = np.argsort(np.where(happens, at, np.inf).reshape(len(x), -1), 1)
    steps = [
        np.take_along_axis(np.where(happens, step, 0.0).reshape(len(x), -1), order, 1)
        for step in ((w * x)[:, :, None] * (near - away), w[:, :, None] * (near**2 - away**2))
    ]
    first = np.where(x > 0, values[-1], values[0])
    xc = (w * x * first).sum(1)[:, None] + np.cumsum(np.pad(steps[0], ((0, 0), (1, 0))), 1)
    cc = (w * first * first).sum(1)[:, None] + np.cumsum(np.pad(steps[1], ((0, 0), (1, 0))), 1)
    # Far below the smallest code sums of rounding remain of cc; such codes are no better than zeros.
    gain = np.where((cc > 1e-9 * (w * values[-1] ** 2).sum(1)[:, None]) & (xc > 0), xc**2 / np.maximum(cc, 1e-30), 0.0)
    return np.maximum(xx - gain.max(1), 0)


def affine_bound(x: Tensor, w: Tensor, levels: int, positive: bool, grid: int) -> Tensor:
    """Least error of each group over scales and offsets, for the integers 0 to `levels`; `positive`: x = s c - o with o >= 0."""
    best = (w * x * x).sum(1)
    low, high = x.amin(1, keepdim=True), x.amax(1, keepdim=True)
    if positive:
        low = low.clamp(max=0)
    sw, sx = w.sum(1, keepdim=True), (w * x).sum(1, keepdim=True)
    reach = 0.12 if levels > 15 else 0.2 if levels > 3 else 0.45
    for a in np.linspace(-0.04, reach, grid):
        for b in np.linspace(-0.04, reach, grid):
            start = low + a * (high - low)
            s = (high - low) * (1 - a - b) / levels
            for _ in range(4):
                c = ((x - start) / s.clamp(min=1e-12)).round().clamp(0, levels)
                sc, scc, sxc = ((w * t).sum(1, keepdim=True) for t in (c, c * c, c * x))
                s = (sw * sxc - sx * sc) / (sw * scc - sc * sc).clamp(min=1e-12)
                start = (sx - s * sc) / sw
                if positive:
                    s = torch.where(start > 0, sxc / scc.clamp(min=1e-12), s)
                    start = start.clamp(max=0)
                best = torch.minimum(best, (w * (x - s * c - start).square()).sum(1))
    return best


def vector_bound(x: Tensor, w: Tensor, book: Tensor, scales: Tensor) -> Tensor:
    """Least error of each group over trial scales `[S]` times its root mean square, refitted, with the nearest of all entries."""
    vec = book.shape[1]
    best = (w * x * x).sum(1)
    size = x.square().mean(1, keepdim=True).sqrt()
    squares = (book * book).T.contiguous()
    for ratio in scales.tolist():
        s = size * ratio
        y, v = (x / s).unflatten(1, (-1, vec)).flatten(0, 1), w.unflatten(1, (-1, vec)).flatten(0, 1)
        code = torch.cat([(b @ squares - 2 * (a * b) @ book.T).argmin(1) for a, b in zip(y.split(256), v.split(256), strict=True)])
        c = book[code].view_as(x)
        fit = (w * x * c).sum(1, keepdim=True) / (w * c * c).sum(1, keepdim=True).clamp(min=1e-30)
        best = torch.minimum(best, (w * (x - fit * c).square()).sum(1))
    return best


def row_search(fmt: Format, x: Tensor, w: Tensor, candidates: int) -> float:
    """Least error of whole rows `[R, K]` of `iq2_kl`: a fan of `d`, for each all scales of all groups."""
    book = torch.from_numpy(fmt.codebook.values[0].astype(np.float32))
    n, vec = fmt.group_size, fmt.vec
    total = 0.0
    for row in x:
        groups, weights = row.view(-1, n), w.view(-1, n)
        v = weights.unflatten(1, (-1, vec)).flatten(0, 1)
        scales = torch.tensor(fmt.scale_values, dtype=torch.float32)
        reach = row.abs().amax() / float(book.abs().max()) / float(scales.abs().max())
        least = float("inf")
        for ratio in np.linspace(0.5, 1.3, candidates):
            d = float((reach * ratio).half())
            errors = torch.full((len(groups),), float("inf"))
            for scale in scales[scales != 0].tolist():
                y = (groups / (d * scale)).unflatten(1, (-1, vec)).flatten(0, 1)
                score = v @ (book * book).T - 2 * (y * v) @ book.T
                each = (score.amin(1) + (v * y * y).sum(1)).view(len(groups), -1).sum(1)
                errors = torch.minimum(errors, each * (d * scale) ** 2)
            least = min(least, float(errors.sum()))
        total += least
    return total


def bound(fmt: Format, x: Tensor, w: Tensor, grid: int) -> float:
    """Least possible error of groups `[P, n]`, summed."""
    if fmt.affine:
        positive = min(fmt.min_values or (1,)) >= 0
        return float(affine_bound(x.double(), w.double(), fmt.codebook.entries - 1, positive, grid).sum())
    book = fmt.codebook.values.astype(np.float64)
    if fmt.vec == 1:
        each = np.full(len(x), np.inf)
        for variant in book[:, :, 0]:
            for sign in (1, -1):
                each = np.minimum(each, scale_bound(sign * x.double().numpy(), w.double().numpy(), np.unique(variant)))
        return float(each.sum())
    ratios = np.linspace(0.35, 2.5, 8 * grid)
    least = torch.full((len(x),), float("inf"))
    for variant in book:
        entries = torch.from_numpy(variant).float()
        span = torch.from_numpy(ratios).float() / entries.square().mean().sqrt()
        for sign in (1, -1):
            least = torch.minimum(least, vector_bound(x, w, entries, sign * span))
    return float(least.sum())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--formats", nargs="+", default=list(FORMATS), choices=FORMATS)
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--grid", type=int, default=16)
    parser.add_argument("--seed", type=int, default=20260101)
    parser.add_argument("--ik", type=Path, help="a shared library of ik_llama.cpp's ggml")
    parser.add_argument("--out", type=Path, default=RESULTS / "quantize_bounds.csv")
    options = parser.parse_args()
    torch.set_num_threads(1)
    weights, importance = matrices(options.rows, options.seed)
    beside = Reference(options.ik) if options.ik else None
    published = published_reference()
    lines = []
    print(" ".join(f"{c:>10}" for c in COLUMNS))
    for name in options.formats:
        fmt = iqtorch.get_format(name).for_encoding
        theirs = beside.measure(fmt, {m: [(w, importance)] for m, w in weights.items()}) if beside else published.get(name, {})
        for i, (matrix, rows) in enumerate(weights.items()):
            for kind, columns in (("ones", torch.ones_like(importance)), ("w", importance)):
                n, w = fmt.group_size, columns / columns.mean()
                whole = float((w * rows.square()).sum())
                least = bound(fmt, rows.reshape(-1, n), w.expand_as(rows).reshape(-1, n).contiguous(), options.grid)
                given = None if kind == "ones" else importance
                ours = {s: relative_error(rows, fmt, encode(rows, fmt, given, "rmse", s), columns) for s in ("best", "default")}
                reference, plain = theirs.get(f"{kind}_{matrix}"), theirs.get(f"plain_{matrix}")
                factor = 0.95 if kind == "ones" else WEIGHTED_TARGETS.get(name, (None, None))[i]
                base = plain if kind == "ones" else reference
                needed = base * factor if factor and base else None
                lowest = (least / whole) ** 0.5
                verdict = "" if needed is None else "reached" if ours["default"] <= needed else "beyond" if lowest > needed else "missed"
                line = [name, matrix, kind, len(rows), f"{lowest:.5f}", f"{ours['best']:.5f}", f"{ours['default']:.5f}"]
                lines.append([*line, *(f"{e:.5f}" if e else "" for e in (reference, plain, needed)), verdict])
                print(" ".join(f"{c:>10}" for c in lines[-1]), flush=True)
                if name == "iq2_kl":
                    found = (row_search(fmt, rows[:2], w, 4 * options.grid) / float((w * rows[:2].square()).sum())) ** 0.5
                    own = relative_error(rows[:2], fmt, encode(rows[:2], fmt, given, "rmse"), columns)
                    lines.append([f"{name}, row", matrix, kind, 2, f"{found:.5f}", "", f"{own:.5f}", "", "", "", ""])
                    print(" ".join(f"{c:>10}" for c in lines[-1]), flush=True)
    header = [f"{results_file.cpu_name()}; reference {'on the same rows' if beside else 'of all 1024 rows'}; grid {options.grid}"]
    results_file.write(options.out, header, COLUMNS, lines)


if __name__ == "__main__":
    main()
