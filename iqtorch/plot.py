"""Plots of quality against size."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from .errors import EvaluationError, MissingDependencyError
from .files import check_place

__all__ = ["check_output", "quality"]

_INK, _GRAY, _ACCENT = "#1a1a1a", "#8a8a8a", "#b3361e"


def check_output(path: str | Path) -> None:
    """Refuses a plot that could not be written, before what it shows is measured; errors as `quality`."""
    if importlib.util.find_spec("matplotlib") is None:
        raise MissingDependencyError("matplotlib is needed for plots and not installed: pip install 'iqtorch[eval]'")
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    kinds = FigureCanvasAgg.get_supported_filetypes()
    if Path(path).suffix[1:].lower() not in kinds:
        raise EvaluationError(f"{path}: its ending names no kind of image that matplotlib writes: .{', .'.join(sorted(kinds))}")
    check_place(path)


def quality(
    rows: Sequence[Mapping[str, Any]], path: str | Path, title: str = "", original: float | None = None, highlight: str = ""
) -> Path:
    """Writes an image of mean KL divergence (logarithmic) and perplexity against bits per weight.

    Args:
        rows: one mapping per model with `format`, `bpw`, `mean_kl` (> 0) and `perplexity`.
        path: image to write; its ending chooses the kind (.png, .svg, .pdf).
        title: heading.
        original: perplexity of the unquantized model, drawn as a line.
        highlight: format drawn in colour.

    Raises:
        MissingDependencyError: matplotlib is not installed.
        EvaluationError: `rows` is empty or lacks a value; the ending of `path` is unknown.
        OSError: the image cannot be written there.
    """
    check_output(path)
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    points = sorted(_points(rows), key=lambda row: row["bpw"])

    figure = Figure(figsize=(11, 5), layout="constrained", dpi=150)
    FigureCanvasAgg(figure)
    figure.suptitle(title, color=_INK, fontsize=12)
    left, right = figure.subplots(1, 2)
    left.set_yscale("log")
    left.set_ylabel("mean KL divergence from the original (nats per token)")
    right.set_ylabel("perplexity")
    right.yaxis.set_major_locator(MaxNLocator(7))
    left.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    if original is not None:
        right.axhline(original, color=_GRAY, linewidth=1, linestyle="--")
        right.annotate(
            f"original {original:.2f}", (1, original), xycoords=("axes fraction", "data"), xytext=(-4, -11), textcoords="offset points",
            ha="right", fontsize=8, color=_GRAY,
        )  # fmt: skip
    for axes, key in ((left, "mean_kl"), (right, "perplexity")):
        best = _front([(row["bpw"], row[key]) for row in points])
        axes.plot(*zip(*best, strict=True), color=_GRAY, linewidth=0.8, zorder=1)
        colors = [_ACCENT if row["format"] == highlight else _INK for row in points]
        axes.scatter([row["bpw"] for row in points], [row[key] for row in points], c=colors, s=24, zorder=2)
        axes.set_xlabel("bits per weight, whole model")
        axes.margins(x=0.12, y=0.12)
        axes.grid(color="#e6e6e6", linewidth=0.6)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    figure.draw_without_rendering()  # fixes the axes, which label placement needs
    for axes, key in ((left, "mean_kl"), (right, "perplexity")):
        _label(axes, [(row["format"], row["bpw"], row[key]) for row in points], highlight)
    figure.savefig(path)
    return Path(path)


def _points(rows: Sequence[Mapping[str, Any]]) -> Iterator[Mapping[str, Any]]:
    if not rows:
        raise EvaluationError("nothing to plot: no rows given")
    for row in rows:
        for key in ("format", "bpw", "mean_kl", "perplexity"):
            if key not in row:
                raise EvaluationError(
                    f"a row to plot lacks {key!r}: it has {sorted(row)}; rows come from `iqtorch demo --json` or `iqtorch kl --json`"
                )
        if not row["mean_kl"] > 0:
            raise EvaluationError(
                f"{row['format']}: mean KL {row['mean_kl']} cannot be drawn on a logarithmic axis; leave the original out"
            )
        yield row


def _front(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Of points sorted by size, those that are better (lower) than every smaller one."""
    best: list[tuple[float, float]] = []
    for x, y in points:
        if not best or y < best[-1][1]:
            best.append((x, y))
    return best


def _label(axes: Any, points: Sequence[tuple[str, float, float]], highlight: str) -> None:
    """Names each point, at the nearest of some places around it where the name covers nothing."""
    renderer = axes.figure.canvas.get_renderer()
    unit = axes.figure.dpi / 72  # pixels per typographic point
    dots = [axes.transData.transform((x, y)) for _, x, y in points]
    obstacles = list(dots)
    for line in axes.lines:
        corners = line.get_transform().transform(line.get_xydata())
        for start, end in pairwise(corners):
            steps = max(2, int(abs(end - start).max() / (3 * unit)))
            obstacles += [start + (end - start) * i / steps for i in range(steps + 1)]
    texts = list(axes.texts)
    boxes = [text.get_window_extent(renderer) for text in texts]
    for (name, x, y), own in zip(points, dots, strict=True):
        color = _ACCENT if name == highlight else _INK
        text = axes.annotate(name, (x, y), xytext=(0, 0), textcoords="offset points", fontsize=9, color=color, va="center")
        for dx, dy, side in _PLACES:
            text.set_position((dx, dy))
            text.set_horizontalalignment(side)
            box = text.get_window_extent(renderer).padded(unit)
            leader = dx * dx + dy * dy > _NEAR**2
            covers = any(box.overlaps(other) for other in boxes) or any(box.contains(*dot) for dot in obstacles)
            inside = axes.bbox.x0 <= box.x0 and box.x1 <= axes.figure.bbox.x1
            mistaken = not leader and any(_distance(box, dot) <= _distance(box, own) for dot in dots if dot is not own)
            if inside and not covers and not mistaken:
                break
        if leader:
            line = axes.annotate("", (x, y), xytext=(dx, dy), textcoords="offset points", arrowprops=_LEADER)
            line.set_zorder(0)
        boxes.append(box)


def _distance(box: Any, point: Sequence[float]) -> float:
    """From a point to the nearest point of a box."""
    return math.hypot(max(box.x0 - point[0], 0, point[0] - box.x1), max(box.y0 - point[1], 0, point[1] - box.y1))


#: Offsets of a label in typographic points, with the side of it that faces the point: near places first.
_PLACES = [
    (reach * dx, reach * dy, side)
    for reach in (1.0, 1.6, 2.4, 3.4, 4.6, 6.0)
    for dx, dy, side in ((9, 7, "left"), (-9, -7, "right"), (9, -7, "left"), (-9, 7, "right"), (0, 12, "center"), (0, -12, "center"))
]
#: Labels farther than this get a line to their point.
_NEAR = 12
_LEADER = {"arrowstyle": "-", "color": "#b5b5b5", "linewidth": 0.6, "shrinkA": 1, "shrinkB": 3}
