"""The demo: the embedded model in several formats, measured, tabled, plotted and heard.

All figures are measured while it runs. The quality figures are the same on every machine up to rounding; tokens/s is this
machine's, for one sequence on one thread, and says more about the overhead of small layers than about the kernels: the
embedded model has layers of 256.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TimeElapsedColumn
from rich.table import Table
from torch import Tensor, nn

from . import data, evaluate, hf, plot, progress
from .formats import get_format
from .importance import Importance
from .model import quantize_model
from .report import report

__all__ = ["FORMATS", "Row", "run"]

FORMATS = ("iq2_ks", "iq2_kl", "iq3_k", "iq4_ks", "iq4_k", "iq5_k", "iq6_k")
PROMPT = "It was a dark night, and"
SHOWN = "iq2_kl"  # the format whose text is printed, and which the plot points out
NEW_TOKENS = 48


@dataclass(frozen=True)
class Row:
    """What is measured of one model.

    Attributes:
        format: name of the format, or "original".
        bpw: bits per weight over all parameters.
        mib: size of all parameters in MiB.
        perplexity: on the held-out text.
        mean_kl: mean KL divergence from the original, nats per token.
        same_top: share of equal most likely tokens, 0 to 1.
        tokens_per_second: generation, one sequence, one thread.
    """

    format: str
    bpw: float
    mib: float
    perplexity: float
    mean_kl: float
    same_top: float
    tokens_per_second: float

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def run(
    formats: Sequence[str] = FORMATS,
    output: str | Path = "iqtorch-demo.png",
    windows: int = 100,
    console: Console | None = None,
) -> list[Row]:
    """Quantizes the embedded model to each format; prints a table and two texts, and writes a plot.

    Args:
        formats: names of formats, each applied as its default recipe.
        output: image to write.
        windows: windows of 512 tokens of the held-out text to score; there are 100.
        console: where to print.

    Returns:
        The table's rows, the original model first.

    Raises:
        UnknownFormatError: a format that does not exist.
        MissingDependencyError: transformers or matplotlib is not installed.
        EvaluationError, OSError: `output` is no image, or cannot be written.
    """
    formats = [get_format(name).name for name in formats]
    console = console or Console()
    plot.check_output(output)  # minutes before it is written
    base, tokenizer = data.load_tiny_llama()
    ids = hf.encode(tokenizer, data.heldout_text())[: 512 * windows]
    prompt = torch.tensor([tokenizer(PROMPT).input_ids])
    importance = Importance.load(data.TINY_LLAMA_IMPORTANCE)
    rows: list[Row] = []
    texts: dict[str, str] = {}

    columns = ("{task.description}", BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with _one_thread(), progress.bars(*columns, console=console) as bars:
        overall = bars.add_task("all formats", total=len(formats))
        for name in formats:
            bar = bars.add_task(f"{name}: quantizing", total=None)
            model = quantize_model(copy.deepcopy(base), name, importance, progress=False)
            bars.update(bar, description=f"{name}: scoring")
            found = evaluate.kl_divergence(model, base, ids, progress=_advance(bars, bar))
            bars.update(bar, description=f"{name}: writing")
            if not rows:
                tokens, speed = _generate(base, prompt)
                texts["original"] = _words(tokenizer, tokens)
                # Computed in float32, but counted as its file stores it.
                size = _size(copy.deepcopy(base).bfloat16())
                rows.append(Row("original", *size, found.base_perplexity, 0.0, 1.0, speed))
            tokens, speed = _generate(model, prompt)
            texts[name] = _words(tokenizer, tokens)
            rows.append(Row(name, *_size(model), found.perplexity, found.mean_kl, found.same_top, speed))
            bars.remove_task(bar)
            bars.advance(overall)

    title = f"Embedded Llama (3.7 M parameters), {found.tokens} predictions on held-out text"
    console.print(table(rows, title))
    for name in ("original", SHOWN if SHOWN in formats else formats[0]):
        console.print(f"[bold]{name}:[/bold]", escape(texts[name]), highlight=False)
    path = plot.quality([row.as_dict() for row in rows[1:]], output, title, original=rows[0].perplexity, highlight=SHOWN)
    console.print(f"Plot of quality against size: {path}", highlight=False, soft_wrap=True)
    return rows


def table(rows: Sequence[Row], title: str) -> Table:
    """The rows as a table for the terminal."""
    made = Table(title=title, title_justify="left")
    made.add_column("format")
    for heading in ("bpw", "MiB", "perplexity", "mean KL", "same top token", "tokens/s"):
        made.add_column(heading, justify="right")
    for row in rows:
        compared = ["", ""] if row.format == "original" else [f"{row.mean_kl:.5f}", f"{100 * row.same_top:.1f} %"]
        cells = [f"{row.bpw:.2f}", f"{row.mib:.2f}", f"{row.perplexity:.3f}", *compared, f"{row.tokens_per_second:.0f}"]
        made.add_row(row.format, *cells, style="bold" if row.format == SHOWN else "")
    return made


def _advance(bars: Progress, bar: TaskID) -> evaluate.Progress:
    return lambda done, total: bars.update(bar, completed=done, total=total)


@contextmanager
def _one_thread() -> Iterator[None]:
    """Layers of 256 gain little from more threads, and wait long for them where the machine is busy."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _size(model: nn.Module) -> tuple[float, float]:
    """Bits per weight, and MiB, of all parameters."""
    stored = report(model)
    return stored.bits_per_weight, stored.nbytes / 2**20


def _words(tokenizer: Any, tokens: Tensor) -> str:
    """The text on one line: the model was trained on books with hard line breaks."""
    return " ".join(tokenizer.decode(tokens, skip_special_tokens=True).split())


def _generate(model: Any, prompt: Tensor) -> tuple[Tensor, float]:
    """Greedy continuation of `prompt [1, T]` (repetition discouraged), and the best of three speeds in tokens per second."""
    how = {"do_sample": False, "repetition_penalty": 1.3}
    model.generate(prompt, max_new_tokens=4, **how)  # warms up
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        out: Tensor = model.generate(prompt, max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS, **how)
        seconds.append(time.perf_counter() - start)
    return out[0], NEW_TOKENS / min(seconds)
