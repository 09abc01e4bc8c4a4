"""Weights that files hold in two packed halves and models in one parameter: the model gets a parameter for each half.

Halves of different formats cannot be one packed tensor, and decoding one of them is no choice. So each stays as it is stored and is
multiplied by itself. Such a model is recognized by the names of its parameters, in GGUF files and in Hugging Face folders alike.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from torch import nn

from .experts import split_experts
from .mla import SplitKV

__all__ = ["split_halves"]

#: Names of halves: of MLA's `kv_b_proj`, and of the gate and up projections of experts.
_KV = re.compile(r"(?P<layer>.*(?:^|\.)kv_b_proj)\.[kv]_b_proj\.weight$")
_EXPERTS = re.compile(r"(?P<layer>.*(?:^|\.)experts)\.(?:gate|up)_proj$")


def split_halves(model: nn.Module, names: Iterable[str]) -> None:
    """Splits the weights that parameters of these names are halves of.

    Args:
        model: a model of transformers; weights that it lacks are passed over.
        names: such as `model.layers.0.mlp.experts.gate_proj`; those of whole weights are ignored.
    """
    layers = {match["layer"]: None for name in names for match in [_KV.match(name) or _EXPERTS.match(name)] if match}
    for layer in layers:
        path, _, name = layer.rpartition(".")
        parent = _submodule(model, path)
        whole = getattr(parent, name, None)
        if name == "experts" and isinstance(whole, nn.Module):
            split_experts(whole)
        elif type(whole) is nn.Linear:
            setattr(parent, name, SplitKV(whole, parent.num_heads, parent.qk_nope_head_dim))


def _submodule(model: nn.Module, path: str) -> Any:
    """The module, with or without the prefix that a model without its head lacks; None where there is none."""
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    for candidate in (path, prefix + path, path.removeprefix(prefix)):
        try:
            return model.get_submodule(candidate)
        except AttributeError:
            continue
    return None
