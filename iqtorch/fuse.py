"""`fuse`: projections of the same activations (q/k/v, gate/up) become one call of the kernels.

Nothing is stored differently: every projection keeps its module, weight and name, so that checkpoints, adapters and GGUF files are those
of the model without fusing. The first projection that is called computes all of its group and hands the others' results over when
they are called with the same activations. Results are the same bits. It saves two of three calls and preparations of
the activations per group, and costs the lists of matrices that its operator takes: about as much (docs/huggingface.md has figures).
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from . import ops
from .derivatives import needs_derivative
from .linear import Linear
from .tensor import IQTensor
from .tensor_ops import autocasts

#: Names under which models keep linear layers that read the same activations.
SIBLINGS: tuple[tuple[str, ...], ...] = (
    ("q_proj", "k_proj", "v_proj"), ("query", "key", "value"), ("q", "k", "v"), ("wq", "wk", "wv"), ("q_lin", "k_lin", "v_lin"),
    ("gate_proj", "up_proj"), ("w1", "w3"), ("wi_0", "wi_1"),
)  # fmt: skip


class Group:
    """Projections of the same activations.

    Attributes:
        members: in the order in which the model calls them.
        held: activations, and the results of members that have not been called with them yet, by position.
        enabled: False once results were not asked for: these members do not read the same activations.
    """

    def __init__(self, members: list[FusedLinear]) -> None:
        self.members = members
        self.held: tuple[Tensor, dict[int, Tensor]] | None = None
        self.enabled = True

    def result(self, position: int, x: Tensor) -> Tensor | None:
        """The result of one member, or None if it must be computed alone."""
        held = self.held
        if held is not None:
            if held[0] is x and position in held[1]:
                if len(held[1]) == 1:
                    self.held = None
                return held[1].pop(position)
            self.held, self.enabled = None, False
        if not self.enabled or not self._fits(x):
            return None
        weights: list[Any] = [member.weight for member in self.members]
        matrices = [w.packed for w in weights], [w.format for w in weights], [w.rows for w in weights]
        biases: list[Tensor | None] = [member.bias for member in self.members]
        results = ops.get_backend(weights[0].backend).linear_many(x, *matrices, biases, ops.activation_precision())
        self.held = (x, {i: y for i, y in enumerate(results) if i != position})
        return results[position]

    def _fits(self, x: Tensor) -> bool:
        """Whether the members' weights, as they are now, can be multiplied in one call."""
        if x.dtype not in ops.KERNEL_DTYPES or type(x) is IQTensor or autocasts(x):
            return False
        if needs_derivative(x):
            return False
        backend = getattr(self.members[0].weight, "backend", None)
        for member in self.members:
            w, bias = member.weight, member.bias
            if not isinstance(w, IQTensor) or w.transposed or w.leading or w.backend != backend or not x.shape or x.shape[-1] != w.k:
                return False
            if bias is not None and needs_derivative(bias):
                return False
        return True


class FusedLinear(Linear):
    """A packed linear layer of a `Group`; alone it is an `iqtorch.Linear`."""

    group: Group
    position: int

    def forward(self, input: Tensor) -> Tensor:
        y = self.group.result(self.position, input)
        return super().forward(input) if y is None else y


def fuse(model: nn.Module) -> int:
    """Fuses projections of the same activations, in place; `unfuse` takes it back.

    A group are the packed linear layers of one module whose names are in one row of `SIBLINGS` and whose rows are equally long; their
    formats may differ. A group whose members turn out to be called with different activations (cross-attention) stops being one
    by itself. Products that need gradients or run under autocast are computed one by one as before.

    Args:
        model: a model with packed weights, in any state: with adapters, compiled later, on any device.

    Returns:
        The number of groups.
    """
    groups = 0
    for parent in model.modules():
        for names in SIBLINGS:
            found = [getattr(parent, name, None) for name in names]
            found = [getattr(layer, "base_layer", layer) for layer in found]  # under an adapter
            members: list[Any] = [layer for layer in found if type(layer) is Linear and isinstance(layer.weight, IQTensor)]
            if len(members) > 1 and len({layer.in_features for layer in members}) == 1:
                group = Group(members)
                for position, layer in enumerate(members):
                    layer.__class__ = FusedLinear
                    layer.group, layer.position = group, position
                groups += 1
    return groups


def unfuse(model: nn.Module) -> None:
    """Takes `fuse` back, in place."""
    for layer in model.modules():
        if type(layer) is FusedLinear:
            del layer.group, layer.position
            layer.__class__ = Linear  # type: ignore[assignment]


__all__ = ["SIBLINGS", "FusedLinear", "fuse", "unfuse"]
