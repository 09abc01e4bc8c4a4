"""Modules on chosen devices, by rules: experts on the CPU, for example, and the rest on a GPU."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TypeVar

import torch
from torch import nn

from ..errors import RecipeError
from ..recipe import check_pattern

M = TypeVar("M", bound=nn.Module)


def place(model: M, rules: Mapping[str, str | torch.device], default: str | torch.device = "cpu") -> M:
    """Moves modules to devices and computes there: activations travel, weights stay where they are.

        iqtorch.place(model, {r"mlp\\.experts$": "cpu"}, default="cuda")

    accelerate's CPU offload, in contrast, brings the weights to the GPU for every product.

    Args:
        model: any module; packed weights take the layout of their new device.
        rules: regular expressions, searched in module names, in order; the first that matches an outermost module places it
            and everything inside.
        default: device of the rest, and of the model's outputs.

    Returns:
        The same model.

    Raises:
        RecipeError: a rule that matches no module, or is no regular expression.
    """
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module

    for pattern in rules:
        check_pattern(pattern)
    placed: dict[str, str | torch.device] = {}
    rest = []
    for name, module in model.named_modules():
        if any(name.startswith(f"{outer}.") for outer in placed):
            continue
        device = next((device for pattern, device in rules.items() if name and re.search(pattern, name)), None)
        if device is None:
            rest.append(module)
        else:
            placed[name] = device
    for pattern in rules:
        if not any(re.search(pattern, name) for name in placed):
            raise RecipeError(
                f"rule {pattern!r} places no module of this model (a rule before it, or a module around it, may have it already)"
            )
    for name, device in placed.items():
        module = model.get_submodule(name).to(device)
        add_hook_to_module(module, AlignDevicesHook(torch.device(device), io_same_device=True), append=True)
    for module in rest:  # and never the whole model, for which a GPU may have no room
        module._apply(lambda tensor: tensor.to(default), recurse=False)
    return model
