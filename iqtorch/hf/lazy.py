"""Transformers models whose weights are lazy: what streaming quantization plans on, and what it saves."""

from __future__ import annotations

import contextlib
import json
import logging
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ..checkpoint.shards import INDEX
from ..errors import CheckpointError
from ..lazy import LazyTensor
from ..tensor import IQTensor
from . import transformers
from .config import METHOD, StoredTensor

logger = logging.getLogger("iqtorch")


def lazy_model(folder: Path, tensors: Mapping[str, LazyTensor]) -> Any:
    """The model that `from_pretrained(folder, dtype="auto")` loads, with lazy weights; packed ones are `IQTensor`s of lazy bytes.

    Args:
        folder: a checkpoint: config.json says what model it is.
        tensors: what its files hold.

    Raises:
        CheckpointError: quantized by another method; tensors that the model needs and no file has, or of another shape.
        OSError: config.json is missing or cannot be read.
    """
    hf = transformers()
    config = hf.AutoConfig.from_pretrained(folder)
    method = (getattr(config, "quantization_config", None) or {"quant_method": METHOD})["quant_method"]
    if method != METHOD:
        raise CheckpointError(f"{folder} is quantized already, by {method!r}: dequantize it, or take the original checkpoint")
    try:
        with _silent(hf):
            model, info = _model_class(hf, config).from_pretrained(
                None, config=config, state_dict=dict(tensors), dtype="auto", output_loading_info=True
            )
    except RuntimeError as error:  # shapes that differ, conversions that failed
        raise CheckpointError(f"{folder} does not hold the model of its config.json: {error}") from error
    if info["missing_keys"]:
        raise CheckpointError(
            f"{folder}: no file has {_some(info['missing_keys'])}, which the model of config.json needs; a file is missing"
        )
    if info["unexpected_keys"]:
        logger.warning("%s: left out, for the model has no such part: %s", folder, _some(info["unexpected_keys"]))
    model.config._name_or_path = str(folder)  # as from_pretrained(folder) does
    if (folder / "generation_config.json").is_file() and model.can_generate():
        model.generation_config = hf.GenerationConfig.from_pretrained(folder)
    return model.eval()


def _model_class(hf: Any, config: Any) -> Any:
    """The class that saved the checkpoint, which has a place for each of its tensors."""
    named = getattr(hf, (config.architectures or [""])[0], None)
    return named if isinstance(named, type) and issubclass(named, hf.PreTrainedModel) else hf.AutoModelForCausalLM


@contextlib.contextmanager
def _silent(hf: Any) -> Iterator[None]:
    """Without transformers' progress bar and report: nothing is loaded, and what is missing or left over is said here."""
    logging_of = hf.utils.logging
    level, bars = logging_of.get_verbosity(), logging_of.is_progress_bar_enabled()
    logging_of.set_verbosity_error()
    logging_of.disable_progress_bar()
    try:
        yield
    finally:
        logging_of.set_verbosity(level)
        if bars:
            logging_of.enable_progress_bar()


def saved_state(model: Any) -> dict[str, Tensor]:
    """What `save_pretrained` puts into the files of a packed model, lazy as its weights are; fills in `quantization_config.tensors`."""
    state: dict[str, Tensor] = dict(model.state_dict(keep_vars=True))
    config = model.hf_quantizer.quantization_config
    config.tensors = {name: StoredTensor.of(value, model.dtype) for name, value in state.items() if isinstance(value, IQTensor)}
    names: dict[int, list[str]] = {}
    for name, value in state.items():
        names.setdefault(id(value), []).append(name)
    tied = set(model.all_tied_weights_keys)
    for same in names.values():  # a tied weight is saved once, under the name that is no alias
        for name in sorted(same, key=lambda n: n not in tied)[: len(same) - 1]:
            del state[name]
    for name in model._keys_to_ignore_on_save or ():
        state.pop(name, None)
    ordered = sorted(state.items(), key=lambda item: _natural(item[0]))
    return {name: value.to_blocks() if isinstance(value, IQTensor) else value.detach() for name, value in ordered}


def save_configs(model: Any, folder: Path, index: dict[str, Any] | None) -> None:
    """Everything that `save_pretrained` writes beside the weights; `index`: of their files, if there are several."""
    model.config.dtype = str(model.dtype).removeprefix("torch.")
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)
    if model.can_generate():
        model.generation_config.save_pretrained(folder)
    if index is not None:
        index = {"metadata": {"total_parameters": model.num_parameters(), **index["metadata"]}, "weight_map": index["weight_map"]}
        (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _natural(name: str) -> list[tuple[Any, ...]]:
    """Sorts names as transformers does before it splits them into files: numbers by value, also those at the end of a word."""
    words = [re.fullmatch(r"(.*?)(\d*)", part) for part in name.split(".")]
    return [(not (w[2] and not w[1]), w[1], *([int(w[2])] if w[2] else [])) for w in words if w]


def _some(names: Any, most: int = 10) -> str:
    ordered = sorted(names)
    return ", ".join(ordered[:most]) + (f" and {len(ordered) - most} more" if len(ordered) > most else "")
