"""Adapters (PEFT) on packed models."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UnsupportedOperationError
from ..formats import get_format
from ..linear import set_weight
from ..model import importance_table
from ..quantize import quantize
from ..tensor import IQTensor


def merge_adapter(model: Any, format: str | None = "same", importance: Mapping[str, Tensor] | str | None = None) -> nn.Module:
    """Adds the active adapters of a PEFT model to its weights and takes the adapters off.

    Args:
        model: a `PeftModel` with LoRA adapters on linear layers.
        format: what the weights that change become: `"same"` quantizes each again to the format it had (rounding again:
            expect a small loss), a format name quantizes to that, None leaves them dequantized. Other weights stay as they are.
        importance: as in `iqtorch.quantize_model`, for quantizing again.

    Returns:
        The base model, without adapters.

    Raises:
        UnsupportedOperationError: no PeftModel; DoRA, embeddings, experts or trained biases; a tied weight.
    """
    if not hasattr(model, "get_base_model"):
        raise UnsupportedOperationError(
            f"merge_adapter needs a PeftModel, got {type(model).__name__}: load the adapter with PeftModel.from_pretrained"
        )
    table = importance_table(importance)
    inner = model.get_base_model()
    layers = [(name, module) for name, module in inner.named_modules() if hasattr(module, "get_delta_weight")]
    holders = Counter(id(parameter) for module in inner.modules() for parameter in module._parameters.values() if parameter is not None)
    for name, layer in layers:  # all checks before the first change
        base = layer.get_base_layer()
        if not isinstance(base, nn.Linear) or any(layer.use_dora.values()) or any(layer.lora_bias.values()):
            raise UnsupportedOperationError(
                f"the adapter of {name!r} cannot be merged into a packed weight: only LoRA on linear layers can"
            )
        if holders[id(base.weight)] > 1:
            raise UnsupportedOperationError(
                f"the weight of {name!r} is tied to another: merging would change both; leave it out of the adapter"
            )
    for name, layer in layers:
        base = layer.get_base_layer()
        active = [adapter for adapter in layer.active_adapters if adapter in layer.lora_A]
        if layer.merged or not active:
            continue
        old = base.weight
        with torch.no_grad():
            plain = old.dequantize(torch.float32) if isinstance(old, IQTensor) else old.float()
            merged = (plain + sum(layer.get_delta_weight(adapter).float() for adapter in active)).to(old.dtype)
        if format is None or not isinstance(old, IQTensor):
            base.weight = nn.Parameter(merged, requires_grad=False)
        else:
            target = old.format if format == "same" else get_format(format)
            set_weight(base, "weight", quantize(merged, target, table.get(f"{name}.weight"), name=f"{name}.weight"))
    return model.unload()
