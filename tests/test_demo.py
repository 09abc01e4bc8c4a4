"""The demo end to end on a part of the text, and its plot."""

from __future__ import annotations

import io
import re
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from iqtorch import data, demo, evaluate, hf, plot, quantize_model, report
from iqtorch.errors import EvaluationError, UnknownFormatError
from iqtorch.importance import Importance


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[demo.Row], str, Path]:
    printed, image = io.StringIO(), tmp_path_factory.mktemp("demo") / "out.png"
    rows = demo.run(["iq4_ks", "iq2_kl"], image, windows=4, console=Console(file=printed, width=100))
    return rows, printed.getvalue(), image


def test_rows_are_what_evaluate_and_report_say(ran: tuple[list[demo.Row], str, Path]) -> None:
    original, iq4, iq2 = ran[0]
    base, tokenizer = data.load_tiny_llama()
    ids = hf.encode(tokenizer, data.heldout_text())[:2048]
    assert original.perplexity == pytest.approx(evaluate.perplexity(base, ids).perplexity)
    assert (original.bpw, original.mean_kl, original.same_top) == (16.0, 0.0, 1.0)
    model, _ = data.load_tiny_llama()
    quantize_model(model, "iq4_ks", Importance.load(data.TINY_LLAMA_IMPORTANCE), progress=False)
    found = evaluate.kl_divergence(model, base, ids)
    assert (iq4.format, iq4.bpw) == ("iq4_ks", report(model).bits_per_weight)
    assert iq4.mean_kl == pytest.approx(found.mean_kl, rel=1e-3)
    assert iq4.perplexity == pytest.approx(found.perplexity, rel=1e-3)
    assert (iq2.format, iq2.bpw < iq4.bpw, iq2.mean_kl > iq4.mean_kl) == ("iq2_kl", True, True)


def test_quantized_models_stay_close_to_the_original(ran: tuple[list[demo.Row], str, Path]) -> None:
    """Bounds from the reference engine on the whole text (mean KL 0.0086 and 0.090 for pure models), with room for the part."""
    _, iq4, iq2 = ran[0]
    assert 0 < iq4.mean_kl < 0.012
    assert 0 < iq2.mean_kl < 0.11
    assert iq4.same_top > 0.9


def test_what_is_printed(ran: tuple[list[demo.Row], str, Path]) -> None:
    rows, printed, image = ran
    for row in rows:
        line = re.search(rf"│ {row.format} .*", printed)
        assert line, printed
        assert f"{row.perplexity:.3f}" in line[0]
    assert "1020 predictions" in printed
    assert printed.count(demo.PROMPT) == 2
    assert str(image) in printed


def test_the_plot_is_an_image(ran: tuple[list[demo.Row], str, Path]) -> None:
    from matplotlib.image import imread

    pixels = imread(ran[2])
    assert pixels.shape == (750, 1650, 4)
    assert pixels[..., :3].std() > 0.05


def test_unknown_format_is_refused_before_any_work(tmp_path: Path) -> None:
    with pytest.raises(UnknownFormatError, match="iq2_kl"):
        demo.run(["iq2_kk"], tmp_path / "out.png")
    assert not list(tmp_path.iterdir())


def test_embedded_files() -> None:
    base, tokenizer = data.load_tiny_llama(torch.bfloat16)
    assert sum(p.numel() for p in base.parameters()) == 3_672_320
    assert next(base.parameters()).dtype == torch.bfloat16
    assert not base.training
    assert hf.encode(tokenizer, data.heldout_text()).shape == (51288,)
    assert len(data.calibration_text()) > 300_000
    importance = Importance.load(data.TINY_LLAMA_IMPORTANCE)
    missing = [name for name, p in base.named_parameters() if "layers" in name and p.ndim == 2 and name not in importance]
    assert missing == []


# -- plot --------------------------------------------------------------------------------------------------------

ROWS: list[dict[str, Any]] = [
    {"format": f"iq{bits}_{kind}", "bpw": bits + extra, "mean_kl": 2.0 ** (-2 * bits - extra), "perplexity": 29 + 2.0 ** (3 - bits)}
    for bits in (2, 3, 4, 5)
    for kind, extra in (("ks", 0.2), ("k", 0.4))
]


def test_labels_cover_neither_each_other_nor_a_point() -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 5), dpi=150)
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    points = [(row["format"], row["bpw"], row["perplexity"]) for row in ROWS]
    axes.scatter([x for _, x, _ in points], [y for _, _, y in points])
    axes.margins(0.12)
    figure.draw_without_rendering()
    plot._label(axes, points, "iq2_ks")
    texts = [text for text in axes.texts if text.get_text()]
    boxes = [text.get_window_extent() for text in texts]
    assert sorted(text.get_text() for text in texts) == sorted(row["format"] for row in ROWS)
    assert not any(a.overlaps(b) for a, b in combinations(boxes, 2))
    assert not any(box.contains(*axes.transData.transform((x, y))) for box in boxes for _, x, y in points)


def test_front_keeps_what_no_smaller_point_beats() -> None:
    assert plot._front([(1, 9), (2, 5), (3, 7), (4, 5), (5, 1)]) == [(1, 9), (2, 5), (5, 1)]


@pytest.mark.parametrize("suffix", [".png", ".svg", ".pdf"])
def test_plot_kinds(tmp_path: Path, suffix: str) -> None:
    path = plot.quality(ROWS, tmp_path / f"quality{suffix}", "title", original=29.0, highlight="iq2_k")
    assert path.stat().st_size > 5000
    if suffix == ".svg":
        assert "<svg" in path.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "nothing to plot"),
        ([{"format": "iq2_k", "bpw": 2.4, "perplexity": 30.0}], "lacks 'mean_kl'"),
        ([{**ROWS[0], "mean_kl": 0.0}], "logarithmic"),
    ],
)
def test_rows_that_cannot_be_drawn(tmp_path: Path, rows: list[dict[str, Any]], message: str) -> None:
    with pytest.raises(EvaluationError, match=message):
        plot.quality(rows, tmp_path / "quality.png")
    assert not list(tmp_path.iterdir())
