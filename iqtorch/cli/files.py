"""Commands that make and read files: formats, quantize, convert, importance, inspect."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.box import SIMPLE_HEAD
from rich.table import Table

from ..errors import CheckpointError
from ..files import check_place
from ..formats import get_format, list_formats
from ..tensor import IQTensor
from .options import (
    ROUNDING,
    WINDOWS,
    WRITABLE,
    AsJson,
    Calibrated,
    Device,
    Limit,
    Model,
    Output,
    Quantization,
    Streaming,
    bar,
    command,
    counted,
    err,
    files_of,
    is_embedded,
    located,
    open_model,
    out,
    print_json,
    print_table,
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
    print_table(table)


@command(
    "iqtorch quantize ./my-model ./packed --format iq2_kl --importance imatrix.dat",
    "iqtorch quantize ./my-model my-model.gguf --format iq3_k --rule 'down_proj=iq4_ks' --skip lm_head",
    "iqtorch quantize ./my-model ./packed --format iq2_kl --calibration book.txt --rounding ldlq",
)
@shared(how=Quantization, files=Streaming, rounded=Calibrated)
def quantize(model: Model, output: Output, how: Quantization, files: Streaming, rounded: Calibrated, as_json: AsJson = False) -> None:
    """Quantize a model from file to file, to a GGUF file (OUTPUT ends in .gguf) or a Hugging Face folder.

    Memory does not grow with the model, except with --calibration. The same command goes on with a run that was stopped.
    """
    if not how.wanted:
        raise typer.BadParameter("give --format, --recipe, --rule or --custom-q", param_hint="--format")
    with _resumable():
        if rounded.calibration is None:
            made = _streamed(model, output, how, files)
        else:
            made = _calibrated(model, output, how, files, rounded, rounded.calibration)
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

    with _resumable():
        if how.wanted:
            _streamed(model, output, how, files)
        else:
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
        Path,
        typer.Argument(
            metavar="OUTPUT", help="File to write: .dat (read by ik_llama.cpp), or any other ending for a GGUF file.", **WRITABLE
        ),
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
    from ..gguf.names import gguf_package
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
    gguf_package()  # its names are those of the file; not after the text
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


@command(
    "iqtorch fit ./my-model mix.toml --bpw 2.7 --importance imatrix.dat",
    "iqtorch quantize ./my-model ./packed --recipe mix.toml --importance imatrix.dat",
)
def fit(
    model: Model,
    output: Annotated[Path, typer.Argument(metavar="OUTPUT", help="Recipe file (TOML) to write.", **WRITABLE)],
    bpw: Annotated[float, typer.Option(help="Most bits per packed weight.")],
    importance: Annotated[Path | None, typer.Option(help="Importance file (imatrix, .dat or .gguf).")] = None,
    text: Annotated[Path | None, text_option("UTF-8 text. Default: the calibration text inside the package.")] = None,
    window: Annotated[int, typer.Option(help="Tokens per sequence.")] = 512,
    windows: Annotated[int, typer.Option(help="Use the first so many windows.", min=1)] = 4,
    device: Device = "cpu",
    as_json: AsJson = False,
) -> None:
    """Find the best format for each weight of a model under a limit on its size: one pass of the text per weight."""
    from .. import data, evaluate, hf
    from ..fit import fit

    loaded, tokenizer = open_model(model)
    ids = hf.encode(tokenizer, read_text(text) if text else data.calibration_text())
    batches = evaluate.windows(loaded, ids, window)[:windows].split(1)
    file = importance or (data.TINY_LLAMA_IMPORTANCE if is_embedded(model) else None)
    found = fit(loaded.to(device), file, target_bpw=bpw, batches=batches)
    found.recipe.save(output)
    if as_json:
        return print_json({"output": str(output), **{key: value for key, value in asdict(found).items() if key != "recipe"}})
    out.print(f"{found} in {output}", highlight=False, soft_wrap=True)


@command("iqtorch inspect model.gguf", "iqtorch inspect ./packed --json", "iqtorch inspect imatrix.dat")
def inspect(
    path: Annotated[
        Path, typer.Argument(metavar="PATH", help="A .gguf or .safetensors file, a folder of one of them, or an importance file.")
    ],
    as_json: AsJson = False,
) -> None:
    """List what a file holds: tensors with format, shape and bits per weight, metadata, or importance statistics."""
    from .. import inspection

    found = inspection.inspect(located(path))
    if as_json:
        return print_json(found)
    for key, value in found["metadata"].items():
        out.print(f"{key}: {value}", highlight=False, markup=False, soft_wrap=True)
    rows = found["rows"]
    table = Table(box=SIMPLE_HEAD)
    used = [key for key in (rows[0] if rows else {}) if any(row[key] is not None for row in rows)]
    for key in used:
        table.add_column(key, justify="right" if isinstance(rows[0][key], int | float) else "left", overflow="fold")
    for row in rows:
        table.add_row(*(inspection.shown(row[key]) for key in used))
    print_table(table)
    out.print(found["summary"], highlight=False, soft_wrap=True)


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


def _calibrated(model: str, output: Path, how: Quantization, files: Streaming, rounded: Calibrated, text: Path) -> Any:
    """In memory. Finished blocks lie in a hidden folder beside the output until that is written."""
    from .. import evaluate, hf
    from ..gguf.names import gguf_package
    from ..report import report

    made = output if output.suffix == ".gguf" else output / "config.json"
    if made.exists() and not files.overwrite:
        raise CheckpointError(f"{made} is there already: choose another place, or overwrite it (--overwrite)")
    output.parent.mkdir(parents=True, exist_ok=True)
    check_place(output)
    if output.suffix == ".gguf":
        gguf_package()
    loaded, tokenizer = open_model(model)
    if any(isinstance(parameter, IQTensor) for parameter in loaded.parameters()):
        raise CheckpointError(f"{model} is quantized already; calibrated rounding takes the original model")
    ids = hf.encode(tokenizer, read_text(text))
    batches = evaluate.windows(loaded, ids)[: rounded.windows or WINDOWS].split(4)
    if output.suffix == ".gguf":
        from ..gguf import use_file_order

        use_file_order(loaded)
    blocks = output.with_name(f".{output.name}.blocks")
    if files.overwrite:
        shutil.rmtree(blocks, ignore_errors=True)
    torch.set_num_threads(files.threads or torch.get_num_threads())
    rounding, device = rounded.rounding or ROUNDING, rounded.device
    if rounding == "yaqa" and device:
        loaded, device = loaded.to(device), None  # it runs backward through the whole model
    how.apply(loaded, model, rounding=rounding, calibration=batches, checkpoint=blocks, device=device)
    _save(loaded, tokenizer, output, files.max_shard_size)
    shutil.rmtree(blocks)
    return report(loaded)


def _save(model: Any, tokenizer: Any, output: Path, max_shard_size: str) -> None:
    """Writes a GGUF file or a folder, which have their names when they are complete."""
    if output.suffix == ".gguf":
        from ..gguf import save_gguf

        return save_gguf(model, output, tokenizer)
    from safetensors import SafetensorError

    part = output.with_name(f".{output.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    try:
        model.save_pretrained(part, max_shard_size=max_shard_size)
    except SafetensorError as error:
        raise OSError(f"{output}: {error}; the same command goes on where it was once it can be written") from error
    tokenizer.save_pretrained(part)
    for old in output.glob("*.safetensors*"):
        old.unlink()
    shutil.copytree(part, output, copy_function=shutil.move, dirs_exist_ok=True)
    shutil.rmtree(part)
