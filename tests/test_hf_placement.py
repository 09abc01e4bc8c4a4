"""Devices: offload hooks move packed bytes, device maps know their sizes, rules place modules. Only a CPU is needed."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch

import iqtorch
from iqtorch import IQTensor, Recipe
from iqtorch.errors import RecipeError, UnsupportedOperationError

transformers = pytest.importorskip("transformers")
accelerate = pytest.importorskip("accelerate")

from placement_cases import IDS, logits, near, no_dequantizing, packed, same_files, tokens  # noqa: E402, F401
from tiny_models import tiny_model  # noqa: E402


def test_cpu_offload_moves_packed_bytes() -> None:
    model = packed()
    want = logits(model)
    offloaded = accelerate.cpu_offload(copy.deepcopy(model), execution_device=torch.device("cpu"))
    weight = offloaded.lm_head.weight
    assert isinstance(weight, IQTensor) and weight.is_meta  # between calls only a placeholder is left in the module
    assert torch.equal(logits(offloaded), want) and offloaded.lm_head.weight.is_meta


def test_dispatch_with_hooks() -> None:
    model = packed()
    want = logits(model)
    parts = dict.fromkeys(("model.embed_tokens", "model.layers", "model.norm", "model.rotary_emb", "lm_head"), "cpu")
    assert torch.equal(logits(accelerate.dispatch_model(model, parts, main_device="cpu", force_hooks=True)), want)


def test_device_maps_count_packed_bytes(tmp_path: Path) -> None:
    model = packed()
    model.save_pretrained(tmp_path)
    for device_map in ("auto", {"": "cpu"}):
        assert near(logits(transformers.AutoModelForCausalLM.from_pretrained(tmp_path, device_map=device_map)), logits(model))
    quantizer = model.hf_quantizer
    quantizer.stored = dict(quantizer.quantization_config.tensors)
    weight = model.lm_head.weight
    assert quantizer.param_element_size(model, "lm_head.weight", weight) * weight.numel() == weight.to_blocks().nbytes
    plain = sum(p.numel() * 4 for p in model.parameters())  # enough for the packed model, not for the plain one
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, device_map="auto", max_memory={"cpu": plain // 2})
    assert torch.equal(logits(loaded), logits(model))


HALF = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk", "model.norm": "disk", "model.rotary_emb": "cpu",
        "lm_head": "disk"}  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "changes", "where"),
    [
        ("llama", {}, HALF),
        ("llama", {"tie_word_embeddings": True}, {**HALF, "model.embed_tokens": "disk"}),
        ("llama", {"tie_word_embeddings": True}, "auto"),
        ("gpt_oss", {}, HALF),
        ("gpt_oss", {}, "auto"),
    ],
)
def test_disk_offload_keeps_packed_bytes_in_their_file(kind: str, changes: dict, where: object, tmp_path: Path) -> None:
    model = iqtorch.quantize_model(tiny_model(kind, **changes), Recipe.pure("q8_0"), progress=False)
    model.save_pretrained(tmp_path)
    memory = {"max_memory": {"cpu": 1000}} if where == "auto" else {}
    loaded, info = type(model).from_pretrained(tmp_path, device_map=where, output_loading_info=True, **memory)
    assert not any(info.values()), info
    if where == "auto" and not hasattr(loaded, "hf_device_map"):
        pytest.skip(f"transformers {transformers.__version__} runs no model that is all on disk, plain ones neither")
    offloaded = [name for name, p in loaded.named_parameters(remove_duplicate=False) if p.is_meta]
    assert any("layers.1" in name for name in offloaded) and "lm_head.weight" in offloaded
    assert all(isinstance(p, IQTensor) for p in loaded.parameters() if p.dim() > 1 and "router" not in str(p.shape) and p.shape[0] > 4)
    for _ in range(2):  # nothing stays behind
        assert torch.equal(logits(loaded), logits(model))
        assert [name for name, p in loaded.named_parameters(remove_duplicate=False) if p.is_meta] == offloaded
    assert torch.equal(tokens(loaded), tokens(model))
    with pytest.raises(UnsupportedOperationError, match="'disk'"):
        loaded.dequantize()
    loaded.save_pretrained(tmp_path / "again")
    assert same_files(tmp_path, tmp_path / "again")


def test_quantizing_onto_disk_is_refused(tmp_path: Path) -> None:
    tiny_model("llama").save_pretrained(tmp_path)
    with pytest.raises(UnsupportedOperationError, match="packed checkpoint"):
        transformers.AutoModelForCausalLM.from_pretrained(
            tmp_path, quantization_config=iqtorch.IQConfig("q8_0"), device_map="auto", max_memory={"cpu": 1000}
        )


@pytest.mark.parametrize(("kind", "rule"), [("qwen3_moe", r"mlp\.experts$"), ("llama", "lm_head|mlp")])
def test_rules_place_modules(kind: str, rule: str) -> None:
    model = packed(kind)
    want = logits(model)
    assert iqtorch.place(model, {rule: "cpu"}) is model
    hooked = [name for name, module in model.named_modules() if hasattr(module, "_hf_hook")]
    assert len(hooked) == (2 if kind == "qwen3_moe" else 3) and torch.equal(logits(model), want)
    with pytest.raises(RecipeError, match="places no module"):
        iqtorch.place(model, {"nothing": "cpu"})
    with pytest.raises(RecipeError, match="no regular expression"):
        iqtorch.place(model, {"(": "cpu"})
