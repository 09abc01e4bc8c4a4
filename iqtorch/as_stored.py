"""Packed weights that files store in another way than models: the model gets a layer that takes them as they are.

Packed rows of two formats cannot be one tensor, and columns cannot change their order: blocks go across them. Decoding is no choice, so
halves are multiplied one by one, and activations are put in the order of the columns. Such layers are recognized by the names of their
parameters, in GGUF files and in Hugging Face folders alike.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from .experts import split_experts
from .mla import SplitKV

__all__ = ["SplitQKVZ", "TiledInputs", "keep_as_stored"]

#: Names of parameters of such layers: halves of MLA's `kv_b_proj`, of experts, and the input and output of linear attention.
_NAMES = re.compile(
    r"(?P<layer>.*(?:^|\.)(?:kv_b_proj(?=\.[kv]_b_proj\.weight$)|experts(?=\.(?:gate|up)_proj$)"
    r"|linear_attn\.(?:in_proj_qkvz(?=\.in_proj_(?:qkv|z)\.weight$)|out_proj(?=\.tiled\.weight$))))"
)


class TiledInputs(nn.Module):
    """In the place of an `nn.Linear` without bias that reads heads in groups, with the columns of its weight in another order.

    The weight has the first head of each group first, then the second of each, and so on.

    Attributes:
        tiled: the layer with that weight.
        groups: of heads.
        heads: in each group.
    """

    def __init__(self, layer: nn.Linear, groups: int, heads: int) -> None:
        super().__init__()
        self.groups, self.heads = groups, heads
        like = layer.weight
        self.tiled = nn.Linear(layer.in_features, layer.out_features, bias=False, device=like.device, dtype=like.dtype)

    def forward(self, x: Tensor) -> Tensor:
        """`[.., in_features]` -> `[.., out_features]`."""
        tiled: Tensor = self.tiled(x.unflatten(-1, (self.groups, self.heads, -1)).transpose(-2, -3).flatten(-3))
        return tiled

    def columns(self) -> Tensor:
        """int64 `[in_features]`: for each column of the weight, its place in that of the layer that this is in the place of."""
        return torch.arange(self.tiled.in_features, device="cpu").view(self.groups, self.heads, -1).transpose(0, 1).flatten()

    def extra_repr(self) -> str:
        return f"groups={self.groups}, heads={self.heads}"


class SplitQKVZ(nn.Module):
    """In the place of an `nn.Linear` without bias whose rows are, one group of heads after the other: query, key, values, gates.

    Attributes:
        in_proj_qkv: the rows of all queries, then all keys, then all values.
        in_proj_z: the rows of all gates.
        groups: of heads.
        head: rows of a query, and of a key.
    """

    def __init__(self, layer: nn.Linear, groups: int, head: int) -> None:
        super().__init__()
        self.groups, self.head = groups, head
        gates = layer.out_features // 2 - groups * head
        like = layer.weight
        self.in_proj_qkv, self.in_proj_z = (
            nn.Linear(layer.in_features, rows, bias=False, device=like.device, dtype=like.dtype)
            for rows in (layer.out_features - gates, gates)
        )

    def forward(self, x: Tensor) -> Tensor:
        """`[.., in_features]` -> `[.., out_features]`."""
        keys = self.groups * self.head
        parts = (*self.in_proj_qkv(x).tensor_split([keys, 2 * keys], -1), self.in_proj_z(x))
        return torch.cat([part.unflatten(-1, (self.groups, -1)) for part in parts], -1).flatten(-2)

    def extra_repr(self) -> str:
        return f"groups={self.groups}, head={self.head}"


def keep_as_stored(model: nn.Module, names: Iterable[str]) -> None:
    """Makes room for weights as files store them.

    Args:
        model: a model of transformers; layers that it lacks are passed over.
        names: of parameters, such as `model.layers.0.mlp.experts.gate_proj`; those of other layers are ignored.
    """
    layers = {match["layer"]: None for match in map(_NAMES.match, names) if match}
    for layer in layers:
        path, _, name = layer.rpartition(".")
        parent = _submodule(model, path)
        whole = getattr(parent, name, None)
        if name == "experts" and isinstance(whole, nn.Module):
            split_experts(whole)
        elif type(whole) is nn.Linear and name == "kv_b_proj":
            setattr(parent, name, SplitKV(whole, parent.num_heads, parent.qk_nope_head_dim))
        elif type(whole) is nn.Linear and name == "in_proj_qkvz":
            setattr(parent, name, SplitQKVZ(whole, parent.num_k_heads, parent.head_k_dim))
        elif type(whole) is nn.Linear:
            setattr(parent, name, TiledInputs(whole, parent.num_k_heads, parent.num_v_heads // parent.num_k_heads))


def _submodule(model: nn.Module, path: str) -> Any:
    """The module, with or without the prefix that a model without its head lacks; None where there is none."""
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    for candidate in (path, prefix + path, path.removeprefix(prefix)):
        try:
            return model.get_submodule(candidate)
        except AttributeError:
            continue
    return None
