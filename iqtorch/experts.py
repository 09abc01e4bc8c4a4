"""Mixtures of experts on packed weights: one grouped product per projection, whatever the routing."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import ops
from .derivatives import needs_derivative
from .tensor import IQTensor
from .tensor_ops import grouped_linear

#: Parameters in the place of `gate_up_proj` where the formats of the two differ.
SPLIT = ("gate_proj", "up_proj")


def is_split(module: Any) -> bool:
    """Whether gate and up projections are parameters of their own."""
    return SPLIT[0] in getattr(module, "_parameters", ())


def split_experts(module: nn.Module) -> None:
    """Gives experts of transformers the parameters `SPLIT` in the place of `gate_up_proj`, in place; nothing to do if they have no such."""
    merged = module._parameters.get("gate_up_proj")
    if merged is None or not getattr(module, "has_gate", False):
        return
    rows = -1 if module.is_transposed else -2
    for name, half in zip(SPLIT, merged.detach().chunk(2, rows), strict=True):
        module.register_parameter(name, nn.Parameter(torch.empty_like(half), requires_grad=False))
    del module.gate_up_proj
    module.gate_up_proj = merged.new_empty(0)  # no parameter: `_init_weights` of its model asks for it


def experts_forward(module: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """The experts of a transformers model, as its "experts implementation" `iqtorch`.

    Token and expert pairs are sorted by expert, so that each projection is one grouped product; nothing waits for the device
    and no shape depends on the routing, so it compiles and can be captured in a graph.

    Args:
        module: holds `gate_up_proj` (or `up_proj`, or after `split_experts` both of `SPLIT`) and `down_proj`, `[E, N, K]` or
            transposed, packed or plain, their biases, and the flags that transformers sets (`has_gate`, `has_bias`,
            `is_transposed`, `has_post_expert_norm`).
        hidden_states: `[T, H]`.
        top_k_index: `[T, k]`, experts of each token; an index of `num_experts` or more is no expert and adds nothing.
        top_k_weights: `[T, k]`.

    Returns:
        `[T, H]`, of `hidden_states`' dtype.
    """
    fused = _fused(module, hidden_states, top_k_index, top_k_weights)
    if fused is not None:
        return fused
    tokens, k = top_k_index.shape
    experts, order = torch.sort(top_k_index.reshape(-1), stable=True)
    offsets = torch.searchsorted(experts, torch.arange(module.num_experts, device=experts.device, dtype=experts.dtype), right=True)
    of_bias = experts.clamp(max=module.num_experts - 1)

    def project(x: Tensor, name: str, *parts: str) -> Tensor:
        ys = [_grouped(x, getattr(module, part), offsets, module.is_transposed) for part in parts or [name]]
        y = torch.cat(ys, -1) if getattr(module, "is_concatenated", not module.is_transposed) else torch.stack(ys, -1).flatten(-2)
        return y + getattr(module, f"{name}_bias")[of_bias].to(y.dtype) if module.has_bias else y

    x = hidden_states[order // k]
    if module.has_gate:
        x = module._apply_gate(project(x, "gate_up_proj", *(SPLIT if is_split(module) else ())))
    else:
        x = module.act_fn(project(x, "up_proj"))
    x = project(x, "down_proj")
    if getattr(module, "has_post_expert_norm", False):  # unknown to older transformers
        x = module.post_expert_norm(x)
    weights = (top_k_weights.reshape(-1)[order] * (experts < module.num_experts)).unsqueeze(-1)
    back = torch.argsort(order)  # a gather and a sum: unlike index_add, the same result on every run
    return (x * weights)[back].reshape(tokens, k, x.shape[-1]).sum(dim=1).to(hidden_states.dtype)


#: Up to this many pairs of token and expert the fused kernels win: beyond, tokens that share an expert should share its decoding.
FUSED_PAIRS = 64

_ACTIVATIONS = {
    "silu": "silu",
    "SiLU": "silu",
    "SiLUActivation": "silu",
    "GELUActivation": "gelu",
    "GELUTanh": "gelu_tanh",
    "PytorchGELUTanh": "gelu_tanh",
    "ReLU": "relu",
}


def _activation(function: Any) -> str | None:
    """Name of an activation function in the kernels."""
    return _ACTIVATIONS.get(getattr(function, "__name__", type(function).__name__))


def _fused(module: Any, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor | None:
    """The layer as two kernels on the GPU that read the expert ids there, or None if this layer or call is another case."""
    gate_up, down = getattr(module, "gate_up_proj", None), module.down_proj
    if not isinstance(gate_up, IQTensor) or not isinstance(down, IQTensor) or gate_up.backend != "triton" or down.backend != "triton":
        return None
    plain = not (module.has_bias or module.is_transposed or gate_up.transposed or down.transposed)
    plain = plain and not getattr(module, "has_post_expert_norm", False) and getattr(module, "is_concatenated", True)
    own_gate = getattr(getattr(module, "_apply_gate", None), "__name__", "") != "_default_apply_gate"
    activation = _activation(getattr(module, "act_fn", None))  # experts with a gate of their own may have none
    if not plain or own_gate or activation is None or ids.numel() > FUSED_PAIRS or x.dtype not in ops.KERNEL_DTYPES:
        return None
    if needs_derivative(x) or needs_derivative(weights):
        return None
    from . import kernels

    precision = ops.activation_precision()
    h = kernels.routed_gated(x, gate_up.packed, ids, gate_up.format, gate_up.rows, activation, precision)
    return kernels.routed_weighted(h, down.packed, ids, weights, down.format, down.rows, precision)


def _grouped(x: Tensor, weight: Tensor, offsets: Tensor, transposed: bool) -> Tensor:
    if isinstance(weight, IQTensor) and weight.transposed == transposed:
        return grouped_linear(x, weight, offsets)
    # A projection that was kept: its layer may still have a packed one.
    weight = weight if transposed else weight.mT
    if hasattr(F, "grouped_mm") and weight.dtype == torch.bfloat16:
        return F.grouped_mm(x.to(weight.dtype), weight, offs=offsets.to(torch.int32))
    bounds = [0, *offsets.tolist(), len(x)]
    parts = [x[a:b].to(weight.dtype) @ weight[e] for e, (a, b) in enumerate(pairwise(bounds[:-1]))]
    return torch.cat([*parts, x.new_zeros((bounds[-1] - bounds[-2], weight.shape[-1]), dtype=weight.dtype)])
