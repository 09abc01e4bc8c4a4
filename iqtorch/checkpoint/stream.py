"""`quantize_checkpoint`: a checkpoint folder becomes a packed one, without ever being in memory."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..encode import Objective, Speed
from ..encode.encoder import CHUNK
from ..errors import CheckpointError
from ..formats import Format, get_format
from ..lazy import LazyTensor
from ..model import Site, importance_table, install_packed, plan_packing
from ..quantize import check_finite, check_options, encode_blocks
from ..recipe import Recipe
from ..report import Report, report
from ..tensor import IQTensor
from .job import Job, digest
from .shards import INDEX, checkpoint_files, describe_files, read_folder, shard_layouts

#: Weights encoded in one piece.
_PIECE = 1 << 20
#: Endings of files with weights; everything else of a checkpoint folder is copied.
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".h5", ".msgpack", ".gguf", ".onnx", ".index.json")
#: Written anew.
_CONFIGS = ("config.json", "generation_config.json")


def quantize_checkpoint(
    source: str | Path,
    output: str | Path,
    recipe: Recipe | str | Mapping[str, str | None],
    importance: Mapping[str, Tensor] | str | None = None,
    *,
    objective: Objective = "model",
    speed: Speed = "default",
    skip: Iterable[str] = (),
    threads: int | None = None,
    max_shard_size: int | str = "50GB",
    overwrite: bool = False,
    progress: bool = True,
) -> Report:
    """Quantizes a Hugging Face checkpoint from folder to folder: bit for bit what `quantize_model` and `save_pretrained` make of it.

    Rows are read, quantized and written a few megabytes at a time, so that memory does not grow with the model. A run that was
    killed goes on where it was when it is started again with the same arguments; until the end its files have hidden names.

    Args:
        source: folder with config.json and safetensors files; tokenizer and other small files are copied.
        output: folder to make, which `from_pretrained` opens; or a file that ends in `.gguf`.
        recipe, importance, objective, speed, skip: as in `iqtorch.quantize_model`.
        threads: pieces quantized at a time; default `torch.get_num_threads()`. The bytes do not depend on it.
        max_shard_size: as in `save_pretrained`.
        overwrite: replace what is in `output`, a finished checkpoint or another unfinished run.
        progress: show a progress bar on standard error.

    Returns:
        What every parameter became, and why.

    Raises:
        CheckpointError: a damaged, incomplete or already quantized checkpoint; an `output` with other contents.
        WeightError: NaN or Inf in a weight that is quantized; names it and the position. The run can be resumed after the repair
            only from the start: the checkpoint is another one then.
        UnknownFormatError, RecipeError, ShapeError, ImportanceError: as in `quantize_model`.
        OSError: disk full; nothing is left under a final name.
        MissingDependencyError: transformers is not installed.
    """
    check_options(objective, speed)
    source, output = Path(source), Path(output)
    if output.resolve() == source.resolve():
        raise CheckpointError(f"{output} is the checkpoint itself: choose another folder for the quantized one")
    from ..hf.lazy import lazy_model

    chosen, table = Recipe.of(recipe), importance_table(importance)
    model = lazy_model(source, read_folder(source))
    plan, notes = plan_packing(model, chosen, table, skip, has_importance=bool(table))
    packed = ((site, lazily_packed(site, fmt, weights, objective, speed)) for site, fmt, weights in plan)
    install_packed(model, packed, notes, chosen)
    made = report(model)
    facts = {
        "source": describe_files(checkpoint_files(source)),
        "importance": digest({site.name: weights for site, _, weights in plan}),
        "options": [objective, speed],
    }
    folder_job(model, source, output, facts, max_shard_size).run(threads, overwrite, progress)
    return made


def lazily_packed(site: Site, format: str, importance: Tensor | None, objective: Objective, speed: Speed) -> IQTensor:
    """The packed weight of a site of a lazy model, quantized when its bytes are read."""
    weight, fmt = site.matrix, get_format(format)
    fmt = get_format(fmt.plain) if fmt.plain else fmt
    if not isinstance(weight, LazyTensor):
        raise TypeError(f"{site.name!r} is no lazy weight")
    k, dtype = weight.shape[-1], weight.dtype if weight.dtype != torch.float64 else torch.float32
    return IQTensor.from_blocks(_encoded(weight, fmt, k, importance, objective, speed, site.name), fmt, dtype)


def _encoded(
    weight: LazyTensor, fmt: Format, k: int, importance: Tensor | None, objective: Objective, speed: Speed, name: str
) -> LazyTensor:
    per_expert = importance is not None and importance.dim() == 2

    def read(start: int, stop: int) -> Tensor:
        part = weight.read(start, stop)
        check_finite(part, name, start)
        return encode_blocks(part, fmt, importance[start:stop] if per_expert and importance is not None else importance, objective, speed)

    # whole chunks of the encoder, so that its batches are those that it makes of a whole matrix
    chunk = max(1, CHUNK["cpu"] // k)
    grain = chunk * max(1, _PIECE // (chunk * k)) if weight.dim() == 2 else 1
    work = weight.work + weight.numel() * torch.float32.itemsize
    return LazyTensor.of((*weight.shape[:-1], fmt.row_bytes(k)), torch.uint8, read, weight.sliceable, grain, work)


def folder_job(model: Any, source: Path, output: Path, facts: Mapping[str, Any], max_shard_size: int | str) -> Job:
    """The job that writes a lazy model as a checkpoint folder, with the small files of `source`."""
    from .. import __version__
    from ..hf.lazy import save_configs, saved_state

    files, index = shard_layouts(saved_state(model), max_shard_size)

    def finish(folder: Path) -> None:
        for path in sorted(source.iterdir()):
            if path.is_file() and not path.name.startswith(".") and not path.name.endswith(_WEIGHTS) and path.name not in _CONFIGS:
                shutil.copyfile(path, folder / path.name)
        save_configs(model, folder, index)

    return Job(output, files, {"iqtorch": __version__, **facts}, finish, obsolete=("model*.safetensors", INDEX))


__all__ = ["quantize_checkpoint"]
