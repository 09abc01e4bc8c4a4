"""What no key says of Gemma's models, in files and in configurations."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

from .errors import GGUFArchitectureError
from .family import check_implied, plausible, positive
from .reader import GGUFFile
from .rope import STILL
from .writer import INT32, Typed

__all__ = ["read_gemma2", "read_gemma3", "read_gemma4", "write_gemma", "write_gemma4"]


def read_gemma3(file: GGUFFile, config: dict[str, Any]) -> dict[str, Any]:
    rope = dict(config["rope_parameters"])
    local = positive(file, "gemma3.rope.freq_base_swa", 10000.0)
    return {
        "rope_parameters": {"full_attention": rope, "sliding_attention": {"rope_type": "default", "rope_theta": local}},
        "query_pre_attn_scalar": _gemma_scalar(config),
    }


def _gemma_scalar(config: Mapping[str, Any]) -> int:
    """The 27B models scale queries by the width per head, all others by the head's size; readers go by the number of layers."""
    wide = (config["model_type"], config["num_hidden_layers"]) in (("gemma2", 46), ("gemma3_text", 62))
    return int(config["hidden_size"] // config["num_attention_heads"] if wide else config["head_dim"])


def read_gemma2(file: GGUFFile, config: dict[str, Any]) -> dict[str, Any]:
    return {"query_pre_attn_scalar": _gemma_scalar(config)}


def write_gemma(config: Any) -> dict[str, Any]:
    check_implied(config, {"query_pre_attn_scalar": _gemma_scalar(config.to_dict())})
    if config.model_type == "gemma3_text":
        return {"rope.freq_base_swa": float(config.rope_parameters["sliding_attention"]["rope_theta"])}
    return {}


def read_gemma4(file: GGUFFile, config: dict[str, Any]) -> dict[str, Any]:
    meta, layers = file.metadata, config["num_hidden_layers"]
    sliding, kv, width = (
        _by_layer(file, f"gemma4.{key}", layers)
        for key in ("attention.sliding_window_pattern", "attention.head_count_kv", "feed_forward_length")
    )
    head, head_swa = (
        plausible(file, f"gemma4.attention.{key}", meta.get(f"gemma4.attention.{key}", 0)) for key in ("key_length", "key_length_swa")
    )
    own = layers - config.get("num_kv_shared_layers", 0)  # layers after these take keys and values of others
    wide = own < layers and width == [width[0]] * own + [2 * width[0]] * (layers - own)
    kinds = set(zip(sliding, kv, strict=True))  # of layers, each with its number of key heads
    if {bool(kind) for kind, _ in kinds} != {True, False} or len(kinds) != 2 or sliding[-1] or not (wide or len(set(width)) == 1):
        raise GGUFArchitectureError(f"{file.path}: layers of gemma4 differ in a way that transformers does not have; pass config=")
    if meta.get("gemma4.rope.dimension_count_swa", head_swa) != head_swa:
        raise GGUFArchitectureError(f"{file.path}: gemma4 with local heads that rotate in part; pass config=")
    cap = "gemma4.final_logit_softcapping"  # 30 is what readers assume
    theta = {key: positive(file, f"gemma4.rope.{key}", usual) for key, usual in (("freq_base", 1e6), ("freq_base_swa", 1e4))}
    rotated = (
        file.data("rope_freqs.weight").float().flatten() < STILL if "rope_freqs.weight" in file.tensors else torch.ones(1, device="cpu")
    )
    pairs, share = int(rotated.sum()), float(rotated.double().mean())
    if share * rotated.numel() < pairs:
        share = math.nextafter(share, 1.0)  # transformers multiplies again, and rounds down
    per_layer = file.tensors.get("per_layer_token_embd.weight")
    return {
        "layer_types": ["sliding_attention" if kind else "full_attention" for kind in sliding],
        "head_dim": head_swa, "global_head_dim": head,
        "num_key_value_heads": kv[sliding.index(True)], "num_global_key_value_heads": kv[sliding.index(False)],
        "attention_k_eq_v": any(f"blk.{i}.attn_v.weight" not in file.tensors for i in range(own) if not sliding[i]),
        "intermediate_size": width[0], "use_double_wide_mlp": wide,
        "final_logit_softcapping": positive(file, cap, 30.0) if meta.get(cap, 30.0) != 0 else None,
        "rope_parameters": {
            "full_attention": {
                "rope_type": "proportional", "rope_theta": theta["freq_base"], "partial_rotary_factor": share,
            },
            "sliding_attention": {"rope_type": "default", "rope_theta": theta["freq_base_swa"]},
        },
        **({"vocab_size_per_layer_input": per_layer.shape[0]} if per_layer else {}),
    }  # fmt: skip


def _by_layer(file: GGUFFile, key: str, layers: int) -> list[Any]:
    """A number, or a list of one for each layer, as a list."""
    value = file.metadata.get(key, 0)
    values = value if isinstance(value, list) else [value] * layers
    if len(values) != layers:
        raise GGUFArchitectureError(f"{file.path}: {key} has {len(values)} values for {layers} layers")
    return [n if isinstance(n, bool) else plausible(file, key, n) for n in values]


def write_gemma4(config: Any) -> dict[str, Any]:
    check_implied(config, {"use_bidirectional_attention": None} if config.use_bidirectional_attention == "all" else {})
    kinds = [kind == "sliding_attention" for kind in config.layer_types]
    layers = [config.per_layer_config[i] for i in range(config.num_hidden_layers)]
    rope, own = config.rope_parameters, config.num_hidden_layers - config.num_kv_shared_layers
    for kind, wanted in (("full_attention", "proportional"), ("sliding_attention", "default")):
        if kind not in config.layer_types or rope[kind].get("rope_type") != wanted or rope[kind].get("factor", 1.0) != 1.0:
            raise GGUFArchitectureError(f"{config.model_type} with layers {kind!r} of rope {rope.get(kind)!r} has no GGUF form")
    width = [config.intermediate_size * (1 + (config.use_double_wide_mlp and i >= own)) for i in range(config.num_hidden_layers)]
    swa, full = layers[kinds.index(True)], layers[kinds.index(False)]
    out = {f"attention.{part}_length{end}": layer.head_dim for part in ("key", "value") for end, layer in (("", full), ("_swa", swa))}
    return out | {
        "attention.sliding_window_pattern": kinds, "attention.head_count_kv": Typed([layer.num_key_value_heads for layer in layers], INT32),
        "feed_forward_length": Typed(width, INT32) if config.use_double_wide_mlp else config.intermediate_size,
        "final_logit_softcapping": float(config.final_logit_softcapping or 0.0),
        "rope.dimension_count": full.head_dim, "rope.dimension_count_swa": swa.head_dim,
        "rope.freq_base": float(rope["full_attention"]["rope_theta"]), "rope.freq_base_swa": float(rope["sliding_attention"]["rope_theta"]),
    }  # fmt: skip
