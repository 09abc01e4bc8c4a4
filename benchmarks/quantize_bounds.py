"""How far the encoders are from the best that their formats allow, and whether a target lies beyond that.

    python benchmarks/quantize_bounds.py                        # every format of the table below, 4 rows, CSV
    python benchmarks/quantize_bounds.py --ik libggml.so        # the reference's errors on the same rows (else of all 1024)

For each group of weights that shares a scale, the least error over *all real* scales (and offsets), each with its nearest codes: no
encoding of the format can be better. Where scales are integers times a `d`, over all real `d` that the groups of a row or block share.
Same matrices and columns as quantize.py.

scale    single values: exact. The error is made of pieces between the scales at which a code changes; all pieces are visited.
shared   single values with integer scales: the same pieces in cells of `d`, each group with its best integer; exact but for their width.
powers   `mxfp4`: all powers of two; this is the optimum.
affine   two dimensions: a grid of ranges, each followed by alternating fits; `--grid` sets its density.
vectors  `iq2_kl`: a dense grid of scales with an exhaustive search of the codebook, refitted.
row      `iq2_kl`: as the format stores it, every scale of a fan of `d` for the whole row: not a bound, but an encoding.
blocks   formats with stored minima: as they are stored, 400 values of `d` times 400 of `dmin`: not a bound, but far more than is worth
         trying.

`needed` is the lowest error that a target asks for: 5 % below the reference without importance (`ones`), and with importance 8 and 9 %
below it for iq2_kl.
"""

from __future__ import annotations

import argparse
import itertools
from dataclasses import replace
from pathlib import Path

import numpy as np
import results_file
import torch
from quantize import RESULTS, Reference, matrices, published_reference, relative_error
from torch import Tensor

import iqtorch
from iqtorch.encode import encode
from iqtorch.encode.encoder import SINGLE_EFFORTS, _encode_rows
from iqtorch.formats import Format

FORMATS = (
    "q4_0", "q5_0", "q6_0", "q8_0", "iq4_nl", "q4_1", "q5_1", "q2_k", "q3_k", "q4_k", "q5_k", "q6_k", "iq4_xs", "mxfp4",
    "iq2_ks", "iq2_k", "iq3_ks", "iq3_k", "iq4_ks", "iq4_k", "iq5_ks", "iq5_k", "iq6_k", "iq2_kl",
)  # fmt: skip
WEIGHTED_TARGETS = {"iq2_kl": (0.92, 0.91)}
COLUMNS = ("format", "matrix", "weights", "rows", "bound", "best", "default", "reference", "plain_reference", "needed", "verdict")


def pieces(x: np.ndarray, w: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The error of each group `[P, n]` over positive scales, for a sorted list of values with their nearest codes: where codes change
    `[P, E]`, ascending, and sum w x c and sum w c c before the first and after each of these `[P, E + 1]`. It is xx - 2 s xc + s^2 cc."""
    thresholds = (values[1:] + values[:-1]) / 2
    # As s grows from 0, x / s falls from its sign's extreme value towards 0; at x / t the value beyond t changes to the one before it.
    with np.errstate(divide="ignore", invalid="ignore"):
        at = x[:, :, None] / thresholds
    away = np.where(x[:, :, None] > 0, values[1:], values[:-1])
    near = np.where(x[:, :, None] > 0, values[:-1], values[1:])
    happens = (at > 0) & np.isfinite(at)
    at = np.where(happens, at, np.inf).reshape(len(x), -1)
    order = np.argsort(at, 1)
    first = np.where(x > 0, values[-1], values[0])
    sums = []
    for step, start in (((w * x)[:, :, None] * (near - away), w * x * first), (w[:, :, None] * (near**2 - away**2), w * first * first)):
        change = np.take_along_axis(np.where(happens, step, 0.0).reshape(len(x), -1), order, 1)
        sums.append(np.cumsum(np.concatenate([start.sum(1, keepdims=True), change], 1), 1))
    return np.take_along_axis(at, order, 1), sums[0], sums[1]


def scale_bound(x: np.ndarray, w: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Least error of each group `[P, n]` over all positive scales, for a sorted list of values: exact."""
    _, xc, cc = pieces(x, w, values)
    # Far below the smallest code sums of rounding remain of cc; such codes are no better than zeros.
    gain = np.where((cc > 1e-9 * (w * values[-1] ** 2).sum(1)[:, None]) & (xc > 0), xc**2 / np.maximum(cc, 1e-30), 0.0)
    return np.maximum((w * x * x).sum(1) - gain.max(1), 0)


def least_by_cell(x: np.ndarray, w: np.ndarray, values: np.ndarray, borders: np.ndarray) -> np.ndarray:
    """Least error of each group `[P, n]` over the scales from each of `borders` `[C + 1]` to the next: `[P, C]`, exact."""
    at, xc, cc = pieces(x, w, values)
    xx = (w * x * x).sum(1)
    found = np.empty((len(x), len(borders) - 1))
    for p in range(len(x)):
        starts = np.concatenate([borders, at[p][(at[p] > borders[0]) & (at[p] < borders[-1])]])
        starts.sort()
        low, high = starts[:-1], starts[1:]
        piece = np.searchsorted(at[p], (low + high) / 2)
        s = np.clip(xc[p][piece] / np.maximum(cc[p][piece], 1e-30), low, high)
        error = xx[p] - 2 * s * xc[p][piece] + s * s * cc[p][piece]
        found[p] = np.minimum.reduceat(error, np.searchsorted(low, borders[:-1]))
    return found


def shared_bound(fmt: Format, x: np.ndarray, w: np.ndarray, groups: int, cell: float) -> float:
    """Least error of units of `groups` groups whose scales are stored integers times a real `d` that they share: `[P, n]`, summed.

    `d` runs through narrow cells; in each, every group takes its least error over the cells that an integer times `d` may lie in, for
    every integer, sign and variant. Below the first cell and beyond the last, scales may be any that are as small, or as large.
    """
    integers = np.unique(np.abs([k for k in fmt.scale_values or (1,) if k])).astype(np.float64)
    total = 0.0
    for u in range(0, len(x), groups):
        xu, wu = x[u : u + groups], w[u : u + groups]
        lowest_d = np.abs(xu).max() / np.abs(fmt.codebook.values).max() / integers[-1] / 4
        ds = int(np.log(16 * integers[-1] / integers[0]) / cell)
        scales = lowest_d * integers[0] * np.exp(cell * np.arange(ds + int(np.log(integers[-1] / integers[0]) / cell) + 3))
        ends = np.array([1e-9 * lowest_d, lowest_d * integers[-1], scales[ds], 1e9 * scales[-1]])
        least, beyond = np.full((groups, len(scales) - 1), np.inf), np.full((groups, 3), np.inf)
        for variant, sign in itertools.product(fmt.codebook.values[:, :, 0].astype(np.float64), (1, -1)):
            least = np.minimum(least, least_by_cell(sign * xu, wu, np.unique(variant), scales))
            beyond = np.minimum(beyond, least_by_cell(sign * xu, wu, np.unique(variant), ends))
        of_d = np.full((groups, ds), np.inf)
        for k in integers:
            first = int(np.log(k / integers[0]) / cell)
            np.minimum(of_d, least[:, first : first + ds], out=of_d)
            np.minimum(of_d, least[:, first + 1 : first + 1 + ds], out=of_d)
        zero = (wu * xu * xu).sum(1) if 0 in (fmt.scale_values or ()) else np.full(groups, np.inf)
        whole = np.minimum(np.concatenate([of_d, beyond[:, [0, 2]]], 1), zero[:, None]).sum(0)
        total += whole.min()
    return total


def powers_bound(x: np.ndarray, w: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Least error of each group `[P, n]` over all scales that are powers of two: exact."""
    best = (w * x * x).sum(1)
    for power in range(-20, 10):
        nearest = values[np.abs(x[:, :, None] / 2.0**power - values).argmin(2)]
        best = np.minimum(best, (w * (x - 2.0**power * nearest) ** 2).sum(1))
    return best


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


def exhaustive(rows: Tensor, fmt: Format, columns: Tensor) -> Tensor:
    """What the encoder's search finds with 160,000 pairs of `d` and `dmin` per block and eight rounds of settling."""
    effort = replace(SINGLE_EFFORTS["best"], trials=80, steps=400, rounds=8)
    return fmt.pack(_encode_rows(rows, fmt, columns, "rmse", effort))


def bound(fmt: Format, x: Tensor, w: Tensor, columns: int, grid: int, cell: float) -> float:
    """Least possible error of groups `[P, n]`, summed."""
    if fmt.affine:
        positive = min(fmt.min_values or (1,)) >= 0
        return float(affine_bound(x.double(), w.double(), fmt.codebook.entries - 1, positive, grid).sum())
    book = fmt.codebook.values.astype(np.float64)
    if fmt.d_kind == "e8m0":
        return float(powers_bound(x.double().numpy(), w.double().numpy(), np.unique(book)).sum())
    if fmt.vec == 1 and fmt.scale_values:
        groups = (fmt.block_size if "d" in fmt.fields else columns) // fmt.group_size
        return shared_bound(fmt, x.double().numpy(), w.double().numpy(), groups, cell)
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
    parser.add_argument("--kinds", nargs="+", default=["ones", "w"], choices=["ones", "w"], help="equal weights, with importance")
    parser.add_argument("--grid", type=int, default=16)
    parser.add_argument("--cell", type=float, default=2e-4, help="relative width of the cells of a shared scale")
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
            for kind in options.kinds:
                columns = torch.ones_like(importance) if kind == "ones" else importance
                n, w = fmt.group_size, columns / columns.mean()
                whole = float((w * rows.square()).sum())
                least = bound(
                    fmt, rows.reshape(-1, n), w.expand_as(rows).reshape(-1, n).contiguous(), rows.shape[1], options.grid, options.cell
                )
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
                if fmt.affine and fmt.scale_values:
                    found = relative_error(rows, fmt, exhaustive(rows, fmt, w), columns)
                    lines.append([f"{name}, blocks", matrix, kind, len(rows), f"{found:.5f}", "", line[6], "", "", "", ""])
                    print(" ".join(f"{c:>10}" for c in lines[-1]), flush=True)
    header = [
        f"{results_file.cpu_name()}; reference {'on the same rows' if beside else 'of all 1024 rows'}; "
        f"grid {options.grid}, cell {options.cell}"
    ]
    results_file.write(options.out, header, COLUMNS, lines)


if __name__ == "__main__":
    main()
