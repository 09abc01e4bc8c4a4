"""Training adapters on packed weights: PEFT, gradients, checkpointing, Trainer, autocast, merging."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import iqtorch
from iqtorch import IQTensor, Recipe
from iqtorch.errors import UnsupportedOperationError, WeightError

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

from packaging.version import Version  # noqa: E402
from test_model import dequantized, llama  # noqa: E402
from tiny_models import tiny_model  # noqa: E402
from transformers.integrations import peft as transformers_peft  # noqa: E402

IDS = torch.arange(3, 27).reshape(2, 12)
EMBEDDED = Path(iqtorch.__file__).parent / "data" / "tiny-llama"


def packed(kind: str = "llama", recipe: str = "q8_0") -> nn.Module:
    return iqtorch.quantize_model(tiny_model(kind), Recipe.pure(recipe), progress=False)


def lora(model: nn.Module, **kwargs: object) -> nn.Module:
    """The model with random (not zero) adapters, the same on every call."""
    torch.manual_seed(0)
    adapted = peft.get_peft_model(model, peft.LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": "all-linear", **kwargs}))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.05)
    return adapted


def gradients(model: nn.Module) -> dict[str, Tensor]:
    model.zero_grad()
    model(input_ids=IDS, labels=IDS).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


def train(model: nn.Module, ids: Tensor, steps: int, lr: float) -> list[float]:
    """Losses of some steps of AdamW on what is not frozen."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)
    losses = []
    for _ in range(steps):
        loss = model(input_ids=ids, labels=ids).loss
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return losses


@pytest.fixture
def plain_torch() -> object:
    """Float32 arithmetic: kernels may round activations of large batches to bfloat16."""
    iqtorch.set_backend("torch")
    yield
    iqtorch.set_backend(None)


@pytest.mark.usefixtures("plain_torch")
@pytest.mark.parametrize("kind", ["llama", "qwen3_moe"])
def test_gradients_equal_those_of_the_dequantized_model(kind: str) -> None:
    model = packed(kind)
    target = ["q_proj", "v_proj", "o_proj"] if kind == "qwen3_moe" else "all-linear"  # below the experts: gradients pass through them
    got, want = gradients(lora(model, target_modules=target)), gradients(lora(dequantized(model), target_modules=target))
    assert got.keys() == want.keys() and len(got) > 10
    for name in want:
        assert (got[name] - want[name]).norm() <= 1e-4 * want[name].norm(), name


def test_gradients_of_the_kernels_of_this_machine_and_of_checkpointing() -> None:
    model = packed()
    want = gradients(lora(dequantized(model)))
    adapted = lora(model)
    adapted.enable_input_require_grads()  # as checkpointing does: without it the first layer may round its activations to 8 bits
    got = gradients(adapted)
    adapted.gradient_checkpointing_enable()
    again = gradients(adapted.train())
    for name in want:
        assert (got[name] - want[name]).norm() <= 0.03 * want[name].norm(), name
        assert torch.equal(got[name], again[name]), name


def test_autocast_trains_in_bfloat16() -> None:
    adapted = lora(packed())
    with torch.autocast("cpu", torch.bfloat16):
        hidden = adapted.base_model.model.model.layers[0].self_attn.q_proj.get_base_layer()(torch.randn(2, 256))
        assert hidden.dtype == torch.bfloat16
        loss = adapted(input_ids=IDS, labels=IDS).loss
    loss.backward()
    exact = lora(packed())(input_ids=IDS, labels=IDS).loss
    assert abs(loss.item() - exact.item()) <= 0.02 * exact.item()
    assert all(torch.isfinite(p.grad).all() for p in adapted.parameters() if p.requires_grad)


def test_lora_on_the_embedded_model_trains_saves_loads_and_turns_off(tmp_path: Path) -> None:
    def base() -> nn.Module:
        model = transformers.AutoModelForCausalLM.from_pretrained(EMBEDDED, dtype=torch.float32)
        return iqtorch.quantize_model(model, "iq4_k", progress=False)

    text = (EMBEDDED.parent / "heldout.txt").read_text()[:600]
    ids = transformers.AutoTokenizer.from_pretrained(EMBEDDED)(text, return_tensors="pt").input_ids[:, :96]
    torch.manual_seed(0)
    model = peft.get_peft_model(base(), peft.LoraConfig(r=8, lora_alpha=16, target_modules="all-linear"))
    blocks = {name: p.to_blocks() for name, p in model.named_parameters() if isinstance(p, IQTensor)}
    losses = train(model, ids, steps=6, lr=3e-3)
    assert losses[-1] < 0.8 * losses[0], losses
    assert blocks and all(torch.equal(blocks[name], p.to_blocks()) for name, p in model.named_parameters() if name in blocks)

    model.eval()
    with torch.no_grad():
        adapted = model(ids).logits
        with model.disable_adapter():
            assert torch.equal(model(ids).logits, base().eval()(ids).logits)
        model.save_pretrained(tmp_path)
        assert (tmp_path / "adapter_model.safetensors").stat().st_size < 1e6
        assert torch.equal(peft.PeftModel.from_pretrained(base(), tmp_path).eval()(ids).logits, adapted)


@pytest.mark.usefixtures("plain_torch")
def test_merging_into_dequantized_or_requantized_weights() -> None:
    with torch.no_grad():
        want = lora(packed())(IDS).logits
        plain = iqtorch.merge_adapter(lora(packed()), format=None)
        assert type(plain) is transformers.LlamaForCausalLM and not hasattr(plain, "peft_config")
        assert not isinstance(plain.model.layers[0].mlp.up_proj.weight, IQTensor) and isinstance(plain.lm_head.weight, IQTensor)
        assert (plain(IDS).logits - want).norm() <= 1e-4 * want.norm()
        again = iqtorch.merge_adapter(lora(packed()))
        assert again.model.layers[0].mlp.up_proj.weight.format.name == "q8_0" and iqtorch.report(again).packed_fraction == 1
        assert 0 < (again(IDS).logits - want).norm() <= 0.05 * want.norm()
        other = iqtorch.merge_adapter(lora(packed()), format="q6_k")
        assert other.model.layers[0].mlp.up_proj.weight.format.name == "q6_k"
        assert not any("lora" in name for name, _ in other.named_modules())
    with pytest.raises(UnsupportedOperationError, match="nothing to merge"):
        iqtorch.merge_adapter(peft.get_peft_model(packed(), peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)))
    with pytest.raises(UnsupportedOperationError, match="PeftModel"):
        iqtorch.merge_adapter(packed())
    tied = iqtorch.quantize_model(llama(tie_word_embeddings=True), "q8_0", progress=False)
    with pytest.raises(UnsupportedOperationError, match="lm_head.*tied"):
        iqtorch.merge_adapter(lora(tied, target_modules=["lm_head"]))
    with pytest.raises(UnsupportedOperationError, match="merge_adapter"):
        lora(packed()).merge_and_unload()  # PEFT adds in place


@pytest.mark.usefixtures("plain_torch")
def test_merging_says_when_few_bits_lose_the_adapter() -> None:
    """The weights lie on the grid of their format: changes smaller than its steps are rounded away, unless they are added before."""

    def small(base: nn.Module) -> nn.Module:
        adapted = lora(base, r=8)
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.data.mul_(0.03)  # changes smaller than a step of iq4_ks, larger than one of q8_0
        return adapted

    with torch.no_grad():
        base = packed(recipe="iq4_ks")
        change = small(packed(recipe="iq4_ks"))(IDS).logits - base(IDS).logits
        with pytest.warns(UserWarning, match=r"kept \d+% of what the adapter changes.*merge_and_unload"):
            lost = iqtorch.merge_adapter(small(packed(recipe="iq4_ks")))(IDS).logits - base(IDS).logits
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            kept = iqtorch.merge_adapter(small(packed(recipe="iq4_ks")), format=None)(IDS).logits - base(IDS).logits
            iqtorch.merge_adapter(small(packed(recipe="iq4_ks")), format="q8_0")
    assert (kept - change).norm() <= 0.01 * change.norm()
    assert (lost * change).sum() <= 0.5 * change.square().sum()


TARGETS = ["q_proj", "v_proj", "down_proj"]


@pytest.mark.usefixtures("plain_torch")
@pytest.mark.parametrize(
    "make",
    [
        lambda: peft.LoraConfig(target_modules=TARGETS, use_dora=True),
        lambda: peft.LoraConfig(target_modules=[*TARGETS, "embed_tokens"], modules_to_save=["norm"]),
        lambda: peft.LoraConfig(target_modules=TARGETS, trainable_token_indices=[3, 4]),
        lambda: peft.IA3Config(target_modules=TARGETS, feedforward_modules=["down_proj"]),
        lambda: peft.LoKrConfig(target_modules=TARGETS),
        lambda: peft.VeraConfig(target_modules=["q_proj", "o_proj"], r=4),
        lambda: peft.OFTConfig(target_modules=TARGETS, oft_block_size=32),
        lambda: peft.LoraConfig(target_modules=["q_proj"], target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]),
    ],
    ids=["dora", "embedding and norm", "tokens", "ia3", "lokr", "vera", "oft", "experts"],
)
def test_other_adapters_train_save_load_and_merge(make: Callable[[], object], tmp_path: Path) -> None:
    config = make()
    kind = "qwen3_moe" if getattr(config, "target_parameters", None) else "llama"
    torch.manual_seed(0)
    model = peft.get_peft_model(packed(kind), config)
    losses = train(model, IDS, steps=3, lr=1e-2)
    assert losses[-1] < losses[0]
    with torch.no_grad():
        want = model.eval()(IDS).logits
        model.save_pretrained(tmp_path, save_embedding_layers=False)
        assert torch.equal(peft.PeftModel.from_pretrained(packed(kind), tmp_path).eval()(IDS).logits, want)
        again = iqtorch.merge_adapter(copy.deepcopy(model))
        assert iqtorch.report(again).packed_fraction > 0.99 and 0 < (again(IDS).logits - want).norm() <= 0.1 * want.norm()
        plain = iqtorch.merge_adapter(model, format=None)
        assert (plain(IDS).logits - want).norm() <= 1e-4 * want.norm()


def test_an_adapter_that_is_not_active_changes_no_bit() -> None:
    model = lora(packed(), target_modules=TARGETS, layers_to_transform=[0])
    model.add_adapter("other", peft.LoraConfig(target_modules=["up_proj"], init_lora_weights=False))
    model.set_adapter("other")
    before = {name: p.to_blocks() for name, p in packed().named_parameters() if isinstance(p, IQTensor)}
    after = iqtorch.merge_adapter(model)
    changed = {name for name, p in after.named_parameters() if isinstance(p, IQTensor) and not torch.equal(p.to_blocks(), before[name])}
    assert changed == {f"model.layers.{i}.mlp.up_proj.weight" for i in range(2)}


def test_trainer(tmp_path: Path) -> None:
    model = lora(packed())
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path), max_steps=3, per_device_train_batch_size=2, learning_rate=5e-3, use_cpu=True, report_to=[],
        save_strategy="no", logging_steps=1, gradient_checkpointing=True, disable_tqdm=True,
    )  # fmt: skip
    data = [{"input_ids": row, "labels": row} for row in IDS.repeat(4, 1)]
    trainer = transformers.Trainer(model=model, args=arguments, train_dataset=data)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 3 and losses[-1] < losses[0]


def test_trainer_needs_an_adapter(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="purely quantized"):
        transformers.Trainer(model=packed(), args=transformers.TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to=[]))


@pytest.mark.skipif(
    Version(peft.__version__) < Version(transformers_peft.MIN_PEFT_VERSION),
    reason=f"transformers wants PEFT {transformers_peft.MIN_PEFT_VERSION} for its own adapters, newer than {peft.__version__}",
)
def test_adapters_of_transformers() -> None:
    model = packed()
    model.add_adapter(peft.LoraConfig(r=4, target_modules=["q_proj"]))
    model(input_ids=IDS, labels=IDS).loss.backward()
    assert model.model.layers[0].self_attn.q_proj.lora_A["default"].weight.grad is not None


def test_other_ways_to_adapt() -> None:
    prepared = peft.prepare_model_for_kbit_training(packed())
    assert any(isinstance(p, IQTensor) for p in prepared.parameters())
    lora(packed(), use_dora=True)(input_ids=IDS, labels=IDS).loss.backward()  # needs the weight's norms, on a dequantized copy


def test_what_cannot_be_trained_says_so(tmp_path: Path) -> None:
    model = packed()
    with pytest.raises(UnsupportedOperationError, match=r"train an adapter \(LoRA\)"):
        model.requires_grad_(True)
    with pytest.raises(UnsupportedOperationError, match="frozen"):
        model.lm_head.weight.requires_grad_(True)
    before = model.lm_head.weight.to_blocks()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)  # frozen weights have no gradient: nothing happens to them
    optimizer.step()
    assert torch.equal(model.lm_head.weight.to_blocks(), before)
    with pytest.raises(ValueError, match="float"):
        model.float()
    with pytest.raises(UnsupportedOperationError, match="keep this weight plain"):
        lora(packed(), modules_to_save=["lm_head"])
    with pytest.raises(WeightError, match="save_embedding_layers=False"):  # which would save the frozen table, too
        lora(packed(), target_modules=["embed_tokens"]).save_pretrained(tmp_path / "table")
    lora(packed(), r=2).save_pretrained(tmp_path)
    (tmp_path / "adapter_config.json").write_text((tmp_path / "adapter_config.json").read_text().replace('"r": 2', '"r": 3'))
    with pytest.raises(RuntimeError, match="size mismatch"):
        peft.PeftModel.from_pretrained(packed(), tmp_path)


def test_resizing_embeddings_and_tying_afterwards() -> None:
    model = packed()
    with pytest.raises(UnsupportedOperationError, match=r"resize_token_embeddings.*weight\.dequantize"):
        model.resize_token_embeddings(140)
    old = model.get_input_embeddings().weight.dequantize()
    model.get_input_embeddings().weight = nn.Parameter(old.clone())
    model.resize_token_embeddings(140)
    table = model.get_input_embeddings().weight
    assert table.shape == (140, 256) and type(table) is nn.Parameter and torch.equal(table[:128].detach(), old)
    assert model(IDS).logits.shape[-1] == 140
    model = packed()
    model.config.tie_word_embeddings = True
    model.tie_weights()
    assert model.lm_head.weight is model.get_input_embeddings().weight and model(IDS).logits.shape[-1] == 128
