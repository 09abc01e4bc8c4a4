"""Tiny random models of transformers' architectures, made from the architecture's own config class."""

from __future__ import annotations

import inspect
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

#: Sizes that make a model tiny while every row still has 256 weights; whatever of it a config class knows is set.
SIZES: dict[str, Any] = {
    "vocab_size": 128, "unpadded_vocab_size": 128,
    "hidden_size": 256, "d_model": 256, "n_embd": 256, "dim": 256, "embed_dim": 256,
    "intermediate_size": 256, "moe_intermediate_size": 256, "shared_expert_intermediate_size": 256, "shared_intermediate_size": 256,
    "moe_shared_expert_intermediate_size": 256, "intermediate_size_mlp": 256, "ffn_hidden_size": 256, "mlp_intermediate_size": 256,
    "dense_intermediate_size": 256, "expert_ffn_hidden_size": 256,
    "num_hidden_layers": 2, "n_layer": 2, "n_layers": 2, "num_layers": 2, "depth": 2,
    "num_attention_heads": 4, "n_head": 4, "n_heads": 4, "num_heads": 4, "num_key_value_heads": 2, "head_dim": 64,
    "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "moe_num_experts": 4,
    "num_experts_per_tok": 2, "num_experts_per_token": 2, "moe_topk": 2, "moe_top_k": 2, "moe_k": 2, "top_k_experts": 2,
    "n_shared_experts": 1, "num_shared_experts": 1, "n_group": 1, "topk_group": 1,
    "q_lora_rank": 256, "kv_lora_rank": 256, "qk_nope_head_dim": 64, "qk_rope_head_dim": 64, "v_head_dim": 64,
    "max_position_embeddings": 64, "n_positions": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    "image_size": 32, "patch_size": 16, "first_k_dense_replace": 1, "num_dense_layers": 1,
}  # fmt: skip

#: What single types need beyond `SIZES`.
CHANGES: dict[str, dict[str, Any]] = {
    "qwen3_next": {"layer_types": ["linear_attention", "full_attention"]},
    "qwen3_5_moe_text": {"layer_types": ["linear_attention", "full_attention"]},
    "jamba": {
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "expert_layer_period": 1,
        "expert_layer_offset": 0,
        "use_mamba_kernels": False,
    },
    "granitemoehybrid": {"layer_types": ["mamba", "attention"], "mamba_n_heads": 8, "mamba_d_head": 64},
    "bailing_hybrid": {"layer_types": ["linear_attention", "full_attention"]},
    "kimi_linear": {"layer_types": ["linear_attention", "full_attention"]},
    "qwen4_exp_text": {"layer_types": ["linear_attention", "full_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "zaya": {"num_experts_per_tok": 1},
}


def tiny_config(model_type: str, **changes: Any) -> Any:
    """A config of this type with `SIZES`, sub-configs included, then `changes` (dicts go into sub-configs)."""
    return _tiny(CONFIG_MAPPING[model_type], {**CHANGES.get(model_type, {}), **changes})


def _tiny(cls: Any, changes: dict[str, Any]) -> Any:
    known = set(inspect.signature(cls.__init__).parameters)
    known.update(name for base in cls.__mro__ for name in getattr(base, "__annotations__", {}))
    values = {name: value for name, value in SIZES.items() if name in known}
    for name, sub in (getattr(cls, "sub_configs", None) or {}).items():
        if isinstance(changes.get(name, {}), dict) and hasattr(sub, "model_type") and sub is not transformers.AutoConfig:
            values[name] = _tiny(sub, changes.get(name, {})).to_dict()
    if "kv_lora_rank" in known:  # latent attention has no groups
        values["num_key_value_heads"] = values["num_attention_heads"]
    values.update({name: value for name, value in changes.items() if name not in values or not isinstance(value, dict)})
    return cls(**values)


def tiny_model(model_type: str, auto: str = "AutoModelForCausalLM", **changes: Any) -> nn.Module:
    """A model of this type, random but always the same, in evaluation mode."""
    torch.manual_seed(0)
    model: nn.Module = getattr(transformers, auto).from_config(tiny_config(model_type, **changes))
    return model.eval()


class Logits(nn.Module):
    """Ids to logits, without a cache: one graph."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor) -> Tensor:
        return self.model(ids, use_cache=False).logits
