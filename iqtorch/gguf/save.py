"""`save_gguf`: a transformers model as a GGUF file, packed weights bit for bit."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..formats import Format
from ..tensor import IQTensor
from .errors import GGUFArchitectureError, GGUFTensorError
from .families import FILE_NAME, family_of_config, metadata_from_config
from .family import Family
from .family_table import metadata_of_halves
from .rope import rope_tensors
from .tensors import Binding, bind, conv1d_weights, parameter_names
from .tokenizer import metadata_from_tokenizer
from .writer import TensorSource, write_gguf

__all__ = ["save_gguf"]

#: `general.file_type` of the formats that have one (of the reference's enumeration of whole-model types).
_FILE_TYPES = {
    "q4_0": 2, "q4_1": 3, "q8_0": 7, "q5_0": 8, "q5_1": 9, "q2_k": 10, "q3_k": 12, "q4_k": 15, "q5_k": 17, "q6_k": 18, "iq2_xxs": 19,
    "iq2_xs": 20, "iq3_xxs": 23, "iq1_s": 24, "iq4_nl": 25, "iq3_s": 26, "iq2_s": 28, "iq4_xs": 30, "iq1_m": 31, "iq2_k": 138,
    "iq3_k": 139, "iq4_k": 140, "iq2_ks": 147, "iq2_kt": 151, "iq3_kt": 152, "iq4_kt": 153, "iq2_kl": 155,
}  # fmt: skip
#: Ends of tensors that programs want in float32.
_FLOAT32 = (
    "ffn_gate_inp.weight", "norm.weight", ".bias", "position_embd.weight", "conv1d.weight", "shortconv.conv.weight", "ssm_x.weight",
    "ssm_dt.weight", ".ssm_a",
)  # fmt: skip
_PLAIN_FILE_TYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 32}
_QUANTIZATION_VERSION = 2


def save_gguf(model: nn.Module, path: str | Path, tokenizer: Any = None, *, name: str | None = None) -> None:
    """Writes a model that ik_llama.cpp (and, if all formats are standard ones, llama.cpp) can run.

    Packed weights are written bit for bit, other matrices in their dtype, vectors and routers as float32. Tensors are written
    one at a time; the file appears under its name when it is complete.

    Args:
        model: a transformers model of a known architecture, packed or not.
        path: of the file.
        tokenizer: the model's fast tokenizer; without one the file holds weights only, and programs cannot make text with it.
        name: `general.name`; default: that of the file it came from, or its folder's.

    Raises:
        GGUFArchitectureError: the architecture, or a setting of its configuration, has no GGUF form.
        GGUFNameError: a parameter has no name in such files.
        GGUFTensorError: a dtype that files cannot hold, or a weight that is stored transposed.
        GGUFTokenizerError: a kind of tokenizer that cannot be converted.
        MissingDependencyError: the gguf package is not installed.
    """
    write_gguf(path, *contents(model, tokenizer, name))


def contents(model: nn.Module, tokenizer: Any = None, name: str | None = None) -> tuple[dict[str, Any], list[TensorSource]]:
    """Metadata and tensors of the file of a model; arguments and errors of `save_gguf`."""
    config: Any = getattr(model, "config", None)
    if config is None:
        raise GGUFArchitectureError(f"{type(model).__name__} has no config; save_gguf writes transformers models")
    config = config.get_text_config()
    family = family_of_config(config)
    parameters = parameter_names(model)
    bindings = bind(parameters, family.arch, family, config, conv1d_weights(model))
    heads = getattr(config, "num_attention_heads", 0)
    sources = [source for binding in bindings for source in _sources(binding, parameters[binding.name], heads)]
    if family.repeats and not any(source.name == "output.weight" for source in sources):
        sources += [replace(source, name="output.weight") for source in sources if source.name == "token_embd.weight"]
    sources += [TensorSource.of(key, value) for key, value in rope_tensors(config).items()]
    metadata = _general(family, config, parameters, name) | metadata_from_config(family, config)
    if any(binding.per_head for binding in bindings):
        metadata |= metadata_of_halves(family, config)
    if tokenizer is not None:
        metadata |= metadata_from_tokenizer(tokenizer, config.vocab_size)
    return metadata, sources


def _general(family: Family, config: Any, parameters: dict[str, Tensor], name: str | None) -> dict[str, Any]:
    sizes: Counter[str | torch.dtype] = Counter()
    for value in parameters.values():
        if value.ndim > 1:
            sizes[value.format.name if isinstance(value, IQTensor) else value.dtype] += value.numel()
    most = sizes.most_common(1)[0][0]
    name = name or getattr(config, FILE_NAME, None) or Path(str(getattr(config, "_name_or_path", "") or config.model_type)).name
    file_type = _FILE_TYPES.get(most) if isinstance(most, str) else _PLAIN_FILE_TYPES.get(most)
    out: dict[str, Any] = {
        "general.architecture": family.arch,
        "general.type": "model",
        "general.name": name,
        "general.quantization_version": _QUANTIZATION_VERSION,
    }
    return out if file_type is None else out | {"general.file_type": file_type}


def _sources(binding: Binding, value: Tensor, heads: int) -> list[TensorSource]:
    """The tensors that a parameter becomes; each makes its data when it is written. `heads` are those of attention."""
    kind: Format | torch.dtype
    shape = binding.stored_shape(value)
    if isinstance(value, IQTensor):
        if value.transposed != binding.transposed:
            raise GGUFTensorError(f"{binding.name} is stored transposed {tuple(value.shape)}, which files of this architecture cannot hold")
        if binding.columns is not None:
            raise GGUFTensorError(
                f"{binding.name} is packed, and files have its columns in another order: call iqtorch.gguf.use_file_order(model) before "
                "the model is quantized"
            )
        kind, rows_at = value.format, value.ndim - 2
    else:
        kind, rows_at = _plain_dtype(binding, value), binding.rows_at(len(shape))
        if len(shape) == 2 and shape[0] == 1:
            shape = shape[1:]  # files hold the gate of a shared expert as a vector
    if binding.per_head and len(shape) == 2:
        shape = (heads, shape[0] // heads, shape[1])
    if len(binding.tensors) > 1:
        shape = (*shape[:rows_at], shape[rows_at] // len(binding.tensors), *shape[rows_at + 1 :])

    def load(part: int) -> Tensor:
        if isinstance(value, IQTensor):
            rows = value.to_blocks()
        else:
            rows = (value.mT if binding.transposed else value.reshape(binding.stored_shape(value))).detach()
            rows = rows.to(_plain_dtype(binding, value))
        return binding.to_file(rows, rows_at)[part]

    return [TensorSource(name, shape, kind, lambda part=part: load(part)) for part, name in enumerate(binding.tensors)]  # type: ignore[misc]


def _plain_dtype(binding: Binding, value: Tensor) -> torch.dtype:
    """Vectors and routers are float32 in files: their kernels know nothing else."""
    small = value.ndim < 2 or value.shape[0] == 1 or binding.tensors[0].endswith(_FLOAT32)
    return torch.float32 if small else value.dtype
