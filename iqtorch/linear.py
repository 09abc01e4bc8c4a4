"""Drop-in layers with a packed weight. They are what `quantize_model` makes of linear layers, embeddings and pointwise convolutions."""

from __future__ import annotations

from typing import Any, TypeVar, cast

import torch.nn.functional as F
from torch import Tensor, nn

from .encode import Objective, Speed
from .errors import ShapeError, UnsupportedOperationError
from .formats import Format
from .quantize import quantize
from .tensor import IQTensor

L = TypeVar("L", bound="_Packed")


class _Packed(nn.Module):
    """What the packed layers share: the weight, how it is made, and its line in `print(model)`."""

    weight: Tensor

    @classmethod
    def from_float(
        cls: type[L],
        layer: nn.Module,
        format: Format | str,
        importance: Tensor | None = None,
        objective: Objective = "model",
        *,
        speed: Speed = "default",
    ) -> L:
        """A packed copy of a layer of `torch.nn` of the same name, with the same bias; arguments and errors as in `iqtorch.quantize`.

        Raises:
            UnsupportedOperationError: a convolution that is no linear layer of each position.
        """
        others = cls._settings(layer)
        return cls(quantize(matrix_of(layer, cast(Tensor, layer.weight)), format, importance, objective, speed=speed), **others)

    @classmethod
    def _settings(cls, layer: Any) -> dict[str, Any]:
        """The arguments besides the weight that make a layer like this one."""
        raise NotImplementedError

    def extra_repr(self) -> str:
        fmt = f", format={self.weight.format.name!r}" if isinstance(self.weight, IQTensor) else ""
        return f"{super().extra_repr()}{fmt}"


def packed_parameter(weight: IQTensor) -> nn.Parameter:
    """A frozen parameter that keeps the class of the packed weight."""
    return nn.Parameter(weight, requires_grad=False)


def _bias(bias: Tensor | None) -> nn.Parameter | None:
    return bias if bias is None or isinstance(bias, nn.Parameter) else nn.Parameter(bias)


def _sizes(layer: type[nn.Module], weight: IQTensor) -> tuple[int, int]:
    """Rows and columns of a layer's packed weight."""
    name = layer.__name__
    if not isinstance(weight, Tensor):
        raise TypeError(
            f"iqtorch.{name} takes a packed weight, got {type(weight).__name__}; make one with iqtorch.quantize, or of a layer with "
            f"iqtorch.{name}.from_float"
        )
    if weight.dim() != 2:
        raise ShapeError(f"iqtorch.{name} takes a weight of 2 dimensions, got shape {tuple(weight.shape)}")
    rows, columns = weight.shape
    return rows, columns


class Linear(_Packed, nn.Linear):
    """`nn.Linear` whose weight is an `IQTensor` `[out_features, in_features]`; the bias stays as it is, and trainable.

    Args:
        weight: the packed weight.
        bias: `[out_features]`, or None.
    """

    def __init__(self, weight: IQTensor, bias: Tensor | None = None) -> None:
        out_features, in_features = _sizes(Linear, weight)
        super().__init__(in_features, out_features, bias=False, device="meta", dtype=weight.dtype)
        self.weight = packed_parameter(weight)
        self.register_parameter("bias", _bias(bias))

    @classmethod
    def _settings(cls, layer: nn.Linear) -> dict[str, Any]:
        return {"bias": layer.bias}


class Embedding(_Packed, nn.Embedding):
    """`nn.Embedding` whose table is an `IQTensor` `[num_embeddings, embedding_dim]`.

    Args:
        weight: the packed table.
        padding_idx: kept for compatibility; the table is frozen, so it has no effect on gradients.
    """

    def __init__(self, weight: IQTensor, padding_idx: int | None = None) -> None:
        num_embeddings, embedding_dim = _sizes(Embedding, weight)
        super().__init__(num_embeddings, embedding_dim, padding_idx, device="meta", dtype=weight.dtype)
        self.weight = packed_parameter(weight)

    @classmethod
    def _settings(cls, layer: nn.Embedding) -> dict[str, Any]:
        return {"padding_idx": layer.padding_idx}


class Conv1d(_Packed, nn.Conv1d):
    """`nn.Conv1d` of kernel size 1, without padding or groups, whose weight is an `IQTensor` `[out_channels, in_channels]`.

    Args:
        weight: the packed weight.
        bias: `[out_channels]`, or None.
        stride: of the positions.
    """

    def __init__(self, weight: IQTensor, bias: Tensor | None = None, stride: int = 1) -> None:
        out_channels, in_channels = _sizes(Conv1d, weight)
        super().__init__(in_channels, out_channels, 1, stride, bias=False, device="meta", dtype=weight.dtype)
        self.weight = packed_parameter(weight)
        self.register_parameter("bias", _bias(bias))

    @classmethod
    def _settings(cls, layer: nn.Conv1d) -> dict[str, Any]:
        if not is_pointwise(layer):
            raise UnsupportedOperationError(
                f"{layer} is no linear layer of each position: only kernel_size=1, padding=0, groups=1 is packed"
            )
        return {"bias": layer.bias, "stride": layer.stride[0]}

    def forward(self, input: Tensor) -> Tensor:
        """`[.., in_channels, length]` -> `[.., out_channels, length / stride]`."""
        return F.linear(input[..., :: self.stride[0]].mT, self.weight, self.bias).mT


#: Classes whose instances become the packed class when their weight is swapped in place (exact type: a subclass keeps its own).
PACKED_CLASS: dict[type[nn.Module], type[nn.Module]] = {nn.Linear: Linear, nn.Embedding: Embedding, nn.Conv1d: Conv1d}


def is_conv1d(module: nn.Module) -> bool:
    """transformers' `Conv1D` (GPT-2): a linear layer with weight `[in, out]`."""
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")


def is_flat_experts(module: nn.Module) -> bool:
    """DBRX's experts: matrices one below the other, `[E * N, K]`, which it views as `[E, N, K]`; that is how they are packed."""
    return type(module).__name__ == "DbrxExpertGLU"


def is_pointwise(module: nn.Module) -> bool:
    """A convolution that is a linear layer of each position."""
    return type(module) is nn.Conv1d and module.kernel_size == (1,) and module.groups == 1 and module.padding in ((0,), "same", "valid")


def matrix_of(module: nn.Module, weight: Tensor) -> Tensor:
    """A layer's weight as the matrix `[N, K]` that is packed; experts stay `[E, N, K]` or transposed."""
    if is_conv1d(module):
        return weight.mT
    if is_flat_experts(module):
        return weight.view(cast(int, module.moe_num_experts), -1, weight.shape[-1])
    return weight.squeeze(-1) if isinstance(module, nn.Conv1d) else weight


def set_weight(module: nn.Module, name: str, weight: IQTensor) -> None:
    """Replaces a parameter of `module` by a packed weight, in place (hooks, identity and other attributes stay)."""
    module._parameters[name] = weight if isinstance(weight, nn.Parameter) else packed_parameter(weight)
    module.__class__ = PACKED_CLASS.get(type(module), type(module))


def packable(module: nn.Module) -> nn.Module:
    """The module that a packed weight goes into: itself, or for a `Conv1D` of GPT-2 an `nn.Linear` with its bias."""
    weight = module._parameters.get("weight")
    if weight is None or not is_conv1d(module):
        return module
    inner, outer = weight.shape
    linear = nn.Linear(inner, outer, bias=False, device="meta", dtype=weight.dtype)
    linear.register_parameter("bias", module._parameters.get("bias"))
    return linear.train(module.training)


__all__ = ["Conv1d", "Embedding", "Linear", "packed_parameter", "set_weight"]
