"""Adapters (PEFT) on packed models."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UnsupportedOperationError
from ..formats import get_format
from ..linear import set_weight
from ..model import importance_table
from ..quantize import quantize
from ..tensor import IQTensor

#: Merging that keeps less than this part of an adapter's changes warns.
MOSTLY = 0.5


def merge_adapter(model: Any, format: str | None = "same", importance: Mapping[str, Tensor] | str | Path | None = None) -> nn.Module:
    """Merges the active adapters of a PEFT model into its weights and takes the adapters off.

    The merging is PEFT's own (LoRA, DoRA, IA3, OFT, ..., on linear layers, embeddings and experts), one layer at a time on a
    dequantized weight.

    Args:
        model: a `PeftModel`, with any adapter that PEFT can merge.
        format: what the weights that change become: `"same"` quantizes each again to the format it had, a format name quantizes to
            that, None leaves them dequantized. Other weights stay as they are. A packed weight is one that its format holds exactly,
            so that rounding to the same format undoes changes smaller than half a step: a warning tells if most of the adapter is
            lost. To keep it in few bits, merge it into the original weights (PEFT's `merge_and_unload`) and quantize those.
        importance: as in `iqtorch.quantize_model`, for quantizing again.

    Returns:
        The base model, without adapters.

    Raises:
        UnsupportedOperationError: no PeftModel; prompts instead of adapters; a tied weight. The model is as it was.
    """
    if not hasattr(model, "get_base_model"):
        raise UnsupportedOperationError(
            f"merge_adapter needs a PeftModel, got {type(model).__name__}: load the adapter with PeftModel.from_pretrained"
        )
    from peft.tuners.tuners_utils import BaseTunerLayer

    target = None if format in (None, "same") else get_format(format)
    table = importance_table(importance)
    inner = model.get_base_model()
    layers = [(name, module) for name, module in inner.named_modules() if isinstance(module, BaseTunerLayer)]
    if not layers or not hasattr(model.base_model, "merge_and_unload"):
        raise UnsupportedOperationError(
            f"{type(model.base_model).__name__} has no adapter layers: there is nothing to merge into the weights"
        )
    holders = Counter(id(parameter) for module in inner.modules() for parameter in module._parameters.values() if parameter is not None)
    for name, layer in layers:
        if holders[id(layer.get_base_layer()._parameters.get(_attribute(layer)))] > 1:
            raise UnsupportedOperationError(
                f"the weight of {name!r} is tied to another: merging would change both; leave it out of the adapter"
            )
    kept = whole = 0.0
    for name, layer in layers:
        base, attribute = layer.get_base_layer(), _attribute(layer)
        old = base._parameters.get(attribute)
        if layer.merged or not isinstance(old, IQTensor):
            continue
        base._parameters[attribute] = nn.Parameter(old.dequantize(torch.float32), requires_grad=False)
        layer.merge()
        merged = base._parameters[attribute]
        if not layer.merged:  # no active adapter here: the very same bits
            base._parameters[attribute] = old
        elif format is None:
            base._parameters[attribute] = nn.Parameter(merged.detach().to(old.dtype), requires_grad=False)
        else:
            name = f"{name.replace('.base_layer', '')}.{attribute}"
            matrix = merged.detach().mT if old.transposed else merged.detach()
            blocks = quantize(matrix, target or old.format, table.get(name), name=name).to_blocks()
            new = IQTensor.from_blocks(blocks, target or old.format, old.dtype, transposed=old.transposed)
            before = old.dequantize(torch.float32)
            change = merged.detach() - before
            kept += float((change * (new.dequantize(torch.float32) - before)).sum())
            whole += float(change.square().sum())
            set_weight(base, attribute, new)
    if kept < MOSTLY * whole:
        warnings.warn(
            f"quantizing again kept {max(kept, 0.0) / whole:.0%} of what the adapter changes: most changes are smaller than the steps of "
            "the format. Take a format of more bits (format='q8_0'), or none (format=None); or merge the adapter into the original "
            "weights (PEFT's merge_and_unload on the original model) and quantize those",
            stacklevel=2,
        )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="(Already following|All) adapters (were|are already) merged")
        return model.merge_and_unload()  # what is not packed


def _attribute(layer: Any) -> str:
    """Name of the parameter that an adapter layer changes."""
    return getattr(layer, "parameter_name", "weight")
