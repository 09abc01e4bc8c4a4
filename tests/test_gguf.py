"""Models to GGUF files and back: every family, bit for bit, without dequantizing."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch

import iqtorch
from iqtorch import IQTensor
from iqtorch.formats import get_format, list_formats
from iqtorch.gguf import (
    GGUFArchitectureError,
    GGUFError,
    GGUFFile,
    GGUFNameError,
    GGUFTensorError,
    GGUFTokenizerError,
    TensorSource,
    custom_q,
    gguf_name,
    load_gguf,
    load_tokenizer,
    save_gguf,
    write_gguf,
)
from iqtorch.gguf.families import FAMILIES, config_from_gguf
from iqtorch.gguf.tensors import Binding

transformers = pytest.importorskip("transformers")
from gguf_models import MODELS, ids, tiny  # noqa: E402 (imports transformers)

every_family = pytest.mark.parametrize("name", MODELS)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        out: torch.Tensor = model(ids()).logits
    return out


def assert_same_weights(found: Any, expected: Any) -> int:
    """Equal bit for bit, packed or not; returns how many are packed."""
    ours, theirs = found.state_dict(), expected.state_dict()
    assert ours.keys() == theirs.keys()
    packed = 0
    for name, value in theirs.items():
        assert type(ours[name]) is type(value), name
        assert ours[name].dtype == value.dtype, name
        if isinstance(value, IQTensor):
            assert ours[name].format is value.format
            assert torch.equal(ours[name].to_blocks(), value.to_blocks()), name
            packed += 1
        else:
            assert torch.equal(ours[name], value), name
    return packed


def pack(model: Any, recipe: Any = "q8_0") -> Any:
    recipe = iqtorch.Recipe.pure(recipe) if isinstance(recipe, str) else recipe
    return iqtorch.quantize_model(model, recipe, progress=False)


# -- round trips -------------------------------------------------------------------------------------------


@every_family
def test_packed_model_round_trip(tmp_path: Path, name: str) -> None:
    model = pack(tiny(name), {"embed_tokens|lm_head": "q8_0", "down_proj": "q5_0", "layers": "iq4_nl"})
    path = tmp_path / "a.gguf"
    save_gguf(model, path)
    again = load_gguf(path)
    assert assert_same_weights(again, model) > 10
    assert torch.equal(logits(again), logits(model))
    tied = model.config.tie_word_embeddings
    assert (again.get_output_embeddings().weight is again.get_input_embeddings().weight) == tied
    assert ("output.weight" in GGUFFile(path).tensors) == (not tied)


@every_family
def test_plain_model_and_configuration_round_trip(tmp_path: Path, name: str) -> None:
    model = tiny(name)
    path = tmp_path / "a.gguf"
    save_gguf(model, path)
    again = load_gguf(path)
    assert assert_same_weights(again, model) == 0
    assert torch.equal(logits(again), logits(model))
    # All that a computation depends on is as before; what files have no place for is at its default.
    before, after = model.config.to_dict(), again.config.to_dict()
    ignored = {"model_type", "architectures", "_name_or_path", "dtype", "transformers_version", "initializer_range", "quantization_config"}
    head_dim = model.config.hidden_size // model.config.num_attention_heads
    for key in before.keys() - ignored:
        if key == "head_dim" and before[key] is None:
            assert after[key] in (None, head_dim)
        else:
            assert after.get(key) == before[key], key


@pytest.mark.parametrize("name", ["llama", "gemma"])
def test_float32_round_trip(tmp_path: Path, name: str) -> None:
    model = tiny(name, torch.float32)
    save_gguf(model, tmp_path / "a.gguf")
    again = load_gguf(tmp_path / "a.gguf", dtype=torch.float32).state_dict()
    for key, value in model.state_dict().items():
        # files hold 1 + w for Gemma's norms: the last bits of a small float32 w are lost, in every program that writes them
        shifted = name == "gemma" and key.endswith("norm.weight")
        torch.testing.assert_close(again[key], value, rtol=0, atol=2**-23 if shifted else 0)


def test_every_format_survives(tmp_path: Path) -> None:
    plain = [get_format(f) for f in list_formats() if get_format(f).plain is None]
    layers = -(-len(plain) // 7)
    model = tiny("llama", hidden_size=256, intermediate_size=256, num_hidden_layers=layers, num_key_value_heads=4)
    generator = torch.Generator().manual_seed(0)
    chosen = {}
    weights = [(m, n) for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and n != "lm_head"]
    for fmt, (module, name) in zip(plain, weights, strict=False):
        blocks = torch.randint(0, 256, (256, fmt.row_bytes(256)), dtype=torch.uint8, generator=generator)
        iqtorch.linear.set_weight(module, "weight", IQTensor.from_blocks(blocks, fmt))
        chosen[name + ".weight"] = (fmt, blocks)
    path = tmp_path / "a.gguf"
    save_gguf(model, path)
    again = load_gguf(path).state_dict()
    assert len(chosen) == len(plain) == 36
    for name, (fmt, blocks) in chosen.items():
        assert again[name].format is fmt
        assert torch.equal(again[name].to_blocks(), blocks), name


def test_generation_and_saving_after_loading(tmp_path: Path) -> None:
    model = pack(tiny("qwen3"))
    save_gguf(model, tmp_path / "a.gguf")
    again = load_gguf(tmp_path / "a.gguf")
    assert again.generation_config.eos_token_id == 2
    kwargs = {"max_new_tokens": 8, "do_sample": False}
    assert torch.equal(again.generate(ids(), **kwargs), model.generate(ids(), **kwargs))
    again.save_pretrained(tmp_path / "folder")
    third = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "folder")
    assert torch.equal(logits(third), logits(model))


# -- what is in the file -----------------------------------------------------------------------------------


def test_rows_of_q_and_k_are_those_of_other_programs(tmp_path: Path) -> None:
    """llama.cpp rotates neighbouring rows, transformers the two halves of a head."""
    model = tiny("llama", torch.float32)
    save_gguf(model, tmp_path / "a.gguf")
    file = GGUFFile(tmp_path / "a.gguf")
    weight = model.model.layers[0].self_attn.k_proj.weight.detach()
    stored = file.data("blk.0.attn_k.weight")
    for head in range(2):
        for i in range(8):
            assert torch.equal(stored[16 * head + 2 * i], weight[16 * head + i])
            assert torch.equal(stored[16 * head + 2 * i + 1], weight[16 * head + 8 + i])
    assert torch.equal(file.data("blk.0.attn_v.weight"), model.model.layers[0].self_attn.v_proj.weight)


def test_row_operations_are_inverse() -> None:
    rows = torch.arange(24 * 5).view(24, 5)
    for binding in (Binding("w", ("a",)), Binding("w", ("a",), heads=3), Binding("w", ("a", "b")), Binding("w", ("a",), shift=1.0)):
        parts = binding.to_file(rows, 0)
        assert len(parts) == len(binding.tensors)
        assert torch.equal(binding.to_model(parts, 0), rows)
    assert not torch.equal(Binding("w", ("a",), heads=3).to_file(rows, 0)[0], rows)


def test_values_that_files_spell_differently(tmp_path: Path) -> None:
    save_gguf(gemma := tiny("gemma", torch.float32), tmp_path / "gemma.gguf")
    stored = GGUFFile(tmp_path / "gemma.gguf").data("output_norm.weight")
    assert torch.equal(stored, gemma.model.norm.weight + 1)
    save_gguf(moe := tiny("qwen2-moe"), tmp_path / "moe.gguf")
    file = GGUFFile(tmp_path / "moe.gguf")
    assert file.tensors["blk.0.ffn_gate_inp_shexp.weight"].shape == (64,)
    assert file.tensors["blk.0.ffn_gate_inp.weight"].dtype == torch.float32
    gate_up = moe.model.layers[0].mlp.experts.gate_up_proj
    assert torch.equal(file.data("blk.0.ffn_gate_exps.weight"), gate_up[:, :32])
    assert torch.equal(file.data("blk.0.ffn_up_exps.weight"), gate_up[:, 32:])
    save_gguf(tiny("llama-3.1"), tmp_path / "llama.gguf")
    factors = GGUFFile(tmp_path / "llama.gguf").data("rope_freqs.weight")
    assert factors[0] == 1
    assert factors[-1] == 8


def test_metadata(tmp_path: Path) -> None:
    path = tmp_path / "a.gguf"
    save_gguf(pack(tiny("qwen3-moe"), "q8_0"), path, name="Tiny")
    meta = GGUFFile(path).metadata
    expected = {
        "general.architecture": "qwen3moe", "general.name": "Tiny", "general.type": "model", "general.file_type": 7,
        "general.quantization_version": 2, "qwen3moe.block_count": 3, "qwen3moe.context_length": 128, "qwen3moe.embedding_length": 64,
        "qwen3moe.attention.head_count": 4, "qwen3moe.attention.head_count_kv": 2, "qwen3moe.attention.key_length": 32,
        "qwen3moe.rope.dimension_count": 32, "qwen3moe.rope.freq_base": 10000.0, "qwen3moe.expert_count": 4,
        "qwen3moe.expert_used_count": 2, "qwen3moe.expert_feed_forward_length": 32, "tokenizer.ggml.bos_token_id": 1,
    }  # fmt: skip
    assert {key: meta[key] for key in expected} == expected
    assert meta["qwen3moe.attention.layer_norm_rms_epsilon"] == pytest.approx(1e-6)
    reader = gguf.GGUFReader(path)  # q8_0 is a standard type: the gguf package reads the file too
    assert {t.name for t in reader.tensors} == set(GGUFFile(path).tensors)


def test_codes_that_other_programs_misread_are_not_written() -> None:
    """Kernels of ik_llama.cpp take the code -128 of q8_0 for +128."""
    fmt = get_format("q8_0")
    assert fmt.codebook.values[0, fmt.unused_codes, 0].tolist() == [-128]
    weight = torch.randn(64, 256, generator=torch.Generator().manual_seed(0))
    for objective in ("model", "rmse"):
        packed = iqtorch.quantize(weight, fmt, objective=objective)
        assert 128 not in fmt.unpack(packed.to_blocks())["code"]
        assert (packed.dequantize(torch.float32) - weight).norm() / weight.norm() < 0.006


# -- files of others ---------------------------------------------------------------------------------------


def rewrite(source: Path, target: Path, change: Any = None, **metadata: Any) -> Path:
    """A copy of a file with tensors (`change(name, info, data) -> TensorSource or None`) or metadata changed; None removes."""
    file = GGUFFile(source)
    merged = {key: file.metadata[key] for key in file.metadata} | {key.replace("__", "."): value for key, value in metadata.items()}
    sources = []
    for name, info in file.tensors.items():
        source_ = TensorSource(name, info.shape, info.format or info.dtype, lambda name=name: file.data(name))
        source_ = change(name, info, source_) if change else source_
        if source_ is not None:
            sources.append(source_)
    write_gguf(target, {key: value for key, value in merged.items() if value is not None}, sources)
    return target


def test_interleaved_rows_are_unpacked(tmp_path: Path) -> None:
    model = tiny("llama", hidden_size=256, intermediate_size=256)
    pack(model, {"layers": "iq4_ks"})
    save_gguf(model, tmp_path / "plain.gguf")

    def interleave(name: str, info: Any, source: TensorSource) -> TensorSource:
        if info.format is None:
            return source
        r4 = get_format("iq4_ks_r4")
        blocks = IQTensor.from_blocks(source.load(), info.format).to_blocks(r4)
        return TensorSource(name, info.shape, r4, lambda: blocks)

    path = rewrite(tmp_path / "plain.gguf", tmp_path / "r4.gguf", interleave)
    assert {info.type_name for info in GGUFFile(path).tensors.values()} >= {"iq4_ks_r4"}
    assert assert_same_weights(load_gguf(path), model) == 21


@pytest.mark.parametrize("name", ["gemma", "llama-tied-biased"])
def test_vectors_that_are_quantized(tmp_path: Path, name: str) -> None:
    """Nobody gains by it, but files may have it: norms that are shifted, biases whose rows are permuted."""
    model = tiny(name)
    save_gguf(model, tmp_path / "a.gguf")

    def pack_vectors(name: str, info: Any, source: TensorSource) -> TensorSource:
        if len(info.shape) != 1 or info.shape[0] % 32:
            return source
        blocks = iqtorch.quantize(source.load().float()[None], "q8_0").to_blocks()
        return TensorSource(name, info.shape, get_format("q8_0"), lambda: blocks)

    again = load_gguf(rewrite(tmp_path / "a.gguf", tmp_path / "b.gguf", pack_vectors))
    for key, value in model.state_dict().items():
        torch.testing.assert_close(again.state_dict()[key], value, rtol=0, atol=0.02)


def test_split_files(tmp_path: Path) -> None:
    from iqtorch.gguf.writer import Typed

    model = pack(tiny("qwen2"))
    save_gguf(model, tmp_path / "whole.gguf")
    file = GGUFFile(tmp_path / "whole.gguf")
    names = list(file.tensors)
    for part in range(2):
        chosen = names[part::2]
        metadata = {key: file.metadata[key] for key in file.metadata} if part == 0 else {}
        metadata |= {"split.no": Typed(part, 2), "split.count": Typed(2, 2), "split.tensors.count": len(names)}
        sources = [
            TensorSource(n, file.tensors[n].shape, file.tensors[n].format or file.tensors[n].dtype, lambda n=n: file.data(n))
            for n in chosen
        ]
        write_gguf(tmp_path / f"m-{part + 1:05d}-of-00002.gguf", metadata, sources)
    assert_same_weights(load_gguf(tmp_path / "m-00002-of-00002.gguf"), model)


def test_halves_of_mla(tmp_path: Path) -> None:
    """Newer llama.cpp files hold `attn_kv_b` as two halves, the first transposed; ik_llama.cpp's hold both forms."""
    model = pack(tiny("deepseek-v3"), {"mlp": "q8_0"})
    save_gguf(model, tmp_path / "a.gguf")
    file = GGUFFile(tmp_path / "a.gguf")
    heads, nope, value = 4, 16, 16
    for keep in (False, True):
        sources = []
        for name, info in file.tensors.items():
            if not name.endswith("attn_kv_b.weight") or keep:
                sources.append(TensorSource(name, info.shape, info.format or info.dtype, lambda name=name: file.data(name)))
            if name.endswith("attn_kv_b.weight"):
                k, v = file.data(name).view(heads, nope + value, -1).split([nope, value], 1)
                sources.append(TensorSource.of(name.replace("kv_b", "k_b"), k.mT.contiguous()))
                sources.append(TensorSource.of(name.replace("kv_b", "v_b"), v.contiguous()))
        meta = {key: file.metadata[key] for key in file.metadata}
        if not keep:  # such files say that there is one key-value head, of the joint size
            meta |= {
                "deepseek2.attention.head_count_kv": 1,
                "deepseek2.attention.key_length_mla": 24,
                "deepseek2.attention.value_length_mla": 16,
            }
            meta |= {"deepseek2.attention.key_length": 40, "deepseek2.attention.value_length": 32}
        write_gguf(tmp_path / "b.gguf", meta, sources)
        assert_same_weights(load_gguf(tmp_path / "b.gguf"), model)


def test_missing_and_surplus_tensors_are_listed(tmp_path: Path) -> None:
    save_gguf(tiny("llama"), tmp_path / "a.gguf")
    dropped = rewrite(tmp_path / "a.gguf", tmp_path / "b.gguf", lambda name, _, s: None if "attn_q" in name else s)
    with pytest.raises(GGUFNameError, match=r"3 tensors missing: blk\.0\.attn_q\.weight, blk\.1\.attn_q\.weight"):
        load_gguf(dropped)
    renamed = rewrite(
        tmp_path / "a.gguf", tmp_path / "c.gguf",
        lambda name, _, s: TensorSource("blk.0.mystery.weight", s.shape, s.type, s.load) if name == "blk.0.attn_v.weight" else s,
    )  # fmt: skip
    with pytest.raises(GGUFNameError, match=r"1 tensors missing: blk\.0\.attn_v\.weight; 1 tensors without a parameter: blk\.0\.mystery"):
        load_gguf(renamed)


def test_another_configuration_is_refused(tmp_path: Path) -> None:
    save_gguf(model := tiny("llama"), tmp_path / "a.gguf")
    config = model.config.to_dict() | {"intermediate_size": 128}
    with pytest.raises(
        GGUFTensorError, match=r"9 shapes differ.*mlp\.gate_proj\.weight is \(128, 64\), blk\.0\.ffn_gate\.weight \(96, 64\)"
    ):
        load_gguf(tmp_path / "a.gguf", config=config)
    with pytest.raises(GGUFNameError, match="4th|missing"):
        load_gguf(tmp_path / "a.gguf", config=model.config.to_dict() | {"num_hidden_layers": 4})


def test_configuration_given_by_the_user(tmp_path: Path) -> None:
    """A file of an architecture that is not known loads by the model's own configuration."""
    model = pack(tiny("qwen3"))
    save_gguf(model, tmp_path / "a.gguf")
    bare = rewrite(tmp_path / "a.gguf", tmp_path / "b.gguf", qwen3__block_count=None, qwen3__embedding_length=None)
    with pytest.raises(GGUFArchitectureError, match=r"qwen3\.embedding_length, qwen3\.block_count missing.*config="):
        load_gguf(bare)
    model.config.save_pretrained(tmp_path / "folder")
    settings = json.loads((tmp_path / "folder" / "config.json").read_text())
    settings.pop("quantization_config", None)
    (tmp_path / "folder" / "config.json").write_text(json.dumps(settings))
    for config in (tmp_path / "folder", str(tmp_path / "folder"), settings, transformers.AutoConfig.from_pretrained(tmp_path / "folder")):
        assert torch.equal(logits(load_gguf(bare, config=config)), logits(model))
    unknown = rewrite(tmp_path / "a.gguf", tmp_path / "c.gguf", general__architecture="seed_oss")
    with pytest.raises(GGUFArchitectureError, match=r"'seed_oss' is not among llama, qwen2.*config="):
        load_gguf(unknown)
    nonsense = rewrite(tmp_path / "a.gguf", tmp_path / "d.gguf", general__architecture="nonsense")
    with pytest.raises(GGUFNameError, match="'nonsense' is unknown to the installed gguf package"):
        load_gguf(nonsense, config=settings)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("block_count", 2**31), ("embedding_length", 2**31), ("feed_forward_length", 2**31 - 1), ("attention.head_count", 0),
        ("attention.head_count", 2**20), ("attention.key_length", 2**30), ("vocab_size", 2**31), ("expert_count", 2**30),
        ("expert_feed_forward_length", 2**30), ("block_count", "three"), ("context_length", 2**31), ("attention.head_count", [4, 4, 2]),
        ("embedding_length", 0), ("rope.scaling.type", "unheard-of"), ("attention.layer_norm_rms_epsilon", "x"),
        ("expert_used_count", -1), ("rope.freq_base", "x"),
    ],
)  # fmt: skip
def test_implausible_metadata(tmp_path: Path, key: str, value: Any) -> None:
    """A file's numbers are checked against its tensors before any model is made of them."""
    save_gguf(tiny("qwen3-moe"), tmp_path / "a.gguf")
    from iqtorch.gguf.writer import Typed

    stored = Typed(value, 10) if isinstance(value, int) and value >= 2**32 else value
    path = rewrite(tmp_path / "a.gguf", tmp_path / "b.gguf", **{f"qwen3moe.{key}": stored})
    with pytest.raises(GGUFError, match=r"b\.gguf: .*"):
        load_gguf(path)


def test_device_map(tmp_path: Path) -> None:
    model = pack(tiny("qwen2"))
    save_gguf(model, tmp_path / "a.gguf")
    for device_map in ("cpu", torch.device("cpu"), "auto", {"": "cpu"}):
        assert_same_weights(load_gguf(tmp_path / "a.gguf", device_map=device_map), model)


def test_experts_of_two_types_are_refused(tmp_path: Path) -> None:
    save_gguf(pack(tiny("qwen3-moe"), "q8_0"), tmp_path / "a.gguf")

    def other(name: str, info: Any, source: TensorSource) -> TensorSource:
        if name != "blk.1.ffn_up_exps.weight":
            return source
        blocks = iqtorch.quantize(torch.randn(info.shape), "q4_0").to_blocks()
        return TensorSource(name, info.shape, get_format("q4_0"), lambda: blocks)

    path = rewrite(tmp_path / "a.gguf", tmp_path / "b.gguf", other)
    with pytest.raises(GGUFTensorError, match=r"gate_up_proj.*different types \(blk\.1\.ffn_gate_exps\.weight q8_0, .*q4_0\)"):
        load_gguf(path)


def test_loading_owns_its_memory(tmp_path: Path) -> None:
    """No weight lives in the mapped file: it may change or vanish afterwards."""
    model = pack(tiny("llama"))
    path = tmp_path / "a.gguf"
    save_gguf(model, path)
    again = load_gguf(path)
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2 :] = bytes(len(raw) - len(raw) // 2)
    path.write_bytes(bytes(raw))
    path.unlink()
    assert_same_weights(again, model)


def test_saving_refuses_what_files_cannot_say(tmp_path: Path) -> None:
    path = tmp_path / "a.gguf"
    with pytest.raises(GGUFArchitectureError, match="'gpt2' cannot be written.*known are llama"):
        save_gguf(transformers.GPT2LMHeadModel(transformers.GPT2Config(n_layer=1, n_embd=32, n_head=2, vocab_size=64)), path)
    with pytest.raises(GGUFArchitectureError, match="norm_topk_prob=False.*assume True"):
        save_gguf(tiny("qwen3-moe", norm_topk_prob=False), path)
    with pytest.raises(GGUFArchitectureError, match="hidden_act='gelu'"):
        save_gguf(tiny("llama", hidden_act="gelu"), path)
    with pytest.raises(GGUFArchitectureError, match="has no config"):
        save_gguf(torch.nn.Linear(2, 2), path)
    with pytest.raises(GGUFArchitectureError, match="rope type 'dynamic'"):
        save_gguf(tiny("llama", rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}), path)
    assert not list(tmp_path.iterdir())


def test_rope_factors_of_others_are_refused(tmp_path: Path) -> None:
    save_gguf(tiny("llama-3.1"), tmp_path / "a.gguf")

    def other(name: str, info: Any, source: TensorSource) -> TensorSource:
        return TensorSource.of(name, source.load() ** 2) if name == "rope_freqs.weight" else source

    path = rewrite(tmp_path / "a.gguf", tmp_path / "b.gguf", other)
    with pytest.raises(GGUFArchitectureError, match="rope_freqs"):
        load_gguf(path)


def test_names() -> None:
    assert gguf_name("model.layers.12.self_attn.o_proj.weight") == "blk.12.attn_output.weight"
    assert gguf_name("model.layers.0.mlp.experts.down_proj") == "blk.0.ffn_down_exps.weight"
    assert gguf_name("blk.3.ffn_up.weight") == "blk.3.ffn_up.weight"
    assert gguf_name("lm_head.weight") == "output.weight"
    assert gguf_name("model.nothing.weight") is None
    assert len({(family.arch, family.model_type) for family in FAMILIES}) == len(FAMILIES)


def test_custom_q(caplog: pytest.LogCaptureFixture) -> None:
    """The rules of ik_llama.cpp's tool choose the same weights here."""
    model = tiny("qwen3-moe")
    text = r"""
        # the first match counts
        blk\.[0-1]\.ffn_down_exps=q5_0, ffn_.*_exps = Q4_0
        attn_v=iq4_nl_r4_typo
    """
    with pytest.raises(iqtorch.errors.RecipeError, match="attn_v=iq4_nl_r4_typo.*did you mean"):
        custom_q(text, model)
    rules = custom_q(text.replace("_r4_typo", "") + r"attn_q\.=bf16,ffn_gate_up_exps=q8_0", model)
    assert "'ffn_gate_up_exps' matches no weight" in caplog.text
    pack(model, iqtorch.Recipe.pure("q8_0").with_rules(rules))
    found = {name: value.format.name for name, value in model.state_dict().items() if isinstance(value, IQTensor)}
    assert "model.layers.0.self_attn.q_proj.weight" not in found
    assert found["model.layers.0.self_attn.k_proj.weight"] == "q8_0"
    assert found["model.layers.2.self_attn.v_proj.weight"] == "iq4_nl"
    assert found["model.layers.1.mlp.experts.down_proj"] == "q5_0"
    assert found["model.layers.2.mlp.experts.down_proj"] == "q4_0"
    assert found["model.layers.0.mlp.experts.gate_up_proj"] == "q4_0"
    for bad, message in (("attn_v", "must be REGEX=TYPE"), ("=q8_0", "must be REGEX=TYPE"), ("(=q8_0", "no regular expression")):
        with pytest.raises(iqtorch.errors.RecipeError, match=message):
            custom_q(bad, model)
    assert custom_q("attn_k=iq4_ks_r4", ["model.layers.0.self_attn.k_proj.weight"])[0][1] == "iq4_ks"


def test_every_family_is_tested() -> None:
    tested = {tiny_config.model_type for name in MODELS for tiny_config in [getattr(transformers, MODELS[name][0])]}
    for family in FAMILIES:
        assert {family.model_type, *family.aliases} <= tested, family


# -- tokenizers --------------------------------------------------------------------------------------------

TEXT = "Hello  world, it's 12345 o'clock:\n\n  naïve café – 東京 🙂 don't!\ttab <|end|> x"


def byte_level(split: str | None = None) -> Any:
    """A small byte-level BPE tokenizer that cuts text like the models named `split`."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    from iqtorch.gguf.tokenizer import _SPLITS

    backend = Tokenizer(models.BPE())
    steps = [pre_tokenizers.Split(Regex(p), behavior="isolated") for p in _SPLITS.get(split or "", ())]
    backend.pre_tokenizer = pre_tokenizers.Sequence([*steps, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not steps)])
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, special_tokens=["<s>", "</s>"], show_progress=False)
    backend.train_from_iterator([TEXT, Path(__file__).read_text()], trainer)
    backend.add_tokens([AddedToken("<|end|>", special=False, normalized=False)])
    return transformers.PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")


def sentencepiece(prefix: bool = True) -> Any:
    """A small BPE tokenizer with byte fallback, as SentencePiece models become."""
    from tokenizers import Tokenizer, decoders, models, normalizers, processors, trainers

    def build(**model: Any) -> Any:
        backend = Tokenizer(models.BPE(byte_fallback=True, fuse_unk=True, unk_token="<unk>", **model))
        steps = [normalizers.Prepend("\u2581")] if prefix else []
        backend.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "\u2581")])
        return backend

    trained = build()
    special = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))]
    trained.train_from_iterator(Path(__file__).read_text().split("\n"), trainers.BpeTrainer(
        vocab_size=700, special_tokens=special, show_progress=False
    ))  # fmt: skip
    model = json.loads(trained.to_str())["model"]
    backend = build(vocab=model["vocab"], merges=[tuple(m) for m in model["merges"]])
    backend.add_special_tokens(["<unk>", "<s>", "</s>"])
    strip = [decoders.Strip(" ", 1, 0)] if prefix else []
    backend.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), *strip])
    backend.post_processor = processors.TemplateProcessing(single="<s>:0 $A:0", pair="<s>:0 $A:0 $B:1", special_tokens=[("<s>", 1)])
    return transformers.PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def tokenizer_file(tmp_path: Path, tokenizer: Any, original: bool) -> Path:
    """A file with this tokenizer; without `original`, as other programs write it."""
    save_gguf(tiny("llama", vocab_size=1024), tmp_path / "a.gguf", tokenizer)
    if original:
        return tmp_path / "a.gguf"
    return rewrite(tmp_path / "a.gguf", tmp_path / "b.gguf", tokenizer__huggingface__json=None)


@pytest.mark.parametrize("original", [True, False], ids=["original", "rebuilt"])
@pytest.mark.parametrize("split", [None, "llama-bpe", "qwen2", "qwen35", "tekken", "gpt-4o", "deepseek-v3"])
def test_byte_level_tokenizers(tmp_path: Path, split: str | None, original: bool) -> None:
    tokenizer = byte_level(split)
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    path = tokenizer_file(tmp_path, tokenizer, original)
    meta = GGUFFile(path).metadata
    assert meta["tokenizer.ggml.model"] == "gpt2"
    assert meta["tokenizer.ggml.pre"] == (split or "gpt-2")
    assert len(meta["tokenizer.ggml.tokens"]) == 1024
    kinds = dict(zip(meta["tokenizer.ggml.tokens"], meta["tokenizer.ggml.token_type"], strict=True))
    assert (kinds["<s>"], kinds["<|end|>"], kinds["[PAD1023]"], kinds["a"]) == (3, 4, 5, 1)
    found = load_tokenizer(path)
    assert found(TEXT).input_ids == tokenizer(TEXT).input_ids
    assert found.decode(found(TEXT).input_ids) == TEXT
    assert (found.bos_token, found.eos_token, found.chat_template) == ("<s>", "</s>", tokenizer.chat_template)


@pytest.mark.parametrize("original", [True, False], ids=["original", "rebuilt"])
@pytest.mark.parametrize("prefix", [True, False])
def test_sentencepiece_tokenizers(tmp_path: Path, prefix: bool, original: bool) -> None:
    tokenizer = sentencepiece(prefix)
    path = tokenizer_file(tmp_path, tokenizer, original)
    meta = GGUFFile(path).metadata
    assert (meta["tokenizer.ggml.model"], meta["tokenizer.ggml.add_space_prefix"], meta["tokenizer.ggml.add_bos_token"]) == (
        "llama",
        prefix,
        True,
    )
    kinds = dict(zip(meta["tokenizer.ggml.tokens"], meta["tokenizer.ggml.token_type"], strict=True))
    assert (kinds["<unk>"], kinds["<s>"], kinds["<0x41>"], kinds["[PAD1023]"]) == (2, 3, 6, 5)
    found = load_tokenizer(path)
    assert found(TEXT).input_ids == tokenizer(TEXT).input_ids
    assert found.decode(found(TEXT).input_ids, skip_special_tokens=True) == TEXT


def test_tokenizers_that_cannot_be_converted(tmp_path: Path) -> None:
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers

    path = tmp_path / "a.gguf"
    model = tiny("llama", vocab_size=1024)
    pieces = transformers.PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordPiece({"[UNK]": 0}, unk_token="[UNK]")))
    with pytest.raises(GGUFTokenizerError, match="'WordPiece'"):
        save_gguf(model, path, pieces)
    odd = byte_level()
    odd.backend_tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("x+"), behavior="isolated")
    with pytest.raises(GGUFTokenizerError, match="no known name.*x\\+.*tokenizer=None"):
        save_gguf(model, path, odd)
    with pytest.raises(GGUFTokenizerError, match=r"ids up to \d+, the embedding 96 rows"):
        save_gguf(tiny("llama"), path, byte_level())
    with pytest.raises(GGUFTokenizerError, match="no tokenizer.json"):
        save_gguf(model, path, object())
    assert not list(tmp_path.iterdir())

    good = tokenizer_file(tmp_path, byte_level(), original=False)
    for change, message in (
        ({"tokenizer__ggml__model": "bert"}, "'bert' cannot be rebuilt"),
        ({"tokenizer__ggml__model": None}, "None cannot be rebuilt"),
        ({"tokenizer__ggml__pre": "unheard-of"}, "'unheard-of', known are"),
        ({"tokenizer__ggml__token_type": [1, 2]}, "2 types"),
        ({"tokenizer__ggml__tokens": ["a", "a"]}, "1 of them different"),
        ({"tokenizer__ggml__merges": ["zz zz"]}, "makes no tokenizer"),
        ({"tokenizer__huggingface__json": "{}"}, "cannot be read"),
    ):
        with pytest.raises(GGUFTokenizerError, match=message):
            load_tokenizer(rewrite(good, tmp_path / "c.gguf", **change))


def test_configuration_of_a_file_is_a_dictionary(tmp_path: Path) -> None:
    save_gguf(tiny("deepseek-v3"), tmp_path / "a.gguf")
    config = config_from_gguf(GGUFFile(tmp_path / "a.gguf"))
    assert config["model_type"] == "deepseek_v3"
    assert (config["qk_nope_head_dim"], config["qk_rope_head_dim"], config["v_head_dim"], config["q_lora_rank"]) == (16, 8, 16, 32)
    shutil.rmtree(tmp_path)
