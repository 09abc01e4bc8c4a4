"""Gate and up experts of different types: packed as they are stored, in one model parameter each."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import iqtorch
from iqtorch import IQTensor
from iqtorch.experts import SPLIT, is_split
from iqtorch.formats import get_format
from iqtorch.gguf import GGUFFile, TensorSource, load_gguf, save_gguf

pytest.importorskip("transformers")
from gguf_models import MODELS, assert_same_weights, ids, logits, pack, reload_from_folder, rewrite, tiny

#: Families whose files have gate and up in two tensors.
MOE = [name for name, (_, settings) in MODELS.items() if any("expert" in key for key in settings) and name != "gemma4-moe"]
#: Of gate and up; None: not quantized.
TYPES = [("q8_0", "q5_0"), ("iq4_nl", None), (None, "q4_1")]


@pytest.fixture
def exact_products() -> Iterator[None]:
    iqtorch.ops.set_backend("torch")
    yield
    iqtorch.ops.set_backend(None)


def mixed(name: str, path: Path, types: tuple[str | None, str | None]) -> Any:
    """A file whose layers have experts of these types, but for the first such layer; returns the model with plain experts."""
    model = tiny(name)
    save_gguf(model, path.with_suffix(".plain"))
    first = min(n for n in GGUFFile(path.with_suffix(".plain")).tensors if "_gate_exps.weight" in n)

    def change(tensor: str, info: Any, source: TensorSource) -> TensorSource:
        for part, kind in zip(("gate", "up"), types, strict=True):
            if tensor.endswith(f"ffn_{part}_exps.weight"):
                kind = "q8_0" if tensor.split(".")[1] == first.split(".")[1] else kind
                if kind is not None:
                    blocks = iqtorch.quantize(source.load().float(), kind).to_blocks()
                    return TensorSource(tensor, info.shape, get_format(kind), lambda blocks=blocks: blocks)  # type: ignore[misc]
        return source

    rewrite(path.with_suffix(".plain"), path, change)
    return model


def experts_of(model: Any) -> list[Any]:
    return [module for name, module in model.named_modules() if name.endswith(".experts")]


@pytest.mark.parametrize("name", MOE)
def test_experts_stay_packed(tmp_path: Path, name: str, exact_products: None) -> None:
    path = tmp_path / "a.gguf"
    mixed(name, path, ("q8_0", "q5_0"))
    file, model = GGUFFile(path), load_gguf(path, dtype=torch.float32)
    experts = experts_of(model)
    assert [is_split(module) for module in experts] == [False] + [True] * (len(experts) - 1)
    last = model.config.num_hidden_layers - 1
    for part, kind in zip(SPLIT, ("q8_0", "q5_0"), strict=True):
        weight, stored = getattr(experts[-1], part), file.data(f"blk.{last}.ffn_{part.removesuffix('_proj')}_exps.weight")
        assert isinstance(weight, IQTensor) and weight.format.name == kind
        assert torch.equal(weight.to_blocks(), stored)
    # the same model with experts decoded and merged again computes the same, by transformers' own code
    found, plain = logits(model), load_gguf(path.with_suffix(".plain"), dtype=torch.float32)
    first = logits(plain)
    for ours, theirs in zip(experts, experts_of(plain), strict=True):
        halves = [getattr(ours, part).dequantize() for part in SPLIT] if is_split(ours) else []
        if not halves:
            merged = ours.gate_up_proj.dequantize()
        elif theirs.is_transposed:  # gpt-oss: columns alternate
            merged = torch.stack(halves, -1).flatten(-2)
        else:
            merged = torch.cat(halves, 1)
        theirs.gate_up_proj = torch.nn.Parameter(merged)
    expected = logits(plain)
    assert (found - expected).norm() / expected.norm() < 1e-4 < (first - expected).norm() / expected.norm() < 0.5
    assert model.generate(ids(), max_new_tokens=3, do_sample=False).shape == (2, 27)


@pytest.mark.parametrize("types", TYPES, ids=str)
@pytest.mark.parametrize("name", ["qwen3-moe", "gpt-oss"])
def test_round_trips(tmp_path: Path, name: str, types: Any) -> None:
    """Through memory, folders and streaming: the tensors of the file."""
    path = tmp_path / "a.gguf"
    mixed(name, path, types)
    model = load_gguf(path)
    assert {is_split(module) for module in experts_of(model)} == {False, True}
    save_gguf(model, tmp_path / "b.gguf")
    reload_from_folder(model, tmp_path / "folder")
    iqtorch.convert_checkpoint(path, tmp_path / "streamed", progress=False)
    iqtorch.convert_checkpoint(tmp_path / "streamed", tmp_path / "c.gguf", progress=False)
    plain = GGUFFile(tmp_path / "b.gguf")
    assert plain.tensors["blk.2.ffn_gate_exps.weight"].type_name == (types[0] or "bfloat16")
    assert plain.tensors["blk.2.ffn_up_exps.weight"].type_name == (types[1] or "bfloat16")
    other = GGUFFile(tmp_path / "c.gguf")
    assert list(other.tensors) == list(plain.tensors)
    assert all(torch.equal(other.data(tensor), plain.data(tensor)) for tensor in plain.tensors)
    assert all(torch.equal(plain.data(tensor), GGUFFile(path).data(tensor)) for tensor in plain.tensors)


def test_a_packed_split_model_quantizes_the_rest(tmp_path: Path) -> None:
    """The half that the file holds unquantized can be packed later; the report and importance know it by its own name."""
    path = tmp_path / "a.gguf"
    mixed("qwen3-moe", path, ("q8_0", None))
    model = load_gguf(path)
    importance = iqtorch.Importance({"blk.1.ffn_up_exps.weight": torch.rand(4, 64) + 0.1})
    pack(model, {"up_proj": "iq4_nl"})
    weight = model.model.layers[1].mlp.experts.up_proj
    assert isinstance(weight, IQTensor) and weight.format.name == "iq4_nl"
    other = iqtorch.Importance({"blk.1.ffn_up_exps.weight": torch.ones(3, 64)})
    with pytest.raises(iqtorch.errors.IQTorchError, match=r"has 192 values, .*up_proj' of shape \(4, 32, 64\) needs 256"):
        iqtorch.quantize_model(load_gguf(path), {"up_proj": "iq4_nl"}, other, progress=False)
    again = iqtorch.quantize_model(load_gguf(path), {"up_proj": "iq4_nl"}, importance, progress=False)
    assert not torch.equal(again.model.layers[1].mlp.experts.up_proj.to_blocks(), weight.to_blocks())


@pytest.mark.parametrize("kind", [None, "q8_0"])
def test_gate_and_up_in_one_tensor(tmp_path: Path, kind: str | None) -> None:
    """As some files have them."""
    model = pack(tiny("qwen3-moe"), {"experts": kind, "self_attn": "q5_0"})
    save_gguf(model, tmp_path / "a.gguf")
    file = GGUFFile(tmp_path / "a.gguf")

    def join(name: str, info: Any, source: TensorSource) -> TensorSource | None:
        if not name.endswith(("ffn_gate_exps.weight", "ffn_up_exps.weight")):
            return source
        if "up_exps" in name:
            return None
        both = torch.cat([source.load(), file.data(name.replace("gate", "up"))], 1)
        return TensorSource(name.replace("gate", "gate_up"), (4, 64, 64), source.type, lambda: both)

    path = rewrite(tmp_path / "a.gguf", tmp_path / "b.gguf", join)
    assert "blk.0.ffn_gate_up_exps.weight" in GGUFFile(path).tensors
    assert_same_weights(load_gguf(path), model)
