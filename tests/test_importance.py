"""Importance: collecting, both file kinds, names, merging, bad input."""

from __future__ import annotations

import logging
import struct
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from torch import nn

import iqtorch
from iqtorch.errors import ImportanceError, MissingDependencyError
from iqtorch.gguf import names
from iqtorch.gguf.errors import GGUFError, GGUFMetadataError
from iqtorch.importance import Importance, ImportanceEntry, collect_importance

transformers = pytest.importorskip("transformers")


def tiny_llama(tie: bool = True) -> nn.Module:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        tie_word_embeddings=tie,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


def tiny_moe(experts: int = 8) -> nn.Module:
    torch.manual_seed(0)
    config = transformers.Qwen3MoeConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, moe_intermediate_size=16, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, num_experts=experts, num_experts_per_tok=2, head_dim=8, decoder_sparse_step=1,
    )  # fmt: skip
    return transformers.Qwen3MoeForCausalLM(config).eval()


def ids(batch: int = 3, length: int = 20, seed: int = 1) -> torch.Tensor:
    return torch.randint(0, 64, (batch, length), generator=torch.Generator().manual_seed(seed))


def simple(**extra: torch.Tensor) -> Importance:
    return Importance({
        "model.layers.0.self_attn.q_proj.weight": ImportanceEntry(torch.tensor([1.0, 2.0, 0.0]), torch.tensor([1024.0])),
        "model.layers.0.mlp.experts.gate_up_proj": ImportanceEntry(torch.arange(6.0).reshape(2, 3) + 1, torch.tensor([512.0, 1536.0])),
        **extra,
    }, datasets=("calibration.txt",), chunks=4, chunk_size=512)  # fmt: skip


# -- collecting --------------------------------------------------------------------------------------------


def test_collected_means_are_the_mean_squares_of_the_inputs() -> None:
    model = tiny_llama()
    batches = [ids(), ids(2, 11, seed=2)]
    inputs: dict[str, list[torch.Tensor]] = {}
    handles = [
        module.register_forward_pre_hook(
            lambda _, args, name=name: inputs.setdefault(name, []).append(args[0].double().reshape(-1, args[0].shape[-1]))
        )
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
    ]
    with torch.no_grad():
        for batch in batches:
            model(batch)
    for handle in handles:
        handle.remove()
    model.train()
    found = collect_importance(model, batches, datasets=["random"])
    assert model.training
    assert all(not module._forward_pre_hooks for module in model.modules())
    assert len(found) == 2 * 7 + 1  # the tied output layer counts once, under the embedding's name
    for name, seen in inputs.items():
        parameter = "model.embed_tokens.weight" if name == "lm_head" else name + ".weight"
        entry = found.entry(parameter)
        rows = torch.cat(seen)
        torch.testing.assert_close(entry.mean.double(), rows.square().mean(0), rtol=1e-5, atol=0)
        assert entry.count.tolist() == [3 * 20 + 2 * 11]
    assert (found.chunks, found.chunk_size, found.datasets) == (5, 20, ("random",))


def test_untied_output_has_its_own_entry() -> None:
    found = collect_importance(tiny_llama(tie=False), [{"input_ids": ids()}])
    assert "lm_head.weight" in found
    assert "model.embed_tokens.weight" not in found


def test_experts_are_counted_one_by_one(caplog: pytest.LogCaptureFixture) -> None:
    model = tiny_moe(experts=16)
    batch = ids(1, 5)
    before = model.config._experts_implementation
    module = model.model.layers[0].mlp.experts
    calls: list[tuple[torch.Tensor, torch.Tensor]] = []
    handle = module.register_forward_pre_hook(lambda _, args: calls.append((args[0], args[1])))
    with caplog.at_level(logging.WARNING, "iqtorch"):
        found = collect_importance(model, [batch])
    handle.remove()
    assert model.config._experts_implementation == before
    hidden, chosen = calls[0]
    hidden = hidden.reshape(-1, 32)
    gate_up, down = found.entry("model.layers.0.mlp.experts.gate_up_proj"), found.entry("model.layers.0.mlp.experts.down_proj")
    assert gate_up.mean.shape == (16, 32)
    assert down.mean.shape == (16, 16)
    unseen = []
    for e in range(16):
        tokens = hidden[(chosen == e).any(-1)]
        assert gate_up.count[e] == down.count[e] == len(tokens)
        if len(tokens):
            torch.testing.assert_close(gate_up.mean[e], tokens.square().mean(0))
            gate, up = nn.functional.linear(tokens, module.gate_up_proj[e]).chunk(2, -1)
            torch.testing.assert_close(down.mean[e], (nn.functional.silu(gate) * up).square().mean(0))
        else:
            unseen.append(e)
            assert (gate_up.mean[e] == 1).all()
            assert (down.mean[e] == 1).all()
    assert unseen, "the test needs an expert without a token"
    assert f"experts {unseen} of 'model.layers.0.mlp.experts.gate_up_proj' saw no token" in caplog.text


def test_layers_that_stream_through_memory() -> None:
    accelerate = pytest.importorskip("accelerate")
    for make in (tiny_llama, tiny_moe):
        expected = collect_importance(make(), [ids()])
        found = collect_importance(accelerate.cpu_offload(make()), [ids()])
        assert list(found) == list(expected)
        for name in expected:
            assert torch.equal(found[name], expected[name]), name


def test_sums_do_not_saturate() -> None:
    """A float32 sum stops growing at 2^24 equal terms."""
    from iqtorch.importance import _Sums

    sums = _Sums(None)
    x = torch.ones(1 << 20, 1)
    for _ in range(40):
        sums.add(x)
    entry = sums.entry()
    assert entry.mean.tolist() == [1.0]
    assert entry.count.tolist() == [40 * (1 << 20)]
    half = _Sums(None)
    half.add(torch.full((4, 2), 300.0, dtype=torch.float16))  # the square is beyond float16
    assert half.entry().mean.tolist() == [90000.0, 90000.0]


def test_collecting_refuses_what_cannot_be_counted() -> None:
    with pytest.raises(ImportanceError, match="batches are empty"):
        collect_importance(tiny_llama(), [])
    broken = tiny_llama()
    with torch.no_grad():
        broken.model.layers[1].self_attn.o_proj.weight[0, 0] = float("nan")
    with pytest.raises(ImportanceError, match=r"layers\.1\.mlp.*NaN"):
        collect_importance(broken, [ids()])
    assert all(not module._forward_pre_hooks for module in broken.modules())


# -- names -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stored", "wanted"),
    [
        ("blk.3.attn_q.weight", "model.layers.3.self_attn.q_proj.weight"),
        ("model.layers.3.self_attn.q_proj.weight", "blk.3.attn_q.weight"),
        ("blk.3.ffn_up.weight", "model.layers.3.mlp.gate_proj.weight"),
        ("blk.0.ffn_down.weight", "model.language_model.layers.0.mlp.down_proj.weight"),
        ("blk.11.ffn_up_exps.weight", "model.layers.11.mlp.experts.gate_up_proj"),
        ("blk.11.ffn_gate_exps.weight", "model.layers.11.mlp.experts.gate_up_proj"),
        ("blk.11.ffn_down_exps.weight", "model.layers.11.mlp.experts.down_proj"),
        ("blk.2.attn_kv_b.weight", "blk.2.attn_v_b.weight"),
        ("output.weight", "lm_head.weight"),
        ("token_embd.weight", "model.embed_tokens.weight"),
    ],
)
def test_names_of_both_worlds(stored: str, wanted: str) -> None:
    found = Importance({stored: torch.tensor([1.0, 2.0])})
    assert wanted in found
    assert found[wanted].tolist() == [1.0, 2.0]
    assert found.unused([wanted]) == []
    for other in ("model.layers.4.self_attn.q_proj.weight", "model.layers.3.self_attn.k_proj.weight", "nonsense"):
        assert other not in found
        with pytest.raises(KeyError):
            found[other]


def test_for_weight() -> None:
    found = simple(**{"token_embd.weight": torch.ones(5)})
    assert found.for_weight("blk.0.attn_q.weight", (7, 3)).tolist() == [1.0, 2.0, 0.0]
    assert found.for_weight("blk.0.ffn_up_exps.weight", (2, 9, 3)).shape == (2, 3)
    assert found.for_weight("blk.1.attn_q.weight", (7, 3)) is None
    assert found.for_weight("model.embed_tokens.weight", (64, 3)) is None
    with pytest.raises(ImportanceError, match=r"3 values.*\(7, 4\) needs 4.*another model"):
        found.for_weight("blk.0.attn_q.weight", (7, 4))
    flat = Importance({"blk.0.ffn_up_exps.weight": torch.arange(6.0)})
    assert flat.for_weight("model.layers.0.mlp.experts.gate_up_proj", (2, 9, 3)).tolist() == [[0, 1, 2], [3, 4, 5]]
    assert found.unused(["blk.0.attn_q.weight"]) == ["model.layers.0.mlp.experts.gate_up_proj", "token_embd.weight"]


def test_without_the_gguf_package(monkeypatch: pytest.MonkeyPatch) -> None:
    """Names of models need no tables; names of files do, and say so."""
    monkeypatch.setitem(sys.modules, "gguf", None)
    for cached in (names.gguf_name, names._patterns):
        cached.cache_clear()
    ours = Importance({"model.layers.0.mlp.up_proj.weight": torch.ones(2)})
    assert "model.layers.0.mlp.up_proj.weight" in ours
    assert ours.for_weight("model.layers.1.mlp.up_proj.weight", (3, 2)) is None
    with pytest.raises(MissingDependencyError, match=r"iqtorch\[gguf\]"):
        Importance({"blk.0.ffn_up.weight": torch.ones(2)}).for_weight("model.layers.0.mlp.up_proj.weight", (3, 2))


# -- files -------------------------------------------------------------------------------------------------


def assert_same(found: Importance, expected: Importance) -> None:
    for name in expected:
        torch.testing.assert_close(found[name].flatten(), expected[name].flatten(), rtol=2e-7, atol=0)


@pytest.mark.parametrize("suffix", [".dat", ".gguf"])
def test_files_round_trip(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"importance{suffix}"
    expected = collect_importance(tiny_moe(), [ids(8, 32)], datasets=["some text"])
    expected.save(path)
    found = Importance.load(path)
    assert_same(found, expected)
    assert found.datasets == ("some text",)
    assert found.chunks == 8
    assert "blk.0.ffn_gate_exps.weight" in list(found)
    assert "blk.0.ffn_up_exps.weight" in list(found)
    if suffix == ".gguf":
        for name in expected:
            assert torch.equal(found.entry(name).count, expected.entry(name).count)
    assert list(tmp_path.iterdir()) == [path]
    again = tmp_path / f"again{suffix}"
    found.save(again)
    assert_same(Importance.load(again), expected)


def test_legacy_bytes(tmp_path: Path) -> None:
    """The file as FORMATS describes it, written and read by hand."""
    path = tmp_path / "a.dat"
    simple().save(path)
    raw = path.read_bytes()
    assert struct.unpack_from("<ii", raw) == (3, 19)
    assert raw[8:27] == b"blk.0.attn_q.weight"
    assert struct.unpack_from("<ii3f", raw, 27) == (2, 3, 2.0, 4.0, 0.0)  # 1024 tokens: two calls of 512
    assert raw.endswith(struct.pack("<ii", 4, 15) + b"calibration.txt")

    def entry(name: bytes, calls: int, *values: float) -> bytes:
        return struct.pack("<i", len(name)) + name + struct.pack(f"<ii{len(values)}f", calls, len(values), *values)

    old = struct.pack("<i", 2) + entry(b"blk.0.ffn_up.weight", 4, 8.0, 2.0) + entry(b"output.weight", 0, 3.0)
    path.write_bytes(old)
    found = Importance.load(path)
    assert found["model.layers.0.mlp.up_proj.weight"].tolist() == [2.0, 0.5]
    assert found["lm_head.weight"].tolist() == [3.0]
    assert (found.chunks, found.datasets) == (0, ())
    for n in range(len(old)):  # truncated anywhere
        path.write_bytes(old[:n])
        with pytest.raises(ImportanceError, match="damaged"):
            Importance.load(path)
    for bad, message in (
        (struct.pack("<i", 0) + bytes(20), "claims 0 entries"),
        (struct.pack("<i", -5) + bytes(20), "claims -5 entries"),
        (struct.pack("<i", 2**31 - 1) + bytes(20), "claims 2147483647 entries"),
        (struct.pack("<ii", 1, 2**31 - 1) + bytes(20), "needs 2147483647 bytes"),
        (struct.pack("<ii", 1, -1) + bytes(20), "needs -1 bytes"),
        (struct.pack("<i", 1) + entry(b"\xff\xfe", 1, 1.0), "name of entry 0"),
        (struct.pack("<i", 2) + 2 * entry(b"blk.0.ffn_up.weight", 1, 1.0), "there twice"),
        (struct.pack("<i", 1) + entry(b"blk.0.ffn_up.weight", 1), "empty"),
        (struct.pack("<i", 1) + entry(b"blk.0.ffn_up.weight", 1, float("nan")), "NaN"),
        (struct.pack("<i", 1) + entry(b"blk.0.ffn_up.weight", 1, -1.0), "negative"),
    ):
        path.write_bytes(bad)
        with pytest.raises(ImportanceError, match=message):
            Importance.load(path)


def test_gguf_kind_written_by_the_gguf_package(tmp_path: Path) -> None:
    path = tmp_path / "a.imatrix"  # known by its content, not by its name
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_string("general.type", "imatrix")
    writer.add_array("imatrix.datasets", ["one", "two"])
    writer.add_uint32("imatrix.chunk_count", 7)
    writer.add_tensor("blk.0.attn_q.weight.in_sum2", np.array([[4.0, 8.0]], np.float32))
    writer.add_tensor("blk.0.attn_q.weight.counts", np.array([[4.0]], np.float32))
    writer.add_tensor("blk.0.ffn_down_exps.weight.sums", np.array([[4.0, 8.0], [0.0, 0.0]], np.float32))
    writer.add_tensor("blk.0.ffn_down_exps.weight.counts", np.array([[2.0], [0.0]], np.float32))
    writer.add_tensor("blk.0.ffn_up.weight.in_sum2", np.array([[4.0, 8.0]], np.float32))
    writer.add_tensor("blk.0.ffn_up.weight.mystery", np.array([[4.0, 8.0]], np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    found = Importance.load(path)
    assert len(found) == 3
    assert found["blk.0.attn_q.weight"].tolist() == [1.0, 2.0]
    assert found["model.layers.0.mlp.experts.down_proj"].tolist() == [[2.0, 4.0], [1.0, 1.0]]
    assert found["blk.0.ffn_up.weight"].tolist() == [1.0, 1.0]  # no counts: as if never seen
    assert (found.chunks, found.chunk_size, found.datasets) == (7, 512, ("one", "two"))
    raw = path.read_bytes()
    path.write_bytes(raw.replace(b"imatrix", b"model!!", 3))
    with pytest.raises(GGUFMetadataError, match="general.type"):
        Importance.load(path)
    path.write_bytes(raw[:200])
    with pytest.raises(GGUFError, match="download it again"):
        Importance.load(path)


def test_nothing_to_save(tmp_path: Path) -> None:
    with pytest.raises(ImportanceError, match="no importance to write"):
        Importance().save(tmp_path / "x.dat")
    assert not list(tmp_path.iterdir())


# -- values ------------------------------------------------------------------------------------------------


def test_merge_equals_collecting_together() -> None:
    model = tiny_moe()
    a, b = [ids(4, 16, seed=3)], [ids(9, 16, seed=4)]
    together = collect_importance(model, a + b, datasets=["a", "b"])
    merged = collect_importance(model, a, datasets=["a"]).merge(collect_importance(model, b, datasets=["b"]))
    assert list(merged) == list(together)
    for name in together:
        assert torch.equal(merged.entry(name).count, together.entry(name).count)
        torch.testing.assert_close(merged[name], together[name], rtol=1e-5, atol=0)
    assert (merged.chunks, merged.datasets) == (13, ("a", "b"))


def test_merge_by_name_of_either_world() -> None:
    ours = Importance({"model.layers.0.mlp.up_proj.weight": torch.tensor([1.0])})
    theirs = Importance({"blk.0.ffn_up.weight": torch.tensor([3.0]), "blk.1.ffn_up.weight": torch.tensor([5.0])})
    merged = ours.merge(theirs)
    assert {name: value.tolist() for name, value in merged.items()} == {
        "model.layers.0.mlp.up_proj.weight": [2.0],
        "blk.1.ffn_up.weight": [5.0],
    }
    with pytest.raises(ImportanceError, match=r"shapes \(1,\) and \(2,\)"):
        ours.merge(Importance({"blk.0.ffn_up.weight": torch.ones(2)}))


def test_merge_refuses_another_model() -> None:
    ours, theirs = Importance({"blk.0.ffn_up.weight": torch.ones(1)}), Importance({"encoder.w": torch.ones(1)})
    with pytest.raises(ImportanceError, match=r"no weight in common, as 'blk.0.ffn_up.weight' and 'encoder.w'"):
        ours.merge(theirs)
    assert list(ours.merge(Importance())) == list(Importance().merge(ours)) == ["blk.0.ffn_up.weight"]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (torch.tensor([1.0, float("inf")]), "1 values that are NaN or Inf"),
        (torch.tensor([1.0, -1.0]), "negative"),
        (torch.ones(2, 2, 2), r"\[K\] or \[E, K\]"),
        (torch.ones(0), r"\[K\] or \[E, K\]"),
        (ImportanceEntry(torch.ones(2, 2), torch.ones(3)), "2 matrices and 3 counts"),
    ],
)
def test_bad_values(value: torch.Tensor | ImportanceEntry, message: str) -> None:
    with pytest.raises(ImportanceError, match=f"'w'.*{message}"):
        Importance({"w": value})


def test_summary() -> None:
    rows = simple().summary()
    assert rows[0] == {
        "name": "model.layers.0.self_attn.q_proj.weight", "columns": 3, "experts": None, "tokens": (1024, 1024),
        "mean": 1.0, "max": 2.0, "top_percent_share": pytest.approx(2 / 3),
    }  # fmt: skip
    assert (rows[1]["experts"], rows[1]["tokens"]) == (2, (512, 1536))


# -- importance of another model, or of a part of this one ---------------------------------------------------


def packed_with(table: object, skip: tuple[str, ...] = ()) -> nn.Module:
    return iqtorch.quantize_model(tiny_llama(tie=False), iqtorch.Recipe.pure("iq4_nl"), table, skip=("down_proj", *skip), progress=False)


def test_names_of_another_model_are_refused(tmp_path: Path) -> None:
    other = Importance({"encoder.block.0.wi.weight": torch.ones(32), "encoder.block.1.wi.weight": torch.ones(32)})
    with pytest.raises(
        ImportanceError, match=r"no entry for any of the 16 weights.*such as .*its 2 entries.*encoder\.block\.0.*another model"
    ):
        packed_with(other)
    with pytest.raises(ImportanceError, match="another model"):
        packed_with({"encoder": torch.ones(32)})
    tiny_llama(tie=False).save_pretrained(tmp_path)
    with pytest.raises(ImportanceError, match="another model"):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=iqtorch.IQConfig("iq4_nl", importance=other))


def test_lengths_of_another_model_are_refused() -> None:
    other = Importance({"blk.0.attn_q.weight": torch.ones(64)})
    with pytest.raises(ImportanceError, match=r"blk\.0\.attn_q.* has 64 values.*q_proj.*needs 32.*another model"):
        packed_with(other)


def test_part_of_the_entries_is_enough(caplog: pytest.LogCaptureFixture) -> None:
    """Missing entries never abort; the weights that get unit importance are named once."""
    part = Importance({"blk.0.attn_q.weight": torch.ones(32), "blk.0.attn_k.weight": torch.ones(32)})
    with caplog.at_level(logging.WARNING, "iqtorch"):
        model = packed_with(part)
    assert sum(isinstance(p, iqtorch.IQTensor) for p in model.parameters()) == 14
    assert "no importance for 11 of 14 weights" in caplog.text  # the embedding has none in any file
    caplog.clear()
    found = collect_importance(tiny_llama(tie=False), [ids()])
    packed_with(found)
    packed_with({name.removesuffix(".weight"): value for name, value in found.items()})
    packed_with(part, ("layers.1", "mlp", "lm_head", "[vo]_proj"))
    packed_with({name: value for name, value in found.items() if name != "lm_head.weight"})  # as the reference's program leaves it
    assert "no importance" not in caplog.text


def test_experts_of_a_file_that_saw_no_token(tmp_path: Path) -> None:
    """Unit importance for them, whichever way a file says it; nothing is NaN, and the model is packed."""
    model = tiny_moe(experts=16)
    found = collect_importance(model, [ids(1, 4)])
    for suffix in (".dat", ".gguf"):
        found.save(tmp_path / f"a{suffix}")
        again = Importance.load(tmp_path / f"a{suffix}")
        name = "model.layers.0.mlp.experts.gate_up_proj"
        unseen = found.entry(name).count == 0
        assert unseen.any()
        assert (again.for_weight(name, (16, 32, 32))[unseen] == 1).all()
    packed = iqtorch.quantize_model(model, iqtorch.Recipe.pure("iq4_nl"), again, skip=["down_proj"], progress=False)
    assert all(p.dequantize().isfinite().all() for p in packed.parameters() if isinstance(p, iqtorch.IQTensor))
