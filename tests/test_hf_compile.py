"""torch.compile, static caches, torch.export and AOTInductor on whole models with packed weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

import iqtorch
from iqtorch import IQTensor, Recipe, tensor

transformers = pytest.importorskip("transformers")

from tiny_models import Logits, tiny_model  # noqa: E402

IDS = torch.arange(3, 11)[None]


@pytest.fixture(autouse=True)
def fresh_compiler() -> object:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()
    torch.use_deterministic_algorithms(False)
    iqtorch.set_activation_precision("int8")


def test_code_kept_on_disk_is_told_apart_by_precision_and_version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = iqtorch.quantize(torch.randn(64, 256), "iq4_ks")
    iqtorch.set_activation_precision("float")
    keys = [weight._stable_hash_for_caching()]
    iqtorch.set_activation_precision("int8")
    keys.append(weight._stable_hash_for_caching())
    monkeypatch.setattr(tensor, "__file__", str(tmp_path / "tensor.py"))  # sources that differ in a letter
    for text in ("a", "b"):
        (tmp_path / "tensor.py").write_text(text, encoding="utf-8")
        tensor._code_key.cache_clear()
        keys.append(weight._stable_hash_for_caching())
    tensor._code_key.cache_clear()
    assert len(set(keys)) == 4


def packed(kind: str, **changes: object) -> nn.Module:
    return iqtorch.quantize_model(tiny_model(kind, **changes), Recipe.pure("q8_0"), progress=False)


@pytest.mark.parametrize(
    "kind", ["llama", pytest.param("qwen3_moe", marks=pytest.mark.slow), pytest.param("gpt_oss", marks=pytest.mark.slow)]
)
def test_static_cache_generates_with_one_graph_for_the_prompt_and_one_for_all_tokens(kind: str) -> None:
    model = packed(kind)
    feed = {"min_new_tokens": 8, "max_new_tokens": 8, "do_sample": False}
    want = model.generate(IDS, **feed)
    counter = CompileCounterWithBackend("aot_eager")
    model.forward = torch.compile(model.forward, fullgraph=True, backend=counter)
    got = model.generate(IDS, cache_implementation="static", disable_compile=True, **feed)  # compiled by us, not by generate
    assert torch.equal(got, want)
    assert counter.frame_count == 2, "a graph was compiled again for a later token"


@pytest.mark.parametrize(
    "device",
    [
        pytest.param("cpu", marks=pytest.mark.slow),  # where the mode changes nothing: it is the test that is tested
        pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")),
    ],
)
def test_reduce_overhead_compiles_once(device: str) -> None:
    iqtorch.set_activation_precision("float")
    torch.use_deterministic_algorithms(False)  # which keep compiled code out of CUDA graphs
    model = packed("llama", num_hidden_layers=1).to(device)
    feed = {
        "max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "cache_implementation": "static", "disable_compile": True,
        "output_logits": True, "return_dict_in_generate": True,
    }  # fmt: skip
    want = model.generate(IDS.to(device), **feed).logits[0]
    model.forward = torch.compile(model.forward, fullgraph=True, mode="reduce-overhead")
    torch._dynamo.utils.counters.clear()
    for _ in range(2):
        got = model.generate(IDS.to(device), **feed).logits
        assert len(got) == 6 and (got[0] - want).norm() <= 0.02 * want.norm()
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2, "one graph for the prompt, and one for all tokens"


@pytest.mark.parametrize("kind", ["llama", "qwen3_moe"])
def test_fullgraph_with_dynamic_length(kind: str) -> None:
    model = Logits(packed(kind, num_hidden_layers=1))
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=counter)
    graphs = []
    with torch.no_grad():
        for length in (3, 7, 8):
            torch.testing.assert_close(compiled(IDS[:, :length]), model(IDS[:, :length]), rtol=1e-4, atol=1e-4)
            graphs.append(counter.frame_count)
    assert graphs[0] == graphs[-1], "a graph was compiled again for another length"


def test_compiled_training_step() -> None:
    model = Logits(packed("llama", num_hidden_layers=1))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    gradients = []
    for run in (model, compiled):
        model.model.model.norm.weight.grad = None
        run(IDS).square().mean().backward()
        gradients.append(model.model.model.norm.weight.grad)
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-3, atol=1e-6)


@pytest.mark.skipif(
    torch.__version__.startswith(("2.10.", "2.11.")),
    reason="PyTorch 2.10 and 2.11 export no such range of the plain model",
)
def test_export_holds_packed_weights_and_saves(tmp_path: Path) -> None:
    model = Logits(packed("llama", num_hidden_layers=1)).eval()
    lengths = {1: torch.export.Dim("length", min=2, max=32)}
    with torch.no_grad():
        program = torch.export.export(model, (IDS,), dynamic_shapes=(lengths,))
        torch.export.save(program, tmp_path / "model.pt2")
        loaded = torch.export.load(tmp_path / "model.pt2").module()
        for length in (2, 8):
            assert torch.equal(loaded(IDS[:, :length]), model(IDS[:, :length]))
    size = sum(p.numel() * 4 for p in model.parameters() if isinstance(p, IQTensor))
    assert (tmp_path / "model.pt2").stat().st_size < size / 2  # 8.5 bits of 32, and the graph


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["llama", "qwen3_moe"])
def test_inductor(kind: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    model = Logits(packed(kind, num_hidden_layers=1)).eval()
    rounded = {}
    with torch.no_grad():
        for precision in ("int8", "float"):  # fused code differs in the last bit, which may move a rounded activation by a step
            iqtorch.set_activation_precision(precision)
            torch._dynamo.reset()  # as a new process would, this finds the first one's code on disk
            got, want = torch.compile(model, fullgraph=True)(IDS), model(IDS)
            rounded[precision] = got
            limit = 1e-4 if precision == "float" else 0.05 * float(want.std())
            torch.testing.assert_close(got, want, rtol=1e-3, atol=limit)
    assert not torch.equal(rounded["int8"], rounded["float"])


@pytest.mark.slow
def test_aot_inductor_runs_a_packed_model(tmp_path: Path) -> None:
    model = Logits(packed("llama", num_hidden_layers=1)).eval()
    with torch.no_grad():
        program = torch.export.export(model, (IDS,))
        package = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "model.pt2"))
        got, want = torch._inductor.aoti_load_package(package)(IDS), model(IDS)
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-4)
