"""Tiny random models of every family, for the tests of GGUF files."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import nn

_BASE: dict[str, Any] = {
    "vocab_size": 96, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": None,
}  # fmt: skip
_MOE = {"moe_intermediate_size": 32, "num_experts": 4, "num_experts_per_tok": 2}
_MLA = {
    "moe_intermediate_size": 32, "n_routed_experts": 4, "num_experts_per_tok": 2, "first_k_dense_replace": 1, "kv_lora_rank": 32,
    "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 16, "num_key_value_heads": 4, "n_group": 2, "topk_group": 1,
}  # fmt: skip
_LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}  # fmt: skip

#: name -> (configuration class, settings)
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {}),
    "llama-tied-biased": ("LlamaConfig", {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True, "head_dim": 32}),
    "llama-3.1": ("LlamaConfig", {"rope_parameters": _LLAMA3}),
    "llama-linear": ("LlamaConfig", {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}}),
    "llama-yarn": (
        "LlamaConfig",
        {"rope_parameters": {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 32}},
    ),
    "mistral": ("MistralConfig", {"sliding_window": None}),
    "mixtral": ("MixtralConfig", {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None}),
    "qwen2": ("Qwen2Config", {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3Config", {"head_dim": 32}),
    "qwen2-moe": ("Qwen2MoeConfig", {**_MOE, "shared_expert_intermediate_size": 64}),
    "qwen3-moe": ("Qwen3MoeConfig", {**_MOE, "head_dim": 32, "norm_topk_prob": True}),
    "gemma": ("GemmaConfig", {"head_dim": 32}),
    "gemma2": ("Gemma2Config", {"head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 16}),
    "gemma3": ("Gemma3TextConfig", {"head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 16, "num_hidden_layers": 7}),
    "phi3": ("Phi3Config", {"sliding_window": 64, "pad_token_id": 0}),
    "deepseek-v2": ("DeepseekV2Config", {**_MLA, "q_lora_rank": None}),
    "deepseek-v3": ("DeepseekV3Config", {**_MLA, "q_lora_rank": 32}),
    "glm4-moe": (
        "Glm4MoeConfig",
        {
            "moe_intermediate_size": 32, "n_routed_experts": 4, "num_experts_per_tok": 2, "first_k_dense_replace": 1, "head_dim": 32,
            "attention_bias": True, "use_qk_norm": True,
        },
    ),
}  # fmt: skip


def tiny(name: str, dtype: torch.dtype = torch.bfloat16, seed: int = 0, **settings: Any) -> nn.Module:
    """A random model; its norms, biases and routers are random too, so that mixing them up shows."""
    torch.manual_seed(seed)
    cls, own = MODELS[name]
    model: nn.Module = transformers.AutoModelForCausalLM.from_config(getattr(transformers, cls)(**(_BASE | own | settings)), dtype=dtype)
    with torch.no_grad():
        for tensor in [*model.parameters(), *(b for n, b in model.named_buffers() if "correction_bias" in n)]:
            if tensor.ndim == 1:
                tensor.add_(0.2 * torch.randn_like(tensor))
            else:
                tensor.copy_(0.15 * torch.randn_like(tensor))
    return model.eval()


def ids(length: int = 24) -> torch.Tensor:
    return torch.randint(3, 96, (2, length), generator=torch.Generator().manual_seed(5))
