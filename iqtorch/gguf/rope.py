"""Rotary embeddings: what configurations and files say of them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from .errors import GGUFArchitectureError, GGUFMetadataError
from .family import Family, dims, partial_dims, plausible, positive, short
from .reader import GGUFFile

__all__ = ["ROPE_TENSORS", "llama3_factors", "read_rope", "rope_tensors", "write_rope"]


def read_rope(family: Family, file: GGUFFile, config: dict[str, Any]) -> dict[str, Any]:
    prefix = f"{family.arch}.rope."
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": positive(file, prefix + "freq_base", 10000.0)}
    kind = file.metadata.get(prefix + "scaling.type", "none")
    if "rope_factors_long.weight" in file.tensors:
        kind = "longrope"
    factor = positive(file, prefix + "scaling.factor", 1.0)
    if kind == "linear" and factor != 1.0:
        rope |= {"rope_type": "linear", "factor": factor}
    elif kind == "yarn":
        rope |= {"rope_type": "yarn", "factor": factor, **family.yarn}
    elif kind == "longrope":
        rope |= {"rope_type": "longrope"}
        for part in ("long", "short"):
            rope[f"{part}_factor"] = [short(v) for v in file.data(f"rope_factors_{part}.weight").float().tolist()]
        if prefix + "scaling.attn_factor" in file.metadata:
            rope["attention_factor"] = positive(file, prefix + "scaling.attn_factor", 1.0)
    elif kind not in ("none", "linear"):
        raise GGUFArchitectureError(f"{file.path}: rope scaling {kind!r} has no transformers form here; pass config=")
    if kind in ("yarn", "longrope") and prefix + "scaling.original_context_length" in file.metadata:
        rope["original_max_position_embeddings"] = int(positive(file, prefix + "scaling.original_context_length", 1))
    if "rope_freqs.weight" in file.tensors:
        rope |= _llama3_from_factors(file, rope["rope_theta"], config)
    if family.rope_dims is partial_dims and prefix + "dimension_count" in file.metadata:
        head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
        dims = plausible(file, prefix + "dimension_count", file.metadata[prefix + "dimension_count"])
        if not 0 < dims <= head_dim:
            raise GGUFMetadataError(f"{file.path}: {prefix}dimension_count is {dims}, a head has {head_dim} dimensions")
        rope["partial_rotary_factor"] = dims / head_dim
    return {"rope_parameters": rope}


def llama3_factors(theta: float, dims: int, rope: Mapping[str, Any]) -> torch.Tensor:
    """float32 `[dims / 2]`: what the frequencies of Llama 3.1's rope are divided by (files keep it as `rope_freqs.weight`)."""
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    wavelength = 2 * np.pi * theta ** (np.arange(0, dims, 2) / dims)
    smooth = np.clip((rope["original_max_position_embeddings"] / wavelength - low) / (high - low), 0, 1)
    return torch.tensor(1 / ((1 - smooth) / rope["factor"] + smooth), dtype=torch.float32, device="cpu")


def _llama3_from_factors(file: GGUFFile, theta: float, config: dict[str, Any]) -> dict[str, Any]:
    """The four numbers behind `rope_freqs.weight`. The file lacks them; Llama 3.1, 3.2 and 3.3 share all but the factor."""
    stored = file.data("rope_freqs.weight").float()
    rope = {
        "rope_type": "llama3", "factor": short(float(stored.max())), "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }  # fmt: skip
    if not torch.allclose(llama3_factors(theta, 2 * stored.numel(), rope), stored, rtol=1e-4):
        raise GGUFArchitectureError(f"{file.path}: rope_freqs.weight is not that of Llama 3.1; pass config= with its rope_parameters")
    return rope


def write_rope(family: Family, config: Any) -> dict[str, Any]:
    rope = dict(config.rope_parameters or {})
    if "full_attention" in rope:
        rope = rope["full_attention"]
    kind = rope.get("rope_type", "default")
    if kind not in ("default", "linear", "yarn", "longrope", "llama3"):
        raise GGUFArchitectureError(f"rope type {kind!r} of {config.model_type} has no GGUF form")
    if rope.get("partial_rotary_factor", 1.0) != 1.0 and family.rope_dims is None:
        raise GGUFArchitectureError(
            f"{config.model_type} with partial_rotary_factor={rope['partial_rotary_factor']!r} cannot be written: "
            f"programs that read {family.arch!r} files rotate whole heads"
        )
    out: dict[str, Any] = {
        "rope.freq_base": float(rope.get("rope_theta", 10000.0)),
        "rope.dimension_count": (family.rope_dims or dims)(config),
    }
    if kind in ("linear", "yarn"):
        out |= {"rope.scaling.type": kind, "rope.scaling.factor": float(rope["factor"])}
    if kind == "yarn":
        _check_yarn(family, config, rope)
    if kind in ("yarn", "longrope") and rope.get("original_max_position_embeddings"):
        out["rope.scaling.original_context_length"] = int(rope["original_max_position_embeddings"])
    if kind == "longrope" and rope.get("attention_factor"):
        out["rope.scaling.attn_factor"] = float(rope["attention_factor"])
    return out


def _check_yarn(family: Family, config: Any, rope: Mapping[str, Any]) -> None:
    """Programs that read files of most architectures know YaRN by its factor and length alone."""
    natural = 1 + 0.1 * math.log(max(rope["factor"], 1.0))
    expected = {"beta_fast": 32, "beta_slow": 1, "truncate": True, **family.yarn}
    if family.arch == "deepseek2":  # `_write_deepseek` checks mscale
        expected["attention_factor"] = 1.0
    else:
        expected |= {"attention_factor": natural, "mscale": None, "mscale_all_dim": None}
    for key, value in expected.items():
        found = rope.get(key)
        if found is None or found == value or (isinstance(value, float) and math.isclose(found, value, rel_tol=1e-6)):
            continue
        raise GGUFArchitectureError(
            f"{config.model_type} with rope_parameters[{key!r}]={found!r} cannot be written: programs that read {family.arch!r} files "
            f"assume {value!r}"
        )


def rope_tensors(config: Any) -> dict[str, torch.Tensor]:
    """Tensors that files hold for rotary embeddings that are no plain powers."""
    rope = dict(getattr(config, "rope_parameters", None) or {})
    if rope.get("rope_type") == "llama3":
        return {"rope_freqs.weight": llama3_factors(rope["rope_theta"], dims(config), rope)}
    if (full := rope.get("full_attention", {})).get("rope_type") == "proportional":
        half = config.per_layer_config[config.layer_types.index("full_attention")].head_dim // 2
        turning = int(full.get("partial_rotary_factor", 1.0) * half)
        return {"rope_freqs.weight": torch.tensor([1.0] * turning + [STILL] * (half - turning), dtype=torch.float32, device="cpu")}
    if rope.get("rope_type") == "longrope":
        return {
            f"rope_factors_{part}.weight": torch.tensor(rope[f"{part}_factor"], dtype=torch.float32, device="cpu")
            for part in ("long", "short")
        }
    return {}


#: What divides the frequency of dimensions that are not rotated.
STILL = 1e30
#: Tensors that `rope_tensors` writes and `read_rope` reads: no parameters of a model.
ROPE_TENSORS = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")
