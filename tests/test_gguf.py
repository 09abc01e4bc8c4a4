"""Models to GGUF files and back: every family, bit for bit, without dequantizing."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gguf
import pytest
import torch

import iqtorch
from iqtorch import IQTensor
from iqtorch.formats import get_format, list_formats
from iqtorch.gguf import (
    GGUFArchitectureError,
    GGUFFile,
    GGUFNameError,
    GGUFTensorError,
    TensorSource,
    custom_q,
    gguf_name,
    load_gguf,
    save_gguf,
    use_file_order,
    write_gguf,
)
from iqtorch.gguf.families import FAMILIES
from iqtorch.gguf.family_table import _ROTATED
from iqtorch.gguf.save import contents
from iqtorch.gguf.tensors import Binding
from iqtorch.gguf.writer import Typed

transformers = pytest.importorskip("transformers")
from gguf_models import MODELS, assert_same_weights, ids, logits, pack, rewrite, tiny  # noqa: E402 (imports transformers)

every_family = pytest.mark.parametrize("name", MODELS)


# -- round trips -------------------------------------------------------------------------------------------


@every_family
def test_packed_model_round_trip(tmp_path: Path, name: str) -> None:
    model = tiny(name)
    use_file_order(model)
    pack(model, {"embed|lm_head|wte": "q8_0", "down_proj|c_proj|w2": "q5_0", r"layers|\.h\.": "iq4_nl"})
    path = tmp_path / "a.gguf"
    save_gguf(model, path)
    again = load_gguf(path)
    assert assert_same_weights(again, model) > 7
    assert torch.equal(logits(again), logits(model))
    tied = model.config.tie_word_embeddings
    assert (again.get_output_embeddings().weight is again.get_input_embeddings().weight) == tied
    repeats = next(family.repeats for family in FAMILIES if family.model_type == again.config.model_type)
    assert ("output.weight" in GGUFFile(path).tensors) == (not tied or repeats)


def test_gpt_oss_as_it_is_distributed(tmp_path: Path) -> None:
    """Experts in mxfp4, everything else in bfloat16."""
    model = pack(tiny("gpt-oss-yarn"), {"experts": "mxfp4"})
    save_gguf(model, tmp_path / "a.gguf")
    file = GGUFFile(tmp_path / "a.gguf")
    assert {n.split(".")[2] for n, info in file.tensors.items() if info.type_name == "mxfp4"} == {
        "ffn_gate_exps", "ffn_up_exps", "ffn_down_exps",
    }  # fmt: skip
    again = load_gguf(tmp_path / "a.gguf")
    assert assert_same_weights(again, model) == 6
    assert torch.equal(logits(again), logits(model))
    assert again.config.rope_parameters == model.config.rope_parameters


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
    head_dim = model.config.hidden_size // getattr(model.config, "num_attention_heads", 1)
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


def test_answers_end_where_programs_stop(tmp_path: Path) -> None:
    """Files have room for one `eos_token_id`; what else ends a turn stands in other keys and in the texts of control tokens."""
    model, tokenizer = iqtorch.data.load_tiny_llama()
    metadata, tensors = contents(model, tokenizer)
    kinds = metadata["tokenizer.ggml.token_type"].value

    def ends(texts: dict[int, str], **keys: int) -> Any:
        tokens = [texts.get(i, token) for i, token in enumerate(metadata["tokenizer.ggml.tokens"])]
        control = [3 if i in texts else kind for i, kind in enumerate(kinds)]
        changed = {"tokenizer.ggml.tokens": tokens, "tokenizer.ggml.token_type": Typed(control, 5)}
        named = {f"tokenizer.ggml.{key}_token_id": value for key, value in keys.items()}
        write_gguf(tmp_path / "a.gguf", metadata | changed | named, tensors)
        return load_gguf(tmp_path / "a.gguf").generation_config.eos_token_id

    assert ends({}) == 1
    assert ends({9: "<end_of_turn>", 7: "<|im_end|>"}, eot=20, eom=30000) == [1, 7, 9, 20]
    assert ends({7: "<|end|>"}) == [1, 7]
    assert ends({7: "<|end|>", 8: "<|call|>", 9: "<|return|>"}) == [1, 8, 9]
    assert ends({}, eot=1) == 1


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
    order = _ROTATED["attn_q"]
    turned = partial(order, SimpleNamespace(num_attention_heads=3))
    columns = torch.tensor([4, 0, 1, 3, 2])
    for binding in (
        Binding("w", ("a",)), Binding("w", ("a",), order=turned), Binding("w", ("a", "b")), Binding("w", ("a",), shift=1.0),
        Binding("w", ("a",), columns=lambda _: columns),
    ):  # fmt: skip
        parts = binding.to_file(rows, 0)
        assert len(parts) == len(binding.tensors)
        assert torch.equal(binding.to_model(parts, 0), rows)
    assert not torch.equal(Binding("w", ("a",), order=turned).to_file(rows, 0)[0], rows)
    assert torch.equal(Binding("w", ("a",), columns=lambda _: columns).to_file(rows, 0)[0], rows[:, columns])
    decays = Binding("blk.0.ssm_a", ("a",), decay=True)
    values = torch.tensor([-1.0, 0.5, 2.0])
    assert torch.equal(decays.to_file(values, 0)[0], -values.exp())
    torch.testing.assert_close(decays.to_model([-values.exp()], 0), values)


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
    save_gguf(oss := tiny("gpt-oss"), tmp_path / "oss.gguf")
    file, experts = GGUFFile(tmp_path / "oss.gguf"), oss.model.layers[1].mlp.experts
    assert torch.equal(file.data("blk.1.ffn_gate_exps.weight"), experts.gate_up_proj[..., ::2].mT)
    assert torch.equal(file.data("blk.1.ffn_up_exps.weight"), experts.gate_up_proj[..., 1::2].mT)
    assert torch.equal(file.data("blk.1.ffn_down_exps.weight"), experts.down_proj.mT)
    assert torch.equal(file.data("blk.1.ffn_up_exps.bias"), experts.gate_up_proj_bias[:, 1::2].float())
    assert file.tensors["blk.1.attn_sinks.weight"].dtype == torch.float32
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
    for lap in range(2):  # the name survives, also by way of a folder
        load_gguf(path).save_pretrained(tmp_path / "folder")
        save_gguf(transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "folder"), path := tmp_path / f"{lap}.gguf")
        assert GGUFFile(path).metadata == meta
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


def test_saving_refuses_what_files_cannot_say(tmp_path: Path) -> None:
    path = tmp_path / "a.gguf"
    with pytest.raises(GGUFArchitectureError, match="'gptj' cannot be written.*known are llama"):
        save_gguf(transformers.GPTJForCausalLM(transformers.GPTJConfig(n_layer=1, n_embd=32, n_head=2, vocab_size=64, rotary_dim=8)), path)
    with pytest.raises(GGUFArchitectureError, match="norm_topk_prob=False.*assume True"):
        save_gguf(tiny("qwen3-moe", norm_topk_prob=False), path)
    with pytest.raises(GGUFArchitectureError, match="hidden_act='gelu'"):
        save_gguf(tiny("llama", hidden_act="gelu"), path)
    with pytest.raises(GGUFArchitectureError, match="has no config"):
        save_gguf(torch.nn.Linear(2, 2), path)
    yarn = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 32}
    for setting, value in (("beta_fast", 8), ("attention_factor", 1.0), ("truncate", False)):
        with pytest.raises(GGUFArchitectureError, match=rf"rope_parameters\['{setting}'\]={value}.*assume"):
            save_gguf(tiny("llama", rope_parameters=yarn | {setting: value}), path)
    with pytest.raises(GGUFArchitectureError, match=r"partial_rotary_factor=0\.5.*'llama' files rotate whole heads"):
        save_gguf(tiny("llama", rope_parameters={"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}), path)
    with pytest.raises(GGUFArchitectureError, match="rope type 'dynamic'"):
        save_gguf(tiny("llama", rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}), path)
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(transformers.__version__.startswith("5.4."), reason="this version cannot make all of their configurations")
def test_every_family_is_tested() -> None:
    tested = {tiny_config.model_type for name in MODELS for tiny_config in [getattr(transformers, MODELS[name][0])]}
    for family in FAMILIES:
        assert {family.model_type, *family.aliases} <= tested, family


def test_linear_attention_in_the_order_of_files(tmp_path: Path) -> None:
    """Columns that lie elsewhere in files: unquantized ones move when they are written, packed ones must lie so before."""
    model = tiny("qwen3.5", torch.float32)
    config, before = model.config, logits(model)
    plain = model.model.layers[0].linear_attn
    save_gguf(model, tmp_path / "a.gguf")
    file = GGUFFile(tmp_path / "a.gguf")
    for head in range(6):  # as the file has them: with key head 0, 1, 0, 1, ..; in the model 0, 0, 0, 1, 1, 1
        there, here = slice(32 * head, 32 * head + 32), (head % 2) * 3 + head // 2
        here = slice(32 * here, 32 * here + 32)
        assert torch.equal(file.data("blk.0.ssm_out.weight")[:, there], plain.out_proj.weight[:, here])
        assert torch.equal(file.data("blk.0.attn_gate.weight")[there], plain.in_proj_z.weight[here])
        values = slice(128 + here.start, 128 + here.stop)
        assert torch.equal(file.data("blk.0.attn_qkv.weight")[128 + there.start : 128 + there.stop], plain.in_proj_qkv.weight[values])
        assert torch.equal(file.data("blk.0.ssm_conv1d.weight")[128 + there.start : 128 + there.stop], plain.conv1d.weight[values, 0])
        assert file.data("blk.0.ssm_dt.bias")[head] == plain.dt_bias[here.start // 32]
        torch.testing.assert_close(file.data("blk.0.ssm_a")[head], -plain.A_log[here.start // 32].exp())
    packed = pack(tiny("qwen3.5"), "q8_0")
    with pytest.raises(GGUFTensorError, match=r"linear_attn\.out_proj\.weight is packed.*iqtorch\.gguf\.use_file_order\(model\) before"):
        save_gguf(packed, tmp_path / "b.gguf")
    use_file_order(model)
    found = logits(model)
    assert (found - before).norm() / before.norm() < 1e-5  # the sums are taken in another order
    layer = model.model.layers[0].linear_attn.out_proj
    assert "groups=2, heads=3" in str(layer)
    assert torch.equal(layer.tiled.weight, file.data("blk.0.ssm_out.weight"))
    use_file_order(model)  # once is enough
    # quantized so, it goes to files, to folders and back
    use_file_order(model := tiny("qwen3.5"))
    pack(model, "q8_0")
    save_gguf(model, tmp_path / "c.gguf")
    again = load_gguf(tmp_path / "c.gguf")
    assert assert_same_weights(again, model) == 41
    again.save_pretrained(tmp_path / "folder")
    third = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "folder")
    assert_same_weights(third, model)
    assert torch.equal(logits(third), logits(model))
    iqtorch.convert_checkpoint(tmp_path / "folder", tmp_path / "d.gguf", progress=False)
    assert all(torch.equal(GGUFFile(tmp_path / "d.gguf").data(n), GGUFFile(tmp_path / "c.gguf").data(n)) for n in file.tensors)
    assert third.config.layer_types == config.layer_types


def test_output_layers_that_repeat_the_embedding(tmp_path: Path) -> None:
    """Files of GPT-2 have both; they are tied where the bytes are the same."""
    save_gguf(model := tiny("gpt2"), tmp_path / "a.gguf")
    file = GGUFFile(tmp_path / "a.gguf")
    assert torch.equal(file.data("output.weight"), file.data("token_embd.weight"))
    again = load_gguf(tmp_path / "a.gguf")
    assert again.get_output_embeddings().weight is again.get_input_embeddings().weight
    assert_same_weights(load_gguf(tmp_path / "a.gguf", config=model.config), model)

    def other(name: str, _: Any, source: TensorSource) -> TensorSource:
        return TensorSource.of(name, -source.load()) if name == "output.weight" else source

    untied = load_gguf(rewrite(tmp_path / "a.gguf", tmp_path / "b.gguf", other))
    assert torch.equal(untied.get_output_embeddings().weight, -model.transformer.wte.weight)
    with pytest.raises(GGUFNameError, match=r"1 tensors without a parameter: output\.weight"):
        load_gguf(tmp_path / "b.gguf", config=model.config)


def in_two_tensors(source: Path, target: Path, change: Any = lambda name, data: (data, None)) -> None:
    """Rewrites a file of Qwen3-Next as newer programs do: `change` gives other data and the type of it."""
    file = GGUFFile(source)
    tensors = []
    for name, info in file.tensors.items():
        data, type_ = file.data(name), info.format or info.dtype
        if not name.endswith("ssm_in.weight"):
            tensors.append(TensorSource(name, info.shape, type_, lambda data=data: data))  # type: ignore[misc]
            continue
        assert info.shape[0] == 512  # 2 key heads: query of 32, key of 32, 3 values of 32, 3 gates of 32
        groups = data.unflatten(0, (2, 256))
        qkv = torch.cat([groups[:, :32].flatten(0, 1), groups[:, 32:64].flatten(0, 1), groups[:, 64:160].flatten(0, 1)])
        for part, rows in (("attn_qkv", qkv), ("attn_gate", groups[:, 160:].flatten(0, 1))):
            made, other = change(part, rows)
            tensors.append(
                TensorSource(name.replace("ssm_in", part), (len(rows), *info.shape[1:]), other or type_, lambda made=made: made)  # type: ignore[misc]
            )
    write_gguf(target, file.metadata, tensors)


@pytest.mark.parametrize("kind", [None, "q8_0"])
def test_projections_of_qwen3_next_in_two_tensors(tmp_path: Path, kind: str | None) -> None:
    """Newer files have queries, keys and values apart from gates; older ones all of them key head by key head, as the model."""
    model = pack(tiny("qwen3-next"), {"in_proj_qkvz": kind, "mlp": "q8_0"})
    save_gguf(model, tmp_path / "a.gguf")
    in_two_tensors(tmp_path / "a.gguf", tmp_path / "b.gguf")
    assert_same_weights(load_gguf(tmp_path / "b.gguf"), model)


@pytest.mark.parametrize("gates", ["iq4_nl", None])
def test_projections_of_qwen3_next_of_two_types(tmp_path: Path, gates: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """They stay as they are stored, through a folder and back to a file too; the results are those of one matrix of their values."""
    save_gguf(tiny("qwen3-next"), tmp_path / "a.gguf")

    def packed(part: str, rows: torch.Tensor) -> tuple[torch.Tensor, Any]:
        kind = "q8_0" if part == "attn_qkv" else gates
        return (rows, None) if kind is None else (iqtorch.quantize(rows, kind).to_blocks(), get_format(kind))

    def decoded(part: str, rows: torch.Tensor) -> tuple[torch.Tensor, Any]:
        data, fmt = packed(part, rows)
        return (rows.float() if fmt is None else IQTensor.from_blocks(data, fmt, torch.float32).dequantize()), torch.float32

    in_two_tensors(tmp_path / "a.gguf", tmp_path / "b.gguf", packed)
    in_two_tensors(tmp_path / "a.gguf", tmp_path / "c.gguf", decoded)
    again, plain = (load_gguf(tmp_path / name, dtype=torch.float32) for name in ("b.gguf", "c.gguf"))
    layer = again.model.layers[0].linear_attn.in_proj_qkvz
    kinds = ["IQTensor", "IQTensor" if gates else "Parameter"]
    assert [type(part.weight).__name__ for part in (layer.in_proj_qkv, layer.in_proj_z)] == kinds
    assert type(plain.model.layers[0].linear_attn.in_proj_qkvz) is torch.nn.Linear
    monkeypatch.setattr(iqtorch.ops, "_precision", iqtorch.ops.FLOAT)
    few = ids(12)[:1]  # of 16 rows and more some CPUs round the activations to bfloat16
    with torch.no_grad():
        torch.testing.assert_close(again(few).logits, plain(few).logits, rtol=1e-3, atol=1e-3)
    again.save_pretrained(tmp_path / "folder")
    third = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "folder")
    assert_same_weights(third, again)
    save_gguf(third, tmp_path / "d.gguf")
    back, before = (GGUFFile(tmp_path / name) for name in ("d.gguf", "b.gguf"))
    assert {n for n, i in back.tensors.items() if i.format} == {n for n, i in before.tensors.items() if i.format}
    assert all(torch.equal(back.data(n).float(), before.data(n).float()) for n in before.tensors)


# -- names -------------------------------------------------------------------------------------------------


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
