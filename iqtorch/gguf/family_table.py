"""The table of model families, and what their records need: functions for what no key says, and orders of rows.

Sources: llama.cpp's `convert_hf_to_gguf.py` and ik_llama.cpp's `src/llama-hparams.cpp` for what the
keys mean to the programs that read them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .errors import GGUFArchitectureError
from .family import Family, Keys, Order, check_implied, partial_dims, plausible, positive, short
from .gemma import read_gemma2, read_gemma3, read_gemma4, write_gemma, write_gemma4
from .reader import GGUFFile
from .writer import INT32, Typed

__all__ = ["FAMILIES", "metadata_of_halves", "qkvz_rows"]

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


# -- orders of rows ------------------------------------------------------------------------------------------


def _rotated(heads: str) -> Order:
    """llama.cpp's interleaved rotary embedding: it turns neighbouring rows, transformers the two halves of a head."""
    return lambda config, rows: torch.arange(rows, device="cpu").view(getattr(config, heads), 2, -1).transpose(1, 2).flatten()


_ROTATED = {"attn_q": _rotated("num_attention_heads"), "attn_k": _rotated("num_key_value_heads")}


def _bloom_rows(config: Any, rows: int) -> Tensor:
    """Files have all queries, then all keys, then all values; the model has them head by head."""
    return torch.arange(rows, device="cpu").view(config.num_attention_heads, 3, -1).transpose(0, 1).flatten()


def _falcon_rows(config: Any, rows: int) -> Tensor:
    """The same where several heads share keys and values."""
    groups = torch.arange(rows, device="cpu").view(_falcon_kv_heads(config), -1, config.hidden_size // config.num_attention_heads)
    return torch.cat([groups[:, :-2].flatten(), groups[:, -2].flatten(), groups[:, -1].flatten()])


def _falcon_kv_heads(config: Any) -> int:
    if config.new_decoder_architecture:
        return int(config.num_kv_heads)
    return 1 if config.multi_query else int(config.num_attention_heads)


def _tiled(config: Any, rows: int) -> Tensor:
    """Value heads of linear attention: with key head 0, 1, .. again and again in files, with one key head after the other in the model."""
    keys = config.linear_num_key_heads
    return torch.arange(rows, device="cpu").view(keys, config.linear_num_value_heads // keys, -1).transpose(0, 1).flatten()


def _tiled_columns(config: Any) -> Callable[[int], Tensor] | None:
    """The same of columns; None where that is their order anyway."""
    return None if config.linear_num_key_heads in (1, config.linear_num_value_heads) else partial(_tiled, config)


def _tiled_values(config: Any, rows: int) -> Tensor:
    """The same after queries and keys."""
    before = 2 * config.linear_num_key_heads * config.linear_key_head_dim
    return torch.cat([torch.arange(before, device="cpu"), before + _tiled(config, rows - before)])


def qkvz_rows(config: Any, rows: int) -> Tensor:
    """All queries, keys, values and gates one after the other; the model has them key head by key head."""
    keys, size = config.linear_num_key_heads, config.linear_key_head_dim
    values = config.linear_num_value_heads // keys * config.linear_value_head_dim
    parts = torch.arange(rows, device="cpu").view(keys, -1).split([size, size, values, values], 1)
    return torch.cat([part.flatten() for part in parts])


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


def _read_falcon(file: GGUFFile, config: dict[str, Any]) -> dict[str, Any]:
    heads = plausible(file, "falcon.attention.head_count_kv", file.metadata.get("falcon.attention.head_count_kv", 1))
    if config["num_attention_heads"] % heads:
        raise GGUFArchitectureError(f"{file.path}: falcon with {config['num_attention_heads']} heads and {heads} key heads; pass config=")
    new = "blk.0.attn_norm_2.weight" in file.tensors or heads not in (1, config["num_attention_heads"])
    return {
        "new_decoder_architecture": new, "multi_query": new or heads == 1, "parallel_attn": True,
        "num_kv_heads": heads if new else config["num_attention_heads"],
        "num_ln_in_parallel_attn": (2 if "blk.0.attn_norm_2.weight" in file.tensors else 1) if new else None,
    }  # fmt: skip


def _write_falcon(config: Any) -> dict[str, Any]:
    if not (config.new_decoder_architecture or config.parallel_attn):
        check_implied(config, {"parallel_attn": True})
    return {"attention.head_count_kv": _falcon_kv_heads(config), "tensor_data_layout": "jploski"}


def _read_gpt2(file: GGUFFile, config: dict[str, Any]) -> dict[str, Any]:
    return {"n_inner": None} if config.get("n_inner") == 4 * config["hidden_size"] else {}


def _write_gpt2(config: Any) -> dict[str, Any]:
    return {"feed_forward_length": config.n_inner or 4 * config.n_embd}


def _write_bloom(config: Any) -> dict[str, Any]:
    return {"context_length": 2048, "feed_forward_length": 4 * config.hidden_size, "attention.head_count_kv": config.n_head}


def _read_mamba(file: GGUFFile, config: dict[str, Any]) -> dict[str, Any]:
    inner = plausible(file, "mamba.ssm.inner_size", file.metadata.get("mamba.ssm.inner_size", 2 * config["hidden_size"]))
    return {"expand": inner // config["hidden_size"]}


def _write_mamba(config: Any) -> dict[str, Any]:
    return {
        "ssm.inner_size": config.intermediate_size, "context_length": 1 << 20, "feed_forward_length": 0, "attention.head_count": 0,
    }  # fmt: skip


def _read_stablelm(file: GGUFFile, config: dict[str, Any]) -> dict[str, Any]:
    return {"use_parallel_residual": "blk.0.ffn_norm.weight" not in file.tensors}


def _read_lfm2(file: GGUFFile, config: dict[str, Any]) -> dict[str, Any]:
    key = "lfm2.attention.head_count_kv"  # 0 where a layer is a convolution
    heads = file.metadata.get(key)
    if not isinstance(heads, list) or len(heads) != config["num_hidden_layers"] or not any(heads):
        raise GGUFArchitectureError(f"{file.path}: {key} must be a list with a number for each layer; pass config=")
    return {
        "num_key_value_heads": max(plausible(file, key, n) for n in heads if n),
        "layer_types": ["full_attention" if n else "conv" for n in heads],
        "conv_bias": any(name.endswith("shortconv.in_proj.bias") for name in file.tensors),
        "block_auto_adjust_ff_dim": False,  # it has been done
    }


def _write_lfm2(config: Any) -> dict[str, Any]:
    width = config.intermediate_size
    if config.block_auto_adjust_ff_dim:  # as the model does it
        width = int((config.block_ffn_dim_multiplier or 1) * int(2 * width / 3))
        width = -(-width // config.block_multiple_of) * config.block_multiple_of
    heads = [config.num_key_value_heads if kind == "full_attention" else 0 for kind in config.layer_types]
    return {"feed_forward_length": width, "attention.head_count_kv": Typed(heads, INT32)}


def _read_qwen35(file: GGUFFile, config: dict[str, Any]) -> dict[str, Any]:
    arch = file.metadata["general.architecture"]
    inner, interval, sections = (
        file.metadata.get(f"{arch}.{key}", usual)
        for key, usual in (("ssm.inner_size", 0), ("full_attention_interval", 4), ("rope.dimension_sections", []))
    )
    heads, keys = (config.get(f"linear_num_{kind}_heads", 0) for kind in ("value", "key"))
    if not keys or not heads or heads % keys:
        raise GGUFArchitectureError(f"{file.path}: {arch} with {heads} value heads for {keys} key heads of linear attention; pass config=")
    if not isinstance(inner, int) or inner <= 0 or inner % heads or not isinstance(interval, int) or interval < 1:
        raise GGUFArchitectureError(f"{file.path}: {arch}.ssm.inner_size is {inner!r} for {heads} value heads; pass config=")
    if not isinstance(sections, list) or not all(isinstance(n, int) and 0 <= n < 1 << 16 for n in sections):
        raise GGUFArchitectureError(f"{file.path}: {arch}.rope.dimension_sections is {sections!r:.80}, must be a list of sizes")
    out: dict[str, Any] = {"linear_value_head_dim": inner // heads, "layer_types": _linear_layers(config["num_hidden_layers"], interval)}
    if any(sections):
        out["rope_parameters"] = config["rope_parameters"] | {"mrope_section": [n for n in sections if n], "mrope_interleaved": True}
    return out


def _linear_layers(layers: int, interval: int = 4) -> list[str]:
    return ["linear_attention" if (i + 1) % interval else "full_attention" for i in range(layers)]


def _write_qwen35(config: Any) -> dict[str, Any]:
    full = config.layer_types.index("full_attention") + 1 if "full_attention" in config.layer_types else len(config.layer_types) + 1
    check_implied(
        config, {"layer_types": _linear_layers(config.num_hidden_layers, full), "linear_value_head_dim": config.linear_key_head_dim}
    )
    rope = config.rope_parameters or {}
    sections = list(rope.get("mrope_section") or [])
    if not sections:  # programs want them; all axes have the same positions in text
        half = partial_dims(config) // 2
        sections = [half - 2 * (half // 3), half // 3, half // 3]
    return {
        "ssm.inner_size": config.linear_num_value_heads * config.linear_value_head_dim, "full_attention_interval": full,
        "rope.dimension_sections": Typed([*sections, 0, 0, 0][:4], INT32),
    }  # fmt: skip


def _write_qwen3next(config: Any) -> dict[str, Any]:
    check_implied(config, {"layer_types": _linear_layers(config.num_hidden_layers)})
    return {"ssm.inner_size": config.linear_num_value_heads * config.linear_value_head_dim}


# -- the table -----------------------------------------------------------------------------------------------

_QWEN_MOE = {"hidden_act": "silu", "decoder_sparse_step": 1, "mlp_only_layers": [], "use_sliding_window": False}
_BIASES = {"attention_bias": "blk.0.attn_q.bias"}

_EPSILON = ("attention.layer_norm_epsilon", "layer_norm_epsilon")
_LINEAR_ATTENTION: Keys = (
    ("ssm.conv_kernel", "linear_conv_kernel_dim"), ("ssm.state_size", "linear_key_head_dim"),
    ("ssm.group_count", "linear_num_key_heads"), ("ssm.time_step_rank", "linear_num_value_heads"),
)  # fmt: skip
_LINEAR_BIASES = {"attention_bias": "blk.3.attn_q.bias"}
_TILED = {
    "attn_qkv": _tiled_values, "ssm_conv1d": _tiled_values, "attn_gate": _tiled, "ssm_alpha": _tiled, "ssm_beta": _tiled, "ssm_a": _tiled,
    "ssm_dt": _tiled,
}  # fmt: skip

_NO_WINDOW = {"sliding_window": None}

FAMILIES: tuple[Family, ...] = (
    Family(
        "llama", "llama", _DENSE, implied={"hidden_act": "silu"}, detected={**_BIASES, "mlp_bias": "blk.0.ffn_up.bias"},
        aliases=("mistral",), rows=_ROTATED, dropped=_NO_WINDOW, matches=lambda meta: not meta.get("llama.expert_count"),
    ),
    Family(
        "llama", "mixtral",
        (*_DENSE, ("expert_count", "num_local_experts"), ("expert_used_count", "num_experts_per_tok")),
        implied={"hidden_act": "silu"}, rows=_ROTATED, dropped=_NO_WINDOW, matches=lambda meta: bool(meta.get("llama.expert_count")),
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
        period=2, read=read_gemma2, write=write_gemma,
    ),
    Family(
        "gemma3", "gemma3_text", (*_DENSE, ("attention.sliding_window", "sliding_window")),
        implied={"hidden_activation": "gelu_pytorch_tanh", "attn_logit_softcapping": None, "final_logit_softcapping": None},
        norm_shift=1.0, period=6, read=read_gemma3, write=write_gemma,
    ),
    Family(
        "gemma4", "gemma4_text",
        (
            *_COMMON[:3], _COMMON[4], *_COMMON[6:], _EXPERTS[1], ("expert_count", "num_experts"), ("expert_used_count", "top_k_experts"),
            ("attention.sliding_window", "sliding_window"), ("attention.shared_kv_layers", "num_kv_shared_layers"),
            ("embedding_length_per_layer_input", "hidden_size_per_layer_input"),
        ),
        implied={"hidden_activation": "gelu_pytorch_tanh"}, detected={**_BIASES, "enable_moe_block": "blk.0.ffn_gate_inp.weight"},
        # how it sees images is no matter of text
        dropped={"use_bidirectional_attention": None}, rope=False, merged=True, read=read_gemma4, write=write_gemma4,
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
        yarn={"truncate": False}, period=2, turned=True,
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
        implied={"hidden_act": "silu"}, detected={**_BIASES, "mlp_bias": "blk.0.ffn_up.bias"}, rows=_ROTATED,
    ),
    Family(
        "smollm3", "smollm3", _DENSE, implied={"hidden_act": "silu", "no_rope_layer_interval": 4, "use_sliding_window": False},
        detected={**_BIASES, "mlp_bias": "blk.0.ffn_up.bias"}, rows=_ROTATED, write=_write_smollm3,
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
    Family(
        "gpt2", "gpt2", (*_CENTRED[:3], ("feed_forward_length", "n_inner"), _CENTRED[4], _CENTRED[-1], _EPSILON),
        implied={"activation_function": "gelu_new", "scale_attn_by_inverse_layer_idx": False, "add_cross_attention": False},
        rope=False, repeats=True, read=_read_gpt2, write=_write_gpt2,
    ),
    Family(
        "falcon", "falcon", (*_CENTRED[:3], ("feed_forward_length", "ffn_hidden_size"), _CENTRED[4], _CENTRED[-1], _EPSILON),
        implied={"activation": "gelu", "alibi": False, "bias": False}, rows={"attn_qkv": _falcon_rows},
        read=_read_falcon, write=_write_falcon,
    ),
    Family(
        "bloom", "bloom", (*_CENTRED[1:3], _CENTRED[4], _CENTRED[-1], _EPSILON),
        implied={"apply_residual_connection_post_layernorm": False}, rows={"attn_qkv": _bloom_rows}, rope=False, repeats=True,
        write=_write_bloom,
    ),
    Family(
        "stablelm", "stablelm", (*_CENTRED, ("attention.layer_norm_epsilon", "layer_norm_eps"), ("use_parallel_residual",) * 2),
        implied={"hidden_act": "silu", "qk_layernorm": False}, detected={"use_qkv_bias": "blk.0.attn_q.bias"}, rope_dims=partial_dims,
        read=_read_stablelm,
    ),
    Family(
        "nemotron", "nemotron", (*_CENTRED, *_HEADS, ("attention.layer_norm_epsilon", "norm_eps")), implied={"hidden_act": "relu2"},
        detected={**_BIASES, "mlp_bias": "blk.0.ffn_up.bias"}, norm_shift=1.0, rope_dims=partial_dims,
    ),
    Family(
        "mamba", "mamba",
        (
            *_CENTRED[1:3], _CENTRED[-1], ("attention.layer_norm_rms_epsilon", "layer_norm_epsilon"), ("ssm.conv_kernel", "conv_kernel"),
            ("ssm.state_size", "state_size"), ("ssm.time_step_rank", "time_step_rank"),
        ),
        implied={"hidden_act": "silu"}, detected={"use_bias": "blk.0.ssm_in.bias", "use_conv_bias": "blk.0.ssm_conv1d.bias"},
        rope=False, read=_read_mamba, write=_write_mamba,
    ),
    Family(
        "lfm2", "lfm2",
        (
            *_COMMON[:5], _COMMON[-1], ("attention.layer_norm_rms_epsilon", "norm_eps"), ("shortconv.l_cache", "conv_L_cache"),
        ),
        read=_read_lfm2, write=_write_lfm2,
    ),
    Family(
        "qwen35", "qwen3_5_text", (*_DENSE, *_LINEAR_ATTENTION), implied={"hidden_act": "silu"}, detected=_LINEAR_BIASES,
        rows=_TILED, columns={"ssm_out": _tiled_columns}, norm_shift=1.0, rope_dims=partial_dims, read=_read_qwen35, write=_write_qwen35,
    ),
    Family(
        "qwen35moe", "qwen3_5_moe_text",
        (
            *_DENSE[:3], *_DENSE[4:], *_LINEAR_ATTENTION, *_EXPERTS, ("expert_count", "num_experts"),
            ("expert_shared_feed_forward_length", "shared_expert_intermediate_size"),
        ),
        implied={"hidden_act": "silu"}, detected=_LINEAR_BIASES, rows=_TILED, columns={"ssm_out": _tiled_columns}, norm_shift=1.0,
        rope_dims=partial_dims, read=_read_qwen35, write=_write_qwen35,
    ),
    Family(
        "qwen3next", "qwen3_next",
        (
            *_DENSE, *_LINEAR_ATTENTION, *_EXPERTS, ("expert_count", "num_experts"),
            ("expert_shared_feed_forward_length", "shared_expert_intermediate_size"),
        ),
        implied={"hidden_act": "silu", "norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": []}, detected=_LINEAR_BIASES,
        norm_shift=1.0, rope_dims=partial_dims, read=_read_qwen35, write=_write_qwen3next,
    ),
)  # fmt: skip
