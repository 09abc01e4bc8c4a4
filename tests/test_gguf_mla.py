"""Multi-head latent attention: `kv_b_proj` whole and in halves, packed and not."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import iqtorch
from iqtorch import IQTensor
from iqtorch.formats import get_format
from iqtorch.gguf import GGUFFile, GGUFTensorError, TensorSource, gguf_name, load_gguf, save_gguf, write_gguf
from iqtorch.mla import SplitKV

transformers = pytest.importorskip("transformers")
from gguf_models import assert_same_weights, ids, logits, pack, reload_from_folder, tiny  # noqa: E402 (imports transformers)

HEADS, KEYS, VALUES, LATENT = 4, 32, 16, 64
SIZES = {"qk_nope_head_dim": KEYS, "v_head_dim": VALUES, "kv_lora_rank": LATENT}
#: As files say it whose heads are merged.
MERGED = {"head_count_kv": 1, "key_length": LATENT + 8, "value_length": LATENT, "key_length_mla": KEYS + 8, "value_length_mla": VALUES}


def halved(
    source: Path, target: Path, types: tuple[str | None, str | None], keep: bool = False, flat: bool = False, **metadata: Any
) -> Path:
    """The file with `attn_kv_b` in two halves, of these types (None: as they are)."""
    file = GGUFFile(source)
    sources = []
    for name, info in file.tensors.items():
        if not name.endswith("attn_kv_b.weight") or keep:
            sources.append(TensorSource(name, info.shape, info.format or info.dtype, lambda name=name: file.data(name)))  # type: ignore[arg-type,misc]
        if not name.endswith("attn_kv_b.weight"):
            continue
        k, v = file.data(name).view(HEADS, KEYS + VALUES, LATENT).split([KEYS, VALUES], 1)
        for half, values, kind in (("k_b", k.mT.contiguous(), types[0]), ("v_b", v.contiguous(), types[1])):
            values = values.flatten(0, 1) if flat else values
            if kind is None:
                sources.append(TensorSource.of(name.replace("kv_b", half), values))
            else:
                blocks = iqtorch.quantize(values.float(), kind).to_blocks()
                sources.append(TensorSource(name.replace("kv_b", half), tuple(values.shape), get_format(kind), lambda b=blocks: b))  # type: ignore[misc]
    kept = {key: file.metadata[key] for key in file.metadata}
    if not keep:
        kept |= {f"deepseek2.attention.{key}": value for key, value in {**MERGED, **metadata}.items()}
    write_gguf(target, kept, sources)
    return target


@pytest.fixture
def original(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    """A model, packed but for `kv_b_proj`, whose file is `a.gguf`."""
    model = pack(tiny(getattr(request, "param", "deepseek-yarn"), **SIZES), {"mlp": "q8_0"})
    save_gguf(model, tmp_path / "a.gguf")
    return model


@pytest.fixture
def exact_products() -> Iterator[None]:
    """Products in plain torch: kernels may round activations, some of them to bfloat16 at any setting."""
    iqtorch.ops.set_backend("torch")
    yield
    iqtorch.ops.set_backend(None)


@pytest.mark.parametrize("keep", [False, True], ids=["halves", "both"])
@pytest.mark.parametrize("flat", [False, True], ids=["per head", "flat"])
def test_plain_halves_become_one_layer(tmp_path: Path, original: Any, keep: bool, flat: bool) -> None:
    """Newer llama.cpp files hold `attn_kv_b` as two halves, the first transposed; ik_llama.cpp's hold both forms."""
    path = halved(tmp_path / "a.gguf", tmp_path / "b.gguf", (None, None), keep, flat)
    assert_same_weights(load_gguf(path), original)


def check(y: torch.Tensor, x: torch.Tensor, matrix: torch.Tensor, rounding: float) -> None:
    """`y` is `x` times the matrix, each activation rounded by at most this part of itself."""
    x = x.detach().double()
    assert y.shape == (*x.shape[:-1], matrix.shape[1])
    assert ((y.double() - x @ matrix).abs() <= rounding * (x.abs() @ matrix.abs()) + 1e-5).all()


TYPES = [("q8_0", "q5_0"), ("iq4_nl", "iq4_nl"), ("q6_0", None), (None, "q4_1")]


@pytest.mark.parametrize(("types", "flat"), [(types, False) for types in TYPES] + [(TYPES[0], True)], ids=str)
def test_packed_halves_stay_packed(tmp_path: Path, original: Any, types: Any, flat: bool, exact_products: None) -> None:
    path = halved(tmp_path / "a.gguf", tmp_path / "b.gguf", types, flat=flat)
    file, model = GGUFFile(path), load_gguf(path)
    for i, layer in enumerate(model.model.layers):
        split = layer.self_attn.kv_b_proj
        assert type(split) is SplitKV
        assert (split.in_features, split.out_features) == (LATENT, HEADS * (KEYS + VALUES))
        for half, weight, kind in (("k_b", split.k_b_proj.weight, types[0]), ("v_b", split.v_b_proj.weight, types[1])):
            stored = file.data(f"blk.{i}.attn_{half}.weight")
            if kind is None:
                assert not isinstance(weight, IQTensor)
            else:
                assert isinstance(weight, IQTensor) and weight.format.name == kind
                assert torch.equal(weight.to_blocks().flatten(), stored.flatten())
    # the same model with one plain matrix in each layer
    model, whole = load_gguf(path, dtype=torch.float32), load_gguf(tmp_path / "a.gguf", dtype=torch.float32)
    first = logits(whole)
    for ours, theirs in zip(model.model.layers, whole.model.layers, strict=True):
        theirs.self_attn.kv_b_proj.weight = torch.nn.Parameter(ours.self_attn.kv_b_proj.dequantize())
    found, expected = logits(model), logits(whole)
    assert (found - expected).norm() / expected.norm() < 1e-4 < (first - expected).norm() / expected.norm() < 0.5


@pytest.mark.parametrize("original", ["deepseek-v2"], indirect=True)
@pytest.mark.parametrize("backend", ["torch", None])
def test_product_of_the_halves(tmp_path: Path, original: Any, backend: str | None) -> None:
    """Against float64, for any batch, with gradients; and as part of generation."""
    iqtorch.ops.set_backend(backend)
    try:
        model = load_gguf(halved(tmp_path / "a.gguf", tmp_path / "b.gguf", ("q8_0", "q6_0")))
    finally:
        iqtorch.ops.set_backend(None)
    split = model.model.layers[1].self_attn.kv_b_proj
    weight = split.dequantize(torch.float64)
    rounding = 2**-20 if backend == "torch" else 2**-8  # of an activation: exact sums, or bfloat16
    for shape in ((LATENT,), (1, LATENT), (2, 0, LATENT), (2, 1, 37, LATENT)):
        x = torch.randn(shape, requires_grad=True)
        y = split(x)
        assert y.dtype == x.dtype
        check(y, x, weight.T, rounding)
        g = torch.randn(y.shape)
        (y * g).sum().backward()
        check(x.grad, g, weight, rounding)
    assert model.generate(ids(), max_new_tokens=4, do_sample=False).shape == (2, 28)
    assert "HeadLinear(heads=4, in_features=64, out_features=32, format='q8_0')" in str(split)


@pytest.mark.parametrize("types", TYPES, ids=str)
def test_halves_are_written_back(tmp_path: Path, original: Any, types: Any) -> None:
    path = halved(tmp_path / "a.gguf", tmp_path / "b.gguf", types)
    save_gguf(load_gguf(path), tmp_path / "c.gguf", name="deepseek_v3")
    iqtorch.convert_checkpoint(path, tmp_path / "folder", progress=False)
    iqtorch.convert_checkpoint(tmp_path / "folder", tmp_path / "d.gguf", progress=False)
    first = GGUFFile(path)
    for other in (GGUFFile(tmp_path / "c.gguf"), GGUFFile(tmp_path / "d.gguf")):
        assert other.tensors.keys() == first.tensors.keys()
        for name, info in first.tensors.items():
            assert (other.tensors[name].shape, other.tensors[name].type_name) == (info.shape, info.type_name), name
            assert torch.equal(other.data(name), first.data(name)), name
        assert {key: other.metadata[f"deepseek2.attention.{key}"] for key in MERGED} == MERGED


@pytest.mark.parametrize("types", TYPES, ids=str)
def test_halves_in_hugging_face_folders(tmp_path: Path, original: Any, types: Any, caplog: pytest.LogCaptureFixture) -> None:
    model = load_gguf(
        halved(tmp_path / "a.gguf", tmp_path / "b.gguf", types), dtype=torch.float32
    )  # transformers 5.4 reads a correction of scores in float32
    headless = reload_from_folder(model, tmp_path / "folder")
    assert type(headless.layers[0].self_attn.kv_b_proj) is SplitKV


def test_halves_are_not_split_over_processes(tmp_path: Path, original: Any) -> None:
    pytest.importorskip("transformers.distributed.parallel_utils")
    from iqtorch.hf.parallel import use_packed_styles

    model = load_gguf(halved(tmp_path / "a.gguf", tmp_path / "b.gguf", ("q8_0", "q8_0")))
    key = "model.layers.*.self_attn.kv_b_proj"
    use_packed_styles(model, [], plan := {key: "colwise", "model.layers.*.mlp.experts.down_proj": "rowwise"})
    assert len(plan) == 2 and plan["model.layers.*.mlp.experts.down_proj"] == "rowwise"
    style = transformers.distributed.parallel_utils.ALL_PARALLEL_STYLES[plan[key]]
    with pytest.raises(iqtorch.errors.UnsupportedOperationError, match=r"kv_b_proj' \(SplitKV\) is kept as its GGUF file had it.*tp_plan"):
        style.install_forward(model.model.layers[0].self_attn.kv_b_proj, None)


def test_halves_that_do_not_fit(tmp_path: Path, original: Any) -> None:
    path = halved(tmp_path / "a.gguf", tmp_path / "b.gguf", ("q8_0", "q8_0"), key_length_mla=KEYS, value_length_mla=VALUES + 8)
    with pytest.raises(GGUFTensorError, match=r"shapes differ.*kv_b_proj\.k_b_proj\.weight is \(4, 64, 24\), blk\.0\.attn_k_b\.weight"):
        load_gguf(path)


def test_names_of_halves() -> None:
    assert gguf_name("model.layers.3.self_attn.kv_b_proj.k_b_proj.weight") == "blk.3.attn_k_b.weight"
    assert gguf_name("model.layers.3.self_attn.kv_b_proj.v_b_proj.weight") == "blk.3.attn_v_b.weight"
    assert gguf_name("model.layers.3.self_attn.kv_b_proj.weight") == "blk.3.attn_kv_b.weight"
