"""The command line: `iqtorch --help`."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from .errors import IQTorchError
from .formats import get_format, list_formats

if TYPE_CHECKING:
    from torch import Tensor, nn

    from .evaluate import Progress as Report

EMBEDDED = "tiny-llama"

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    rich_markup_mode="rich",
    help="IQ weight formats, 2 to 6 bits per weight, in PyTorch.",
    epilog="""\
[bold]Examples[/bold]

  iqtorch demo\n
  iqtorch formats\n
  iqtorch kl tiny-llama --format iq2_kl\n
  iqtorch perplexity ./my-model --text book.txt --format iq4_ks --importance imatrix.dat\n
  iqtorch inspect ./my-model

MODEL is a Hugging Face folder or hub name, or [bold]tiny-llama[/bold] for the small model inside the package.
Errors go to standard error; the exit code is 0, 1 for an error, 2 for a wrong command line.""",
)

out = Console()
err = Console(stderr=True)

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
Model = Annotated[str, typer.Argument(metavar="MODEL", help="Hugging Face folder or hub name, or tiny-llama.")]
Output = Annotated[Path, typer.Argument(help="GGUF file (.gguf) or folder to write.")]
Text = Annotated[Path | None, typer.Option("--text", help="UTF-8 text to score. Default: the held-out text inside the package.")]
Format = Annotated[str | None, typer.Option("--format", "-f", help="Quantize the model to this format first, as its default recipe.")]
Pure = Annotated[bool, typer.Option("--pure", help="With --format: this one format for every matrix.")]
ImportanceFile = Annotated[Path | None, typer.Option("--importance", help="With --format: importance file (imatrix, .dat or .gguf).")]
Window = Annotated[int, typer.Option(help="Tokens per window; predictions in its second half are scored.")]
Batch = Annotated[int, typer.Option("--batch-size", help="Windows per forward pass.")]
Limit = Annotated[int | None, typer.Option("--windows", help="Score only the first so many windows.", min=1)]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ...")]


@app.command()
def demo(
    formats: Annotated[list[str] | None, typer.Argument(help="Formats to show; see `iqtorch formats`.")] = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="Plot to write.")] = Path("iqtorch-demo.png"),
    windows: Annotated[int, typer.Option(help="Windows of 512 held-out tokens to score, 1 to 100.", min=1, max=100)] = 100,
    as_json: AsJson = False,
) -> None:
    """Quantize the model inside the package to several formats; print a table, a text, and write a plot."""
    from . import demo as module

    _quiet()
    rows = module.run(formats or module.FORMATS, output, windows, err if as_json else out)
    if as_json:
        _print_json([row.as_dict() for row in rows])


@app.command()
def formats(as_json: AsJson = False) -> None:
    """List the formats: bits per weight, type id in GGUF files, and what replaces each where rows do not fit."""
    rows = [
        {
            "format": fmt.name,
            "bpw": fmt.bits_per_weight(),
            "block_size": fmt.block_size,
            "ggml_type": fmt.ggml_type,
            "fallback": fmt.fallback,
            "plain": fmt.plain,
            "requires_importance": fmt.requires_importance,
        }
        for fmt in sorted(map(get_format, list_formats()), key=lambda fmt: (fmt.plain is not None, fmt.bits_per_weight()))
    ]
    if as_json:
        return _print_json(rows)
    table = Table(title="Formats; bits per weight at rows of 4096", title_justify="left")
    for heading in ("format", "bpw", "rows of n x", "GGUF type", "other rows", "note"):
        table.add_column(heading, justify="right" if heading in ("bpw", "rows of n x", "GGUF type") else "left")
    for row in rows:
        note = f"4 rows of {row['plain']}" if row["plain"] else "wants importance" if row["requires_importance"] else ""
        cells = (row["format"], f"{row['bpw']:.3f}", row["block_size"], row["ggml_type"], row["fallback"] or "kept", note)
        table.add_row(*map(str, cells))
    out.print(table)


@app.command()
def perplexity(
    model: Model,
    text: Text = None,
    format: Format = None,
    pure: Pure = False,
    importance: ImportanceFile = None,
    window: Window = 512,
    batch_size: Batch = 4,
    windows: Limit = None,
    device: Device = "cpu",
    as_json: AsJson = False,
) -> None:
    """Perplexity of a model on a text."""
    from . import evaluate

    loaded, ids = _load(model, text, window, windows, device)
    subject = _quantized(loaded, format, pure, importance, model) if format else loaded
    with _bar("scoring") as advance:
        found = evaluate.perplexity(subject, ids, window=window, batch_size=batch_size, progress=advance)
    _print_json({"model": model, "format": format, **asdict(found)}) if as_json else out.print(str(found), highlight=False)


@app.command()
def kl(
    model: Model,
    base: Annotated[str | None, typer.Option(help="Model to compare with. Default: MODEL before --format.")] = None,
    text: Text = None,
    format: Format = None,
    pure: Pure = False,
    importance: ImportanceFile = None,
    window: Window = 512,
    batch_size: Batch = 4,
    windows: Limit = None,
    device: Device = "cpu",
    as_json: AsJson = False,
) -> None:
    """KL divergence of a model from a base model on a text, share of equal top tokens, and both perplexities."""
    import copy

    from . import evaluate
    from .report import report

    if not (base or format):
        raise typer.BadParameter("give --base, or --format to compare MODEL with itself before quantization")
    original, ids = _load(base or model, text, window, windows, device)
    subject = _load(model, text, window, windows, device)[0] if base else copy.deepcopy(original)
    if format:
        subject = _quantized(subject, format, pure, importance, model)
    with _bar("scoring") as advance:
        found = evaluate.kl_divergence(subject, original, ids, window=window, batch_size=batch_size, progress=advance)
    bits = report(subject).bits_per_weight
    if as_json:
        return _print_json({"model": model, "base": base or model, "format": format or "as loaded", "bpw": bits, **asdict(found)})
    out.print(f"{bits:.3f} bits per weight: {found}", highlight=False)


@app.command()
def quantize(
    model: Model,
    output: Output,
    format: Annotated[str, typer.Option("--format", "-f", help="Format, as its default recipe; see `iqtorch formats`.")],
    pure: Annotated[bool, typer.Option("--pure", help="This one format for every matrix.")] = False,
    rule: Annotated[list[str] | None, typer.Option(help="REGEX=FORMAT on parameter names, before the recipe. Repeatable.")] = None,
    custom_q: Annotated[str | None, typer.Option(help="Rules on GGUF names, as ik_llama.cpp takes them: REGEX=TYPE,...")] = None,
    skip: Annotated[list[str] | None, typer.Option(help="REGEX on parameter names: keep those weights. Repeatable.")] = None,
    importance: Annotated[Path | None, typer.Option("--importance", help="Importance file (imatrix, .dat or .gguf).")] = None,
    calibration: Annotated[Path | None, typer.Option(help="UTF-8 text for calibrated rounding: slower, better.")] = None,
    windows: Annotated[int, typer.Option(help="With --calibration: windows of 512 tokens to use.", min=1)] = 64,
    as_json: AsJson = False,
) -> None:
    """Quantize a model and save it, as a GGUF file (OUTPUT ends in .gguf) or a Hugging Face folder."""
    from . import evaluate, hf
    from .gguf import custom_q as parse_custom_q
    from .report import report

    loaded, tokenizer = _open(model)
    rules: dict[str, str | None] = dict(map(_rule, rule or ()))
    if custom_q:
        rules.update(parse_custom_q(custom_q, loaded))
    how: dict[str, Any] = {}
    if calibration:
        ids = hf.encode(tokenizer, calibration.read_text(encoding="utf-8"))
        how = {"rounding": "ldlq", "calibration": evaluate.windows(loaded, ids)[:windows].split(4)}
    _quantized(loaded, format, pure, importance, model, rules=rules, skip=skip or (), **how)
    _save(loaded, tokenizer, output)
    made = report(loaded)
    if as_json:
        return _print_json({"output": str(output), "bpw": made.bits_per_weight, "bytes": made.nbytes})
    out.print(str(made), highlight=False, markup=False, soft_wrap=True)


@app.command()
def convert(model: Model, output: Output) -> None:
    """Convert between GGUF files and Hugging Face folders; quantized weights stay as they are, bit for bit."""
    loaded, tokenizer = _open(model)
    _save(loaded, tokenizer, output)
    out.print(str(output), highlight=False, soft_wrap=True)


@app.command()
def importance(
    model: Model,
    output: Annotated[Path, typer.Argument(help="File to write: .dat (read by ik_llama.cpp), or any other ending for a GGUF file.")],
    text: Annotated[Path | None, typer.Option("--text", help="UTF-8 text. Default: the calibration text inside the package.")] = None,
    window: Annotated[int, typer.Option(help="Tokens per sequence.")] = 512,
    windows: Limit = None,
    device: Device = "cpu",
) -> None:
    """Collect the importance of a model's weights from a text."""
    from . import data, evaluate, hf
    from .importance import collect_importance

    loaded, tokenizer = _open(model)
    ids = hf.encode(tokenizer, text.read_text(encoding="utf-8") if text else data.calibration_text())
    batches = evaluate.windows(loaded, ids, window)[:windows]
    with _bar("collecting") as advance:
        found = collect_importance(
            loaded.to(device), _counted(batches.to(device).split(1), advance), datasets=[str(text or "calibration.txt")]
        )
    found.save(output)
    out.print(f"{found} in {output}", highlight=False, soft_wrap=True)


@app.command()
def plot(
    files: Annotated[list[Path], typer.Argument(help="Output of `iqtorch demo --json` or `iqtorch kl --json`.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Image to write: .png, .svg or .pdf.")] = Path("quality.png"),
    title: Annotated[str, typer.Option(help="Heading.")] = "",
    highlight: Annotated[str, typer.Option(help="Format drawn in colour.")] = "iq2_kl",
) -> None:
    """Plot KL divergence and perplexity against bits per weight."""
    from . import plot as module

    rows: list[dict[str, Any]] = []
    for file in files:
        read = json.loads(file.read_text(encoding="utf-8"))
        rows += read if isinstance(read, list) else [read]
    original = next((row["perplexity"] for row in rows if row.get("format") == "original"), None)
    if original is None:
        original = next((row["base_perplexity"] for row in rows if "base_perplexity" in row), None)
    drawn = [row for row in rows if row.get("format") != "original"]
    out.print(str(module.quality(drawn, output, title, original, highlight)), highlight=False)


@app.command()
def inspect(
    path: Annotated[Path, typer.Argument(help="A .gguf or .safetensors file, a folder of the latter, or an importance file.")],
    as_json: AsJson = False,
) -> None:
    """List what a file holds: tensors with format, shape and bits per weight, metadata, or importance statistics."""
    from . import inspection

    found = inspection.inspect(path)
    if as_json:
        return _print_json(found)
    for key, value in found["metadata"].items():
        out.print(f"{key}: {value}", highlight=False, markup=False, soft_wrap=True)
    rows = found["rows"]
    table = Table(caption=found["summary"])
    for heading, value in (rows[0] if rows else {}).items():
        table.add_column(heading, justify="right" if isinstance(value, int | float) else "left", overflow="fold")
    for row in rows:
        table.add_row(*map(inspection.shown, row.values()))
    out.print(table)


def main() -> None:
    """Entry point: errors of iqtorch and of the file system become one line and exit code 1."""
    try:
        app(prog_name="iqtorch")
    except (IQTorchError, OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        err.print("[bold red]error:[/bold red]", escape(str(error)), highlight=False, soft_wrap=True)
        sys.exit(1)


# -- helpers ---------------------------------------------------------------------------------------------------


def _quiet() -> None:
    """No progress bars from transformers among ours."""
    from .hf import transformers

    transformers().utils.logging.disable_progress_bar()


def _open(model: str, dtype: str = "auto") -> tuple[Any, Any]:
    """Model and tokenizer: the embedded one, a GGUF file, or what transformers finds under that name."""
    from . import data, hf

    _quiet()
    if model == EMBEDDED and not Path(model).exists():
        return data.load_tiny_llama()
    if model.endswith(".gguf"):
        from . import gguf

        return gguf.load_gguf(model), gguf.load_tokenizer(model)
    return hf.load_causal_lm(model, dtype)


def _load(model: str, text: Path | None, window: int, windows: int | None, device: str) -> tuple[nn.Module, Tensor]:
    """The model on its device, and the token ids of the text."""
    from . import data, hf

    loaded, tokenizer = _open(model)
    ids = hf.encode(tokenizer, text.read_text(encoding="utf-8") if text else data.heldout_text())
    return loaded.to(device), ids[: windows * window] if windows else ids


def _quantized(
    model: nn.Module, format: str, pure: bool, importance: Path | None, name: str, rules: dict[str, str | None] | None = None, **how: Any
) -> nn.Module:
    from . import data
    from .importance import Importance
    from .model import quantize_model
    from .recipe import Recipe

    file = importance or (data.TINY_LLAMA_IMPORTANCE if name == EMBEDDED else None)
    recipe = Recipe.pure(format) if pure else Recipe.default(format)
    return quantize_model(model, recipe.with_rules(rules or {}), importance=Importance.load(file) if file else None, **how)


def _rule(text: str) -> tuple[str, str | None]:
    pattern, separator, format = text.rpartition("=")
    if not (separator and pattern):
        raise typer.BadParameter(f"{text!r} is no REGEX=FORMAT, for instance 'down_proj=iq4_ks'", param_hint="--rule")
    return pattern, format


@contextmanager
def _bar(description: str) -> Iterator[Report]:
    """A progress bar on standard error, as a function of (done, total)."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=err, transient=True) as bars:
        task = bars.add_task(description, total=None)
        yield lambda done, total: bars.update(task, completed=done, total=total)


def _counted(batches: Sequence[Tensor], advance: Report) -> Iterator[Tensor]:
    for i, batch in enumerate(batches, 1):
        yield batch
        advance(i, len(batches))


def _save(model: Any, tokenizer: Any, output: Path) -> None:
    if output.suffix == ".gguf":
        from .gguf import save_gguf

        save_gguf(model, output, tokenizer)
    else:
        model.save_pretrained(output)
        tokenizer.save_pretrained(output)


def _print_json(value: object) -> None:
    print(json.dumps(value, indent=2))


if __name__ == "__main__":
    main()
