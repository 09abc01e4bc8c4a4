"""`quantize_checkpoint` and `convert_checkpoint`: from file to file, without a model in memory.

Whatever is read becomes a transformers model of lazy weights, on which everything is decided as on any model; whatever is written are the
bytes of its weights, made when it is their turn.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

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
from .shards import INDEX, Layout, Placed, checkpoint_files, describe_files, read_folder, shard_layouts

logger = logging.getLogger("iqtorch")

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
    importance: Mapping[str, Tensor] | str | Path | None = None,
    *,
    objective: Objective = "model",
    speed: Speed = "default",
    skip: Iterable[str] = (),
    requantize: bool = False,
    threads: int | None = None,
    max_shard_size: int | str = "50GB",
    overwrite: bool = False,
    progress: bool = True,
) -> Report:
    """Quantizes a checkpoint from file to file: bit for bit what `quantize_model` and then `save_pretrained` or `save_gguf` (for
    Qwen3.5: after `gguf.use_file_order`) make of it.

    Rows are read, quantized and written a few megabytes at a time, so that memory does not grow with the model. A run that was
    killed goes on where it was when it is started again with the same arguments; until the end its files have hidden names.

    Args:
        source: folder with config.json and safetensors files, or a GGUF file (any part of a split one).
        output: folder to make, which `from_pretrained` opens (tokenizer and other small files come along); or a file that ends in
            `.gguf`.
        recipe, importance, objective, speed, skip: as in `iqtorch.quantize_model`.
        requantize: quantize again what is packed already, from its decoded values; otherwise that is an error.
        threads: pieces quantized at a time; default `torch.get_num_threads()`. The bytes do not depend on it.
        max_shard_size: as in `save_pretrained`.
        overwrite: replace what is in `output`, a finished checkpoint or another unfinished run.
        progress: show a progress bar on standard error.

    Returns:
        What every parameter became, and why.

    Raises:
        CheckpointError: a damaged, incomplete or already quantized checkpoint; an `output` with other contents.
        WeightError: NaN or Inf in a weight that is quantized; names it and the position.
        UnknownFormatError, RecipeError, ShapeError, ImportanceError: as in `quantize_model`.
        GGUFError: a damaged file, or a model that has no form in such files.
        OSError: disk full; nothing is left under a final name.
        MissingDependencyError: transformers or gguf is not installed.
    """
    check_options(objective, speed)
    source, output = _paths(source, output)
    chosen, table = Recipe.of(recipe), importance_table(importance)
    model, files = _open(source)
    _unpack(model, source, requantize)
    if _is_gguf(output):
        from ..gguf import use_file_order

        use_file_order(model)
    plan, notes = plan_packing(model, chosen, table, skip, has_importance=bool(table))
    packed = ((site, _lazily_packed(site, fmt, weights, objective, speed)) for site, fmt, weights in plan)
    install_packed(model, packed, notes, chosen)
    facts = {"importance": digest({site.name: weights for site, _, weights in plan}), "options": [objective, speed]}
    made = report(model)
    _write(model, source, output, files, facts, "quantizing", max_shard_size).run(threads, overwrite, progress)
    return made


def convert_checkpoint(
    source: str | Path,
    output: str | Path,
    *,
    threads: int | None = None,
    max_shard_size: int | str = "50GB",
    overwrite: bool = False,
    progress: bool = True,
) -> None:
    """Converts between Hugging Face folders and GGUF files; packed weights stay as they are, bit for bit, others keep their values.

    From a GGUF file to another, tensors and metadata are kept whatever the architecture: parts of a split file become one, and
    row-interleaved formats (`_r4`) the plain ones. Memory and interruptions as in `quantize_checkpoint`.

    Args:
        source: folder with config.json and safetensors files, or a GGUF file (any part of a split one).
        output: folder or, if it ends in `.gguf`, file to make.
        threads, max_shard_size, overwrite, progress: as in `quantize_checkpoint`.

    Raises:
        CheckpointError, GGUFError, OSError, MissingDependencyError: as in `quantize_checkpoint`.
    """
    source, output = _paths(source, output)
    how = (threads, overwrite, progress)
    if _is_gguf(source) and _is_gguf(output):
        _plain_gguf(source, output).run(*how)
        return
    if not _is_gguf(source) and not _is_gguf(output):
        raise CheckpointError(
            f"{source} and {output} are both folders: there is nothing to convert; quantize_checkpoint (--format) quantizes"
        )
    model, files = _open(source)
    _write(model, source, output, files, {}, "converting", max_shard_size).run(*how)


def _is_gguf(path: Path) -> bool:
    return path.suffix == ".gguf"


def _paths(source: str | Path, output: str | Path) -> tuple[Path, Path]:
    source, output = Path(source), Path(output)
    if output.resolve() == source.resolve():
        raise CheckpointError(f"{output} is the checkpoint itself: choose another place for the new one")
    return source, output


def _open(source: Path) -> tuple[Any, list[Path]]:
    """A model of lazy weights, and the files that they lie in."""
    if _is_gguf(source):
        from ..gguf.lazy import LazyGGUFFile
        from ..gguf.load import model_of

        file = LazyGGUFFile(source)
        return model_of(file, None, torch.bfloat16, torch.device("cpu")), file.paths
    from ..hf.lazy import lazy_model

    return lazy_model(source, read_folder(source)), checkpoint_files(source)


def parameter_names(source: str | Path) -> list[str]:
    """Names of the parameters of a checkpoint's model, each once; errors as `quantize_checkpoint`."""
    model, _ = _open(Path(source))
    return [name for name, _ in model.named_parameters()]


# -- quantizing ----------------------------------------------------------------------------------------------


def _unpack(model: nn.Module, source: Path, allowed: bool) -> None:
    """Replaces packed weights by their lazily decoded values."""
    packed = {name: p for name, p in model.named_parameters() if isinstance(p, IQTensor)}
    if packed and not allowed:
        name, weight = next(iter(packed.items()))
        raise CheckpointError(
            f"{source}: {len(packed)} weights are quantized already ({name} in {weight.format.name}): take the original checkpoint, for "
            "quantizing twice costs quality; or ask for it (requantize=True, --requantize)"
        )
    plain = {id(weight): nn.Parameter(_decoded(weight), requires_grad=False) for weight in packed.values()}
    for module in model.modules():
        for name, value in module._parameters.items():
            if id(value) in plain:
                module._parameters[name] = plain[id(value)]


def _decoded(weight: IQTensor) -> Tensor:
    blocks, fmt, dtype = weight.to_blocks(), weight.format, weight.dtype
    if not isinstance(blocks, LazyTensor):
        raise TypeError(f"{weight!r} is no lazy weight")

    def read(start: int, stop: int) -> Tensor:
        return IQTensor.from_blocks(blocks.read(start, stop), fmt, dtype).dequantize()

    stored = LazyTensor.of((*blocks.shape[:-1], weight.k), dtype, read, blocks.sliceable)
    return stored.mT if weight.transposed else stored


def _lazily_packed(site: Site, format: str, importance: Tensor | None, objective: Objective, speed: Speed) -> IQTensor:
    """The packed weight of a site of a lazy model, quantized when its bytes are read."""
    weight, fmt = site.matrix, get_format(format)
    fmt = get_format(fmt.plain) if fmt.plain else fmt
    if not isinstance(weight, LazyTensor):
        raise TypeError(f"{site.name!r} is no lazy weight")
    dtype = weight.dtype if weight.dtype != torch.float64 else torch.float32
    return IQTensor.from_blocks(_encoded(weight, fmt, importance, objective, speed, site.name), fmt, dtype)


def _encoded(weight: LazyTensor, fmt: Format, importance: Tensor | None, objective: Objective, speed: Speed, name: str) -> LazyTensor:
    k = weight.shape[-1]

    def read(start: int, stop: int) -> Tensor:
        part = weight.read(start, stop)
        check_finite(part, name, start)
        weights = importance[start:stop] if importance is not None and importance.dim() == 2 else importance
        return encode_blocks(part, fmt, weights, objective, speed)

    # whole chunks of the encoder, so that its batches are those that it makes of a whole matrix
    chunk = max(1, CHUNK["cpu"] // k)
    grain = chunk * max(1, _PIECE // (chunk * k)) if weight.dim() == 2 else 1
    work = weight.work + weight.numel() * torch.float32.itemsize
    return LazyTensor.of((*weight.shape[:-1], fmt.row_bytes(k)), torch.uint8, read, weight.sliceable, grain, work)


# -- writing -------------------------------------------------------------------------------------------------


def _write(model: Any, source: Path, output: Path, files: list[Path], facts: dict[str, Any], label: str, max_shard_size: int | str) -> Job:
    """The job that writes a lazy model."""
    from .. import __version__

    facts = {"iqtorch": __version__, "source": describe_files(files), **facts}
    if _is_gguf(output):
        from ..gguf.save import contents

        return _gguf_job(output, *contents(model, _tokenizer(source)), facts, label)
    from ..hf.lazy import save_configs, saved_state

    layouts, index = shard_layouts(saved_state(model), max_shard_size)

    def finish(folder: Path) -> None:
        _copy_small_files(source, folder)
        save_configs(model, folder, index)

    return Job(output, layouts, facts, label, finish, obsolete=("model*.safetensors", INDEX))


def _gguf_job(output: Path, metadata: Mapping[str, Any], tensors: list[Any], facts: dict[str, Any], label: str) -> Job:
    from ..gguf.writer import layout

    header, offsets, nbytes = layout(output, metadata, tensors)  # lazily loaded: nothing is read here
    placed = tuple(Placed(tensor.name, tensor.load(), offset) for tensor, offset in zip(tensors, offsets, strict=True))
    return Job(output.parent, [Layout(output.name, header, placed, nbytes)], facts, label)


def _plain_gguf(source: Path, output: Path) -> Job:
    """A GGUF file as one file without interleaved rows: no model is needed for that."""
    from .. import __version__
    from ..gguf.lazy import LazyGGUFFile
    from ..gguf.writer import TensorSource

    file = LazyGGUFFile(source)
    tensors = []
    for info in file.tensors.values():
        data, kind = file.plain_data(info.name)
        tensors.append(TensorSource(info.name, info.shape, kind, lambda data=data: data))  # type: ignore[misc]
    facts = {"iqtorch": __version__, "source": describe_files(file.paths)}
    return _gguf_job(output, file.plain_metadata(), tensors, facts, "converting")


def _tokenizer(source: Path) -> Any:
    from ..hf import transformers

    if _is_gguf(source):
        from ..gguf import GGUFFile, load_tokenizer

        if "tokenizer.ggml.model" in GGUFFile(source).metadata:
            return load_tokenizer(source)
    elif any((source / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")):
        return transformers().AutoTokenizer.from_pretrained(source)
    logger.warning("%s has no tokenizer, and neither has what is made of it", source)
    return None


def _copy_small_files(source: Path, folder: Path) -> None:
    if _is_gguf(source):
        tokenizer = _tokenizer(source)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        return
    for path in sorted(source.iterdir()):
        if path.is_file() and not path.name.startswith(".") and not path.name.endswith(_WEIGHTS) and path.name not in _CONFIGS:
            shutil.copyfile(path, folder / path.name)


__all__ = ["convert_checkpoint", "parameter_names", "quantize_checkpoint"]
