"""Tiny random models of every family and tokenizers of every kind, for the tests of GGUF files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

import iqtorch
from iqtorch import IQTensor
from iqtorch.gguf import GGUFFile, TensorSource, write_gguf

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

_DOTS = {"moe_intermediate_size": 32, "n_routed_experts": 4, "num_experts_per_tok": 2, "first_k_dense_replace": 1}
_GPT_OSS = {
    "head_dim": 32, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 16,
    "rope_parameters": {"rope_type": "default", "rope_theta": 150000.0},
}  # fmt: skip

#: Of models whose width follows from others; `...` leaves a setting out.
_OLD: dict[str, Any] = {"intermediate_size": ..., "num_key_value_heads": ...}
_DELTA = {
    "num_hidden_layers": 5, "head_dim": 32, "linear_key_head_dim": 32, "linear_value_head_dim": 32, "linear_num_key_heads": 2,
    "linear_num_value_heads": 6,
    "rope_parameters": {
        "rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5, "mrope_section": [4, 2, 2], "mrope_interleaved": True,
    },
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
    "gemma4": (
        "Gemma4TextConfig",
        {
            "num_hidden_layers": 7, "head_dim": 16, "global_head_dim": 32, "hidden_size_per_layer_input": 32, "sliding_window": 16,
            "vocab_size_per_layer_input": 96, "num_kv_shared_layers": 2, "use_double_wide_mlp": True, "final_logit_softcapping": 30.0,
            "layer_types": [f"{kind}_attention" for kind in ("sliding", "full", "sliding", "sliding", "full", "sliding", "full")],
        },
    ),
    "gemma4-moe": (
        "Gemma4TextConfig",
        {
            "num_hidden_layers": 6, "head_dim": 16, "global_head_dim": 32, "hidden_size_per_layer_input": 0, "sliding_window": 16,
            "num_global_key_value_heads": 1, "attention_k_eq_v": True, "enable_moe_block": True, "num_experts": 4, "top_k_experts": 2,
            "moe_intermediate_size": 32,
        },
    ),
    "phi3": ("Phi3Config", {"sliding_window": 64, "pad_token_id": 0}),
    "deepseek-v2": ("DeepseekV2Config", {**_MLA, "q_lora_rank": None}),
    "deepseek-v3": ("DeepseekV3Config", {**_MLA, "q_lora_rank": 32}),
    "deepseek-yarn": (
        "DeepseekV3Config",
        {
            **_MLA, "q_lora_rank": 32,
            "rope_parameters": {
                "rope_type": "yarn", "rope_theta": 10000.0, "factor": 40.0, "original_max_position_embeddings": 32, "mscale": 0.707,
                "mscale_all_dim": 0.707,
            },
        },
    ),
    "glm4-moe": (
        "Glm4MoeConfig",
        {
            "moe_intermediate_size": 32, "n_routed_experts": 4, "num_experts_per_tok": 2, "first_k_dense_replace": 1, "head_dim": 32,
            "attention_bias": True, "use_qk_norm": True,
        },
    ),
    "glm4": ("Glm4Config", {"head_dim": 32}),
    "dots1": ("Dots1Config", {**_DOTS, "head_dim": 16, "n_shared_experts": 1, "norm_topk_prob": True, "routed_scaling_factor": 2.5}),
    "minimax-m2": (
        "MiniMaxM2Config",
        {
            "head_dim": 32, "num_local_experts": 4, "num_experts_per_tok": 2,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
        },
    ),
    "gpt-oss": ("GptOssConfig", _GPT_OSS),
    "gpt-oss-yarn": (
        "GptOssConfig",
        {
            **_GPT_OSS,
            "rope_parameters": {
                "rope_type": "yarn", "rope_theta": 150000.0, "factor": 4.0, "original_max_position_embeddings": 32, "truncate": False,
            },
        },
    ),
    "seed-oss": ("SeedOssConfig", {"head_dim": 32}),
    "ernie4.5": ("Ernie4_5Config", {"head_dim": 32, "tie_word_embeddings": True, "pad_token_id": 0}),
    "ernie4.5-moe": (
        "Ernie4_5_MoeConfig",
        {"moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 32, "moe_layer_start_index": 1, "moe_num_shared_experts": 2},
    ),
    "granite": (
        "GraniteConfig",
        {"embedding_multiplier": 12.0, "logits_scaling": 8.0, "residual_multiplier": 0.22, "attention_multiplier": 0.0625},
    ),
    "smollm3": ("SmolLM3Config", {"num_hidden_layers": 5, "tie_word_embeddings": True}),
    "starcoder2": ("Starcoder2Config", {"tie_word_embeddings": True}),
    "command-r": ("CohereConfig", {"pad_token_id": 0}),
    "cohere2": ("Cohere2Config", {"head_dim": 32, "sliding_window": 16, "num_hidden_layers": 5, "pad_token_id": 0}),
    "olmoe": ("OlmoeConfig", {"num_experts": 4, "num_experts_per_tok": 2, "clip_qkv": 3.0}),
    "olmo2": ("Olmo2Config", {}),
    "gpt2": ("GPT2Config", {**_OLD}),
    "falcon": ("FalconConfig", {**_OLD, "tie_word_embeddings": True}),
    "falcon-new": (
        "FalconConfig", {**_OLD, "new_decoder_architecture": True, "num_kv_heads": 2, "ffn_hidden_size": 96, "tie_word_embeddings": False},
    ),
    "bloom": ("BloomConfig", {**_OLD, "max_position_embeddings": ...}),
    "stablelm": (
        "StableLmConfig",
        {"use_qkv_bias": True, "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.25}},
    ),
    "stablelm-parallel": (
        "StableLmConfig",
        {
            "use_parallel_residual": True,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.25},
        },
    ),
    "nemotron": (
        "NemotronConfig",
        {"head_dim": 32, "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}},
    ),
    "mamba": ("MambaConfig", {**_OLD, "num_attention_heads": ..., "max_position_embeddings": ..., "time_step_rank": 8}),
    "lfm2": ("Lfm2Config", {"layer_types": ["conv", "full_attention", "conv"], "block_auto_adjust_ff_dim": False, "pad_token_id": 0}),
    "qwen3.5": ("Qwen3_5TextConfig", {**_DELTA, "tie_word_embeddings": True}),
    "qwen3.5-equal": ("Qwen3_5TextConfig", {**_DELTA, "linear_num_value_heads": 2}),
    "qwen3-next": (
        "Qwen3NextConfig",
        {
            **_DELTA, **_MOE, "shared_expert_intermediate_size": 64,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
        },
    ),
    "qwen3.5-moe": ("Qwen3_5MoeTextConfig", {**_DELTA, **_MOE, "shared_expert_intermediate_size": 64, "intermediate_size": ...}),
}  # fmt: skip


if not hasattr(transformers, "Gemma4TextConfig"):
    del MODELS["gemma4"], MODELS["gemma4-moe"]
if transformers.__version__.startswith("5.4."):
    # It refuses the defaults of these configurations itself (a newer huggingface_hub checks their types).
    for _name in ("ernie4.5", "ernie4.5-moe", "cohere2", "olmoe", "olmo2"):
        del MODELS[_name]


def tiny(name: str, dtype: torch.dtype = torch.bfloat16, seed: int = 0, **settings: Any) -> nn.Module:
    """A random model; its norms, biases and routers are random too, so that mixing them up shows."""
    torch.manual_seed(seed)
    cls, own = MODELS[name]
    chosen = {key: value for key, value in (_BASE | own | settings).items() if value is not ...}
    model: nn.Module = transformers.AutoModelForCausalLM.from_config(getattr(transformers, cls)(**chosen), dtype=dtype)
    with torch.no_grad():
        buffers = [(name, b) for name, b in model.named_buffers() if "correction_bias" in name or "scalar" in name]
        for name, tensor in [*model.named_parameters(), *buffers]:
            if name.endswith("A_log"):  # of which files have the exponential: values near 0 lose digits
                tensor.copy_(0.5 + torch.rand_like(tensor))
            elif tensor.ndim == 1:
                tensor.add_(0.2 * torch.randn_like(tensor))
            else:
                tensor.copy_(0.15 * torch.randn_like(tensor))
    return model.eval()


def ids(length: int = 24) -> torch.Tensor:
    return torch.randint(3, 96, (2, length), generator=torch.Generator().manual_seed(5))


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        out: torch.Tensor = model(ids()).logits
    return out


def assert_same_weights(found: Any, expected: Any) -> int:
    """Equal bit for bit, packed or not; returns how many are packed."""
    ours, theirs = found.state_dict(), expected.state_dict()
    assert ours.keys() == theirs.keys()
    packed = 0
    for name, value in theirs.items():
        assert type(ours[name]) is type(value), name
        assert ours[name].dtype == value.dtype, name
        if isinstance(value, IQTensor):
            assert ours[name].format is value.format
            assert torch.equal(ours[name].to_blocks(), value.to_blocks()), name
            packed += 1
        else:
            assert torch.equal(ours[name], value), name
    return packed


def reload_from_folder(model: Any, folder: Path) -> Any:
    """Saves a causal model and loads it, equal bit for bit; returns the model without its head, loaded from the same folder."""
    model.save_pretrained(folder)
    again, info = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert_same_weights(again, model)
    assert torch.equal(logits(again), logits(model))
    headless = transformers.AutoModel.from_pretrained(folder)
    assert torch.equal(headless(ids())[0], model.model(ids())[0])
    return headless


def pack(model: Any, recipe: Any = "q8_0") -> Any:
    recipe = iqtorch.Recipe.pure(recipe) if isinstance(recipe, str) else recipe
    return iqtorch.quantize_model(model, recipe, progress=False)


def rewrite(source: Path, target: Path, change: Any = None, **metadata: Any) -> Path:
    """A copy of a file with tensors (`change(name, info, data) -> TensorSource or None`) or metadata changed; None removes."""
    file = GGUFFile(source)
    merged = {key: file.metadata[key] for key in file.metadata} | {key.replace("__", "."): value for key, value in metadata.items()}
    sources = []
    for name, info in file.tensors.items():
        source_ = TensorSource(name, info.shape, info.format or info.dtype, lambda name=name: file.data(name))
        source_ = change(name, info, source_) if change else source_
        if source_ is not None:
            sources.append(source_)
    write_gguf(target, {key: value for key, value in merged.items() if value is not None}, sources)
    return target


# -- tokenizers --------------------------------------------------------------------------------------------

TEXT = "Hello  world, it's 12345 o'clock:\n\n  naïve café – 東京 🙂 don't!\ttab <|end|> x"


def byte_level(split: str | None = None) -> Any:
    """A small byte-level BPE tokenizer that cuts text like the models named `split`."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    from iqtorch.gguf.tokenizer import _SPLITS

    backend = Tokenizer(models.BPE())
    steps = [pre_tokenizers.Split(Regex(p), behavior="isolated") for p in _SPLITS.get(split or "", ())]
    backend.pre_tokenizer = pre_tokenizers.Sequence([*steps, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not steps)])
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, special_tokens=["<s>", "</s>"], show_progress=False)
    backend.train_from_iterator([TEXT, Path(iqtorch.__file__).with_name("tensor.py").read_text()], trainer)
    backend.add_tokens([AddedToken("<|end|>", special=False, normalized=False)])
    return transformers.PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")


def sentencepiece(prefix: bool = True) -> Any:
    """A small BPE tokenizer with byte fallback, as SentencePiece models become."""
    from tokenizers import Tokenizer, decoders, models, normalizers, processors, trainers

    def build(**model: Any) -> Any:
        backend = Tokenizer(models.BPE(byte_fallback=True, fuse_unk=True, unk_token="<unk>", **model))
        steps = [normalizers.Prepend("\u2581")] if prefix else []
        backend.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "\u2581")])
        return backend

    trained = build()
    special = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))]
    trained.train_from_iterator(Path(iqtorch.__file__).with_name("tensor.py").read_text().split("\n"), trainers.BpeTrainer(
        vocab_size=700, special_tokens=special, show_progress=False
    ))  # fmt: skip
    model = json.loads(trained.to_str())["model"]
    backend = build(vocab=model["vocab"], merges=[tuple(m) for m in model["merges"]])
    backend.add_special_tokens(["<unk>", "<s>", "</s>"])
    strip = [decoders.Strip(" ", 1, 0)] if prefix else []
    backend.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), *strip])
    backend.post_processor = processors.TemplateProcessing(single="<s>:0 $A:0", pair="<s>:0 $A:0 $B:1", special_tokens=[("<s>", 1)])
    return transformers.PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
