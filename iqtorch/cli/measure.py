"""Commands that measure models and machines: demo, perplexity, kl, bench, plot."""

from __future__ import annotations

import copy
import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from .options import (
    AsJson,
    Device,
    Model,
    Quantization,
    Scoring,
    bar,
    command,
    err,
    out,
    print_json,
    print_table,
    quiet,
    read_text,
    shared,
)


@command("iqtorch demo", "iqtorch demo iq2_kl iq4_ks --output quality.png")
def demo(
    formats: Annotated[list[str] | None, typer.Argument(metavar="FORMAT", help="Formats to show; see `iqtorch formats`.")] = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="Plot to write.")] = Path("iqtorch-demo.png"),
    windows: Annotated[int, typer.Option(help="Windows of 512 held-out tokens to score, 1 to 100.", min=1, max=100)] = 100,
    as_json: AsJson = False,
) -> None:
    """Quantize the model inside the package to several formats; print a table, a text, and write a plot."""
    from .. import demo as module

    quiet()
    rows = module.run(formats or module.FORMATS, output, windows, err if as_json else out)
    if as_json:
        print_json([row.as_dict() for row in rows])


@command(
    "iqtorch perplexity ./packed --text book.txt",
    "iqtorch perplexity ./my-model --text book.txt --format iq4_ks --importance imatrix.dat",
)
@shared(how=Quantization, scoring=Scoring)
def perplexity(model: Model, how: Quantization, scoring: Scoring, as_json: AsJson = False) -> None:
    """Perplexity of a model on a text; with --format, after quantizing it in memory."""
    from .. import evaluate

    subject, ids = scoring.load(model)
    if how.wanted:
        subject = how.apply(subject, model)
    with bar("scoring") as advance:
        found = evaluate.perplexity(subject, ids, window=scoring.window, batch_size=scoring.batch_size, progress=advance)
    if as_json:
        return print_json({"model": model, "format": how.format, **asdict(found)})
    out.print(str(found), highlight=False, soft_wrap=True)


@command("iqtorch kl tiny-llama --format iq2_kl", "iqtorch kl ./packed --base ./my-model --text book.txt --json")
@shared(how=Quantization, scoring=Scoring)
def kl(
    model: Model,
    how: Quantization,
    scoring: Scoring,
    base: Annotated[str | None, typer.Option(help="Model to compare with. Default: MODEL before --format.")] = None,
    as_json: AsJson = False,
) -> None:
    """KL divergence of a model from a base model on a text, share of equal top tokens, and both perplexities."""
    from .. import evaluate
    from ..report import report

    if not (base or how.wanted):
        raise typer.BadParameter("give --base, or --format to compare MODEL with itself before quantization")
    original, ids = scoring.load(base or model)
    subject = scoring.load(model)[0] if base else copy.deepcopy(original)
    if how.wanted:
        subject = how.apply(subject, model)
    with bar("scoring") as advance:
        found = evaluate.kl_divergence(subject, original, ids, window=scoring.window, batch_size=scoring.batch_size, progress=advance)
    bits = report(subject).bits_per_weight
    if as_json:
        return print_json({"model": model, "base": base or model, "format": how.format or "as loaded", "bpw": bits, **asdict(found)})
    out.print(f"{bits:.3f} bits per weight: {found}", highlight=False, soft_wrap=True)


@command("iqtorch bench", "iqtorch bench iq2_kl iq4_ks --shape 4096x4096 --shape 14336x4096 --rows 1 --rows 512 --json")
def bench(
    formats: Annotated[list[str] | None, typer.Argument(metavar="FORMAT", help="Formats to time; see `iqtorch formats`.")] = None,
    shape: Annotated[list[str] | None, typer.Option(help="Weights N x K. Repeatable. Default: 4096x4096.")] = None,
    rows: Annotated[list[int] | None, typer.Option(help="Rows of activations. Repeatable. Default: 1, 8, 128.")] = None,
    device: Device = "cpu",
    threads: Annotated[int | None, typer.Option(help="Threads. Default: as torch is set.", min=1)] = None,
    megabytes: Annotated[float, typer.Option(help="Weights used in turn, so that they come from memory.", min=0)] = 256,
    tune: Annotated[bool, typer.Option("--tune", help="Choose the GPU kernels' tiles by measuring; keep them for this card.")] = False,
    as_json: AsJson = False,
) -> None:
    """Time packed products against a plain bfloat16 nn.Linear on this machine, after checking their values."""
    from .. import bench as module

    shapes = [_shape(text) for text in shape or ["4096x4096"]]
    if tune:
        from ..kernels import tuning

        made = str(tuning.tune(formats or module.FORMATS, shapes, "cuda" if device == "cpu" else device, report=err.print))
        return print_json({"output": made}) if as_json else out.print(made, highlight=False, soft_wrap=True)
    with bar("timing") as advance:
        found = module.run(formats or module.FORMATS, shapes, rows or module.ROWS, device, threads, megabytes, advance)
    if as_json:
        return print_json({"machine": module.machine(device), "rows": [asdict(row) for row in found]})
    table = Table(title=module.machine(device), title_justify="left")
    for heading in ("format", "NxK", "rows", "packed us", "bf16 us", "speedup", "GB/s", "error"):
        table.add_column(heading, justify="left" if heading == "format" else "right")
    for row in found:
        cells = (f"{row.packed_us:.1f}", f"{row.plain_us:.1f}", f"{row.speedup:.2f}", f"{row.gb_per_s:.1f}", f"{row.error:.1e}")
        table.add_row(row.format, f"{row.n}x{row.k}", str(row.rows), *cells)
    print_table(table)


@command("iqtorch plot demo.json --output quality.png")
def plot(
    files: Annotated[list[Path], typer.Argument(metavar="FILE", help="Output of `iqtorch demo --json` or `iqtorch kl --json`.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Image to write: .png, .svg or .pdf.")] = Path("quality.png"),
    title: Annotated[str, typer.Option(help="Heading.")] = "",
    highlight: Annotated[str, typer.Option(help="Format drawn in colour.")] = "iq2_kl",
    as_json: AsJson = False,
) -> None:
    """Plot KL divergence and perplexity against bits per weight."""
    from .. import plot as module

    rows: list[dict[str, Any]] = []
    for file in files:
        try:
            read = json.loads(read_text(file))
        except json.JSONDecodeError as error:
            raise OSError(f"{file} is no JSON: {error}") from error
        rows += read if isinstance(read, list) else [read]
    original = next((row["perplexity"] for row in rows if row.get("format") == "original"), None)
    if original is None:
        original = next((row["base_perplexity"] for row in rows if "base_perplexity" in row), None)
    drawn = [row for row in rows if row.get("format") != "original"]
    made = str(module.quality(drawn, output, title, original, highlight))
    if as_json:
        return print_json({"output": made})
    out.print(made, highlight=False, soft_wrap=True)


def _shape(text: str) -> tuple[int, int]:
    n, x, k = text.lower().partition("x")
    if not (x and n.isdigit() and k.isdigit() and int(n) and int(k)):
        raise typer.BadParameter(f"{text!r} is no N x K, for instance 4096x4096", param_hint="--shape")
    return int(n), int(k)
