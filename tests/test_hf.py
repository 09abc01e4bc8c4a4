"""transformers: quantizing while loading, packed checkpoints, and everything that can be wrong with them."""

from __future__ import annotations

import copy
import json
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import iqtorch
from iqtorch import IQConfig, IQTensor, Recipe
from iqtorch.errors import CalibrationError, CheckpointError, RecipeError, UnknownFormatError, UnsupportedOperationError, WeightError

transformers = pytest.importorskip("transformers")
accelerate = pytest.importorskip("accelerate")

from test_model import IDS, bert, gpt2, llama, mixtral, output  # noqa: E402
from tiny_models import tiny_model  # noqa: E402

#: A mix of formats that are quick to quantize to.
RECIPE = Recipe.of({"embed|wte|lm_head": "q8_0", r"v_proj|down_proj": "q5_0", r"attn|mlp|attention|output|intermediate|experts": "iq4_nl"})


def tied() -> nn.Module:
    return llama(tie_word_embeddings=True)


def gpt_oss() -> nn.Module:
    return tiny_model("gpt_oss")


def load(path: Path, cls: type | None = None, **kwargs: object) -> nn.Module:
    model, info = (cls or transformers.AutoModelForCausalLM).from_pretrained(path, output_loading_info=True, **kwargs)
    assert not any(info.values()), info
    return model


def same_state(a: nn.Module, b: nn.Module) -> None:
    """Equal keys, equal classes, equal bits."""
    first, second = a.state_dict(), b.state_dict()
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert type(value) is type(second[name]) and value.dtype == second[name].dtype, name
        assert torch.equal(value, second[name]), name


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A packed checkpoint of a Llama; do not write into it."""
    path = tmp_path_factory.mktemp("packed")
    iqtorch.quantize_model(llama(), RECIPE, progress=False).save_pretrained(path)
    return path


@pytest.fixture
def damaged(saved: Path, tmp_path: Path) -> Path:
    """A copy of it, to be damaged."""
    return Path(shutil.copytree(saved, tmp_path / "damaged"))


@pytest.mark.parametrize("build", [llama, tied, gpt2, mixtral, gpt_oss, bert])
def test_loading_quantizes_as_quantize_model_does_and_saving_keeps_every_bit(build: Callable[[], nn.Module], tmp_path: Path) -> None:
    model = build()
    cls = type(model)
    model.save_pretrained(tmp_path / "plain")
    packed = iqtorch.quantize_model(load(tmp_path / "plain", cls), RECIPE, progress=False)
    loaded = load(tmp_path / "plain", cls, quantization_config=IQConfig(recipe=RECIPE))
    same_state(packed, loaded)
    assert [type(m) for m in packed.modules()] == [type(m) for m in loaded.modules()]
    assert [(r.name, r.format, r.reason) for r in iqtorch.report(packed).rows] == [
        (r.name, r.format, r.reason) for r in iqtorch.report(loaded).rows
    ]
    want = output(packed)
    assert torch.equal(output(loaded), want) and not torch.equal(want, output(model))

    # quantized after loading, in one file; while loading, in shards: both are read back bit for bit, and can be saved again
    packed.save_pretrained(tmp_path / "one")
    loaded.save_pretrained(tmp_path / "shards", max_shard_size="150KB")
    assert (tmp_path / "shards" / "model.safetensors.index.json").exists()
    for name in ("one", "shards"):
        again = load(tmp_path / name, cls)
        same_state(packed, again)
        assert torch.equal(output(again), want)
        again.save_pretrained(tmp_path / f"{name}2")
        same_state(packed, load(tmp_path / f"{name}2", cls))
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "one2"))
    assert first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


def test_checkpoint_holds_canonical_bytes_under_the_model_s_own_names(saved: Path) -> None:
    config = json.loads((saved / "config.json").read_text())["quantization_config"]
    assert config["quant_method"] == "iqtorch" and config["format_version"] == 1
    tensors = load_file(saved / "model.safetensors")
    assert set(config["tensors"]) < set(tensors) and tensors.keys() == llama().state_dict().keys()
    model = load(saved)
    for name, entry in config["tensors"].items():
        weight = model.get_parameter(name)
        assert entry["format"] == weight.format.name and entry["shape"] == list(weight.shape)
        assert tensors[name].dtype == torch.uint8 and torch.equal(tensors[name], weight.to_blocks())
    assert tensors["model.norm.weight"].dtype == torch.float32


def test_saving_over_the_checkpoint_that_a_model_still_reads_from(saved: Path, damaged: Path) -> None:
    model = load(damaged)
    assert model.lm_head.weight._deferred() is not None or model.lm_head.weight.backend == "torch"
    model.save_pretrained(damaged)
    same_state(load(damaged), load(saved))
    assert torch.equal(output(model), output(load(saved)))


def test_tied_weights_are_stored_once_and_come_back_tied(tmp_path: Path) -> None:
    iqtorch.quantize_model(tied(), RECIPE, progress=False).save_pretrained(tmp_path)
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    model = load(tmp_path)
    assert model.lm_head.weight is model.get_input_embeddings().weight and isinstance(model.lm_head.weight, IQTensor)
    assert type(model.lm_head) is iqtorch.Linear and type(model.get_input_embeddings()) is iqtorch.Embedding


def test_a_model_without_head_reads_a_checkpoint_with_one_and_the_reverse(saved: Path, tmp_path: Path) -> None:
    base = transformers.AutoModel.from_pretrained(saved)
    whole = load(saved)
    same_state(base, whole.model)
    base.save_pretrained(tmp_path)
    headed, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert info["missing_keys"] == {"lm_head.weight"} and not isinstance(headed.lm_head.weight, IQTensor)
    same_state(headed.model, whole.model)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_dtype_is_of_the_activations_and_changes_no_block(saved: Path, dtype: torch.dtype) -> None:
    model, whole = load(saved, dtype=dtype), load(saved)
    assert model.lm_head.weight.dtype == dtype and model.model.norm.weight.dtype == dtype
    assert torch.equal(model.lm_head.weight.to_blocks(), whole.lm_head.weight.to_blocks())
    assert output(model).dtype == dtype


def test_loaded_model_generates(saved: Path) -> None:
    got = load(saved).generate(IDS[:1], max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert torch.equal(
        got, iqtorch.quantize_model(llama(), RECIPE, progress=False).generate(IDS[:1], max_new_tokens=4, do_sample=False, pad_token_id=0)
    )


def test_dequantize_gives_the_plain_model(saved: Path, tmp_path: Path) -> None:
    model = load(saved)
    want = output(model)
    plain = model.dequantize()
    assert not any(isinstance(p, IQTensor) for p in plain.parameters()) and not hasattr(plain.config, "quantization_config")
    assert (output(plain) - want).norm() <= 0.02 * want.norm()
    plain.save_pretrained(tmp_path)
    same_state(plain, load(tmp_path))


def test_config_passes_recipe_skip_and_importance(tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path)
    importance = {"model.layers.0.self_attn.q_proj.weight": torch.linspace(0.1, 9, 256)}
    config = IQConfig("q4_0", recipe={"k_proj": "q8_0"}, importance=importance, skip=["lm_head"])
    model = load(tmp_path, quantization_config=config)
    rows = {row.name.removeprefix("model.layers.0.self_attn."): row for row in iqtorch.report(model).rows}
    assert rows["k_proj.weight"].format == "q8_0" and rows["q_proj.weight"].format == "q4_0"
    assert rows["lm_head.weight"].reason == "skipped by the caller" and not isinstance(model.lm_head.weight, IQTensor)
    plain = load(tmp_path).model.layers[0].self_attn.q_proj.weight
    want = iqtorch.quantize(plain, "q4_0", importance["model.layers.0.self_attn.q_proj.weight"])
    assert torch.equal(model.model.layers[0].self_attn.q_proj.weight.to_blocks(), want.to_blocks())
    model.save_pretrained(tmp_path / "packed")
    stored = transformers.AutoConfig.from_pretrained(tmp_path / "packed").quantization_config
    again = IQConfig.from_dict(stored)
    assert again.recipe == config.recipe and again.skip == ("lm_head",) and again.importance is None
    same_state(model, load(tmp_path / "packed"))


def test_config_rounds_by_a_calibration(tmp_path: Path) -> None:
    plain = llama()
    plain.save_pretrained(tmp_path)
    calibration = iqtorch.calibrate(plain, [IDS])
    calibration.save(tmp_path / "calibration.safetensors")
    want = iqtorch.quantize_model(llama(), Recipe.pure("iq4_nl"), calibration=calibration, rounding="ldlq", speed="fast", progress=False)
    for given in (calibration, str(tmp_path / "calibration.safetensors")):
        config = IQConfig(recipe=Recipe.pure("iq4_nl"), rounding="ldlq", calibration=given, speed="fast")
        model = load(tmp_path, quantization_config=config)
        same_state(model, want)
        assert [row.reason for row in iqtorch.report(model).rows] == [row.reason for row in iqtorch.report(want).rows]
    model.save_pretrained(tmp_path / "packed")
    stored = json.loads((tmp_path / "packed" / "config.json").read_text())["quantization_config"]
    assert (stored["rounding"], stored["speed"], stored["objective"]) == ("ldlq", "fast", "model")
    same_state(load(tmp_path / "packed"), model)


def test_bad_configs_are_named() -> None:
    with pytest.raises(CalibrationError, match="or neither"):
        IQConfig("iq2_kl", rounding="ldlq")
    with pytest.raises(CalibrationError, match="quantize_model"):
        IQConfig("iq2_kl", rounding="yaqa", calibration="file")
    with pytest.raises(CalibrationError, match="quantize_model"):
        IQConfig("iq2_kl", rounding="ldlq", calibration=[IDS])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="speed"):
        IQConfig("iq2_kl", speed="slow")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="rounding"):
        IQConfig("iq2_kl", rounding="up")  # type: ignore[arg-type]
    with pytest.raises(UnknownFormatError, match="iq2_kl"):
        IQConfig("iq2_lk")
    with pytest.raises(RecipeError, match="needs a format"):
        IQConfig()
    with pytest.raises(RecipeError, match="no regular expression"):
        IQConfig("iq2_kl", skip=["("])
    with pytest.raises(RecipeError, match="not both"):
        IQConfig("iq2_kl", recipe=Recipe.pure("iq2_kl"))
    with pytest.raises(ValueError, match="objective"):
        IQConfig("iq2_kl", objective="best")  # type: ignore[arg-type]
    with pytest.raises(UnsupportedOperationError, match="disk"):
        transformers.AutoModelForCausalLM.from_pretrained(
            ".", config=llama().config, quantization_config=IQConfig("q8_0"), device_map={"": "disk"}
        )


def test_nan_in_a_checkpoint_is_named(tmp_path: Path) -> None:
    model = llama()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 5] = float("nan")
    model.save_pretrained(tmp_path)
    with pytest.raises(WeightError, match=r"model\.layers\.1\.mlp\.up_proj\.weight.*\(3, 5\)"):
        load(tmp_path, quantization_config=IQConfig("q8_0"))


def test_printing_a_config_lists_no_weights(saved: Path) -> None:
    config = transformers.AutoConfig.from_pretrained(saved).quantization_config
    text = repr(iqtorch.IQConfig.from_dict(config))
    assert f"{len(config['tensors'])} packed weights" in text and "model.layers" not in text and len(text) < 400


def test_a_config_may_be_a_dictionary(tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path)
    wanted = {"quant_method": "iqtorch", "format": "q8_0", "skip": ["lm_head"]}
    same_state(load(tmp_path, quantization_config=wanted), load(tmp_path, quantization_config=IQConfig("q8_0", skip=["lm_head"])))
    with pytest.raises(TypeError, match="fromat"):
        load(tmp_path, quantization_config={"quant_method": "iqtorch", "fromat": "q8_0"})


def test_memory_footprint_counts_packed_bytes(saved: Path) -> None:
    for model in (load(saved), iqtorch.quantize_model(llama(), RECIPE, progress=False)):
        kept = sum(p.nbytes for p in model.parameters() if not isinstance(p, IQTensor))
        packed = sum(p.nbytes for p in model.parameters() if isinstance(p, IQTensor))
        assert model.get_memory_footprint(return_buffers=False) == kept + packed
    assert packed < 0.3 * llama().get_memory_footprint()


@pytest.mark.parametrize("way", ["deepcopy", "pickle", "torch.save", "state dict", "state dict into packed", "state dict into meta"])
def test_a_packed_model_is_copied_with_every_bit(way: str, saved: Path, tmp_path: Path) -> None:
    model = load(saved)
    if way == "deepcopy":
        other = copy.deepcopy(model)
    elif way == "pickle":
        other = pickle.loads(pickle.dumps(model))
    elif way == "torch.save":
        torch.save(model, tmp_path / "model.pt")
        other = torch.load(tmp_path / "model.pt", weights_only=False)
    else:
        torch.save(model.state_dict(), tmp_path / "state.pt")
        state = torch.load(tmp_path / "state.pt", weights_only=True)
        if way == "state dict into meta":
            with accelerate.init_empty_weights():
                other = transformers.AutoModelForCausalLM.from_config(model.config).requires_grad_(False)
            other.load_state_dict(state, assign=True)
            assert all(isinstance(p, IQTensor) for name, p in other.named_parameters() if p.dim() > 1)
            return
        other = llama().requires_grad_(False)
        if way == "state dict into packed":
            other = iqtorch.quantize_model(other, Recipe.pure("iq4_nl"), progress=False)
        other.load_state_dict(state, assign=True)
    same_state(model, other)
    assert torch.equal(output(other), output(model))


def test_states_that_do_not_fit_are_refused(saved: Path) -> None:
    model = load(saved)
    model.load_state_dict({**model.state_dict(), Q: model.get_parameter(Q).dequantize()})  # the same weights, plain
    with pytest.raises(RuntimeError, match="quantize it first"):
        model.load_state_dict({Q: torch.zeros(256, 256)}, strict=False)
    with pytest.raises(RuntimeError, match="assign=True"):
        model.load_state_dict({Q: iqtorch.quantize(torch.ones(256, 256), "q6_k")}, strict=False)
    with pytest.raises(WeightError, match="save_pretrained"):
        save_file(model.state_dict(), saved / "state.safetensors")


def edit(path: Path, change: Callable[[dict], object]) -> None:
    config = json.loads((path / "config.json").read_text())
    change(config["quantization_config"])
    (path / "config.json").write_text(json.dumps(config))


Q = "model.layers.0.self_attn.q_proj.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.update(format_version=2), "version 2.*update iqtorch"),
        (lambda c: c.pop("format_version"), "version None"),
        (lambda c: c["tensors"][Q].update(format="iq9_x"), "iq9_x"),
        (lambda c: c["tensors"][Q].update(shape=[128, 256]), r"\[128, 256\].*\[256, 256\]"),
        (lambda c: c["tensors"][Q].update(shape=[256]), "2 or 3 positive"),
        (lambda c: c["tensors"][Q].update(shape=[256, -1]), "2 or 3 positive"),
        (lambda c: c["tensors"][Q].pop("shape"), "cannot be read"),
        (lambda c: c["tensors"][Q].update(dtype="int8"), "floating"),
        (lambda c: c["tensors"][Q].update(dtype="nonsense"), "cannot be read"),
        (lambda c: c["tensors"].update({Q: 3}), "cannot be read"),
        (lambda c: c["tensors"][Q].update(format="iq4_ks_r4"), "iq4_ks_r4: checkpoints hold iq4_ks"),
        (lambda c: c.update(tensors=[Q]), "tensors by name"),
        (lambda c: c.pop("tensors"), "tensors by name"),
        (lambda c: c.update(recipe=7), "a recipe"),
        (lambda c: c["tensors"][Q].update(format="q8_0"), r"must be uint8 \[256, 272\].*has torch.uint8 \[256, 144\]"),
        (lambda c: c["tensors"].update({"model.norm.weight": {"format": "q8_0", "shape": [1, 256]}}), "shape"),
        (lambda c: c["tensors"].pop(Q), "ignore_mismatched_sizes|mismatch|does not list"),
    ],
)
def test_damaged_config_is_refused(damaged: Path, change: Callable[[dict], object], message: str) -> None:
    edit(damaged, change)
    with pytest.raises((CheckpointError, RuntimeError), match=message):
        load(damaged)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(Q), f"{Q}.*missing"),
        (lambda t: t.update({Q: t[Q][:-1].clone()}), r"must be uint8 \[256, 144\].*has torch.uint8 \[255, 144\]"),
        (lambda t: t.update({Q: t[Q][:, :-1].clone()}), r"has torch.uint8 \[256, 143\]"),
        (lambda t: t.update({Q: t[Q].float()}), "has torch.float32"),
    ],
)
def test_damaged_files_are_refused(damaged: Path, change: Callable[[dict[str, Tensor]], object], message: str) -> None:
    tensors = load_file(damaged / "model.safetensors")
    change(tensors)
    save_file(tensors, damaged / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=message):
        load(damaged)


def test_a_missing_shard_is_refused(tmp_path: Path) -> None:
    iqtorch.quantize_model(llama(), RECIPE, progress=False).save_pretrained(tmp_path, max_shard_size="150KB")
    next(tmp_path.glob("model-00002*")).unlink()
    with pytest.raises(OSError, match="model-00002"):
        load(tmp_path)


@pytest.mark.parametrize(
    "order", ["import iqtorch, transformers", "import transformers, iqtorch", "import transformers.quantizers.auto, iqtorch"]
)
def test_a_saved_model_loads_whatever_the_order_of_imports(saved: Path, order: str) -> None:
    code = f"""
import sys
{order}
assert 'iqtorch' in transformers.quantizers.auto.AUTO_QUANTIZER_MAPPING
model = transformers.AutoModelForCausalLM.from_pretrained({str(saved)!r})
assert isinstance(model.lm_head.weight, iqtorch.IQTensor)
import inspect, importlib
assert 'class AutoHfQuantizer' in inspect.getsource(transformers.quantizers.auto)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parent.parent)
    assert done.returncode == 0, done.stderr


def test_importing_iqtorch_imports_neither_transformers_nor_triton() -> None:
    code = "import iqtorch, sys; assert not {'transformers', 'triton', 'gguf', 'peft', 'accelerate'} & set(sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parent.parent)
    assert done.returncode == 0, done.stderr


class Hub:
    """The calls of `push_to_hub`: a commit becomes a snapshot in a cache, as if it had been downloaded again."""

    def __init__(self, cache: Path) -> None:
        self.cache = cache

    def create_repo(self, repo_id: str, **kwargs: object) -> SimpleNamespace:
        return SimpleNamespace(repo_id=repo_id)

    def create_commit(self, repo_id: str, operations: list, **kwargs: object) -> None:
        folder = self.cache / f"models--{repo_id.replace('/', '--')}"
        (folder / "refs").mkdir(parents=True)
        (folder / "refs" / "main").write_text("0" * 40)
        for operation in operations:
            file = folder / "snapshots" / ("0" * 40) / operation.path_in_repo
            file.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(operation.path_or_fileobj, file)


@pytest.mark.parametrize("size", ["50GB", "150KB"])
def test_push_to_hub(size: str, saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub.errors import EntryNotFoundError
    from transformers.utils import hub

    def no_card(*args: object, **kwargs: object) -> None:
        raise EntryNotFoundError("a new repository has none")

    remote = Hub(tmp_path / "cache")
    monkeypatch.setattr(hub, "hf_api", lambda: remote, raising=False)
    for name in ("create_repo", "create_commit"):  # older versions of transformers
        monkeypatch.setattr(hub, name, getattr(remote, name), raising=False)
    monkeypatch.setattr(hub.ModelCard, "load", no_card)
    there = {"cache_dir": tmp_path / "cache", "local_files_only": True}
    in_memory = iqtorch.quantize_model(llama(), RECIPE, progress=False)
    for repo, model in {"someone/quantized": in_memory, "someone/loaded": load(saved)}.items():
        model.push_to_hub(repo, max_shard_size=size)
        again = load(repo, **there)
        same_state(again, model)
        assert torch.equal(output(again), output(in_memory))
