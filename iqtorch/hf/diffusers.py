"""The diffusers quantizer: the same `IQConfig`, checkpoint layout and errors as for transformers models.

diffusers hands over one tensor at a time and asks for its packed parameter; what to plan, and how to read and quantize, is `IQQuantizer`'s.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from diffusers.quantizers.base import DiffusersQuantizer
from torch import Tensor, nn

from ..errors import UnsupportedOperationError
from ..formats import get_format
from ..tensor import IQTensor
from .config import METHOD, IQConfig, StoredTensor
from .quantizer import IQQuantizer


class IQDiffusersQuantizer(DiffusersQuantizer):
    """What diffusers calls while it loads and saves a model with an `IQConfig`."""

    use_keep_in_fp32_modules = True
    supports_parallel_loading = False
    is_serializable = True
    is_trainable = True
    is_compileable = True
    quantization_config: IQConfig

    def __init__(self, quantization_config: IQConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self.inner = IQQuantizer(quantization_config, pre_quantized=self.pre_quantized)

    def update_torch_dtype(self, torch_dtype: torch.dtype | None) -> torch.dtype:
        """Of the activations; without one diffusers would cast packed bytes to the dtype that the model was made in."""
        self.inner.dtype = torch_dtype or torch.get_default_dtype()
        return self.inner.dtype

    def adjust_target_dtype(self, torch_dtype: torch.dtype) -> Any:
        """What a weight takes at most, as far as accelerate has a name for it, for `device_map="auto"`."""
        from accelerate.utils import CustomDtype

        formats = {plan.format for plan in self.inner.planned.values()} | {stored.format for stored in self.inner.stored.values()}
        return CustomDtype.INT4 if formats and all(get_format(name).bits_per_weight() <= 4 for name in formats) else torch.int8

    def validate_environment(self, *args: Any, device_map: Any = None, **kwargs: Any) -> None:
        """Raises UnsupportedOperationError for weights that would lie on disk: diffusers writes them there itself."""
        if isinstance(device_map, dict) and "disk" in map(str, device_map.values()):
            raise UnsupportedOperationError("diffusers cannot leave packed weights on disk; give device_map more memory, or 'cpu'")

    def check_if_quantized_param(self, model: Any, param_value: Tensor, param_name: str, state_dict: Any, **kwargs: Any) -> bool:
        """Whether a parameter is packed: while loading a plain checkpoint, or as the packed checkpoint says."""
        return self.inner.param_needs_quantization(model, param_name)

    def create_quantized_param(
        self, model: Any, param_value: Tensor, param_name: str, target_device: Any, *args: Any, **kwargs: Any
    ) -> nn.Parameter:
        """Makes the packed parameter, and puts it in its place."""
        make = self.inner.read_weight if self.pre_quantized else self.inner.quantize_weight
        parameter = make(model, param_name, param_value.to(target_device))
        if parameter is None:
            raise self.inner.error or AssertionError
        path, _, attribute = param_name.rpartition(".")
        model.get_submodule(path)._parameters[attribute] = parameter
        return parameter

    def get_state_dict_and_metadata(
        self, state_dict: dict[str, Any], safe_serialization: bool = False
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """The state dict with canonical bytes for packed weights."""
        return {name: value.to_blocks() if isinstance(value, IQTensor) else value for name, value in state_dict.items()}, {}

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        return self.inner._process_model_before_weight_loading(model, dtype=self.inner.dtype)

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        self.inner._process_model_after_weight_loading(model)
        list_weights(model, self.quantization_config)
        return model

    def _dequantize(self, model: Any) -> Any:
        return self.inner._dequantize(model)


def list_weights(model: nn.Module, config: IQConfig) -> None:
    """Fills in `config.tensors`, which a saved model needs."""
    dtype: Any = model.dtype
    packed = {name: p for name, p in model.named_parameters(remove_duplicate=False) if isinstance(p, IQTensor)}
    config.tensors = {name: StoredTensor.of(weight, dtype) for name, weight in packed.items()}


def adopt(model: Any, config: IQConfig) -> None:
    """Makes a diffusers model whose weights were packed after loading one that `save_pretrained` can save."""
    list_weights(model, config)
    model.hf_quantizer = IQDiffusersQuantizer(config, pre_quantized=False)
    model.is_quantized, model.quantization_method = True, METHOD
    model.register_to_config(quantization_config=config)


AUTO_QUANTIZATION_CONFIG_MAPPING[METHOD] = IQConfig
AUTO_QUANTIZER_MAPPING[METHOD] = IQDiffusersQuantizer
