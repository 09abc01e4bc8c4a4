"""Models on a GPU, on two, and on a GPU beside CPU and disk: what moves is packed, and outputs are those of the CPU.

Without a GPU `tests/test_simulated_device.py` runs this file on devices in host memory, which have no kernels of their own.
"""

from __future__ import annotations

import copy
import io
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import iqtorch
from iqtorch import IQTensor, Recipe
from iqtorch.data import TINY_LLAMA
from iqtorch.errors import UnsupportedOperationError

transformers = pytest.importorskip("transformers")
accelerate = pytest.importorskip("accelerate")

from placement_cases import (  # noqa: E402, F401
    GPU,
    IDS,
    gpu,
    logits,
    near,
    needs_gpu,
    needs_two_gpus,
    no_dequantizing,
    packed,
    same_files,
    tokens,
)
from tiny_models import tiny_model  # noqa: E402

#: A CPU as well, so that the tests themselves are tested everywhere.
DEVICES = ["cpu", pytest.param(GPU, marks=needs_gpu)]
#: Layers of a tiny Llama on two devices, as a pipeline has them.
PIPELINE = {
    "model.embed_tokens": 0, "model.rotary_emb": 0, "model.layers.0": 0, "model.layers.1": 1, "model.norm": 1, "lm_head": 1,
}  # fmt: skip


def split(folder: Path, where: object, **kwargs: object) -> nn.Module:
    """A packed Llama, saved and loaded onto several devices."""
    packed().save_pretrained(folder)
    return transformers.AutoModelForCausalLM.from_pretrained(folder, device_map=where, **kwargs)


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
@pytest.mark.parametrize("checkpoint", ["packed", "plain"])
def test_auto_splits_layers_between_a_gpu_and_the_cpu(checkpoint: str, tmp_path: Path) -> None:
    """By their packed sizes, whether they are packed already or quantized while they are loaded."""
    model = packed()
    (model if checkpoint == "packed" else tiny_model("llama")).save_pretrained(tmp_path)
    size = sum(p.nbytes for p in model.parameters())
    memory = {0: size, "cpu": 4 * size}  # all but a head, beside room for a layer; of the plain model not even a layer
    config = {} if checkpoint == "packed" else {"quantization_config": iqtorch.IQConfig(recipe=Recipe.pure("q8_0"))}
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, device_map="auto", max_memory=memory, **config)
    assert set(map(str, loaded.hf_device_map.values())) == {"0", "cpu"} and iqtorch.report(loaded).packed_fraction == 1
    assert any(p.device.type == GPU for p in loaded.model.layers[0].parameters())
    assert near(logits(loaded), logits(model))


@needs_gpu
def test_a_model_on_a_gpu_needs_its_packed_size_and_activations(tmp_path: Path) -> None:
    packed().save_pretrained(tmp_path)
    logits(packed().to(GPU))  # takes the workspaces of matrix products
    before = gpu.memory_allocated()
    gpu.reset_peak_memory_stats()
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, device_map=GPU)
    size = sum(p.nbytes for p in loaded.parameters())
    assert gpu.memory_allocated() - before <= 1.1 * size + 2**16
    logits(loaded)
    assert gpu.max_memory_allocated() - before <= 1.1 * size + 2**24  # the plain model has 4 bytes a weight


@needs_gpu
def test_experts_on_the_cpu_and_the_rest_on_the_gpu() -> None:
    model = packed("qwen3_moe")
    want = logits(model)
    gpu.reset_peak_memory_stats()
    before = gpu.memory_allocated()
    iqtorch.place(model, {r"mlp\.experts$": "cpu"}, default=GPU)
    there = sum(p.nbytes for p in model.parameters() if p.device.type == GPU)
    assert gpu.max_memory_allocated() - before <= 1.5 * there + 2**16 < sum(p.nbytes for p in model.parameters())  # no expert was there
    devices = {name: p.device.type for name, p in model.named_parameters()}
    assert all((device == "cpu") == ("experts" in name) for name, device in devices.items())
    with torch.no_grad():
        assert near(model(IDS.to(GPU)).logits.cpu(), want)


@pytest.mark.parametrize("device", DEVICES)
def test_state_dicts_and_pickles_cross_devices(device: str) -> None:
    model, there = packed(), packed().to(device)
    want = logits(model)
    copied = copy.deepcopy(there)
    assert copied.device.type == device and near(logits(copied), want)
    copied.load_state_dict(model.state_dict())  # by value: each weight stays where it is
    assert copied.device.type == device and torch.equal(copied.lm_head.weight.cpu(), model.lm_head.weight)
    back = packed()
    back.load_state_dict(there.state_dict())
    assert back.device.type == "cpu" and torch.equal(logits(back), want)
    back.load_state_dict(there.state_dict(), assign=True)
    assert back.device.type == device and near(logits(back), want)
    file = io.BytesIO()
    torch.save(there.state_dict(), file)
    for location in ("cpu", device):
        file.seek(0)
        weight = torch.load(file, map_location=location)["lm_head.weight"]
        assert isinstance(weight, IQTensor) and weight.device.type == location
        assert torch.equal(weight.cpu(), model.lm_head.weight)


@needs_gpu
def test_an_offload_hook_brings_packed_weights_to_the_gpu() -> None:
    model = packed()
    want, generated = logits(model), tokens(model)
    offloaded = accelerate.cpu_offload(copy.deepcopy(model), execution_device=torch.device(GPU, 0))
    for _ in range(2):
        assert near(offloaded(IDS.to(GPU)).logits.detach().cpu(), want)
        assert all(p.is_meta for p in offloaded.parameters())  # nothing stays behind
    assert torch.equal(tokens(offloaded, GPU), generated)
    whole, hook = accelerate.cpu_offload_with_hook(packed(), execution_device=torch.device(GPU, 0))
    assert near(whole(IDS.to(GPU)).logits.detach().cpu(), want) and {p.device.type for p in whole.parameters()} == {GPU}
    hook.offload()
    assert all(p.device.type == "cpu" and torch.equal(p, q) for p, q in zip(whole.parameters(), model.parameters()))


@needs_gpu
@pytest.mark.parametrize("changes", [{}, {"model.layers.0": "cpu"}, {"model.layers.0": "cpu", "lm_head": "disk"}])
@pytest.mark.parametrize("gpus", [1, pytest.param(2, marks=needs_two_gpus)])
def test_layers_on_gpus_cpu_and_disk(gpus: int, changes: dict, tmp_path: Path) -> None:
    """A pipeline in one process: hooks carry the activations from device to device."""
    where = {**(PIPELINE if gpus == 2 else dict.fromkeys(PIPELINE, 0)), **changes}
    loaded = split(tmp_path, where)
    assert near(loaded(IDS.to(GPU)).logits.detach().cpu(), logits(packed())) and torch.equal(tokens(loaded, GPU), tokens(packed()))
    for name, parameter in loaded.named_parameters():
        place = next(place for part, place in where.items() if name.startswith(part))
        assert parameter.device == (torch.device("meta") if isinstance(place, str) else torch.device(GPU, place)), name
        assert isinstance(parameter, IQTensor) or parameter.dim() == 1
    loaded.save_pretrained(tmp_path / "again")
    assert same_files(tmp_path, tmp_path / "again")


@needs_two_gpus
def test_a_tied_table_serves_another_gpu(tmp_path: Path) -> None:
    model = packed(tie_word_embeddings=True)
    model.save_pretrained(tmp_path)
    where = {"model.embed_tokens": 0, "lm_head": 0, "model.layers": 1, "model.norm": 1, "model.rotary_emb": 1}
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, device_map=where)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert near(loaded(IDS.to(GPU)).logits.detach().cpu(), logits(model))


@needs_two_gpus
@pytest.mark.parametrize("kind", ["qwen3_moe", "gpt_oss", "mixtral"])
def test_experts_on_another_gpu(kind: str) -> None:
    model = packed(kind)
    want, generated = logits(model), tokens(model)
    iqtorch.place(model, {r"experts$": f"{GPU}:1"}, default=f"{GPU}:0")
    assert {p.device.index for name, p in model.named_parameters() if "experts." in name} == {1}
    assert near(logits(model), want) and torch.equal(tokens(model, GPU), generated)


@needs_gpu
def test_adapters_train_on_a_gpu(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"])
    where = PIPELINE if gpu.device_count() > 1 else GPU
    for model in (packed().to(GPU), split(tmp_path, where)):
        adapted, ids = peft.get_peft_model(model, config), IDS.to(GPU)
        optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], 1e-2)
        losses = []
        for _ in range(5):
            losses.append(adapted(input_ids=ids, labels=ids).loss)
            losses[-1].backward()
            optimizer.step()
            optimizer.zero_grad()
        assert losses[-1] < losses[0] - 0.5
    data = [{"input_ids": IDS[0], "labels": IDS[0]}] * 8
    arguments = transformers.TrainingArguments(
        str(tmp_path), max_steps=2, per_device_train_batch_size=2, gradient_checkpointing=True, save_strategy="no", report_to=[]
    )
    trained = peft.get_peft_model(packed(), config)
    assert transformers.Trainer(trained, arguments, train_dataset=data).train().global_step == 2
    assert {p.device.type for p in trained.parameters()} == {GPU}
    want = trained(IDS.to(GPU)).logits.detach().cpu()
    merged = iqtorch.merge_adapter(trained, format=None)  # plain layers where adapters were
    assert near(merged(IDS.to(GPU)).logits.detach().cpu(), want)


@needs_gpu
def test_autocast_on_a_gpu() -> None:
    layer = packed().lm_head.to(GPU)
    with torch.autocast(GPU, torch.bfloat16):
        assert layer(torch.randn(2, 256, device=GPU)).dtype == torch.bfloat16


@needs_gpu
def test_pipelines_find_their_device(tmp_path: Path) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(TINY_LLAMA)
    model = iqtorch.quantize_model(transformers.AutoModelForCausalLM.from_pretrained(TINY_LLAMA), "iq4_ks", progress=False)
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path)
    texts = set()
    for kwargs in ({"device": f"{GPU}:0"}, {"device_map": "auto"}, {}, {"device": "cpu"}):
        pipeline = transformers.pipeline("text-generation", model=str(tmp_path), **kwargs)
        assert pipeline.model.device.type == ("cpu" if kwargs.get("device") == "cpu" else GPU)
        texts.add(pipeline("The cat", max_new_tokens=5, do_sample=False)[0]["generated_text"])
    assert len(texts) == 1


@needs_gpu
def test_importance_and_files_from_a_gpu(tmp_path: Path) -> None:
    plain = tiny_model("llama")
    want = iqtorch.collect_importance(plain, [IDS])
    got = iqtorch.collect_importance(plain.to(GPU), [IDS])
    assert set(got) == set(want) and all(torch.allclose(got[name].cpu(), want[name], rtol=1e-3) for name in want)
    model = iqtorch.quantize_model(transformers.AutoModelForCausalLM.from_pretrained(TINY_LLAMA), "iq4_ks", progress=False)
    tokenizer = transformers.AutoTokenizer.from_pretrained(TINY_LLAMA)
    iqtorch.save_gguf(model, tmp_path / "cpu.gguf", tokenizer=tokenizer)
    iqtorch.save_gguf(model.to(GPU), tmp_path / "gpu.gguf", tokenizer=tokenizer)
    assert (tmp_path / "cpu.gguf").read_bytes() == (tmp_path / "gpu.gguf").read_bytes()


@needs_gpu
def test_quantizing_a_model_on_a_gpu() -> None:
    model = iqtorch.quantize_model(tiny_model("qwen3_moe").to(GPU), Recipe.pure("q8_0"), progress=False)
    assert {p.device.type for p in model.parameters()} == {GPU} and near(logits(model), logits(packed("qwen3_moe")))


@needs_gpu
def test_mixed_devices_are_named() -> None:
    weight, x = packed().lm_head.weight, torch.randn(2, 256)
    for run in (
        lambda: F.linear(x, weight.to(GPU)),
        lambda: x @ weight.to(GPU).T,
        lambda: F.linear(x.to(GPU), weight),
        lambda: x.to(GPU) @ weight.T,
        lambda: F.embedding(IDS.to(GPU), weight),
    ):
        with pytest.raises(UnsupportedOperationError, match=rf"are on .*{GPU}|is on {GPU}") as error:
            run()
        assert "cpu" in str(error.value) and ".to(device)" in str(error.value)


@pytest.mark.skipif(GPU == "cuda" or not gpu.is_available(), reason="CUDA devices have kernels")
def test_a_device_without_kernels_says_so(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(iqtorch.ops, "_fallbacks", {})
    for _ in range(2):
        assert packed().to(GPU).lm_head.weight.backend == "torch"
    assert [record.levelname for record in caplog.records if f"{GPU} kernels not used" in record.message] == ["WARNING"]
    assert [entry["backend"] for entry in iqtorch.kernel_info()["fallbacks"]] == [GPU]
    iqtorch.set_backend("cpu")
    try:
        with pytest.raises(iqtorch.errors.KernelUnavailableError, match=f"it does not run on {GPU} tensors"):
            packed().to(GPU)
    finally:
        iqtorch.set_backend(None)
