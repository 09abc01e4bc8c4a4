"""Commands that make and read files: formats, quantize, convert, importance, inspect."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from ..formats import get_format, list_formats
from .options import (
    AsJson,
    Device,
    Limit,
    Model,
    Output,
    Quantization,
    Rounding,
    Streaming,
    bar,
    command,
    counted,
    err,
    files_of,
    open_model,
    out,
    print_json,
    read_text,
    shared,
    text_option,
)


@command("iqtorch formats", "iqtorch formats --json")
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
        return print_json(rows)
    table = Table(title="Formats; bits per weight at rows of 4096", title_justify="left")
    for heading in ("format", "bpw", "rows of n x", "GGUF type", "other rows", "note"):
        table.add_column(heading, justify="right" if heading in ("bpw", "rows of n x", "GGUF type") else "left")
    for row in rows:
        note = f"4 rows of {row['plain']}" if row["plain"] else "wants importance" if row["requires_importance"] else ""
        cells = (row["format"], f"{row['bpw']:.3f}", row["block_size"], row["ggml_type"], row["fallback"] or "kept", note)
        table.add_row(*map(str, cells))
    out.print(table)


@command(
    "iqtorch quantize ./my-model ./packed --format iq2_kl --importance imatrix.dat",
    "iqtorch quantize ./my-model my-model.gguf --format iq3_k --rule 'down_proj=iq4_ks' --skip lm_head",
    "iqtorch quantize ./my-model ./packed --format iq2_kl --calibration book.txt --rounding ldlq",
)
@shared(how=Quantization, files=Streaming)
def quantize(
    model: Model,
    output: Output,
    how: Quantization,
    files: Streaming,
    calibration: Annotated[Path | None, text_option("UTF-8 text for calibrated rounding: slower, better, and in memory.")] = None,
    rounding: Rounding = "ldlq",
    windows: Annotated[int, typer.Option(help="With --calibration: windows of 512 tokens to use.", min=1)] = 64,
    as_json: AsJson = False,
) -> None:
    """Quantize a model from file to file, to a GGUF file (OUTPUT ends in .gguf) or a Hugging Face folder.

    Memory does not grow with the model, except with --calibration. The same command goes on with a run that was stopped.
    """
    from ..report import report

    if not how.wanted:
        raise typer.BadParameter("give --format, --recipe, --rule or --custom-q", param_hint="--format")
    if calibration is None:
        made = _streamed(model, output, how, files)
    else:
        from .. import evaluate, hf

        loaded, tokenizer = open_model(model)
        ids = hf.encode(tokenizer, read_text(calibration))
        batches = evaluate.windows(loaded, ids)[:windows].split(4)
        if output.suffix == ".gguf":
            from ..gguf import use_file_order

            use_file_order(loaded)
        how.apply(loaded, model, rounding=rounding, calibration=batches)
        _save(loaded, tokenizer, output)
        made = report(loaded)
    if as_json:
        return print_json({"output": str(output), "bpw": made.bits_per_weight, "bytes": made.nbytes})
    out.print(str(made), highlight=False, markup=False, soft_wrap=True)


@command(
    "iqtorch convert my-model.gguf ./packed",
    "iqtorch convert ./packed my-model.gguf",
    "iqtorch convert interleaved-r4.gguf plain.gguf",
    "iqtorch convert ./my-model my-model.gguf --format iq4_ks",
)
@shared(how=Quantization, files=Streaming)
def convert(model: Model, output: Output, how: Quantization, files: Streaming, as_json: AsJson = False) -> None:
    """Convert between GGUF files and Hugging Face folders; quantized weights stay as they are, bit for bit.

    With --format, weights that are not quantized are, on the way. Split GGUF files are read from any of their parts; interleaved
    formats (_r4) become the plain ones.
    """
    from ..checkpoint import convert_checkpoint

    if how.wanted:
        _streamed(model, output, how, files)
    else:
        with _resumable():
            convert_checkpoint(
                files_of(model), output, threads=files.threads, max_shard_size=files.max_shard_size, overwrite=files.overwrite
            )
    if as_json:
        return print_json({"output": str(output)})
    out.print(str(output), highlight=False, soft_wrap=True)


@command(
    "iqtorch importance ./my-model imatrix.dat --text calibration.txt",
    "iqtorch importance tiny-llama imatrix.gguf --windows 20",
    "iqtorch importance --merge english.dat code.gguf imatrix.dat",
)
def importance(
    model: Annotated[
        list[str], typer.Argument(metavar="MODEL", help="Hugging Face folder or hub name, GGUF file, or tiny-llama. With --merge: files.")
    ],
    output: Annotated[
        Path, typer.Argument(metavar="OUTPUT", help="File to write: .dat (read by ik_llama.cpp), or any other ending for a GGUF file.")
    ],
    text: Annotated[Path | None, text_option("UTF-8 text. Default: the calibration text inside the package.")] = None,
    window: Annotated[int, typer.Option(help="Tokens per sequence.")] = 512,
    windows: Limit = None,
    device: Device = "cpu",
    merge: Annotated[bool, typer.Option("--merge", help="Put importance files of one model together, weighted by tokens.")] = False,
    as_json: AsJson = False,
) -> None:
    """Collect the importance of a model's weights from a text, or put together what was collected from several."""
    from .. import data, evaluate, hf
    from ..importance import Importance, collect_importance

    if merge:
        if text or windows:
            raise typer.BadParameter("--text and --windows are for collecting", param_hint="--merge")
        first, *others = map(Importance.load, model)
        found = first.merge(*others)
        found.save(output)
        if as_json:
            return print_json({"output": str(output), "weights": len(found), "files": len(model)})
        return out.print(f"{found} in {output}", highlight=False, soft_wrap=True)
    if len(model) > 1:
        raise typer.BadParameter(f"{len(model)} models; several files are for --merge", param_hint="MODEL")
    loaded, tokenizer = open_model(model[0])
    ids = hf.encode(tokenizer, read_text(text) if text else data.calibration_text())
    batches = evaluate.windows(loaded, ids, window)[:windows]
    with bar("collecting") as advance:
        found = collect_importance(
            loaded.to(device), counted(batches.to(device).split(1), advance), datasets=[str(text or "calibration.txt")]
        )
    found.save(output)
    if as_json:
        return print_json({"output": str(output), "weights": len(found), "windows": len(batches), "window": window})
    out.print(f"{found} in {output}", highlight=False, soft_wrap=True)


@command("iqtorch inspect model.gguf", "iqtorch inspect ./packed --json", "iqtorch inspect imatrix.dat")
def inspect(
    path: Annotated[
        Path, typer.Argument(metavar="PATH", help="A .gguf or .safetensors file, a folder of the latter, or an importance file.")
    ],
    as_json: AsJson = False,
) -> None:
    """List what a file holds: tensors with format, shape and bits per weight, metadata, or importance statistics."""
    from .. import inspection

    found = inspection.inspect(path)
    if as_json:
        return print_json(found)
    for key, value in found["metadata"].items():
        out.print(f"{key}: {value}", highlight=False, markup=False, soft_wrap=True)
    rows = found["rows"]
    table = Table(caption=found["summary"])
    for heading, value in (rows[0] if rows else {}).items():
        table.add_column(heading, justify="right" if isinstance(value, int | float) else "left", overflow="fold")
    for row in rows:
        table.add_row(*map(inspection.shown, row.values()))
    out.print(table)


# -- helpers ---------------------------------------------------------------------------------------------------


class _resumable:
    """Says how to go on when the user stops what is going on inside."""

    def __enter__(self) -> None: ...

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is KeyboardInterrupt:
            err.print("interrupted: the same command goes on where it was")


def _streamed(model: str, output: Path, how: Quantization, files: Streaming) -> Any:
    from ..checkpoint import parameter_names, quantize_checkpoint

    source = files_of(model)
    file = how.importance_of(model)

    def names() -> Sequence[str]:
        return parameter_names(source)

    with _resumable():
        return quantize_checkpoint(
            source,
            output,
            how.recipe_for(names),
            file,
            objective=how.objective,  # type: ignore[arg-type]
            speed=how.speed,  # type: ignore[arg-type]
            skip=how.skip or (),
            requantize=files.requantize,
            threads=files.threads,
            max_shard_size=files.max_shard_size,
            overwrite=files.overwrite,
        )


def _save(model: Any, tokenizer: Any, output: Path) -> None:
    if output.suffix == ".gguf":
        from ..gguf import save_gguf

        save_gguf(model, output, tokenizer)
    else:
        model.save_pretrained(output)
        tokenizer.save_pretrained(output)
