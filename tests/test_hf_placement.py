"""Devices: offload hooks move packed bytes, device maps know their sizes, rules place modules. Only a CPU is needed."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import iqtorch
from iqtorch import IQTensor, Recipe
from iqtorch.errors import RecipeError, UnsupportedOperationError

transformers = pytest.importorskip("transformers")
accelerate = pytest.importorskip("accelerate")

from tiny_models import tiny_model  # noqa: E402

IDS = torch.arange(3, 11)[None]
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
#: A CPU as well, so that the tests themselves are tested everywhere.
DEVICES = ["cpu", pytest.param("cuda", marks=needs_gpu)]


@pytest.fixture(autouse=True)
def no_dequantizing() -> object:
    """No operation may run on a dequantized copy."""
    iqtorch.set_fallback("error")
    yield
    iqtorch.set_fallback("warn")


def packed(kind: str = "llama") -> nn.Module:
    return iqtorch.quantize_model(tiny_model(kind), Recipe.pure("q8_0"), progress=False)


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(IDS if model.device.type == "meta" else IDS.to(model.device)).logits.cpu()


def same_files(first: Path, second: Path) -> bool:
    a, b = (load_file(folder / "model.safetensors") for folder in (first, second))
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def near(got: Tensor, want: Tensor) -> bool:
    """Equal but for how the kernels of another device round activations."""
    return bool((got - want).norm() <= 0.02 * want.norm())


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
        assert torch.equal(logits(transformers.AutoModelForCausalLM.from_pretrained(tmp_path, device_map=device_map)), logits(model))
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
    tokens = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(loaded.generate(IDS, **tokens), model.generate(IDS, **tokens))
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


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", ["llama", "gpt_oss"])
def test_a_checkpoint_goes_from_the_cpu_to_a_device_and_back(kind: str, device: str, tmp_path: Path) -> None:
    model = packed(kind)
    model.save_pretrained(tmp_path / "cpu")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "cpu", device_map=device)
    assert {p.device.type for p in loaded.parameters()} == {device}
    assert near(logits(loaded), logits(model))
    loaded.save_pretrained(tmp_path / "device")
    assert same_files(tmp_path / "cpu", tmp_path / "device")
    back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "device")
    assert torch.equal(logits(back), logits(model))
    assert near(logits(back.to(device)), logits(model)) and near(logits(back.to("cpu")), logits(model))


@pytest.mark.parametrize("device", DEVICES)
def test_quantizing_while_loading_onto_a_device(device: str, tmp_path: Path) -> None:
    plain = tiny_model("qwen3_moe")
    plain.save_pretrained(tmp_path)
    config = iqtorch.IQConfig(recipe=Recipe.pure("q8_0"))
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=config, device_map=device)
    assert {p.device.type for p in loaded.parameters()} == {device} and iqtorch.report(loaded).packed_fraction > 0.99
    assert near(logits(loaded), logits(packed("qwen3_moe")))


@needs_gpu
def test_auto_splits_layers_between_a_gpu_and_the_cpu(tmp_path: Path) -> None:
    model = packed()
    model.save_pretrained(tmp_path)
    size = sum(p.nbytes for p in model.parameters())
    memory = {0: size // 2, "cpu": 4 * size}
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, device_map="auto", max_memory=memory)
    assert set(map(str, loaded.hf_device_map.values())) == {"0", "cpu"}
    assert near(logits(loaded), logits(model))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_pipeline_over_two_devices(tmp_path: Path) -> None:
    """One process, whose hooks carry activations from device to device."""
    model = packed()
    model.save_pretrained(tmp_path)
    where = {"model.embed_tokens": 0, "model.rotary_emb": 0, "model.layers.0": 0, "model.layers.1": 1, "model.norm": 1, "lm_head": 1}
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, device_map=where)
    assert {p.device.index for p in loaded.model.layers[1].parameters()} == {1} and near(logits(loaded), logits(model))


@needs_gpu
def test_a_model_on_a_gpu_needs_its_packed_size_and_activations(tmp_path: Path) -> None:
    packed().save_pretrained(tmp_path)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, device_map="cuda")
    size = sum(p.nbytes for p in loaded.parameters())
    assert torch.cuda.memory_allocated() - before <= 1.1 * size + 2**16
    logits(loaded)
    assert (
        torch.cuda.max_memory_allocated() - before <= 1.1 * size + 2**24
    )  # workspaces of matrix products; the plain model has 4 bytes a weight


@needs_gpu
def test_experts_on_the_cpu_and_the_rest_on_the_gpu() -> None:
    model = packed("qwen3_moe")
    want = logits(model)
    iqtorch.place(model, {r"mlp\.experts$": "cpu"}, default="cuda")
    devices = {name: p.device.type for name, p in model.named_parameters()}
    assert all((device == "cpu") == ("experts" in name) for name, device in devices.items())
    with torch.no_grad():
        assert near(model(IDS.cuda()).logits.cpu(), want)
