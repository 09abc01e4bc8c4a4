"""Mixtures of experts of transformers models, on packed weights."""

from __future__ import annotations

from typing import Any

from ..experts import experts_forward
from ..tensor import IQTensor

#: Name of our implementation in transformers' list.
IMPLEMENTATION = "iqtorch"


def use_packed_experts(model: Any) -> None:
    """Lets the experts of a transformers model run on their packed weights; nothing to do for a model without any."""
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    if IMPLEMENTATION not in ALL_EXPERTS_FUNCTIONS:
        type(ALL_EXPERTS_FUNCTIONS).register(IMPLEMENTATION, experts_forward)
    for module in model.modules():
        # What `set_experts_implementation` does, which before transformers 5.9 knows no names but its own.
        if hasattr(module, "has_gate") and any(isinstance(p, IQTensor) for p in module._parameters.values()):
            module.config._experts_implementation_internal = IMPLEMENTATION
