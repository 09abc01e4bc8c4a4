"""The transformers quantizer: quantizes while `from_pretrained` loads, reads and writes packed checkpoints.

A packed checkpoint has the model's own parameter names. Under the name of a packed weight lie its canonical bytes, uint8
`[.., rows, row_bytes]`; `quantization_config["tensors"]` in `config.json` says how to read them (`StoredTensor`).
"""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers.integrations.accelerate import get_device, load_offloaded_parameter
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from transformers.quantizers.base import HfQuantizer

from ..as_stored import keep_as_stored
from ..calibration import Calibration, quantize_calibrated
from ..encode.encoder import workspace
from ..errors import CheckpointError, IQTorchError, MissingDependencyError, UnsupportedOperationError
from ..formats import get_format
from ..linear import PACKED_CLASS, matrix_of, packable, packed_parameter
from ..model import NOTES, check_coverage, importance_table, lookup_importance, plan_formats, replace_module
from ..quantize import check_finite, check_weight, quantize
from ..report import warn_if_kept
from ..sharding import SHARDS, gather_blocks
from ..tensor import IQTensor
from .config import METHOD, IQConfig, StoredTensor
from .experts import use_packed_experts


def register() -> None:
    """Makes `IQConfig` and `IQQuantizer` known to transformers; once is enough, more do no harm."""
    AUTO_QUANTIZATION_CONFIG_MAPPING[METHOD] = IQConfig
    AUTO_QUANTIZER_MAPPING[METHOD] = IQQuantizer


@dataclass(frozen=True)
class Planned:
    """How a weight is quantized while it is loaded: format name, importance, and how its matrix lies in the checkpoint.

    Attributes:
        layer: the layer of the original model, on the meta device (see `matrix_of`).
        transposed: experts that the model keeps transposed.
    """

    format: str
    importance: Tensor | None
    layer: nn.Module
    transposed: bool


class IQQuantizer(HfQuantizer):
    """What transformers calls while it loads and saves a model with an `IQConfig`.

    Attributes:
        planned: weights to quantize, by parameter name (empty for a packed checkpoint).
        stored: packed weights to read, by parameter name (empty unless the checkpoint is packed).
        on_disk: packed weights that a `device_map` leaves in their (memory-mapped) file, by parameter name.
        largest: bytes of the largest parameter as the model would have it without quantization.
        error: the first error of an operation; transformers would hide its type, so it is raised at the end of loading.
    """

    requires_calibration = False
    quantization_config: IQConfig

    def __init__(self, quantization_config: IQConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self.planned: dict[str, Planned] = {}
        self.stored: dict[str, StoredTensor] = {}
        self.error: Exception | None = None
        self.calibration: Calibration | None = None
        self.device_map: dict[str, Any] = {}
        self.on_disk: dict[str, Any] = {}
        self.dtype = torch.get_default_dtype()
        self.largest = 0
        self._notes: dict[str, str] = {}

    # -- before loading: the model is on the meta device -------------------------------------------------------

    def validate_environment(self, *args: Any, device_map: Any = None, **kwargs: Any) -> None:
        """Raises UnsupportedOperationError for weights that would have to be quantized on disk."""
        if not isinstance(device_map, dict):
            return  # called again, once it is resolved
        if "disk" in map(str, device_map.values()) and not self.pre_quantized:
            raise UnsupportedOperationError(
                "a device_map with 'disk' needs a packed checkpoint: save the packed model (iqtorch.quantize_checkpoint does so in "
                "bounded memory), and load that"
            )
        self.device_map = device_map

    def _process_model_before_weight_loading(self, model: Any, dtype: torch.dtype | None = None, **kwargs: Any) -> Any:
        self.dtype = dtype or model.dtype
        if self.pre_quantized:
            self._plan_reading(model)
        else:
            self._plan_quantizing(model)
        return model

    def _plan_quantizing(self, model: Any) -> None:
        config = self.quantization_config
        # transformers ties weights only after loading, but a tied weight gets another format than one that is not.
        for target, source in getattr(model, "all_tied_weights_keys", {}).items():
            path, _, attribute = target.rpartition(".")
            setattr(model.get_submodule(path), attribute, model.get_parameter(source))
        with torch.device("cpu"):  # transformers makes every new tensor a meta tensor here
            table = importance_table(config.importance)
            calibration = config.calibration
            if isinstance(calibration, str | Path):
                calibration = Calibration.load(calibration)
        self.calibration = calibration
        self.largest = max(p.nbytes for p in model.parameters())
        choices, self._notes = plan_formats(model, config.recipe, config.skip, has_importance=bool(table) or calibration is not None)
        check_coverage(table, [site for site, _ in choices], [site for site, choice in choices if choice.format])
        for site, choice in choices:
            if choice.format is None:
                continue
            module = site.places[0][0]
            plan = Planned(choice.format, lookup_importance(table, site), module, site.transposed)
            for place in self._names(model, site.places):
                self.planned[place] = plan
            if packable(module) is not module:
                replace_module(model, module, packable(module))

    @staticmethod
    def _names(model: nn.Module, places: list[tuple[nn.Module, str]]) -> list[str]:
        """Parameter names of every place of a weight: a checkpoint may have a tied weight under any of them."""
        wanted = {(id(module), attribute) for module, attribute in places}
        return [
            f"{name}.{attribute}" if name else attribute
            for name, module in model.named_modules(remove_duplicate=False)
            for attribute in module._parameters
            if (id(module), attribute) in wanted
        ]

    def _plan_reading(self, model: Any) -> None:
        keep_as_stored(model, self.quantization_config.tensors)
        weights = model.state_dict()
        prefix = f"{getattr(model, 'base_model_prefix', '')}."
        for name, stored in self.quantization_config.tensors.items():
            # A headless model reads the checkpoint of a model with head, and the reverse: transformers adds or drops the prefix.
            found = next((n for n in (name, prefix + name, name.removeprefix(prefix)) if n in weights), None)
            if found is None:
                continue  # a part that this class of model lacks
            module = model.get_submodule(found.rpartition(".")[0])
            shape = matrix_of(module, weights[found]).shape
            if packable(module) is not module:
                replace_module(model, module, packable(module))
            if shape != stored.shape:
                raise CheckpointError(
                    f"quantization_config gives {name!r} the shape {list(stored.shape)}, the model of config.json has "
                    f"{list(shape)}: the checkpoint does not belong to this config"
                )
            self.stored[found] = stored

    def update_parallel_plan(self, model: Any, plan: dict[str, str]) -> None:
        """Has the packed weights of a tensor-parallel plan split by blocks."""
        if plan:
            try:
                from .parallel import use_packed_styles
            except ImportError:
                raise MissingDependencyError(
                    f"tensor parallelism of packed weights needs transformers 5.22 or newer, this is {transformers.__version__}; update it"
                ) from None
            use_packed_styles(model, {**self.planned, **self.stored}, plan)

    # -- sizes, for device_map="auto" ---------------------------------------------------------------------------

    def param_element_size(self, model: Any, param_name: str, param: Tensor) -> float:
        """Bytes per weight that a parameter will have."""
        if param_name in self.stored:
            stored = self.stored[param_name]
            return get_format(stored.format).bits_per_weight(stored.shape[-2 if stored.transposed else -1]) / 8
        if param_name in self.planned:
            return get_format(self.planned[param_name].format).bits_per_weight() / 8
        return float(param.element_size())

    # -- loading ------------------------------------------------------------------------------------------------

    def param_needs_quantization(self, model: Any, param_name: str, **kwargs: Any) -> bool:
        """Whether a parameter is packed: while loading a plain checkpoint, or as the packed checkpoint says."""
        return param_name in self.planned or param_name in self.stored

    def get_quantize_ops(self) -> Any:
        """The operation that transformers applies to each planned weight."""
        from .operations import Quantize

        return Quantize(self)

    def get_weight_conversions(self) -> list[Any]:
        """The operation that reads packed weights."""
        from .operations import unpacking

        return unpacking(self.quantization_config.tensors, self) if self.pre_quantized else []

    def update_weight_conversions(self, weight_conversions: list[Any], model: Any = None) -> list[Any]:
        """A packed checkpoint has the model's own names and shapes: the model's conversions do not apply."""
        return self.get_weight_conversions() if self.pre_quantized else list(weight_conversions)

    def quantize_weight(self, model: nn.Module, name: str, weight: Tensor) -> nn.Parameter | None:
        """The packed parameter for a weight as the checkpoint has it; None after an error, which is kept in `error`."""
        if self.error is not None:
            return None
        plan = self.planned[name]
        try:
            if hasattr(model.get_parameter(name), "device_mesh"):
                raise UnsupportedOperationError(
                    f"{name!r} is split over processes before it is quantized: save the packed model, and load that with fsdp_size"
                )
            matrix = matrix_of(plan.layer, weight)
            matrix = matrix.mT if plan.transposed else matrix
            config, fmt = self.quantization_config, get_format(plan.format)
            moments = self.calibration.for_weight(name, matrix.shape) if self.calibration is not None else None
            if moments is not None:
                check_weight(matrix, fmt, name)
                check_finite(matrix, name)
                packed, note = quantize_calibrated(matrix, fmt, moments, config.objective, speed=config.speed)
                self._notes[name] = f"{self._notes[name]}; {note}" if name in self._notes else note
            else:
                with workspace(self.largest):
                    packed = quantize(matrix, fmt, plan.importance, config.objective, speed=config.speed, name=name)
            return self._parameter(model, name, packed._swapped() if plan.transposed else packed)
        except (IQTorchError, ValueError) as error:
            self.error = error
            return None

    def is_on_disk(self, name: str) -> bool:
        """Whether the device map leaves a parameter on disk."""
        return bool(self.device_map) and get_device(self.device_map, name) == "disk"

    def read_weight(self, model: nn.Module, name: str, blocks: Tensor) -> nn.Parameter | None:
        """The packed parameter for the bytes of a packed checkpoint; None after an error, which is kept in `error`."""
        if self.error is not None:
            return None
        stored = self.stored[name]
        try:
            if hasattr(model.get_parameter(name), "device_mesh"):
                from .parallel import fsdp_part

                return fsdp_part(model, name, blocks, stored, stored.dtype or self.dtype)
            stored.check(name, blocks)
            dtype = stored.dtype or self.dtype
            weight = IQTensor.from_blocks(blocks, stored.format, dtype, transposed=stored.transposed, defer=True)
            return self._parameter(model, name, weight)
        except IQTorchError as error:
            self.error = error
            return None

    @staticmethod
    def _parameter(model: nn.Module, name: str, weight: IQTensor) -> nn.Parameter:
        """The parameter for a packed weight: all of it, or this process's part."""
        path, _, attribute = name.rpartition(".")
        module = model.get_submodule(path)
        if hasattr(module, SHARDS):
            from .parallel import local_part

            weight = local_part(module, attribute, weight, name)
        parameter = packed_parameter(weight)
        # transformers must not initialize it; before 5.9 it looks only at the module, which must not hide a bias that is missing, nor
        # buffers that no file holds (Gemma's scale of embeddings).
        parameter._is_hf_initialized = True  # type: ignore[attr-defined]
        others = (value for key, value in module._parameters.items() if key != attribute and value is not None)
        module._is_hf_initialized = not module._buffers and not any(value.is_meta for value in others)  # type: ignore[assignment]
        return parameter

    # -- after loading ------------------------------------------------------------------------------------------

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        if self.error is not None:
            raise self.error
        if self.on_disk:
            offload(model, self.on_disk)
        # What a process holds of each: the part of a DTensor (FSDP2), nothing of another stage's layers (pipeline parallelism).
        here = {name: getattr(p, "_local_tensor", p) for name, p in model.named_parameters(remove_duplicate=False)}
        for name in self.stored:
            if name in here and not isinstance(here[name], IQTensor):
                raise CheckpointError(f"config.json lists the packed weight {name!r}, no file of the checkpoint has it: a file is missing")
        for name, parameter in here.items():
            if self.pre_quantized and not isinstance(parameter, IQTensor) and parameter.dtype == torch.uint8:
                raise CheckpointError(f"the file has packed bytes for {name!r}, which config.json does not list; the checkpoint was edited")
        for module in model.modules():
            if isinstance(getattr(module, "weight", None), IQTensor):
                module.__class__ = PACKED_CLASS.get(type(module), type(module))
        setattr(model, NOTES, self._notes)
        model._weight_conversions = []
        use_packed_experts(model)
        count_packed_bytes()
        if self.planned:
            warn_if_kept(model)
        return model

    # -- saving -------------------------------------------------------------------------------------------------

    def get_state_dict_and_metadata(self, model: Any, safe_serialization: bool = True) -> tuple[dict[str, Tensor], dict[str, str]]:
        """The state dict with canonical bytes for packed weights; fills in `quantization_config.tensors`.

        Of a model that is split over processes, each has to call this: they put its weights together.
        """
        if hasattr(model, "_pp_stage"):
            raise UnsupportedOperationError(
                "a process of a pipeline (pp_size) has only its own layers, so it cannot save the model; load it without pp_size to save it"
            )
        fsdp = getattr(getattr(model.config, "distributed_config", None), "dp_size", 1) > 1  # transformers has cut it for FSDP2
        tensors: dict[str, StoredTensor] = {}
        blocks: dict[int, Tensor] = {}  # tied weights share their bytes, so that they are saved once
        state: dict[str, Tensor] = {}
        for name, value in model.state_dict().items():
            path, _, attribute = name.rpartition(".")
            mesh, placements = getattr(value, "device_mesh", None), getattr(value, "placements", ())  # of a DTensor (FSDP2)
            if isinstance(getattr(value, "_local_tensor", None), IQTensor):
                value = value._local_tensor
            elif isinstance(value, IQTensor):
                mesh, placements = getattr(model.get_submodule(path), SHARDS, {}).get(attribute, (None, ()))
            elif mesh is not None and (fsdp or getattr(model.config, "distributed_config", None) is None):
                value = value.full_tensor()  # what transformers does only for tensor parallelism of its own
            if isinstance(value, IQTensor):
                if value.is_meta:
                    value = load_offloaded_parameter(model, name)
                own = value._deferred()
                key = (value.packed if own is None else own).data_ptr()
                if key not in blocks:
                    blocks[key] = gather_blocks(value.to_blocks(), value.format, mesh, placements, value.transposed)
                tensors[name], value = StoredTensor.of(value, model.dtype, blocks[key]), blocks[key]
            state[name] = value
        self.quantization_config.tensors = tensors
        # Conversions back to the layout of the model's authors would take the bytes for weights: see update_weight_conversions.
        model._weight_conversions = []
        if fsdp:  # else it would leave this state and gather packed weights as if they were plain
            model.gather_sharded_state_dict_for_save = lambda _model, state_dict, *args, save_on_this_rank=True, **kwargs: (
                state_dict if save_on_this_rank else {}
            )
        return state, {}

    def is_serializable(self, safe_serialization: bool | None = None) -> bool:
        """Packed models can be saved."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Adapters can be trained on packed models."""
        return True

    @property
    def is_compileable(self) -> bool:
        """Packed models can be compiled."""
        return True

    def _dequantize(self, model: Any, dtype: torch.dtype | str | None = None) -> Any:
        dtype = getattr(torch, dtype.removeprefix("torch.")) if isinstance(dtype, str) else dtype
        plain: dict[int, nn.Parameter] = {}
        if any(hasattr(p, "_local_tensor") or hasattr(module, SHARDS) for module in model.modules() for p in module._parameters.values()):
            raise UnsupportedOperationError("a model that is split over processes cannot be dequantized: load it in one process")
        if any(isinstance(p, IQTensor) and p.is_meta for p in model.parameters()):
            raise UnsupportedOperationError("a model with weights on disk cannot be dequantized: load it without 'disk' in its device_map")
        for module in model.modules():
            for name, parameter in module._parameters.items():
                if isinstance(parameter, IQTensor):
                    if id(parameter) not in plain:
                        plain[id(parameter)] = nn.Parameter(parameter.dequantize(dtype))
                    module._parameters[name] = plain[id(parameter)]
        vars(model).pop("_weight_conversions", None)  # a model that was never loaded has none
        return model


def offload(model: Any, weights: dict[str, Any]) -> None:
    """Gives memory-mapped weights to the hooks that accelerate has put on the modules; the model gets placeholders for them."""
    for target, source in model.all_tied_weights_keys.items():
        if source in weights:
            weights.setdefault(target, weights[source])
    for module in model.modules():
        hook = getattr(module, "_hf_hook", None)
        for one in getattr(hook, "hooks", (hook,)):
            loader: Any = getattr(one, "weights_map", None)
            loader = getattr(loader, "dataset", loader)
            if hasattr(loader, "state_dict"):
                loader.state_dict.update(weights)  # which it asks before its own files
    for name, weight in weights.items():
        path, _, attribute = name.rpartition(".")
        blocks = weight.to_blocks().to("meta")
        placeholder = IQTensor.from_blocks(blocks, weight.format, weight.dtype, transposed=weight.transposed)
        model.get_submodule(path)._parameters[attribute] = packed_parameter(placeholder)


def adopt(model: Any, config: IQConfig) -> None:
    """Makes a transformers model whose weights were packed after loading one that `save_pretrained` can save."""
    quantizer = IQQuantizer(config, pre_quantized=False)
    quantizer.dtype = model.dtype
    model.hf_quantizer = quantizer
    model.is_quantized = True
    model.quantization_method = METHOD
    model.config.quantization_config = config
    use_packed_experts(model)
    count_packed_bytes()


def count_packed_bytes() -> None:
    """Has `get_memory_footprint` of transformers' models count the bytes of packed weights, not what their dtype would take."""
    plain = transformers.PreTrainedModel.get_memory_footprint
    if hasattr(plain, "__wrapped__"):
        return

    @functools.wraps(plain)
    def get_memory_footprint(self: Any, *args: Any, **kwargs: Any) -> int:
        packed = [p for p in self.parameters() if isinstance(p, IQTensor)]
        footprint: int = plain(self, *args, **kwargs)
        return footprint + sum(p.nbytes - p.numel() * p.element_size() for p in packed)

    transformers.PreTrainedModel.get_memory_footprint = get_memory_footprint


def name_patterns(names: Any) -> list[str]:
    """Few regular expressions, without groups, that match exactly a model's names up to their numbers."""
    return sorted({re.sub(r"(?<=\.)\d+(?=\\\.)", r"\\d+", re.escape(name)) for name in names})


register()
