"""What a model family is, and how the numbers of a file are checked."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import Tensor

from .errors import GGUFArchitectureError, GGUFMetadataError
from .reader import GGUFFile

#: (metadata key after the architecture, configuration attribute)
Keys = tuple[tuple[str, str], ...]
#: From a configuration and the number of rows: for each row of the file, its place in the model.
Order = Callable[[Any, int], Tensor]


@dataclass(frozen=True)
class Family:
    """One architecture of GGUF files and the transformers models it stands for.

    Attributes:
        arch: `general.architecture`.
        model_type: of the transformers configuration that a file becomes.
        keys: metadata keys of configuration attributes; a key that is missing leaves the attribute at its default.
        implied: attributes without a key, with the value that readers of such files assume; saving another value is refused.
        detected: attributes that follow from the presence of a tensor.
        aliases: other model types that are saved as this family (the same computation under another name).
        rows: tensors (`attn_q`) whose rows have another order in files, with a function of the configuration and the number of rows:
            for each row of the file, its place in the model.
        columns: tensors whose columns have another order, with a function of the configuration: None, or such a function of their number.
        norm_shift: files store norm weights plus this (Gemma: transformers adds 1 itself), those of state spaces excepted.
        rope: whether positions are rotary embeddings.
        rope_dims: dimensions that are rotated, from the configuration; None = the whole head.
        yarn: settings of YaRN without a key, as readers of such files have them where they differ from transformers' defaults.
        period: of the layers' attention: the last of so many sees everything, the others a sliding window; 0 = all see the same.
        turned: experts are stored transposed in the model, and rows of gate and up alternate (gpt-oss).
        merged: gate and up experts are one tensor.
        repeats: readers want an output layer of its own also where it is tied to the embedding.
        dropped: attributes that files have no place for and programs ignore; a value other than this is dropped with a warning.
        read: more attributes from a file, given those found so far.
        write: more metadata from a configuration.
        matches: tells families of one architecture apart, by metadata.
    """

    arch: str
    model_type: str
    keys: Keys
    implied: Mapping[str, Any] = field(default_factory=dict)
    detected: Mapping[str, str] = field(default_factory=dict)
    aliases: tuple[str, ...] = ()
    rows: Mapping[str, Order] = field(default_factory=dict)
    columns: Mapping[str, Callable[[Any], Callable[[int], Tensor] | None]] = field(default_factory=dict)
    norm_shift: float = 0.0
    rope: bool = True
    rope_dims: Callable[[Any], int] | None = None
    yarn: Mapping[str, Any] = field(default_factory=dict)
    period: int = 0
    turned: bool = False
    merged: bool = False
    repeats: bool = False
    dropped: Mapping[str, Any] = field(default_factory=dict)
    read: Callable[[GGUFFile, dict[str, Any]], dict[str, Any]] | None = None
    write: Callable[[Any], dict[str, Any]] | None = None
    matches: Callable[[Mapping[str, Any]], bool] | None = None


def layer_types(layers: int, period: int) -> list[str]:
    return ["full_attention" if (i + 1) % period == 0 else "sliding_attention" for i in range(layers)]


def dims(config: Any) -> int:
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def attributes(family: Family) -> set[str]:
    return {attribute for _, attribute in family.keys}


def partial_dims(config: Any) -> int:
    return int(dims(config) * (config.rope_parameters or {}).get("partial_rotary_factor", 1.0))


#: Keys whose numbers are not sizes of anything in the file.
_NO_SIZES = ("context_length", "sliding_window")
#: Keys whose numbers must not be 0, besides those of rotary embeddings.
_NOT_ZERO = ("head_count", "head_count_kv", "block_count", "embedding_length", "key_length", "key_length_swa", "value_length")


def plausible(file: GGUFFile, key: str, value: Any) -> Any:
    """A number of the metadata, if a model of that size could be in the file: a hostile one must not make a huge model."""
    largest = max([len(file.tensors), *(n for info in file.tensors.values() for n in info.shape)], default=0)
    if key.endswith("block_count"):
        largest = len(file.tensors)
    elif key.endswith(_NO_SIZES):
        largest = (1 << 31) - 1
    if not isinstance(value, (int, float)) or not math.isfinite(value) or (isinstance(value, int) and not 0 <= value <= largest):
        raise GGUFMetadataError(f"{file.path}: {key} is {value!r:.80}; no tensor of the file is larger than {largest}")
    if not value and key.endswith(_NOT_ZERO):
        raise GGUFMetadataError(f"{file.path}: {key} must not be 0")
    return value


def positive(file: GGUFFile, key: str, default: float) -> float:
    """A positive number of the metadata, as the shortest decimal that means it."""
    value = file.metadata.get(key, default)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not (math.isfinite(value) and value > 0):
        raise GGUFMetadataError(f"{file.path}: {key} is {value!r:.80}, must be a positive number")
    return float(short(value))


def check_implied(config: Any, implied: Mapping[str, Any]) -> None:
    for attribute, value in implied.items():
        found = getattr(config, attribute, value)
        if found != value:
            raise GGUFArchitectureError(
                f"{config.model_type} with {attribute}={found!r} cannot be written: programs that read such files assume {value!r}"
            )


def short(value: Any) -> Any:
    """A float32 as the shortest decimal that means it: 1e-05 instead of 9.99999974e-06."""
    return float(str(np.float32(value))) if isinstance(value, float) else value
