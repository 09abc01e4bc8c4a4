"""Operations that transformers applies to tensors while it loads a checkpoint."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from transformers.core_model_loading import ConversionOps, WeightConverter

from ..cpu_ext import memory

if TYPE_CHECKING:
    from .quantizer import IQQuantizer


class _Operation(ConversionOps):
    def __init__(self, quantizer: IQQuantizer) -> None:
        self.quantizer = quantizer

    def __deepcopy__(self, memo: dict[int, Any]) -> _Operation:
        return self  # transformers copies its converters for every tensor

    def _make(self, model: nn.Module, name: str, value: Tensor) -> nn.Parameter | None:
        raise NotImplementedError

    def convert(self, input_dict: dict[str, Any], *, model: nn.Module, **kwargs: Any) -> dict[str, Any]:
        """Replaces the packed weights among `{parameter name: tensor or [tensor]}`; others pass unchanged."""
        result: dict[str, Any] = {}
        for name, value in input_dict.items():
            if not self.quantizer.param_needs_quantization(model, name):
                result[name] = value
                continue
            parameter = self._make(model, name, value[0] if isinstance(value, list) else value)
            if parameter is not None:  # after an error the weight counts as missing until the error is raised
                result[name] = parameter
        return result


#: Bytes of a weight around whose quantization freed memory is returned: experts have just been put together, twice over.
TRIMMED = 1 << 24


class Quantize(_Operation):
    """A plain weight becomes a packed parameter."""

    def _make(self, model: nn.Module, name: str, value: Tensor) -> nn.Parameter | None:
        if value.nbytes < TRIMMED:
            return self.quantizer.quantize_weight(model, name, value)
        memory.trim()
        parameter = self.quantizer.quantize_weight(model, name, value)
        memory.trim()
        return parameter


class Unpack(_Operation):
    """Canonical bytes become a packed parameter."""

    def _make(self, model: nn.Module, name: str, value: Tensor) -> nn.Parameter | None:
        return self.quantizer.read_weight(model, name, value)

    def convert(self, input_dict: dict[str, Any], *, model: nn.Module, **kwargs: Any) -> dict[str, Any]:
        """As above, for the one tensor of a packed weight, which arrives under the pattern that its name matched."""
        (value,) = input_dict.values()
        made = super().convert({kwargs.pop("full_layer_name"): value}, model=model)
        for name in [name for name in made if self.quantizer.is_on_disk(name)]:
            self.quantizer.on_disk[name] = made.pop(name)
            kwargs["missing_keys"].discard(name)
        return made


def unpacking(names: Iterable[str], quantizer: IQQuantizer) -> list[WeightConverter]:
    """The converter that reads the packed weights of these (checkpoint) names."""
    from .quantizer import name_patterns

    patterns = "|".join(name_patterns(names))
    return [WeightConverter([f"^({patterns})$"], [r"\1"], operations=[Unpack(quantizer)])] if patterns else []
