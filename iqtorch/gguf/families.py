"""Model families: how a transformers configuration and a GGUF file say the same things.

A family is a record: which metadata key is which configuration attribute, and what is done to which tensors on the way. Both
directions follow from it. Sources: llama.cpp's `convert_hf_to_gguf.py` and ik_llama.cpp's `src/llama-hparams.cpp` for what the
keys mean to the programs that read them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from .errors import GGUFArchitectureError, GGUFMetadataError
from .reader import GGUFFile
from .writer import Typed

__all__ = ["FAMILIES", "Family", "config_from_gguf", "family_of_config", "family_of_file", "metadata_from_config"]

#: (metadata key after the architecture, configuration attribute)
Keys = tuple[tuple[str, str], ...]

_COMMON: Keys = (
    ("context_length", "max_position_embeddings"),
    ("embedding_length", "hidden_size"),
    ("block_count", "num_hidden_layers"),
    ("feed_forward_length", "intermediate_size"),
    ("attention.head_count", "num_attention_heads"),
    ("attention.head_count_kv", "num_key_value_heads"),
    ("attention.layer_norm_rms_epsilon", "rms_norm_eps"),
    ("vocab_size", "vocab_size"),
)
_HEADS: Keys = (("attention.key_length", "head_dim"), ("attention.value_length", "head_dim"))
_DENSE = (*_COMMON, *_HEADS)
_EXPERTS: Keys = (("expert_used_count", "num_experts_per_tok"), ("expert_feed_forward_length", "moe_intermediate_size"))
_TOKENS: Keys = (
    ("tokenizer.ggml.bos_token_id", "bos_token_id"),
    ("tokenizer.ggml.eos_token_id", "eos_token_id"),
    ("tokenizer.ggml.padding_token_id", "pad_token_id"),
)


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
        rotated: rows of q and k are in the order of llama.cpp's interleaved rotary embedding: a permutation within each head.
        norm_shift: files store norm weights plus this (Gemma: transformers adds 1 itself).
        rope_dims: dimensions that are rotated, from the configuration; None = the whole head.
        yarn: settings of YaRN without a key, as readers of such files have them where they differ from transformers' defaults.
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
    rotated: bool = False
    norm_shift: float = 0.0
    rope_dims: Callable[[Any], int] | None = None
    yarn: Mapping[str, Any] = field(default_factory=dict)
    read: Callable[[GGUFFile, dict[str, Any]], dict[str, Any]] | None = None
    write: Callable[[Any], dict[str, Any]] | None = None
    matches: Callable[[Mapping[str, Any]], bool] | None = None


def _dims(config: Any) -> int:
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def _partial_dims(config: Any) -> int:
    return int(_dims(config) * (config.rope_parameters or {}).get("partial_rotary_factor", 1.0))


# -- rotary embeddings ---------------------------------------------------------------------------------------


def _read_rope(family: Family, file: GGUFFile, config: dict[str, Any]) -> dict[str, Any]:
    prefix = f"{family.arch}.rope."
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": _positive(file, prefix + "freq_base", 10000.0)}
    kind = file.metadata.get(prefix + "scaling.type", "none")
    if "rope_factors_long.weight" in file.tensors:
        kind = "longrope"
    factor = _positive(file, prefix + "scaling.factor", 1.0)
    if kind == "linear" and factor != 1.0:
        rope |= {"rope_type": "linear", "factor": factor}
    elif kind == "yarn":
        rope |= {"rope_type": "yarn", "factor": factor, **family.yarn}
    elif kind == "longrope":
        rope |= {"rope_type": "longrope"}
        for part in ("long", "short"):
            rope[f"{part}_factor"] = [_short(v) for v in file.data(f"rope_factors_{part}.weight").float().tolist()]
        if prefix + "scaling.attn_factor" in file.metadata:
            rope["attention_factor"] = _positive(file, prefix + "scaling.attn_factor", 1.0)
    elif kind not in ("none", "linear"):
        raise GGUFArchitectureError(f"{file.path}: rope scaling {kind!r} has no transformers form here; pass config=")
    if kind in ("yarn", "longrope") and prefix + "scaling.original_context_length" in file.metadata:
        rope["original_max_position_embeddings"] = int(_positive(file, prefix + "scaling.original_context_length", 1))
    if "rope_freqs.weight" in file.tensors:
        rope |= _llama3_from_factors(file, rope["rope_theta"], config)
    if family.rope_dims is _partial_dims and prefix + "dimension_count" in file.metadata:
        head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
        dims = _plausible(file, prefix + "dimension_count", file.metadata[prefix + "dimension_count"])
        if not 0 < dims <= head_dim:
            raise GGUFMetadataError(f"{file.path}: {prefix}dimension_count is {dims}, a head has {head_dim} dimensions")
        rope["partial_rotary_factor"] = dims / head_dim
    return {"rope_parameters": rope}


def llama3_factors(theta: float, dims: int, rope: Mapping[str, Any]) -> torch.Tensor:
    """float32 `[dims / 2]`: what the frequencies of Llama 3.1's rope are divided by (files keep it as `rope_freqs.weight`)."""
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    wavelength = 2 * np.pi * theta ** (np.arange(0, dims, 2) / dims)
    smooth = np.clip((rope["original_max_position_embeddings"] / wavelength - low) / (high - low), 0, 1)
    return torch.tensor(1 / ((1 - smooth) / rope["factor"] + smooth), dtype=torch.float32)


def _llama3_from_factors(file: GGUFFile, theta: float, config: dict[str, Any]) -> dict[str, Any]:
    """The four numbers behind `rope_freqs.weight`. The file lacks them; Llama 3.1, 3.2 and 3.3 share all but the factor."""
    stored = file.data("rope_freqs.weight").float()
    rope = {
        "rope_type": "llama3", "factor": _short(float(stored.max())), "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }  # fmt: skip
    if not torch.allclose(llama3_factors(theta, 2 * stored.numel(), rope), stored, rtol=1e-4):
        raise GGUFArchitectureError(f"{file.path}: rope_freqs.weight is not that of Llama 3.1; pass config= with its rope_parameters")
    return rope


def _write_rope(family: Family, config: Any) -> dict[str, Any]:
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
        "rope.dimension_count": (family.rope_dims or _dims)(config),
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
    rope = dict(config.rope_parameters or {})
    if rope.get("rope_type") == "llama3":
        return {"rope_freqs.weight": llama3_factors(rope["rope_theta"], _dims(config), rope)}
    if rope.get("rope_type") == "longrope":
        return {f"rope_factors_{part}.weight": torch.tensor(rope[f"{part}_factor"], dtype=torch.float32) for part in ("long", "short")}
    return {}


#: Tensors that `rope_tensors` writes and `_read_rope` reads: no parameters of a model.
ROPE_TENSORS = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")


# -- Gemma ---------------------------------------------------------------------------------------------------


def _read_gemma3(file: GGUFFile, config: dict[str, Any]) -> dict[str, Any]:
    rope = dict(config["rope_parameters"])
    local = _positive(file, "gemma3.rope.freq_base_swa", 10000.0)
    return {
        "rope_parameters": {"full_attention": rope, "sliding_attention": {"rope_type": "default", "rope_theta": local}},
        "layer_types": _gemma3_layers(config["num_hidden_layers"]),
        "query_pre_attn_scalar": _gemma_scalar(config),
    }


def _gemma3_layers(n: int) -> list[str]:
    return ["full_attention" if (i + 1) % 6 == 0 else "sliding_attention" for i in range(n)]


def _gemma2_layers(n: int) -> list[str]:
    return ["sliding_attention" if i % 2 == 0 else "full_attention" for i in range(n)]


def _gemma_scalar(config: Mapping[str, Any]) -> int:
    """The 27B models scale queries by the width per head, all others by the head's size; readers go by the number of layers."""
    wide = (config["model_type"], config["num_hidden_layers"]) in (("gemma2", 46), ("gemma3_text", 62))
    return int(config["hidden_size"] // config["num_attention_heads"] if wide else config["head_dim"])


def _read_gemma2(file: GGUFFile, config: dict[str, Any]) -> dict[str, Any]:
    return {"query_pre_attn_scalar": _gemma_scalar(config), "layer_types": _gemma2_layers(config["num_hidden_layers"])}


def _write_gemma(config: Any) -> dict[str, Any]:
    expected = {
        "query_pre_attn_scalar": _gemma_scalar(config.to_dict()),
        "layer_types": (_gemma3_layers if config.model_type == "gemma3_text" else _gemma2_layers)(config.num_hidden_layers),
    }
    _check_implied(config, expected)
    if config.model_type == "gemma3_text":
        return {"rope.freq_base_swa": float(config.rope_parameters["sliding_attention"]["rope_theta"])}
    return {}


# -- DeepSeek and GLM ----------------------------------------------------------------------------------------

#: `expert_gating_func`
_SOFTMAX, _SIGMOID = 1, 2

_ROUTED: Keys = (
    ("expert_count", "n_routed_experts"),
    ("expert_shared_count", "n_shared_experts"),
    ("expert_weights_scale", "routed_scaling_factor"),
    ("expert_weights_norm", "norm_topk_prob"),
    ("expert_group_count", "n_group"),
    ("expert_group_used_count", "topk_group"),
    ("leading_dense_block_count", "first_k_dense_replace"),
)
_DEEPSEEK: Keys = (
    *_COMMON, *_EXPERTS, *_ROUTED,
    ("attention.q_lora_rank", "q_lora_rank"), ("attention.kv_lora_rank", "kv_lora_rank"),
    ("rope.dimension_count", "qk_rope_head_dim"),
)  # fmt: skip


_LOG_MULTIPLIER = "deepseek2.rope.scaling.yarn_log_multiplier"


def _read_deepseek(file: GGUFFile, config: dict[str, Any]) -> dict[str, Any]:
    meta, heads = file.metadata, config["num_attention_heads"]
    # files that keep the merged heads of MLA name the sizes of a single head apart
    key = meta.get("deepseek2.attention.key_length_mla", meta.get("deepseek2.attention.key_length"))
    value = meta.get("deepseek2.attention.value_length_mla", meta.get("deepseek2.attention.value_length"))
    if key is None or value is None:
        raise GGUFArchitectureError(f"{file.path}: deepseek2.attention.key_length and value_length are missing; pass config=")
    rope = dict(config["rope_parameters"])
    if rope["rope_type"] == "yarn":
        # Such models scale the scores, not the rotation. Files hold a tenth of the factor of the logarithm.
        if _LOG_MULTIPLIER in meta:
            scale = _short(_positive(file, _LOG_MULTIPLIER, 0.1) / 0.1)
            rope |= {"mscale": scale, "mscale_all_dim": scale}
        else:
            rope["attention_factor"] = 1.0
    return {
        "qk_nope_head_dim": key - config["qk_rope_head_dim"], "v_head_dim": value, "num_key_value_heads": heads,
        "q_lora_rank": config.get("q_lora_rank") if "blk.0.attn_q_a.weight" in file.tensors else None,
        "rope_parameters": rope,
    }  # fmt: skip


def _write_deepseek(config: Any) -> dict[str, Any]:
    out: dict[str, Any] = {
        "attention.key_length": config.qk_nope_head_dim + config.qk_rope_head_dim,
        "attention.value_length": config.v_head_dim,
        "expert_gating_func": _SIGMOID if config.model_type == "deepseek_v3" else _SOFTMAX,
    }
    rope = config.rope_parameters or {}
    if rope.get("rope_type") == "yarn":
        scales = rope.get("mscale") or 0.0, rope.get("mscale_all_dim") or 0.0
        if scales[0] != scales[1] or (not scales[1] and rope.get("attention_factor") != 1.0):
            raise GGUFArchitectureError(
                f"{config.model_type} with YaRN's mscale={rope.get('mscale')!r} and mscale_all_dim={rope.get('mscale_all_dim')!r} cannot "
                f"be written: programs that read 'deepseek2' files assume that they are equal"
            )
        if scales[1]:
            out["rope.scaling.yarn_log_multiplier"] = 0.1 * scales[1]
    return out


def metadata_of_halves(family: Family, config: Any) -> dict[str, Any]:
    """What files say whose `attn_kv_b` is in two halves: there is one key-value head, of the latent size; single heads are named apart."""
    latent = config.kv_lora_rank
    return {
        f"{family.arch}.attention.{key}": value
        for key, value in (
            ("head_count_kv", 1),
            ("key_length", latent + config.qk_rope_head_dim),
            ("value_length", latent),
            ("key_length_mla", config.qk_nope_head_dim + config.qk_rope_head_dim),
            ("value_length_mla", config.v_head_dim),
        )
    }


def _gated_by(function: int) -> Callable[[Mapping[str, Any]], bool]:
    return lambda meta: meta.get("deepseek2.expert_gating_func", _SOFTMAX) == function


def _write_glm4_moe(config: Any) -> dict[str, Any]:
    return {"expert_gating_func": _SIGMOID, "nextn_predict_layers": 0}


# -- the table -----------------------------------------------------------------------------------------------

_QWEN_MOE = {"hidden_act": "silu", "decoder_sparse_step": 1, "mlp_only_layers": [], "use_sliding_window": False}
_BIASES = {"attention_bias": "blk.0.attn_q.bias"}

FAMILIES: tuple[Family, ...] = (
    Family(
        "llama", "llama", _DENSE, implied={"hidden_act": "silu"}, detected={**_BIASES, "mlp_bias": "blk.0.ffn_up.bias"},
        aliases=("mistral",), rotated=True, matches=lambda meta: not meta.get("llama.expert_count"),
    ),
    Family(
        "llama", "mixtral",
        (*_DENSE, ("expert_count", "num_local_experts"), ("expert_used_count", "num_experts_per_tok")),
        implied={"hidden_act": "silu"}, rotated=True, matches=lambda meta: bool(meta.get("llama.expert_count")),
    ),
    Family("qwen2", "qwen2", _DENSE, implied={"hidden_act": "silu", "use_sliding_window": False}),
    Family("qwen3", "qwen3", _DENSE, implied={"hidden_act": "silu", "use_sliding_window": False}, detected=_BIASES),
    Family(
        "qwen2moe", "qwen2_moe",
        (*_DENSE, *_EXPERTS, ("expert_count", "num_experts"), ("expert_shared_feed_forward_length", "shared_expert_intermediate_size")),
        implied={"norm_topk_prob": False, **_QWEN_MOE},
    ),
    Family(
        "qwen3moe", "qwen3_moe", (*_DENSE, *_EXPERTS, ("expert_count", "num_experts")),
        implied={"norm_topk_prob": True, **_QWEN_MOE},
        detected=_BIASES,
    ),
    Family("gemma", "gemma", _DENSE, implied={"tie_word_embeddings": True}, norm_shift=1.0),
    Family(
        "gemma2", "gemma2",
        (
            *_DENSE, ("attention.sliding_window", "sliding_window"), ("attn_logit_softcapping", "attn_logit_softcapping"),
            ("final_logit_softcapping", "final_logit_softcapping"),
        ),
        implied={"hidden_activation": "gelu_pytorch_tanh", "tie_word_embeddings": True}, norm_shift=1.0,
        read=_read_gemma2, write=_write_gemma,
    ),
    Family(
        "gemma3", "gemma3_text", (*_DENSE, ("attention.sliding_window", "sliding_window")),
        implied={"hidden_activation": "gelu_pytorch_tanh", "attn_logit_softcapping": None, "final_logit_softcapping": None},
        norm_shift=1.0, read=_read_gemma3, write=_write_gemma,
    ),
    Family(
        "phi3", "phi3", (*_COMMON, ("attention.sliding_window", "sliding_window")), implied={"hidden_act": "silu"}, rope_dims=_partial_dims,
    ),
    Family(
        "deepseek2", "deepseek_v3", _DEEPSEEK, implied={"hidden_act": "silu", "rope_interleave": True},
        rope_dims=lambda config: config.qk_rope_head_dim, read=_read_deepseek, write=_write_deepseek, matches=_gated_by(_SIGMOID),
    ),
    Family(
        "deepseek2", "deepseek_v2", _DEEPSEEK, implied={"hidden_act": "silu"},
        rope_dims=lambda config: config.qk_rope_head_dim, read=_read_deepseek, write=_write_deepseek, matches=_gated_by(_SOFTMAX),
    ),
    Family(
        "glm4moe", "glm4_moe", (*_DENSE, *_EXPERTS, *_ROUTED), implied={"hidden_act": "silu"},
        detected={**_BIASES, "use_qk_norm": "blk.0.attn_q_norm.weight"}, rope_dims=_partial_dims,
        write=_write_glm4_moe,
    ),
)  # fmt: skip


# -- both directions -----------------------------------------------------------------------------------------


def family_of_file(file: GGUFFile) -> Family:
    """Family of a file, by its `general.architecture`.

    Raises:
        GGUFArchitectureError: unknown; the message lists the known ones.
    """
    arch = file.metadata.get("general.architecture")
    for family in FAMILIES:
        if family.arch == arch and (family.matches is None or family.matches(file.metadata)):
            return family
    known = ", ".join(dict.fromkeys(family.arch for family in FAMILIES))
    raise GGUFArchitectureError(f"{file.path}: architecture {arch!r} is not among {known}; pass config= (the folder of the original model)")


def family_of_config(config: Any) -> Family:
    """Family of a transformers configuration.

    Raises:
        GGUFArchitectureError: unknown; the message lists the known ones.
    """
    for family in FAMILIES:
        if config.model_type == family.model_type or config.model_type in family.aliases:
            return family
    known = ", ".join(name for family in FAMILIES for name in (family.model_type, *family.aliases))
    raise GGUFArchitectureError(f"models of type {config.model_type!r} cannot be written as GGUF files; known are {known}")


def config_from_gguf(file: GGUFFile) -> dict[str, Any]:
    """Attributes of the transformers configuration (with `model_type`) that a file's metadata and tensors describe.

    Raises:
        GGUFArchitectureError: an architecture that is not known, or a key that it needs is missing.
    """
    family = family_of_file(file)
    config: dict[str, Any] = {"model_type": family.model_type, **family.implied}
    for key, attribute in family.keys:
        value = file.metadata.get(f"{family.arch}.{key}")
        if isinstance(value, list):
            if len(set(map(str, value))) != 1:
                raise GGUFArchitectureError(f"{file.path}: {family.arch}.{key} differs between layers; pass config=")
            value = value[0]
        if value is not None:
            config[attribute] = _short(_plausible(file, f"{family.arch}.{key}", value))
    missing = [f"{family.arch}.{key}" for key, attribute in _COMMON[:5] if attribute not in config and attribute != "intermediate_size"]
    if missing:
        raise GGUFArchitectureError(f"{file.path}: {', '.join(missing)} missing in the metadata; pass config=")
    # files count the layers that predict further tokens, transformers does not
    extra = _plausible(file, f"{family.arch}.nextn_predict_layers", file.metadata.get(f"{family.arch}.nextn_predict_layers", 0))
    config["num_hidden_layers"] -= min(extra, config["num_hidden_layers"] - 1)
    config.setdefault("num_key_value_heads", config["num_attention_heads"])
    if any(attribute == "head_dim" for _, attribute in family.keys):
        config.setdefault("head_dim", config["hidden_size"] // config["num_attention_heads"])
    if "token_embd.weight" in file.tensors:
        config["vocab_size"] = file.tensors["token_embd.weight"].shape[0]
    config["tie_word_embeddings"] = "output.weight" not in file.tensors
    for attribute, tensor in family.detected.items():
        config[attribute] = tensor in file.tensors
    for key, attribute in _TOKENS:
        config[attribute] = file.metadata.get(key)
    config |= _read_rope(family, file, config)
    if family.read is not None:
        config |= family.read(file, config)
    return config


#: Keys whose numbers are not sizes of anything in the file.
_NO_SIZES = ("context_length", "sliding_window")
#: Keys whose numbers must not be 0, besides those of rotary embeddings.
_NOT_ZERO = ("head_count", "head_count_kv", "block_count", "embedding_length", "key_length", "value_length")


def _plausible(file: GGUFFile, key: str, value: Any) -> Any:
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


def _positive(file: GGUFFile, key: str, default: float) -> float:
    """A positive number of the metadata, as the shortest decimal that means it."""
    value = file.metadata.get(key, default)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not (math.isfinite(value) and value > 0):
        raise GGUFMetadataError(f"{file.path}: {key} is {value!r:.80}, must be a positive number")
    return float(_short(value))


def metadata_from_config(family: Family, config: Any) -> dict[str, Any]:
    """Metadata of a configuration, under full keys; the inverse of `config_from_gguf`.

    Raises:
        GGUFArchitectureError: the configuration has a setting that files of this architecture cannot express.
    """
    _check_implied(config, family.implied)
    out: dict[str, Any] = {}
    for key, attribute in family.keys:
        value = getattr(config, attribute, None)
        if value is None and attribute == "head_dim":
            value = _dims(config)
        if value is not None:
            out[key] = value
    out |= _write_rope(family, config)
    if family.write is not None:
        out |= family.write(config)
    full = {f"{family.arch}.{key}": value for key, value in out.items()}
    for key, attribute in _TOKENS:
        value = getattr(config, attribute, None)
        if isinstance(value, list):  # files have room for one
            value = value[0] if value else None
        if value is not None:
            full[key] = Typed(value, 4)
    return full


def _check_implied(config: Any, implied: Mapping[str, Any]) -> None:
    for attribute, value in implied.items():
        found = getattr(config, attribute, value)
        if found != value:
            raise GGUFArchitectureError(
                f"{config.model_type} with {attribute}={found!r} cannot be written: programs that read such files assume {value!r}"
            )


def _short(value: Any) -> Any:
    """A float32 as the shortest decimal that means it: 1e-05 instead of 9.99999974e-06."""
    return float(str(np.float32(value))) if isinstance(value, float) else value
