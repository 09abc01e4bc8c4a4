"""Tensor parallelism: transformers' plans on packed weights, each process reading only its own rows or blocks."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers.distributed.parallel_utils import ALL_PARALLEL_STYLES, replace_layer_number_by_wildcard
from transformers.distributed.tensor_parallel import TensorParallelLayer

from ..as_stored import SplitQKVZ, TiledInputs
from ..errors import ShapeError, UnsupportedOperationError
from ..experts import SPLIT, is_split
from ..linear import packed_parameter
from ..mla import SplitKV
from ..sharding import SHARDS, split_blocks, stored_dim
from ..tensor import IQTensor
from .config import StoredTensor

#: Attribute of a module: names of its parameters that will be packed.
PACKED = "_iqtorch_packed"


class PackedStyle(TensorParallelLayer):
    """One of transformers' styles, for modules with packed weights.

    transformers' own makes a `DTensor` of each parameter, which slices the stored bytes as if they were weights. Here a packed
    parameter stays plain: where it would be split is written down, and `split_blocks` takes that part when it is read.
    """

    def __init__(self, inner: Any) -> None:
        self.inner = inner

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def validate_param(self, module: nn.Module, param: str, mesh: Any, parameter_name: str | None = None) -> None:
        self.inner.validate_param(module, param, mesh, parameter_name=parameter_name)

    def shard_param(self, module: nn.Module, param: str, mesh: Any) -> None:
        plain = module._parameters.get(param)
        self.inner.shard_param(module, param, mesh)
        if param in getattr(module, PACKED, ()):
            placements = getattr(module._parameters[param], "placements", ())
            module.__dict__.setdefault(SHARDS, {})[param] = (mesh, placements)
            module._parameters[param] = plain
            module._hf_quantized_needs_local_tp = True  # type: ignore[assignment]  # products of plain tensors, not of DTensors

    def install_forward(self, module: nn.Module, mesh: Any) -> Any:
        return self.inner.install_forward(module, mesh)


class Whole(TensorParallelLayer):
    """The style of a layer that cannot be split; `key`: of the plan."""

    def __init__(self, key: str) -> None:
        self.key = key

    def install_forward(self, module: nn.Module, mesh: Any) -> Any:
        raise UnsupportedOperationError(
            f"{self.key!r} ({type(module).__name__}) is kept as its GGUF file had it, and cannot be split over processes: take a tp_plan "
            "without it, or quantize the original model"
        )


def use_packed_styles(model: Any, names: Iterable[str], plan: dict[str, str]) -> None:
    """Changes, in a plan with wildcards, the style of every weight among `names` to its `PackedStyle`.

    Packed embeddings, and a head that is tied to one, stay whole in every process: a lookup costs nothing, and a table of a
    part of the vocabulary would need its ids masked.
    """
    _plan_as_stored(model, plan)
    tied = set(model.all_tied_weights_keys) | set(model.all_tied_weights_keys.values())
    split: set[str] = set()
    whole: set[str] = set()
    for name in names:
        path, _, attribute = name.rpartition(".")
        module = model.get_submodule(path)
        module.__dict__.setdefault(PACKED, set()).add(attribute)
        keys = {replace_layer_number_by_wildcard(name)}
        if isinstance(module, (nn.Linear, nn.Embedding)):  # experts: the module's style sends tokens to them, the weights have their own
            keys.add(replace_layer_number_by_wildcard(path))
        (whole if isinstance(module, nn.Embedding) or name in tied else split).update(keys)
    for key, style in list(plan.items()):
        if key in whole:
            del plan[key]
        elif key in split and not style.startswith("iqtorch_"):
            ALL_PARALLEL_STYLES.register(f"iqtorch_{style}", PackedStyle(ALL_PARALLEL_STYLES[style]))
            plan[key] = f"iqtorch_{style}"


def _plan_as_stored(model: Any, plan: dict[str, str]) -> None:
    """Changes a plan for layers that are kept as a GGUF file had them.

    Halves of experts are cut as their parts of the whole would be. Other such layers cannot be split, which is said when it is tried.
    """
    for name, module in model.named_modules():
        key = replace_layer_number_by_wildcard(name)
        if isinstance(module, SplitKV | SplitQKVZ | TiledInputs) and key in plan:
            ALL_PARALLEL_STYLES.register(f"iqtorch_whole.{key}", Whole(key))
            plan[key] = f"iqtorch_whole.{key}"
        if is_split(module) and (style := plan.get(f"{key}.gate_up_proj")) is not None:
            plan |= {f"{key}.{half}": "colwise" if style == "packed_colwise" else style for half in SPLIT}


def local_part(module: nn.Module, attribute: str, weight: IQTensor, name: str) -> IQTensor:
    """This process's part of a weight; the weight itself if it is not split.

    Raises:
        ShapeError: the plan cuts a row within a block.
    """
    mesh, placements = getattr(module, SHARDS, {}).get(attribute, (None, ()))
    blocks = whole = weight.to_blocks()
    for axis, placement in enumerate(placements):
        if not hasattr(placement, "dim"):
            continue
        dim = stored_dim(placement.dim, blocks.ndim, weight.transposed)
        parts, rank = mesh.size(axis), mesh.get_local_rank(axis)
        blocks = split_blocks(blocks, weight.format, dim, parts, rank, getattr(placement, "split_factor", 1), name)
    if blocks is whole:
        return weight
    return IQTensor.from_blocks(blocks.contiguous(), weight.format, weight.dtype, transposed=weight.transposed, defer=True)


def fsdp_part(model: Any, name: str, blocks: Tensor, stored: StoredTensor, dtype: torch.dtype) -> nn.Parameter:
    """The parameter for this process's rows (or experts) of a weight's bytes, which transformers has cut for FSDP2 and makes a DTensor of.

    Raises:
        UnsupportedOperationError: the weight is also split by a tensor-parallel plan.
        ShapeError: rows that the processes do not divide.
        CheckpointError: bytes of another size than config.json says.
    """
    path, _, attribute = name.rpartition(".")
    whole = model.get_parameter(name)
    if attribute in getattr(model.get_submodule(path), SHARDS, {}):
        raise UnsupportedOperationError(f"{name!r} cannot be split by FSDP2 and a tensor-parallel plan at once: use fsdp_size or tp_size")
    parts = math.prod(whole.device_mesh.size(axis) for axis, placement in enumerate(whole.placements) if hasattr(placement, "dim"))
    if stored.shape[0] % parts:
        raise ShapeError(
            f"{name!r}: {stored.shape[0]} rows (or experts) cannot be split over {parts} processes; use a number that divides them, or "
            "load the model without fsdp_size and call fully_shard with ignored_params"
        )
    own = replace(stored, shape=(stored.shape[0] // parts, *stored.shape[1:]))
    own.check(name, blocks)
    whole.requires_grad_(False)  # which transformers gives to the DTensor
    # Kept as canonical bytes: they are what is gathered.
    weight = IQTensor(blocks, stored.format, "torch", own.shape, dtype, stored.transposed)
    return packed_parameter(weight)
