"""Mixtures of experts of transformers models, on packed weights."""

from __future__ import annotations

from typing import Any

from ..experts import experts_forward
from ..tensor import IQTensor

#: Name of our implementation in transformers' list.
IMPLEMENTATION = "iqtorch"


def use_packed_experts(model: Any) -> None:
    """Lets the experts of a transformers model run on their packed weights; nothing to do for a model without any."""
    if not hasattr(model, "set_experts_implementation"):
        return  # transformers 4: experts are lists of linear layers
    if any(isinstance(parameter, IQTensor) and parameter.dim() == 3 for parameter in model.parameters()):
        from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

        if IMPLEMENTATION not in ALL_EXPERTS_FUNCTIONS:
            type(ALL_EXPERTS_FUNCTIONS).register(IMPLEMENTATION, experts_forward)
        model.set_experts_implementation(IMPLEMENTATION)
