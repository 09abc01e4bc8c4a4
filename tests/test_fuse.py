"""Fused projections: the same bits as one by one, in every state of a model, and nothing that is stored differs."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import iqtorch
from iqtorch.data import load_tiny_llama
from iqtorch.fuse import FusedLinear


class Attention(nn.Module):
    """Projections of one or two inputs, with what real models do around them."""

    def __init__(self, bias: bool = False) -> None:
        super().__init__()
        self.q_proj = nn.Linear(256, 64, bias=bias)
        self.k_proj = nn.Linear(256, 40, bias=bias)
        self.v_proj = nn.Linear(256, 7, bias=bias)

    def forward(self, x: Tensor, other: Tensor | None = None) -> list[Tensor]:
        other = x if other is None else other
        return [self.q_proj(x), self.k_proj(other), self.v_proj(other)]


def packed_attention(bias: bool = False) -> Attention:
    torch.manual_seed(0)
    recipe = {"q_proj": "iq2_kl", "k_proj": "q4_k", "v_proj": "iq4_ks"}
    return iqtorch.quantize_model(Attention(bias), recipe, fuse=True, speed="fast", progress=False)


def alone(model: nn.Module) -> Any:
    out = copy.deepcopy(model)
    iqtorch.unfuse(out)
    assert not any(isinstance(layer, FusedLinear) for layer in out.modules())
    return out


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many matrices each fused call had."""
    counts: list[int] = []
    backend = iqtorch.ops.get_backend(packed_attention().q_proj.weight.backend)
    many = backend.linear_many

    def counted(x: Tensor, data: list[Tensor], *rest: Any) -> list[Tensor]:
        counts.append(len(data))
        return many(x, data, *rest)

    monkeypatch.setattr(backend, "linear_many", counted)
    return counts


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("precision", ["int8", "float"])
def test_same_bits(bias: bool, dtype: torch.dtype, precision: str, calls: list[int]) -> None:
    model = packed_attention(bias).to(dtype)
    iqtorch.set_activation_precision(precision)
    try:
        with torch.no_grad():
            for shape in ((256,), (1, 256), (2, 9, 256), (40, 256), (0, 256)):
                x = torch.randn(shape, dtype=dtype)
                assert same(model(x), alone(model)(x))
    finally:
        iqtorch.set_activation_precision("int8")
    assert calls == 5 * [3]


def test_gradients_and_autocast_take_the_plain_path(calls: list[int]) -> None:
    model = packed_attention(bias=True)
    x = torch.randn(3, 256, requires_grad=True)
    sum(y.sum() for y in model(x)).backward()
    y = x.detach().clone().requires_grad_()
    sum(y.sum() for y in alone(model)(y)).backward()
    assert torch.equal(x.grad, y.grad) and model.k_proj.bias.grad is not None
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert model(x)[0].dtype == torch.bfloat16
    assert not calls


def test_different_activations_end_the_group(calls: list[int]) -> None:
    model, x, other = packed_attention(), torch.randn(2, 256), torch.randn(5, 256)
    with torch.no_grad():
        for _ in range(3):
            assert same(model(x, other), alone(model)(x, other))
    assert calls == [3]  # once, and never again
    assert model.q_proj.group.held is None


def test_results_are_not_kept(calls: list[int]) -> None:
    model = packed_attention()
    with torch.no_grad():
        x = torch.randn(2, 256)
        model(x)
        assert model.q_proj.group.held is None
        assert same(model(x), model(x))
    assert calls == 3 * [3]


def test_what_is_stored_does_not_change() -> None:
    model = packed_attention(bias=True)
    plain = alone(model)
    assert list(model.state_dict()) == list(plain.state_dict())
    assert [name for name, _ in model.named_modules()] == [name for name, _ in plain.named_modules()]
    assert len({id(layer.group) for layer in copy.deepcopy(model).children()} | {id(model.q_proj.group)}) == 2
    fresh = Attention(bias=True).requires_grad_(False)
    fresh.load_state_dict(model.state_dict(), assign=True)
    x = torch.randn(2, 256)
    with torch.no_grad():
        assert same(fresh(x), model(x))


def test_which_layers_are_fused() -> None:
    model = nn.ModuleDict(
        {
            "gate_proj": nn.Linear(256, 32), "up_proj": nn.Linear(256, 32), "down_proj": nn.Linear(256, 32),
            "q": nn.Linear(256, 32), "k": nn.Linear(512, 32),
        }
    )  # fmt: skip
    iqtorch.quantize_model(model, iqtorch.Recipe.pure("iq2_kl"), speed="fast", progress=False)
    assert iqtorch.fuse(model) == 1  # q and k have rows of different lengths
    assert [name for name, layer in model.items() if isinstance(layer, FusedLinear)] == ["gate_proj", "up_proj"]
    assert iqtorch.fuse(model) == 0  # once is enough
    model["up_proj"].weight = nn.Parameter(model["up_proj"].weight.dequantize(), requires_grad=False)
    x = torch.randn(1, 256)
    assert torch.equal(model["gate_proj"](x), alone(model)["gate_proj"](x))


def test_compiled() -> None:
    model = packed_attention()
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager")
    counter = torch._dynamo.utils.counters
    counter.clear()
    with torch.no_grad():
        for batch in (3, 7, 12):
            x = torch.randn(batch, 256)
            assert same(compiled(x), alone(model)(x))
    assert counter["stats"]["unique_graphs"] == 1
    assert model.q_proj.group.held is None


@pytest.fixture(scope="module")
def llama() -> tuple[Any, Any]:
    pytest.importorskip("transformers")
    model, tokenizer = load_tiny_llama(torch.bfloat16)
    return iqtorch.quantize_model(model, "iq4_ks", speed="fast", progress=False), tokenizer


def test_generation_saving_and_gguf(llama: tuple[Any, Any], tmp_path: Path) -> None:
    plain, tokenizer = llama
    model = copy.deepcopy(plain)
    assert iqtorch.fuse(model) == 2 * model.config.num_hidden_layers
    ids = tokenizer("The old man looked at", return_tensors="pt").input_ids
    how = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False}
    assert torch.equal(model.generate(ids, **how), plain.generate(ids, **how))
    with torch.no_grad():
        assert torch.equal(model(ids).logits, plain(ids).logits)
    for name, each in (("fused", model), ("plain", plain)):
        each.save_pretrained(tmp_path / name)
    assert (tmp_path / "fused/model.safetensors").read_bytes() == (tmp_path / "plain/model.safetensors").read_bytes()
    if pytest.importorskip("gguf"):
        for name, each in (("fused", model), ("plain", plain)):
            iqtorch.save_gguf(each, tmp_path / f"{name}.gguf", tokenizer, name="x")
        assert (tmp_path / "fused.gguf").read_bytes() == (tmp_path / "plain.gguf").read_bytes()


def test_adapters(llama: tuple[Any, Any]) -> None:
    peft = pytest.importorskip("peft")
    model = copy.deepcopy(llama[0])
    config = peft.LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    torch.manual_seed(0)
    adapted = peft.get_peft_model(model, config)
    ids = torch.randint(0, 2048, (1, 16))
    with torch.no_grad():
        expected = adapted(input_ids=ids).logits
        assert iqtorch.fuse(adapted) == 2 * model.config.num_hidden_layers
        assert torch.equal(adapted(input_ids=ids).logits, expected)
    adapted(input_ids=ids, labels=ids).loss.backward()
    assert all(p.grad is not None for p in adapted.parameters() if p.requires_grad)
    merged = iqtorch.merge_adapter(adapted)
    assert torch.isfinite(merged(input_ids=ids).logits).all()
