"""Loading files of others: other layouts, other configurations, and what is refused."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import iqtorch
from iqtorch import IQTensor
from iqtorch.formats import get_format
from iqtorch.gguf import (
    GGUFArchitectureError,
    GGUFError,
    GGUFFile,
    GGUFNameError,
    GGUFTensorError,
    TensorSource,
    families,
    load_gguf,
    save_gguf,
    write_gguf,
)
from iqtorch.gguf.families import config_from_gguf
from iqtorch.gguf.family import Family

transformers = pytest.importorskip("transformers")
import gguf_models  # noqa: E402 (imports transformers)
from gguf_models import assert_same_weights, logits, pack, rewrite, tiny  # noqa: E402 (imports transformers)


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
    unknown = rewrite(tmp_path / "a.gguf", tmp_path / "c.gguf", general__architecture="exaone4")
    with pytest.raises(GGUFArchitectureError, match=r"'exaone4' is not among llama, qwen2.*config="):
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
        ("expert_used_count", -1), ("rope.freq_base", "x"), ("rope.freq_base", -1.0), ("rope.freq_base", float("nan")),
        ("rope.scaling.factor", 0.0), ("attention.key_length", 0), ("attention.head_count_kv", 0), ("block_count", 60),
        ("attention.layer_norm_rms_epsilon", float("inf")), ("nextn_predict_layers", -1),
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


def test_layers_that_predict_further_tokens(tmp_path: Path) -> None:
    """Files of GLM-4.5 end with a layer that transformers lacks."""
    model = pack(tiny("glm4-moe"))
    save_gguf(model, tmp_path / "a.gguf")
    file = GGUFFile(tmp_path / "a.gguf")
    tensors = [TensorSource(n, i.shape, i.format or i.dtype, lambda n=n: file.data(n)) for n, i in file.tensors.items()]
    more = [TensorSource(t.name.replace("blk.2.", "blk.3."), t.shape, t.type, t.load) for t in tensors if t.name.startswith("blk.2.")] + [
        TensorSource.of("blk.3.nextn.eh_proj.weight", torch.randn(64, 128))
    ]
    meta = {key: file.metadata[key] for key in file.metadata} | {"glm4moe.block_count": 4, "glm4moe.nextn_predict_layers": 1}
    write_gguf(tmp_path / "b.gguf", meta, tensors + more)
    assert_same_weights(load_gguf(tmp_path / "b.gguf"), model)
    assert_same_weights(load_gguf(tmp_path / "b.gguf", config=model.config), model)
    write_gguf(tmp_path / "c.gguf", meta | {"glm4moe.nextn_predict_layers": 0}, tensors + more)
    with pytest.raises(GGUFNameError, match=r"1 tensors without a parameter: blk\.3\.nextn"):
        load_gguf(tmp_path / "c.gguf")


def test_yarn_of_deepseek(tmp_path: Path) -> None:
    """Its files scale the scores by `yarn_log_multiplier` (older ones: not at all), and never the rotation."""
    save_gguf(tiny("deepseek-yarn"), tmp_path / "a.gguf")
    assert GGUFFile(tmp_path / "a.gguf").metadata["deepseek2.rope.scaling.yarn_log_multiplier"] == pytest.approx(0.0707)
    model = load_gguf(tmp_path / "a.gguf")
    scale = (0.1 * 0.707 * math.log(40) + 1) ** 2 / math.sqrt(24)
    assert model.model.layers[0].self_attn.scaling == pytest.approx(scale)
    assert model.model.rotary_emb.attention_scaling == 1
    older = load_gguf(rewrite(tmp_path / "a.gguf", tmp_path / "b.gguf", deepseek2__rope__scaling__yarn_log_multiplier=None))
    assert older.model.layers[0].self_attn.scaling == pytest.approx(1 / math.sqrt(24))
    assert older.model.rotary_emb.attention_scaling == 1
    unequal = tiny("deepseek-yarn").config.rope_parameters | {"mscale": 1.0}
    with pytest.raises(GGUFArchitectureError, match=r"mscale=1\.0 and mscale_all_dim=0\.707 cannot be written.*equal"):
        save_gguf(tiny("deepseek-yarn", rope_parameters=unequal), tmp_path / "c.gguf")


def test_device_map(tmp_path: Path) -> None:
    model = pack(tiny("qwen2"))
    save_gguf(model, tmp_path / "a.gguf")
    for device_map in ("cpu", torch.device("cpu"), "auto", {"": "cpu"}):
        assert_same_weights(load_gguf(tmp_path / "a.gguf", device_map=device_map), model)


def test_a_family_without_a_record_by_its_own_configuration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """EXAONE 4: its tensors lie in files as in the model, its configuration is not made from the metadata."""
    monkeypatch.setitem(gguf_models.MODELS, "exaone4", ("Exaone4Config", {"head_dim": 32, "sliding_window": 16}))
    model = pack(tiny("exaone4"), {"layers": "q8_0"})
    with monkeypatch.context() as patch:  # only to write such a file
        patch.setattr(families, "FAMILIES", (*families.FAMILIES, Family("exaone4", "exaone4", (), rope=False)))
        save_gguf(model, tmp_path / "a.gguf")
    with pytest.raises(GGUFArchitectureError, match=r"architecture 'exaone4' is not among llama.*; pass config="):
        load_gguf(tmp_path / "a.gguf")
    assert assert_same_weights(load_gguf(tmp_path / "a.gguf", config=model.config), model) == 21


@pytest.mark.skipif("gemma4" not in gguf_models.MODELS, reason="this transformers has no Gemma 4")
@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("attention.sliding_window_pattern", [True] * 7, "layers of gemma4 differ"),
        ("attention.sliding_window_pattern", [True] * 6, "has 6 values for 7 layers"),
        ("attention.sliding_window_pattern", None, "layers of gemma4 differ"),
        ("attention.head_count_kv", [2, 2, 1, 2, 2, 2, 2], "layers of gemma4 differ"),
        ("attention.head_count_kv", [0] * 7, "must not be 0"),
        ("attention.key_length_swa", None, "must not be 0"),
        ("attention.key_length", 2**30, "no tensor of the file is larger"),
        ("attention.shared_kv_layers", 7, "pass config="),
        ("feed_forward_length", [96, 96, 96, 96, 96, 192, 96], "layers of gemma4 differ"),
        ("rope.dimension_count_swa", 8, "rotate in part"),
        ("final_logit_softcapping", -1.0, "must be a positive number"),
    ],
)
def test_gemma4_as_transformers_cannot_have_it(tmp_path: Path, key: str, value: Any, message: str) -> None:
    save_gguf(tiny("gemma4"), tmp_path / "a.gguf")
    path = rewrite(tmp_path / "a.gguf", tmp_path / "b.gguf", **{f"gemma4.{key}": value})
    with pytest.raises(GGUFError, match=message):
        load_gguf(path)


@pytest.mark.skipif("gemma4" not in gguf_models.MODELS, reason="this transformers has no Gemma 4")
@pytest.mark.parametrize(("head", "pairs"), [(32, 4), (80, 7), (44, 15), (80, 40)])
def test_gemma4_rotates_as_many_pairs_again(tmp_path: Path, head: int, pairs: int) -> None:
    """Also where their share is no binary fraction: rounded to double precision, 15 / 22 * 22 is below 15."""
    share = (pairs + 0.25) / (head // 2) if 2 * pairs < head else 1.0
    rope = {"rope_type": "proportional", "rope_theta": 1e6, "partial_rotary_factor": share}
    local = {"rope_type": "default", "rope_theta": 1e4}
    model = tiny("gemma4", global_head_dim=head, rope_parameters={"full_attention": rope, "sliding_attention": local})
    save_gguf(model, tmp_path / "a.gguf")
    frequencies = [m.model.rotary_emb.full_attention_inv_freq for m in (model, load_gguf(tmp_path / "a.gguf", dtype=torch.bfloat16))]
    assert torch.equal(*frequencies) and int((frequencies[0] > 0).sum()) == pairs


def test_architectures_without_a_decoder_alone(tmp_path: Path) -> None:
    save_gguf(tiny("llama"), tmp_path / "a.gguf")
    for arch in ("t5", "bert"):
        path = rewrite(tmp_path / "a.gguf", tmp_path / "b.gguf", general__architecture=arch)
        with pytest.raises(GGUFArchitectureError, match=f"'{arch}' is no causal language model"):
            load_gguf(path)
    for arch in ("deci", "rwkv6", "phi2"):  # not in the table
        path = rewrite(tmp_path / "a.gguf", tmp_path / "c.gguf", general__architecture=arch)
        with pytest.raises(GGUFArchitectureError, match=rf"architecture '{arch}' is not among llama, .*; pass config="):
            load_gguf(path)
    with pytest.raises(GGUFArchitectureError, match="config= makes no valid causal language model: .*T5Config"):
        load_gguf(tmp_path / "a.gguf", config=transformers.T5Config())
    with pytest.raises(OSError, match="nowhere"):
        load_gguf(tmp_path / "a.gguf", config=tmp_path / "nowhere")


def test_ids_of_another_program(tmp_path: Path) -> None:
    """A type id that means something else there: the error names the remedy, the remedy loads the model."""
    model = pack(tiny("llama"), {"layers": "q8_0"})
    save_gguf(model, tmp_path / "a.gguf")
    raw, wanted = (tmp_path / "a.gguf").read_bytes(), 0
    for name, info in GGUFFile(tmp_path / "a.gguf").tensors.items():
        if info.type_name == "q8_0":
            at = raw.index(name.encode()) + len(name) + 4 + 8 * len(info.shape)
            assert raw[at : at + 4] == (8).to_bytes(4, "little")
            raw, wanted = raw[:at] + (7777).to_bytes(4, "little") + raw[at + 4 :], wanted + 1
    (tmp_path / "b.gguf").write_bytes(raw)
    with pytest.raises(GGUFError, match=r"type id 7777.*id_map"):
        load_gguf(tmp_path / "b.gguf")
    assert assert_same_weights(load_gguf(tmp_path / "b.gguf", id_map={7777: "q8_0"}), model) == wanted == 21


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


def test_rope_factors_of_others_are_refused(tmp_path: Path) -> None:
    save_gguf(tiny("llama-3.1"), tmp_path / "a.gguf")

    def other(name: str, info: Any, source: TensorSource) -> TensorSource:
        return TensorSource.of(name, source.load() ** 2) if name == "rope_freqs.weight" else source

    path = rewrite(tmp_path / "a.gguf", tmp_path / "b.gguf", other)
    with pytest.raises(GGUFArchitectureError, match="rope_freqs"):
        load_gguf(path)


def test_configuration_of_a_file_is_a_dictionary(tmp_path: Path) -> None:
    save_gguf(tiny("deepseek-v3"), tmp_path / "a.gguf")
    config = config_from_gguf(GGUFFile(tmp_path / "a.gguf"))
    assert config["model_type"] == "deepseek_v3"
    assert (config["qk_nope_head_dim"], config["qk_rope_head_dim"], config["v_head_dim"], config["q_lora_rank"]) == (16, 8, 16, 32)
    shutil.rmtree(tmp_path)


def test_the_example_runs() -> None:
    script = Path(__file__).parents[1] / "examples" / "gguf_roundtrip.py"
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, check=True)
    assert "same logits after the round trip: True" in done.stdout
    assert "iq2_kl" in done.stdout
