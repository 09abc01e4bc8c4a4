"""`IQConfig`: what `from_pretrained` is asked for, and what `config.json` of a packed checkpoint says."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.utils.quantization_config import QuantizationConfigMixin

from ..calibration import Calibration
from ..encode import Objective, Speed
from ..errors import CalibrationError, CheckpointError, RecipeError, UnknownFormatError
from ..formats import Format, get_format
from ..quantize import ROUNDINGS, Rounding, check_options, check_rounding
from ..recipe import MIXES, Recipe, check_pattern
from ..tensor import IQTensor


class _Method(str):
    """A name that also looks like the enum members of other methods, whose `value` diffusers asks for."""

    value = property(str)


#: Name of the method in the registries of transformers and diffusers, and in `config.json`.
METHOD = _Method("iqtorch")
#: Version of the checkpoint layout described by `StoredTensor`.
VERSION = 1


@dataclass(frozen=True)
class StoredTensor:
    """One packed weight of a checkpoint: how to read the uint8 tensor that is stored under its parameter name.

    Attributes:
        format: name of a plain format.
        shape: shape of the parameter, `(.., N, K)`, or `(.., K, N)` if transposed. The stored bytes are `[.., N, row_bytes(K)]`.
        transposed: the model keeps the parameter transposed (some mixtures of experts).
        dtype: logical dtype, if it is not the model's.
    """

    format: str
    shape: tuple[int, ...]
    transposed: bool = False
    dtype: torch.dtype | None = None

    @classmethod
    def of(cls, weight: IQTensor, model_dtype: torch.dtype, whole: Tensor | None = None) -> StoredTensor:
        """The entry of a packed weight; `whole`: the bytes of all of it, if the weight is one process's part."""
        shape = tuple(weight.shape)
        if whole is not None:
            matrix = (whole.shape[-2], weight.format.row_length(whole.shape[-1]))
            shape = (*whole.shape[:-2], *(matrix[::-1] if weight.transposed else matrix))
        return cls(weight.format.name, shape, weight.transposed, None if weight.dtype == model_dtype else weight.dtype)

    @classmethod
    def parse(cls, name: str, entry: Any) -> StoredTensor:
        """An entry of `config.json`.

        Raises:
            CheckpointError: malformed entry, or unknown format.
        """
        try:
            shape = tuple(entry["shape"])
            if len(shape) not in (2, 3) or not all(type(size) is int and size > 0 for size in shape):
                raise CheckpointError(
                    f"the shape of {name!r} must be 2 or 3 positive integers, got {entry['shape']}; the checkpoint is damaged"
                )
            dtype = getattr(torch, entry["dtype"]) if "dtype" in entry else None
            if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
                raise CheckpointError(f"the dtype of {name!r} must be floating, got {entry['dtype']!r}; the checkpoint is damaged")
            fmt = get_format(entry["format"])
            if fmt.plain:
                raise CheckpointError(f"{name!r} cannot be stored in {fmt.name}: checkpoints hold {fmt.plain}; the checkpoint is damaged")
            return cls(fmt.name, shape, bool(entry.get("transposed", False)), dtype)
        except UnknownFormatError as error:
            raise CheckpointError(f"{name!r}: {error}; a newer iqtorch may know it") from None
        except (KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"the entry of {name!r} in quantization_config cannot be read ({error!r}): {entry!r}") from None

    def to_json(self) -> dict[str, Any]:
        """The entry as `config.json` has it: keys at their default are left out."""
        entry: dict[str, Any] = {"format": self.format, "shape": list(self.shape)}
        if self.transposed:
            entry["transposed"] = True
        if self.dtype is not None:
            entry["dtype"] = str(self.dtype).removeprefix("torch.")
        return entry

    def check(self, name: str, blocks: Tensor) -> None:
        """Raises CheckpointError for stored bytes of another dtype or size than the entry says."""
        fmt: Format = get_format(self.format)
        rows, k = (self.shape[-1], self.shape[-2]) if self.transposed else self.shape[-2:]
        wanted = (*self.shape[:-2], rows, fmt.row_bytes(k))
        if blocks.dtype != torch.uint8 or tuple(blocks.shape) != wanted:
            raise CheckpointError(
                f"{name!r} must be uint8 {list(wanted)} ({self.format} of shape {list(self.shape)}), "
                f"the file has {blocks.dtype} {list(blocks.shape)}; the checkpoint is damaged or was edited"
            )


def _check_rounding(rounding: str, calibration: object, read: bool) -> None:
    """Raises for a rounding that cannot be done while a model loads; a config that was `read` tells what was done."""
    if rounding not in ROUNDINGS:
        raise ValueError(f"rounding must be one of {list(ROUNDINGS)}, got {rounding!r}")
    if read:
        return
    if rounding == "yaqa" or not isinstance(calibration, Calibration | str | Path | None):
        raise CalibrationError(
            f"rounding={rounding!r} with calibration={calibration!r:.40} needs a model in memory: load it, then iqtorch.quantize_model; "
            "IQConfig takes rounding='ldlq' with an iqtorch.Calibration or the path of its file"
        )
    check_rounding(rounding, calibration)


def _unknown_version(version: object) -> CheckpointError:
    return CheckpointError(f"this checkpoint has layout version {version!r}, this iqtorch reads version {VERSION}; update iqtorch")


class IQConfig(QuantizationConfigMixin):
    """How to quantize a transformers model while `from_pretrained` loads it; the same choices as `iqtorch.quantize_model`.

        AutoModelForCausalLM.from_pretrained(path, quantization_config=IQConfig("iq2_kl"))

    A model saved by `save_pretrained` needs no config to load: its `config.json` holds one.

    Args:
        format: a format name; the reference's mix of that name (`Recipe.default`).
        recipe: a `Recipe`, alone; or `{regex: format or None}`: with `format`, exceptions from its mix; without, the whole
            recipe (weights without a match are kept).
        importance: mean squared activation by parameter name, an `iqtorch.Importance`, or the path of an importance file. Not stored.
        skip: regular expressions, searched in parameter names: those weights are kept.
        objective, speed: as in `iqtorch.quantize`.
        rounding: `"nearest"`, or `"ldlq"` with a calibration: error feedback, one weight at a time. Rounding that makes up for the
            layers before (batches of text, `"yaqa"`) needs a model in memory: `iqtorch.quantize_model`.
        calibration: an `iqtorch.Calibration` or the path of its file. Not stored.
        tensors: the packed weights of a checkpoint, by name (written by `save_pretrained`).
        format_version: version of the checkpoint layout.

    Raises:
        UnknownFormatError, RecipeError: unknown format, or a recipe that cannot be read.
        CheckpointError: a checkpoint of a version this iqtorch does not know.
        CalibrationError: rounding without its calibration, or one that cannot be had while loading.
    """

    def __init__(
        self,
        format: str | None = None,
        recipe: Recipe | Mapping[str, str | None] | None = None,
        importance: Mapping[str, Tensor] | str | Path | None = None,
        skip: Iterable[str] = (),
        objective: Objective = "model",
        *,
        speed: Speed = "default",
        rounding: Rounding = "nearest",
        calibration: Calibration | str | Path | None = None,
        tensors: Mapping[str, Any] | None = None,
        format_version: int = VERSION,
    ) -> None:
        if format_version != VERSION:
            raise _unknown_version(format_version)
        check_options(objective, speed)
        _check_rounding(rounding, calibration, read=tensors is not None)
        if format is None and recipe is None and tensors is None:
            raise RecipeError("IQConfig needs a format, such as IQConfig('iq4_ks'), or recipe=; iqtorch.list_formats() lists the formats")
        if format is not None and isinstance(recipe, Recipe):
            raise RecipeError(f"give a format ({format!r}) or a Recipe, not both; exceptions are a dict: recipe={{regex: format}}")
        self.quant_method = METHOD
        self.format_version = VERSION
        self.recipe = Recipe.of(recipe or {}) if format is None else Recipe.default(format).with_rules(recipe or {})  # type: ignore[arg-type]
        self.importance = importance
        self.skip = (skip,) if isinstance(skip, str) else tuple(skip)
        for pattern in self.skip:
            check_pattern(pattern)
        self.objective, self.speed, self.rounding, self.calibration = objective, speed, rounding, calibration
        self.tensors: dict[str, StoredTensor] = {}
        for name, entry in (tensors or {}).items():
            self.tensors[name] = entry if isinstance(entry, StoredTensor) else StoredTensor.parse(name, entry)

    def to_dict(self) -> dict[str, Any]:
        """What `config.json` gets; plain JSON values."""
        return {
            "quant_method": METHOD,
            "format_version": VERSION,
            "recipe": {"base": self.recipe.base, "mix": self.recipe.mix_name, "rules": [list(rule) for rule in self.recipe.rules]},
            "skip": list(self.skip),
            "objective": self.objective,
            "speed": self.speed,
            "rounding": self.rounding,
            "tensors": {name: entry.to_json() for name, entry in self.tensors.items()},
        }

    def __repr__(self) -> str:
        entries = {**self.to_dict(), "tensors": f"{len(self.tensors)} packed weights"}
        del entries["quant_method"], entries["format_version"]
        return f"IQConfig({', '.join(f'{key}={value!r}' for key, value in entries.items())})"

    def __iter__(self) -> Any:
        yield from self.to_dict().items()

    @classmethod
    def from_dict(cls, config_dict: Mapping[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """A config from the dictionary of a `config.json`, where keys that are not ours are ignored; or from the arguments of `IQConfig`.

        Raises:
            CheckpointError, RecipeError: unknown version, damaged entries.
        """
        entries = dict(config_dict)
        version = entries.get("format_version")
        if version is None and "tensors" not in entries:  # what somebody asks for, not what a checkpoint says
            config = cls(**{name: value for name, value in entries.items() if name != "quant_method"})
            return (config, kwargs) if return_unused_kwargs else config
        if version != VERSION:
            raise _unknown_version(version)
        stored, tensors = entries.get("recipe") or {}, entries.get("tensors")
        if not isinstance(stored, Mapping) or not isinstance(tensors, Mapping):
            raise CheckpointError(
                f"quantization_config needs a recipe and tensors by name, got {stored!r:.60} and {tensors!r:.60}; it is damaged"
            )
        mix = MIXES.get(stored.get("mix", "reference"))  # a mix of the user's own cannot be stored; reading needs no recipe
        recipe = Recipe(stored.get("base"), tuple((pattern, name) for pattern, name in stored.get("rules", ())), mix) if mix else Recipe()
        config = cls(
            recipe=recipe,
            skip=entries.get("skip", ()),
            objective=entries.get("objective", "model"),
            speed=entries.get("speed", "default"),
            rounding=entries.get("rounding", "nearest"),
            tensors=tensors,
        )
        return (config, kwargs) if return_unused_kwargs else config

    def __deepcopy__(self, memo: dict[int, Any]) -> IQConfig:
        # transformers copies configs freely; importance values are large and never changed.
        new = copy.copy(self)
        new.tensors = dict(self.tensors)
        return new
