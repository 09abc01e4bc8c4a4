"""quantize, quantize_model, Recipe and report on small models made here."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import iqtorch
from iqtorch import Importance, IQTensor, Recipe, get_format, list_formats
from iqtorch.errors import ImportanceError, RecipeError, ShapeError, UnknownFormatError, UnsupportedOperationError, WeightError
from iqtorch.model import choose_format, find_sites, model_facts
from iqtorch.recipe import ModelFacts, WeightFacts, reference_mix, role_of

transformers = pytest.importorskip("transformers")


def llama(**changes: object) -> nn.Module:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        **{
            "vocab_size": 32, "hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4,
            "num_key_value_heads": 2, "max_position_embeddings": 64, "tie_word_embeddings": False, **changes,
        }
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


def gpt2() -> nn.Module:
    torch.manual_seed(0)
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=32, n_embd=256, n_inner=256, n_layer=1, n_head=4, n_positions=64)
    ).eval()


def mixtral() -> nn.Module:
    torch.manual_seed(0)
    config = transformers.MixtralConfig(
        vocab_size=32, hidden_size=256, intermediate_size=256, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2,
        num_local_experts=4, num_experts_per_tok=2, max_position_embeddings=64,
    )  # fmt: skip
    return transformers.MixtralForCausalLM(config).eval()


def bert() -> nn.Module:
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=32, hidden_size=256, intermediate_size=256, num_hidden_layers=1, num_attention_heads=4, max_position_embeddings=64
    )
    return transformers.BertModel(config).eval()


IDS = torch.tensor([[1, 5, 9, 12, 7, 3], [2, 8, 6, 4, 11, 10]])


def output(model: nn.Module) -> Tensor:
    with torch.no_grad():
        out = model(IDS)
    return out.logits if hasattr(out, "logits") else out.last_hidden_state


def dequantized(model: nn.Module) -> nn.Module:
    """The same model with plain weights: what the packed one must compute."""
    plain = copy.deepcopy(model)
    for module in plain.modules():
        for name, parameter in module._parameters.items():
            if isinstance(parameter, IQTensor):
                module._parameters[name] = nn.Parameter(parameter.dequantize(), requires_grad=False)
    return plain


@pytest.mark.parametrize("build", [llama, gpt2, mixtral, bert])
def test_packed_model_computes_what_its_dequantized_twin_does(build: Callable[[], nn.Module]) -> None:
    model = build()
    original = output(model)
    assert iqtorch.quantize_model(model, Recipe.pure("iq4_nl"), progress=False) is model
    report = iqtorch.report(model)
    assert report.packed_fraction > 0.95
    iqtorch.set_activation_precision("float")
    try:
        got, want = output(model), output(dequantized(model))
    finally:
        iqtorch.set_activation_precision("int8")
    assert (got - want).norm() <= 1e-3 * want.norm()
    assert 0 < (got - original).norm() <= 0.3 * original.norm()


@pytest.mark.parametrize("build", [llama, gpt2, mixtral])
def test_generate(build: Callable[[], nn.Module]) -> None:
    model = iqtorch.quantize_model(build(), "iq4_nl", progress=False)
    got = model.generate(IDS[:1], max_new_tokens=5, do_sample=False, pad_token_id=0)
    assert got.shape == (1, 11) and torch.equal(got[:, :6], IDS[:1])


def test_tied_weights_stay_tied_and_are_packed_once() -> None:
    model = llama(tie_word_embeddings=True)
    iqtorch.quantize_model(model, {"embed": "iq4_k"}, progress=False)
    table, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    assert table is head and isinstance(table, IQTensor) and table.format.name == "iq4_k"
    assert model.state_dict()["lm_head.weight"].packed.data_ptr() == table.packed.data_ptr()
    assert copy.deepcopy(model).lm_head.weight is not table
    again = copy.deepcopy(model)
    assert again.lm_head.weight is again.get_input_embeddings().weight
    assert sum(row.name == "lm_head.weight" for row in iqtorch.report(model).rows) == 0


def test_a_tie_to_what_cannot_be_packed_is_kept_whole() -> None:
    class Lookup(nn.Module):  # an embedding of its own kind, as in I-BERT
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(64, 256))

    for names in (("table", "head"), ("head", "table")):  # whichever comes first
        head = nn.Linear(256, 64, bias=False)
        parts = {"table": Lookup(), "head": head}
        head.weight = parts["table"].weight
        model = nn.ModuleDict({**{name: parts[name] for name in names}, "other": nn.Linear(256, 256), "empty": nn.Linear(0, 64)})
        iqtorch.quantize_model(model, "q8_0", progress=False)
        assert model["head"].weight is model["table"].weight and not isinstance(head.weight, IQTensor)
        assert isinstance(model["other"].weight, IQTensor)
        reasons = {row.name: row.reason for row in iqtorch.report(model).rows}
        assert any("tied to" in reason or "Lookup.weight" in reason for name, reason in reasons.items() if name == f"{names[0]}.weight")
        assert reasons["empty.weight"] == "empty"


def test_tied_embedding_takes_the_format_of_the_mix() -> None:
    model = llama(tie_word_embeddings=True, num_hidden_layers=1)
    (site,) = [site for site in find_sites(model)[0] if site.name == "model.embed_tokens.weight"]
    assert site.role == "tied" and len(site.places) == 2
    assert choose_format(site, Recipe.default("iq2_kl"), model_facts(model)).format == "iq4_k"


def test_default_mix_of_iq2_kl() -> None:
    model = iqtorch.quantize_model(llama(num_hidden_layers=1), "iq2_kl", progress=False)
    formats = {row.name: row.format for row in iqtorch.report(model).rows}
    layer = "model.layers.0."
    assert formats["lm_head.weight"] == "q5_k" and formats["model.embed_tokens.weight"] == "iq2_kl"
    assert formats[layer + "self_attn.v_proj.weight"] == "iq4_ks" and formats[layer + "self_attn.q_proj.weight"] == "iq2_kl"
    assert formats[layer + "mlp.down_proj.weight"] == "iq2_kl" and formats[layer + "input_layernorm.weight"] == "float32"
    assert type(model.lm_head) is iqtorch.Linear and isinstance(model.lm_head, nn.Linear) and "q5_k" in repr(model.lm_head)
    assert type(model.get_input_embeddings()) is iqtorch.Embedding


def test_pure_recipe_and_dict_and_skip() -> None:
    model = iqtorch.quantize_model(llama(), Recipe.pure("q5_0"), skip=[r"lm_head"], progress=False)
    rows = {row.name: row for row in iqtorch.report(model).rows}
    assert {row.format for row in rows.values() if row.packed} == {"q5_0"}
    assert rows["lm_head.weight"].format == "float32" and rows["lm_head.weight"].reason == "skipped by the caller"
    model = iqtorch.quantize_model(llama(), {r"q_proj": "q8_0", r"_proj": "q4_0", r"embed": None}, progress=False)
    rows = {row.name: row for row in iqtorch.report(model).rows}
    assert rows["model.layers.1.self_attn.q_proj.weight"].format == "q8_0"
    assert rows["model.layers.1.mlp.up_proj.weight"].format == "q4_0"
    assert not rows["model.embed_tokens.weight"].packed and rows["lm_head.weight"].reason == "no rule names it"
    # a second call packs what the first kept, and leaves the rest
    iqtorch.quantize_model(model, Recipe.pure("iq4_nl"), progress=False)
    rows = {row.name: row for row in iqtorch.report(model).rows}
    assert rows["lm_head.weight"].format == "iq4_nl" and rows["model.layers.1.mlp.up_proj.weight"].format == "q4_0"


def test_rows_that_do_not_fit_take_the_fallback_or_are_kept_and_report_says_so() -> None:
    model = nn.ModuleDict(
        {"a": nn.Linear(96, 8), "b": nn.Linear(256, 8), "c": nn.Linear(40, 8), "norm": nn.LayerNorm(8), "conv": nn.Conv1d(32, 32, 3)}
    )
    iqtorch.quantize_model(model, "iq2_kl", progress=False)
    rows = {row.name: row for row in iqtorch.report(model).rows}
    assert rows["a.weight"].format == "iq4_nl" and "substituted for iq2_kl" in rows["a.weight"].reason
    assert rows["b.weight"].format == "iq2_kl"
    assert not rows["c.weight"].packed and "no multiple of 32" in rows["c.weight"].reason
    assert not rows["norm.weight"].packed and not rows["a.bias"].packed and not rows["conv.weight"].packed
    text = str(iqtorch.report(model))
    assert "substituted" in text and "bits per weight" in text


@pytest.mark.parametrize("name", list_formats())
def test_quantize_every_format(name: str) -> None:
    torch.manual_seed(0)
    fmt = get_format(name)
    w = torch.randn(8, fmt.block_size) * 0.02
    q = iqtorch.quantize(w, name)
    assert q.format.name == (fmt.plain or name) and q.shape == w.shape and q.dtype == w.dtype
    # b bits for the codes and signs of a weight leave an error of about 2^-b on Gaussian weights (mxfp4, with scales that
    # are powers of two, twice that); the encoders' own tests compare with the reference
    bits = (fmt.fields["code"].width / fmt.vec) + (0 if "sign" not in fmt.fields else 1)
    assert (q.dequantize() - w).norm() < 2.2 * 2**-bits * w.norm()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_quantize_keeps_dtype_and_takes_any_float(dtype: torch.dtype) -> None:
    q = iqtorch.quantize(torch.randn(4, 256).to(dtype), "iq4_k")
    assert q.dtype == (torch.float32 if dtype == torch.float64 else dtype)


def test_quantize_experts_with_importance_of_each() -> None:
    torch.manual_seed(0)
    w = torch.randn(2, 8, 256)
    importance = torch.rand(2, 256) + 0.01
    q = iqtorch.quantize(w, "iq2_kl", importance)
    assert q.shape == w.shape
    for e in range(2):
        assert torch.equal(q[e].to_blocks(), iqtorch.quantize(w[e], "iq2_kl", importance[e]).to_blocks())


def test_more_effort_is_never_worse() -> None:
    torch.manual_seed(0)
    w = torch.randn(16, 256)
    fast, best = (iqtorch.quantize(w, "iq3_k", objective="rmse", speed=speed).dequantize() for speed in ("fast", "best"))
    assert (best - w).norm() < (fast - w).norm()


def test_importance_lowers_the_weighted_error() -> None:
    torch.manual_seed(0)
    w = torch.randn(16, 256)
    importance = torch.exp(1.5 * torch.randn(256))

    def error(q: IQTensor) -> float:
        return float((importance * (q.dequantize() - w) ** 2).sum())

    assert error(iqtorch.quantize(w, "iq2_kl", importance, "rmse")) < 0.9 * error(iqtorch.quantize(w, "iq2_kl", None, "rmse"))


# -- bad input ----------------------------------------------------------------------------------------------------


def test_bad_weights() -> None:
    for bad in (
        torch.ones(4, 256, dtype=torch.int32),
        torch.ones(4, 256, dtype=torch.complex64),
        torch.ones(4, 256, device="meta"),
        [[1.0]],
    ):
        with pytest.raises(WeightError, match="'weight'"):
            iqtorch.quantize(bad, "iq4_k")
    for shape in ((256,), (4, 0), (0, 256), (1, 2, 3, 256)):
        with pytest.raises(ShapeError):
            iqtorch.quantize(torch.ones(shape), "iq4_k")
    with pytest.raises(ShapeError, match="384.*q5_0"):
        iqtorch.quantize(torch.ones(4, 384), "iq4_k")
    for value in (torch.nan, torch.inf):
        w = torch.zeros(4, 256)
        w[2, 7] = value
        with pytest.raises(WeightError, match=r"\(2, 7\)"):
            iqtorch.quantize(w, "iq4_k")
    with pytest.raises(WeightError, match="packed already"):
        iqtorch.quantize(iqtorch.quantize(torch.ones(4, 256), "iq4_k"), "iq4_k")
    with pytest.raises(UnknownFormatError, match="did you mean.*iq4_k"):
        iqtorch.quantize(torch.ones(4, 256), "iq4k")
    with pytest.raises(ValueError, match="speed must be one of"):
        iqtorch.quantize(torch.ones(4, 256), "iq4_k", speed="slow")
    with pytest.raises(ValueError, match="objective"):
        iqtorch.quantize(torch.ones(4, 256), "iq4_k", objective="best")


def test_bad_importance() -> None:
    w = torch.ones(4, 256)
    for bad in (torch.ones(255), torch.ones(4, 256), -torch.ones(256), torch.full((256,), torch.nan), torch.full((256,), torch.inf)):
        with pytest.raises(ImportanceError, match="importance of 'weight'"):
            iqtorch.quantize(w, "iq4_k", bad)


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"recipe": "iq2_k1"}, UnknownFormatError),
        ({"recipe": {"proj": "iq9"}}, RecipeError),
        ({"recipe": {"(": "iq4_k"}}, RecipeError),
        ({"recipe": "iq4_k", "importance": {"model.layers.1.mlp.up_proj.weight": torch.ones(3)}}, ImportanceError),
        ({"recipe": "iq4_k", "objective": "speed"}, ValueError),
        ({"recipe": "iq4_k", "speed": "slow"}, ValueError),
    ],
)
def test_model_is_left_as_it_was_on_error(arguments: dict[str, object], error: type[Exception]) -> None:
    model = llama()
    before = dict(model.named_parameters())
    with pytest.raises(error):
        iqtorch.quantize_model(model, progress=False, **arguments)
    assert all(before[name] is parameter for name, parameter in model.named_parameters())


def test_nan_names_the_tensor_and_nothing_changes() -> None:
    model = llama()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 4] = torch.nan
    with pytest.raises(WeightError, match=r"model.layers.1.mlp.up_proj.weight.*\(3, 4\)"):
        iqtorch.quantize_model(model, "iq2_kl", progress=False)
    assert not any(isinstance(p, IQTensor) for p in model.parameters())


def test_interrupted_packing_leaves_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    model = llama()
    calls = iter([0, 1])

    def fail(*args: object, **kwargs: object) -> IQTensor:
        if next(calls) == 1:
            raise KeyboardInterrupt
        return iqtorch.quantize(torch.ones(4, 256), "q4_0")

    monkeypatch.setattr("iqtorch.model.quantize", fail)
    with pytest.raises(KeyboardInterrupt):
        iqtorch.quantize_model(model, "iq2_kl", progress=False)
    assert not any(isinstance(p, IQTensor) for p in model.parameters())


def test_not_a_module() -> None:
    with pytest.raises(TypeError, match="iqtorch.quantize packs a single tensor"):
        iqtorch.quantize_model(torch.ones(4, 256), "iq4_k")


def test_rule_without_match_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    iqtorch.quantize_model(nn.Sequential(nn.Linear(256, 4)), Recipe.default("iq4_k").with_rules({"nothing": "q8_0"}), progress=False)
    assert "'nothing' matches no weight" in caplog.text


# -- recipes ------------------------------------------------------------------------------------------------------


def test_roles() -> None:
    expected = {
        "lm_head.weight": "output",
        "model.layers.3.self_attn.q_proj.weight": "attn_q",
        "model.layers.3.self_attn.v_proj.weight": "attn_v",
        "model.layers.3.self_attn.o_proj.weight": "attn_output",
        "model.layers.3.self_attn.qkv_proj.weight": "attn_qkv",
        "transformer.h.0.attn.c_attn.weight": "attn_qkv",
        "transformer.h.0.attn.c_proj.weight": "attn_output",
        "transformer.h.0.mlp.c_proj.weight": "ffn_down",
        "model.layers.0.mlp.experts.down_proj": "ffn_down",
        "model.layers.0.mlp.experts.gate_up_proj": "ffn_gate",
        "encoder.layer.0.attention.self.value.weight": "attn_v",
        "encoder.layer.0.attention.output.dense.weight": "attn_output",
        "encoder.layer.0.output.dense.weight": "ffn_down",
        "something.weight": "other",
    }
    assert {name: role_of(name) for name in expected} == expected


@pytest.mark.parametrize(
    ("base", "weight", "model", "expected"),
    [
        ("iq2_kl", WeightFacts("w", "attn_v"), ModelFacts(8, 4), "iq4_ks"),
        ("iq2_kl", WeightFacts("w", "attn_v"), ModelFacts(8, 1), "iq2_kl"),
        ("iq2_kl", WeightFacts("w", "attn_v"), ModelFacts(8, 4, 8), "q8_0"),
        ("iq2_kl", WeightFacts("w", "attn_output"), ModelFacts(8, 4, 8), "iq4_ks"),
        ("iq2_ks", WeightFacts("w", "attn_v"), ModelFacts(8, 1), "q2_k"),
        ("iq2_ks", WeightFacts("w", "attn_v"), ModelFacts(8, 1, 2), "iq3_k"),
        ("iq2_ks", WeightFacts("w", "attn_k"), ModelFacts(8, 4, 8), "q4_k"),
        ("iq2_ks", WeightFacts("w", "ffn_down", 0), ModelFacts(8, 4), "q2_k"),
        ("iq2_ks", WeightFacts("w", "ffn_down", 1), ModelFacts(8, 4), "iq2_ks"),
        ("iq2_kt", WeightFacts("w", "ffn_up", 0), ModelFacts(8, 4, 8), "iq3_k"),
        ("iq2_kt", WeightFacts("w", "ffn_down", 3, shared_expert=True), ModelFacts(8, 4, 8), "iq4_k"),
        ("iq3_kt", WeightFacts("w", "ffn_down", 0), ModelFacts(8, 4), "iq4_k"),
        ("iq3_kt", WeightFacts("w", "ffn_down", 3), ModelFacts(8, 4), "iq3_k"),
        ("iq3_kt", WeightFacts("w", "ffn_down", 3), ModelFacts(8, 4, has_importance=True), "iq3_kt"),
        ("iq3_kt", WeightFacts("w", "embedding"), ModelFacts(8, 4), "iq3_s"),
        ("iq4_k", WeightFacts("w", "output"), ModelFacts(8, 4), "q6_k"),
        ("iq2_k", WeightFacts("w", "output"), ModelFacts(8, 4), "q5_k"),
        ("iq2_k", WeightFacts("w", "tied"), ModelFacts(8, 4), "iq4_k"),
        ("iq4_ks", WeightFacts("w", "output"), ModelFacts(8, 4), "q6_k"),
        ("q8_0", WeightFacts("w", "output"), ModelFacts(8, 4), "q8_0"),
    ],
)
def test_reference_mix(base: str, weight: WeightFacts, model: ModelFacts, expected: str) -> None:
    assert reference_mix(base, weight, model) == expected


def test_facts_of_models() -> None:
    assert model_facts(llama()) == ModelFacts(2, 2, 0)
    assert model_facts(mixtral()) == ModelFacts(1, 2, 4)
    assert model_facts(nn.Linear(4, 4)) == ModelFacts()


def test_routers_norms_and_position_tables_are_kept() -> None:
    for model, kept in ((mixtral(), "gate.weight"), (gpt2(), "wpe.weight"), (bert(), "position_embeddings.weight")):
        sites, notes = find_sites(model)
        assert any(name.endswith(kept) for name in notes), notes
        assert not any(site.name.endswith(kept) for site in sites)
        assert all(site.weight.dim() >= 2 for site in sites)


def test_layers_from_float() -> None:
    torch.manual_seed(0)
    linear = nn.Linear(256, 8)
    packed = iqtorch.Linear.from_float(linear, "iq6_k")
    x = torch.randn(3, 256)
    assert (packed(x) - linear(x)).norm() < 0.05 * linear(x).norm()
    assert packed.bias is linear.bias and isinstance(packed, nn.Linear)
    table = nn.Embedding(16, 256, padding_idx=3)
    small = iqtorch.Embedding.from_float(table, "iq6_k")
    assert small.padding_idx == 3 and (small(IDS) - table(IDS)).norm() < 0.05 * table(IDS).norm()
    conv, x = nn.Conv1d(256, 8, 1, stride=2), torch.randn(2, 256, 5)
    made = iqtorch.Conv1d.from_float(conv, "iq6_k", speed="fast")
    conv.weight = nn.Parameter(made.weight.dequantize().unsqueeze(-1))
    assert made.bias is conv.bias and made.stride == (2,) and (made(x) - conv(x)).norm() <= 0.02 * conv(x).norm()
    with pytest.raises(UnsupportedOperationError, match="kernel_size=1"):
        iqtorch.Conv1d.from_float(nn.Conv1d(256, 8, 3), "iq6_k")


@pytest.mark.parametrize("stride", [1, 2])
def test_pointwise_convolutions_are_packed(stride: int) -> None:
    torch.manual_seed(0)
    layers = [
        nn.Conv1d(64, 96, 1, stride=stride, padding="valid" if stride == 1 else 0),
        nn.Conv1d(96, 32, 1, bias=False, dilation=3),
        nn.Conv1d(32, 32, 1, groups=2),
        nn.Conv1d(32, 32, 1, padding=1),
        nn.Conv1d(32, 32, 3),
    ]
    model = nn.Sequential(*layers)
    x = torch.randn(2, 64, 13)
    importance = iqtorch.collect_importance(model, [{"input": x}])
    assert torch.allclose(importance["0.weight"], x.square().mean((0, 2)), rtol=1e-4)
    iqtorch.set_backend("torch")
    try:
        iqtorch.quantize_model(model, "q8_0", importance=importance, skip=[r"^[234]\."], progress=False)
        assert [type(m) for m in model] == [iqtorch.Conv1d, iqtorch.Conv1d, nn.Conv1d, nn.Conv1d, nn.Conv1d]
        assert model[0].weight.shape == (96, 64)
        plain = [nn.Conv1d(64, 96, 1, stride=stride), nn.Conv1d(96, 32, 1, bias=False)]
        for layer, packed in zip(plain, model):
            layer.weight = nn.Parameter(packed.weight.dequantize().unsqueeze(-1))
        plain[0].bias = model[0].bias
        x.requires_grad_()
        got = nn.Sequential(*model[:2])(x)
        (gradient,) = torch.autograd.grad(got.square().sum(), x)
        want = nn.Sequential(*plain)(x)
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(gradient, torch.autograd.grad(want.square().sum(), x)[0], rtol=1e-4, atol=1e-4)
        assert model(torch.randn(64, 13)).shape == model(torch.randn(1, 64, 13)).shape[1:]  # unbatched
    finally:
        iqtorch.set_backend(None)


def test_convolutions_that_are_no_linear_layer_say_why() -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.Conv1d(32, 32, 1, groups=2), nn.Conv1d(32, 32, 1, padding=1), nn.Conv1d(32, 32, 3))
    with pytest.warns(UserWarning, match="are packed"):
        iqtorch.quantize_model(model, "q8_0", progress=False)
    reasons = {row.name: row.reason for row in iqtorch.report(model).rows}
    assert "groups 2" in reasons["1.weight"] and "padding (1,)" in reasons["2.weight"] and "Conv1d" in reasons["3.weight"]
    assert [type(m) for m in model[1:]] == [nn.Conv1d] * 3


def test_a_second_call_packs_the_rest_and_says_if_there_is_none(caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(256, 64, bias=False), nn.Linear(64, 32, bias=False))
    Importance({"0.weight": torch.ones(256), "1.weight": torch.ones(64)}).save(tmp_path / "imatrix.dat")
    iqtorch.quantize_model(model, {"^0": "iq4_k"}, progress=False)
    iqtorch.quantize_model(model, Recipe.pure("q8_0"), tmp_path / "imatrix.dat", progress=False)
    assert [(row.format, row.reason) for row in iqtorch.report(model).rows] == [("iq4_k", "rule '^0'"), ("q8_0", "base format")]
    assert "packed already" not in caplog.text
    iqtorch.quantize_model(model, "iq3_k", progress=False)
    assert "nothing is packed now: 2 weights are packed already" in caplog.text
    for importance in (5, [1.0]):
        with pytest.raises(ImportanceError, match="mapping, an Importance or a file path"):
            iqtorch.quantize_model(model, "iq3_k", importance)
