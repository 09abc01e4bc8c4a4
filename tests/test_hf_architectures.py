"""Architectures of every kind: quantize, forward, generate, save, load, with the outputs of the dequantized model."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import iqtorch
from iqtorch import IQConfig, IQTensor, Recipe

transformers = pytest.importorskip("transformers")

from test_model import dequantized  # noqa: E402
from tiny_models import tiny_model  # noqa: E402

IDS = torch.tensor([[5, 9, 12, 7, 3, 4], [8, 6, 4, 11, 10, 9]])

#: Type -> auto class and changes of its tiny config.
DEFAULT: dict[str, tuple[str, dict[str, Any]]] = {
    "gemma3_text": ("AutoModelForCausalLM", {}),  # an embedding with a buffer of its own
    "t5": ("AutoModelForSeq2SeqLM", {"d_ff": 256, "d_kv": 64, "num_decoder_layers": 2, "decoder_start_token_id": 0}),
    "whisper": (
        "AutoModelForSpeechSeq2Seq",
        {
            "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 256,
            "decoder_ffn_dim": 256, "num_mel_bins": 8, "max_source_positions": 8, "max_target_positions": 32, "decoder_start_token_id": 1,
        },
    ),
    "vit": ("AutoModelForImageClassification", {}),
    "llava": ("AutoModelForImageTextToText", {
        "image_token_id": 100,
        "vision_config": {"model_type": "clip_vision_model", "hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 2,
                          "num_attention_heads": 4, "image_size": 32, "patch_size": 16, "projection_dim": 256},
        "text_config": {"model_type": "llama", "vocab_size": 128, "hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 1,
                        "num_attention_heads": 4, "num_key_value_heads": 2},
    }),
    "jamba": ("AutoModelForCausalLM", {}),
}  # fmt: skip
SLOW: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("AutoModelForCausalLM", {}),
    "qwen3": ("AutoModelForCausalLM", {}),
    "phi3": ("AutoModelForCausalLM", {}),
    "opt": ("AutoModelForCausalLM", {"ffn_dim": 256, "word_embed_proj_dim": 256}),
    "bloom": ("AutoModelForCausalLM", {}),
    "gpt_neox": ("AutoModelForCausalLM", {}),
    "gpt2": ("AutoModelForCausalLM", {}),
    "bert": ("AutoModelForMaskedLM", {}),
    "distilbert": ("AutoModelForMaskedLM", {"hidden_dim": 256}),
    "modernbert": ("AutoModelForMaskedLM", {"cls_token_id": 1, "sep_token_id": 2}),
    "bart": ("AutoModelForSeq2SeqLM", {
        "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 256,
        "decoder_ffn_dim": 256, "decoder_start_token_id": 1, "forced_eos_token_id": None,
    }),
    "mamba2": ("AutoModelForCausalLM", {"num_heads": 8, "head_dim": 64, "n_groups": 1, "state_size": 16}),
    "falcon_h1": ("AutoModelForCausalLM", {"mamba_d_ssm": 512, "mamba_n_heads": 8, "mamba_d_head": 64}),
    "dinov2": ("AutoModel", {}),
    "clip": ("AutoModel", {"text_config": {"hidden_size": 256}, "projection_dim": 256}),
    "wav2vec2": ("AutoModel", {"conv_dim": (32, 32), "conv_stride": (5, 2), "conv_kernel": (10, 3), "num_conv_pos_embeddings": 16}),
}  # fmt: skip


def inputs(model: nn.Module) -> dict[str, Tensor]:
    """Something to run: ids, pixels, a spectrum or a sound, as the model takes them."""
    torch.manual_seed(1)
    kind, name = model.config.model_type, model.main_input_name
    if name == "pixel_values":
        return {"pixel_values": torch.randn(2, 3, 32, 32)}
    if name == "input_features":
        return {"input_features": torch.randn(2, 8, 16), "decoder_input_ids": IDS}
    if name == "input_values":
        return {"input_values": torch.randn(2, 1600)}
    if kind in ("llava", "clip"):
        ids = torch.cat([torch.full((2, 4), 100), IDS], dim=1) if kind == "llava" else IDS
        return {"input_ids": ids, "pixel_values": torch.randn(2, 3, 32, 32)}
    return {"input_ids": IDS, "decoder_input_ids": IDS} if model.config.is_encoder_decoder else {"input_ids": IDS}


def run(model: nn.Module) -> Tensor:
    with torch.no_grad():
        out = model(**inputs(model))
    return next(out[key] for key in ("logits", "logits_per_image", "last_hidden_state") if key in out)


@pytest.fixture(autouse=True)
def plain_torch() -> object:
    """Kernels may round activations; here the models around them are tested, on outputs that are equal to the last bits."""
    iqtorch.set_backend("torch")
    yield
    iqtorch.set_backend(None)


@pytest.mark.parametrize("model_type", [*DEFAULT, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)])
def test_architecture(model_type: str, tmp_path: Path) -> None:
    auto, changes = {**DEFAULT, **SLOW}[model_type]
    model = tiny_model(model_type, auto, **changes)
    model.save_pretrained(tmp_path / "plain")
    # Position tables and patch convolutions are a large part of models as tiny as these.
    iqtorch.quantize_model(model, Recipe.pure("q8_0"), skip=["pos|patch|conv1d"], progress=False)
    kept = [row for row in iqtorch.report(model).rows if len(row.shape) >= 2 and not row.packed]
    assert all(re.search(r"pos|patch|conv|norm|x_proj|dt_proj|A_log|token|wpe|mask|router|gate|relative", row.name) for row in kept), kept
    assert sum(isinstance(p, IQTensor) for p in model.parameters()) > len(kept)
    got, want = run(model), run(dequantized(model))
    assert (got - want).norm() <= 1e-4 * want.norm()
    model.save_pretrained(tmp_path / "packed")
    loaded, info = type(model).from_pretrained(tmp_path / "packed", output_loading_info=True)
    assert not any(info.values()), info
    assert torch.equal(run(loaded), got)
    config = IQConfig(recipe=Recipe.pure("q8_0"), skip=["pos|patch|conv1d"])
    assert torch.equal(run(type(model).from_pretrained(tmp_path / "plain", quantization_config=config)), got)
    if model.can_generate():
        feed = {name: value for name, value in inputs(model).items() if not name.startswith("decoder")}
        kwargs = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False, "pad_token_id": 0}
        assert torch.equal(loaded.generate(**feed, **kwargs), dequantized(model).generate(**feed, **kwargs))
