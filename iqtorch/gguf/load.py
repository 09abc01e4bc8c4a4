"""`load_gguf`: a GGUF file as a transformers model whose weights stay packed."""

from __future__ import annotations

import copy
import logging
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..formats import Format, get_format
from ..hf import adopt, transformers
from ..lazy import LazyTensor
from ..linear import packed_parameter, set_weight
from ..recipe import Recipe
from ..tensor import IQTensor, repack_rows
from .errors import GGUFArchitectureError, GGUFError, GGUFTensorError
from .families import FILE_NAME, config_from_gguf, family_of_file, repeats_embedding
from .family import Family
from .reader import GGUFFile, TensorInfo
from .tensors import Binding, bind, check_names, conv1d_weights, make_room, merge_heads, merged_halves, parameter_names
from .tokenizer import ends_of_turns

__all__ = ["load_gguf"]

logger = logging.getLogger("iqtorch")


def load_gguf(
    path: str | Path,
    config: Any = None,
    *,
    dtype: torch.dtype = torch.bfloat16,
    device_map: Any = None,
    id_map: Mapping[int, str | Format] | None = None,
) -> nn.Module:
    """A causal language model from a GGUF file, without dequantizing: quantized tensors stay packed, bit for bit.

    `iqtorch.gguf.load_tokenizer(path)` brings the tokenizer of the same file.

    Args:
        path: the file, or any part of a split one.
        config: a transformers configuration, its dictionary, or the folder of the original model. Default: made from the file's
            metadata, for the architectures that iqtorch knows. A configuration defines the model, the file only fills it.
        dtype: of the tensors that are not quantized, and of the activations that `generate` starts from.
        device_map: a device, `"auto"`, or accelerate's dictionary; default CPU.
        id_map: formats for type ids that iqtorch does not know, as in `GGUFFile`.

    Raises:
        GGUFError: a damaged file; an architecture, type or tensor that is not known; tensors that are missing, left over or of
            another shape than the configuration's. All before the first tensor is read.
        MissingDependencyError: transformers or gguf is not installed.
    """
    device = _single_device(device_map)
    return _dispatch(model_of(GGUFFile(path, id_map=id_map), config, dtype, device), device_map, device)


def model_of(file: GGUFFile, config: Any, dtype: torch.dtype, device: torch.device) -> nn.Module:
    """The model of an open file; arguments and errors of `load_gguf`."""
    path, hf = file.path, transformers()
    try:
        family = family_of_file(file)
    except GGUFArchitectureError:
        if config is None:
            raise
        family = None
        logger.warning("%s: architecture %r is not known: tensors are taken as they are", path, file.metadata.get("general.architecture"))
    try:
        model = _empty_model(hf, config_from_gguf(file) if config is None else config, dtype)
    except (GGUFError, OSError):
        raise
    except Exception as error:  # transformers checks settings with many kinds of exceptions
        whose, remedy = ("config=", "") if config is not None else ("its metadata", "; pass config=")
        raise GGUFArchitectureError(f"{path}: {whose} makes no valid causal language model: {error}{remedy}") from error
    text = model.config.get_text_config()  # type: ignore[union-attr,operator]
    wanted, bindings = _bound(model, file, family, text)
    if make_room(model, file, bindings):
        wanted, bindings = _bound(model, file, family, text)
    bindings = merged_halves(bindings, file.tensors, text)
    present = _without_prediction(file, text.num_hidden_layers)
    if not any("output.weight" in binding.tensors for binding in bindings) and repeats_embedding(file):
        present = {name: info for name, info in present.items() if name != "output.weight"}
    check_names(path, bindings, present)
    _check_shapes(file, bindings, wanted)
    _fill_buffers(model)
    places = _places(model)
    for binding in bindings:
        old = wanted[binding.name]
        value = _read(file, binding, old, dtype, device)
        value = _parameter(value) if isinstance(old, nn.Parameter) else value
        for module, name in places[id(old)]:  # tied places share the parameter
            _install(module, name, value)
        file.release(binding.tensors)
    _set_special_tokens(model, file)
    if isinstance(file.metadata.get("general.name"), str):
        setattr(model.config, FILE_NAME, file.metadata["general.name"])
    adopt(model.eval(), Recipe())
    return model


def _bound(model: nn.Module, file: GGUFFile, family: Family | None, config: Any) -> tuple[dict[str, Tensor], list[Binding]]:
    wanted = parameter_names(model)
    return wanted, bind(wanted, str(file.metadata.get("general.architecture")), family, config, conv1d_weights(model))


def _empty_model(hf: Any, config: Any, dtype: torch.dtype) -> nn.Module:
    """A model on the meta device, of a configuration, its dictionary or its folder.

    Nothing of it has memory: a file's numbers may be wrong until its tensors have been compared with the model's.
    """
    if isinstance(config, Mapping):
        attributes = dict(config)
        config = hf.AutoConfig.for_model(attributes.pop("model_type", None), **attributes)
    elif isinstance(config, (str, Path)):
        config = hf.AutoConfig.from_pretrained(config)
    else:
        config = copy.deepcopy(config)
    config._experts_implementation_internal = None  # that of a packed model, of which it may be
    with torch.device("meta"):
        model: nn.Module = hf.AutoModelForCausalLM.from_config(config, dtype=dtype)
    return model


def _fill_buffers(model: Any) -> None:
    """Computes the buffers that no file holds (rotary frequencies), the way transformers does after loading."""
    for module in model.modules():
        for name in module._non_persistent_buffers_set:
            if module._buffers[name] is not None:
                module._buffers[name] = torch.empty_like(module._buffers[name], device="cpu")
        module._is_hf_initialized = False
    model.initialize_weights()  # parameters are on the meta device, where this costs nothing


def _places(model: nn.Module) -> dict[int, list[tuple[nn.Module, str]]]:
    """Every (module, attribute) that holds a tensor, by its id: more than one where weights are tied."""
    places: dict[int, list[tuple[nn.Module, str]]] = {}
    for module in model.modules():
        for name, value in [*module._parameters.items(), *module._buffers.items()]:
            if value is not None:
                places.setdefault(id(value), []).append((module, name))
    return places


def _without_prediction(file: GGUFFile, layers: int) -> dict[str, TensorInfo]:
    """The tensors without the layers after the last, which predict more than one token ahead: transformers has none."""
    if not file.metadata.get(f"{file.metadata.get('general.architecture')}.nextn_predict_layers"):
        return file.tensors
    number = re.compile(r"blk\.(\d+)\.")
    extra = {name for name in file.tensors if (match := number.match(name)) and int(match[1]) >= layers}
    if extra:
        logger.info("%s: %d tensors of layers that predict further tokens are not loaded", file.path, len(extra))
    return {name: info for name, info in file.tensors.items() if name not in extra}


def _stored_shape(file: GGUFFile, binding: Binding) -> tuple[int, ...]:
    shapes = [file.tensors[name].shape for name in binding.tensors]
    if binding.heads:
        k, v = (math.prod(shape) for shape in shapes)
        return ((k + v) // shapes[1][-1], shapes[1][-1])
    if len(shapes) == 1:
        return shapes[0]
    at = binding.rows_at(len(shapes[0]))
    return (*shapes[0][:at], sum(shape[at] for shape in shapes), *shapes[0][at + 1 :])


def _check_shapes(file: GGUFFile, bindings: list[Binding], wanted: Mapping[str, Tensor]) -> None:
    wrong = []
    for binding in bindings:
        stored, shape = _stored_shape(file, binding), binding.stored_shape(wanted[binding.name])
        rows = [(math.prod(s[:-1]), s[-1]) if binding.per_head else [n for n in s if n != 1] for s in (stored, shape)]
        if rows[0] != rows[1]:  # files drop dimensions of 1
            wrong.append(f"{binding.name} is {shape}, {' + '.join(binding.tensors)} {stored}")
    if wrong:
        raise GGUFTensorError(f"{file.path}: {len(wrong)} shapes differ from the configuration's: {'; '.join(wrong[:10])}")


def _read(file: GGUFFile, binding: Binding, old: Tensor, dtype: torch.dtype, device: torch.device) -> Tensor:
    infos = [file.tensors[name] for name in binding.tensors]
    if binding.heads:
        k, v = (file.data(info.name) for info in infos)
        return merge_heads(k, v, binding.heads).reshape(old.shape).to(device, old.dtype)
    if all(info.format is None for info in infos):
        stored = binding.to_model([file.data(info.name) for info in infos], binding.rows_at(len(infos[0].shape)))
        stored = stored.reshape(binding.stored_shape(old))
        stored = stored.mT.contiguous() if binding.transposed else stored.reshape(old.shape)
        return stored.to(device, old.dtype, copy=True)
    if old.ndim < 2:  # vectors are never packed, whatever a file does
        values = [_dequantized(file, info).flatten() for info in infos]
        return binding.to_model(values, rows_at=0).reshape(old.shape).to(device, old.dtype)
    formats = {info.format for info in infos}
    if len(formats) > 1:
        kinds = ", ".join(f"{info.name} {info.type_name}" for info in infos)
        raise GGUFTensorError(
            f"{file.path}: {binding.name} is one parameter, and its parts have different types ({kinds}); requantize one of them"
        )
    blocks, fmt = zip(*(_plain_blocks(file, info) for info in infos), strict=True)
    rows = binding.to_model(list(blocks), rows_at=blocks[0].ndim - 2).to(device)
    rows = rows.reshape(*binding.stored_shape(old)[:-1], rows.shape[-1])
    weight = IQTensor.from_blocks(rows, fmt[0], dtype, transposed=binding.transposed)
    if not isinstance(rows, LazyTensor) and weight.packed.untyped_storage().data_ptr() == rows.untyped_storage().data_ptr():
        weight = IQTensor.from_blocks(rows.clone(), fmt[0], dtype, transposed=binding.transposed)  # no weight may live in the mapped file
    return weight


def _dequantized(file: GGUFFile, info: TensorInfo) -> Tensor:
    data = file.data(info.name)
    return data.float() if info.format is None else IQTensor.from_blocks(data, info.format, torch.float32).dequantize()


def _plain_blocks(file: GGUFFile, info: TensorInfo) -> tuple[Tensor, Format]:
    """Blocks of a tensor, row by row also where the file interleaves them."""
    fmt, blocks = get_format(info.format or ""), file.data(info.name)
    if fmt.plain is None:
        return blocks, fmt
    plain = get_format(fmt.plain)
    return repack_rows(blocks, fmt, plain), plain


def _parameter(value: Tensor) -> nn.Parameter:
    return packed_parameter(value) if isinstance(value, IQTensor) else nn.Parameter(value, requires_grad=value.is_floating_point())


def _install(module: nn.Module, name: str, value: Tensor) -> None:
    if isinstance(value, IQTensor):
        set_weight(module, name, value)
    else:
        (module._parameters if isinstance(value, nn.Parameter) else module._buffers)[name] = value  # type: ignore[assignment]


def _set_special_tokens(model: nn.Module, file: GGUFFile) -> None:
    config, generation = (getattr(model, name, None) for name in ("config", "generation_config"))
    if generation is None:
        return
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        if getattr(config, name, None) is not None:
            setattr(generation, name, getattr(config, name))
    own = generation.eos_token_id
    ends = list(dict.fromkeys([*(own if isinstance(own, list) else [] if own is None else [own]), *ends_of_turns(file)]))
    generation.eos_token_id = ends if len(ends) > 1 else own


def _planned(device_map: Any) -> bool:
    """Whether accelerate places the layers, one by one."""
    return isinstance(device_map, dict) or device_map in ("auto", "balanced", "balanced_low_0", "sequential")


def _single_device(device_map: Any) -> torch.device:
    return torch.device("cpu" if device_map is None or _planned(device_map) else device_map)


def _dispatch(model: nn.Module, device_map: Any, device: torch.device) -> nn.Module:
    if _planned(device_map):
        from accelerate import dispatch_model, infer_auto_device_map

        plan = device_map if isinstance(device_map, dict) else infer_auto_device_map(
            model, no_split_module_classes=list(getattr(model, "_no_split_modules", None) or [])
        )  # fmt: skip
        if set(plan.values()) == {"cpu"}:
            return model
        dispatched: nn.Module = dispatch_model(model, plan)
        return dispatched
    return model.to(device)
