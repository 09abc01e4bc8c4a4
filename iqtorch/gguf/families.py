"""Model families: how a transformers configuration and a GGUF file say the same things.

A family is a record: which metadata key is which configuration attribute, and what is done to which tensors on the way. Both
directions follow from it. Sources: llama.cpp's `convert_hf_to_gguf.py` and ik_llama.cpp's `src/llama-hparams.cpp` for what the
keys mean to the programs that read them.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any

from .errors import GGUFArchitectureError
from .family import Family, Keys, check_implied, dims, layer_types, partial_dims, plausible, positive, short
from .reader import GGUFFile
from .rope import read_rope, write_rope
from .writer import Typed

__all__ = ["FAMILIES", "Family", "config_from_gguf", "family_of_config", "family_of_file", "metadata_from_config"]

logger = logging.getLogger("iqtorch")

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
#: The same of models whose norms subtract the mean.
_CENTRED: Keys = _COMMON[:6] + _COMMON[7:]
_HEADS: Keys = (("attention.key_length", "head_dim"), ("attention.value_length", "head_dim"))
_DENSE = (*_COMMON, *_HEADS)
_EXPERTS: Keys = (("expert_used_count", "num_experts_per_tok"), ("expert_feed_forward_length", "moe_intermediate_size"))
#: Keys whose values are float32 in files, also where a configuration has a whole number.
_FLOATS = ("scale", "epsilon", "softcapping", "clamp_kqv")
#: Attribute of a configuration: `general.name` of the file that the model came from.
FILE_NAME = "gguf_name"
_TOKENS: Keys = (
    ("tokenizer.ggml.bos_token_id", "bos_token_id"),
    ("tokenizer.ggml.eos_token_id", "eos_token_id"),
    ("tokenizer.ggml.padding_token_id", "pad_token_id"),
)


# -- Gemma ---------------------------------------------------------------------------------------------------


def _read_gemma3(file: GGUFFile, config: dict[str, Any]) -> dict[str, Any]:
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


def _read_gemma2(file: GGUFFile, config: dict[str, Any]) -> dict[str, Any]:
    return {"query_pre_attn_scalar": _gemma_scalar(config)}


def _write_gemma(config: Any) -> dict[str, Any]:
    check_implied(config, {"query_pre_attn_scalar": _gemma_scalar(config.to_dict())})
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
            scale = short(positive(file, _LOG_MULTIPLIER, 0.1) / 0.1)
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
    def matches(meta: Mapping[str, Any]) -> bool:
        # files that do not say are of DeepSeek-V2, or of GLM-4.7-Flash, which has 47 layers and perhaps one that predicts
        usual = _SIGMOID if meta.get("deepseek2.block_count") in (47, 48) else _SOFTMAX
        return bool(meta.get("deepseek2.expert_gating_func", usual) == function)

    return matches


def _write_glm4_moe(config: Any) -> dict[str, Any]:
    return {"expert_gating_func": _SIGMOID, "nextn_predict_layers": 0}


# -- others --------------------------------------------------------------------------------------------------


def _write_sigmoid(config: Any) -> dict[str, Any]:
    return {"expert_gating_func": _SIGMOID}


def _read_dots1(file: GGUFFile, config: dict[str, Any]) -> dict[str, Any]:
    return {"layer_types": ["full_attention"] * config["num_hidden_layers"]}  # files know no other


def _write_dots1(config: Any) -> dict[str, Any]:
    check_implied(config, {"layer_types": ["full_attention"] * config.num_hidden_layers})
    return _write_sigmoid(config)


def _read_ernie_moe(file: GGUFFile, config: dict[str, Any]) -> dict[str, Any]:
    # converters say the joint width of the shared experts, in more than one way: their tensors are sure
    shared = file.tensors.get(f"blk.{config.get('moe_layer_start_index', 1)}.ffn_up_shexp.weight")
    return {"moe_num_shared_experts": shared.shape[0] // config["moe_intermediate_size"] if shared else 0}


def _write_ernie_moe(config: Any) -> dict[str, Any]:
    check_implied(config, {"moe_layer_end_index": config.num_hidden_layers - 1})
    return {
        "expert_gating_func": _SOFTMAX,
        "expert_shared_feed_forward_length": config.moe_num_shared_experts * config.moe_intermediate_size,
    }


def _write_smollm3(config: Any) -> dict[str, Any]:
    check_implied(config, {"no_rope_layers": [int((i + 1) % 4 != 0) for i in range(config.num_hidden_layers)]})
    return {}


# -- the table -----------------------------------------------------------------------------------------------

_QWEN_MOE = {"hidden_act": "silu", "decoder_sparse_step": 1, "mlp_only_layers": [], "use_sliding_window": False}
_BIASES = {"attention_bias": "blk.0.attn_q.bias"}

_NO_WINDOW = {"sliding_window": None}

FAMILIES: tuple[Family, ...] = (
    Family(
        "llama", "llama", _DENSE, implied={"hidden_act": "silu"}, detected={**_BIASES, "mlp_bias": "blk.0.ffn_up.bias"},
        aliases=("mistral",), rotated=True, dropped=_NO_WINDOW, matches=lambda meta: not meta.get("llama.expert_count"),
    ),
    Family(
        "llama", "mixtral",
        (*_DENSE, ("expert_count", "num_local_experts"), ("expert_used_count", "num_experts_per_tok")),
        implied={"hidden_act": "silu"}, rotated=True, dropped=_NO_WINDOW, matches=lambda meta: bool(meta.get("llama.expert_count")),
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
        period=2, read=_read_gemma2, write=_write_gemma,
    ),
    Family(
        "gemma3", "gemma3_text", (*_DENSE, ("attention.sliding_window", "sliding_window")),
        implied={"hidden_activation": "gelu_pytorch_tanh", "attn_logit_softcapping": None, "final_logit_softcapping": None},
        norm_shift=1.0, period=6, read=_read_gemma3, write=_write_gemma,
    ),
    Family(
        "phi3", "phi3", (*_COMMON, ("attention.sliding_window", "sliding_window")), implied={"hidden_act": "silu"}, rope_dims=partial_dims,
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
        detected={**_BIASES, "use_qk_norm": "blk.0.attn_q_norm.weight"}, rope_dims=partial_dims,
        write=_write_glm4_moe,
    ),
    Family(
        "glm4", "glm4", _DENSE, implied={"hidden_act": "silu"}, detected=_BIASES, rope_dims=partial_dims,
    ),
    Family(
        "dots1", "dots1", (*_DENSE, *_EXPERTS, *_ROUTED), implied={"hidden_act": "silu"}, detected=_BIASES,
        read=_read_dots1, write=_write_dots1,
    ),
    Family(
        "minimax-m2", "minimax_m2",
        (
            *_DENSE, ("expert_count", "num_local_experts"), ("expert_used_count", "num_experts_per_tok"),
            ("expert_feed_forward_length", "intermediate_size"),
        ),
        implied={"hidden_act": "silu"}, rope_dims=partial_dims, write=_write_sigmoid,
    ),
    Family(
        "gpt-oss", "gpt_oss",
        (
            *_DENSE, ("expert_count", "num_local_experts"), ("expert_used_count", "num_experts_per_tok"),
            ("expert_feed_forward_length", "intermediate_size"), ("attention.sliding_window", "sliding_window"),
        ),
        # readers round the ends of YaRN's ramp, the model's authors do not
        implied={"hidden_act": "silu", "attention_bias": True, "swiglu_alpha": 1.702, "swiglu_limit": 7.0},
        yarn={"truncate": False}, period=2, columns=True,
    ),
    Family(
        "seed_oss", "seed_oss", _DENSE, implied={"hidden_act": "silu"},
        detected={**_BIASES, "attention_out_bias": "blk.0.attn_output.bias", "mlp_bias": "blk.0.ffn_up.bias"},
    ),
    Family("ernie4_5", "ernie4_5", _DENSE, implied={"hidden_act": "silu"}, detected={"use_bias": "blk.0.attn_q.bias"}),
    Family(
        "ernie4_5-moe", "ernie4_5_moe",
        (
            *_COMMON, ("expert_count", "moe_num_experts"), ("expert_used_count", "moe_k"),
            ("expert_feed_forward_length", "moe_intermediate_size"), ("expert_shared_count", "moe_num_shared_experts"),
            ("leading_dense_block_count", "moe_layer_start_index"), ("interleave_moe_layer_step", "moe_layer_interval"),
        ),
        implied={"hidden_act": "silu"}, detected={"use_bias": "blk.0.attn_q.bias"}, read=_read_ernie_moe, write=_write_ernie_moe,
    ),
    Family(
        "granite", "granite",
        (
            *_DENSE, ("logit_scale", "logits_scaling"), ("residual_scale", "residual_multiplier"),
            ("embedding_scale", "embedding_multiplier"), ("attention.scale", "attention_multiplier"),
        ),
        implied={"hidden_act": "silu"}, detected={**_BIASES, "mlp_bias": "blk.0.ffn_up.bias"}, rotated=True,
    ),
    Family(
        "smollm3", "smollm3", _DENSE, implied={"hidden_act": "silu", "no_rope_layer_interval": 4, "use_sliding_window": False},
        detected={**_BIASES, "mlp_bias": "blk.0.ffn_up.bias"}, rotated=True, write=_write_smollm3,
    ),
    Family(
        "starcoder2", "starcoder2", (*_CENTRED, *_HEADS, ("attention.layer_norm_epsilon", "norm_epsilon")),
        implied={"hidden_act": "gelu_pytorch_tanh", "use_bias": True}, dropped=_NO_WINDOW,
    ),
    Family(
        "command-r", "cohere", (*_CENTRED, *_HEADS, ("attention.layer_norm_epsilon", "layer_norm_eps"), ("logit_scale", "logit_scale")),
        implied={"hidden_act": "silu", "tie_word_embeddings": True},
        detected={**_BIASES, "use_qk_norm": "blk.0.attn_q_norm.weight"},
    ),
    Family(
        "cohere2", "cohere2",
        (
            *_CENTRED, *_HEADS, ("attention.layer_norm_epsilon", "layer_norm_eps"), ("logit_scale", "logit_scale"),
            ("attention.sliding_window", "sliding_window"),
        ),
        implied={"hidden_act": "silu", "tie_word_embeddings": True}, detected=_BIASES, period=4,
    ),
    Family(
        "olmoe", "olmoe",
        (*_DENSE, ("expert_count", "num_experts"), ("expert_used_count", "num_experts_per_tok"), ("attention.clamp_kqv", "clip_qkv")),
        implied={"hidden_act": "silu", "norm_topk_prob": False}, detected=_BIASES,
    ),
    Family("olmo2", "olmo2", _DENSE, implied={"hidden_act": "silu"}, detected=_BIASES),
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
            config[attribute] = short(plausible(file, f"{family.arch}.{key}", value))
    missing = [f"{family.arch}.{key}" for key, attribute in _COMMON[:5] if attribute not in config and attribute != "intermediate_size"]
    if missing:
        raise GGUFArchitectureError(f"{file.path}: {', '.join(missing)} missing in the metadata; pass config=")
    # files count the layers that predict further tokens, transformers does not
    extra = plausible(file, f"{family.arch}.nextn_predict_layers", file.metadata.get(f"{family.arch}.nextn_predict_layers", 0))
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
    config |= read_rope(family, file, config)
    if family.period:
        config["layer_types"] = layer_types(config["num_hidden_layers"], family.period)
    if family.read is not None:
        config |= family.read(file, config)
    return config


def metadata_from_config(family: Family, config: Any) -> dict[str, Any]:
    """Metadata of a configuration, under full keys; the inverse of `config_from_gguf`.

    Raises:
        GGUFArchitectureError: the configuration has a setting that files of this architecture cannot express.
    """
    check_implied(config, family.implied)
    if family.period:
        check_implied(config, {"layer_types": layer_types(config.num_hidden_layers, family.period)})
    for attribute, usual in family.dropped.items():
        if (found := getattr(config, attribute, usual)) != usual:
            logger.warning("%s=%r has no place in %r files: programs that read them do without", attribute, found, family.arch)
    out: dict[str, Any] = {}
    for key, attribute in family.keys:
        value = getattr(config, attribute, None)
        if value is None and attribute == "head_dim":
            value = dims(config)
        if value is not None:
            out[key] = float(value) if key.endswith(_FLOATS) else value
    out |= write_rope(family, config)
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
