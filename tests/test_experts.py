"""Mixtures of experts: the grouped implementation, and every architecture of the installed transformers that has experts."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

import iqtorch
from iqtorch import IQTensor, Recipe, derivatives, experts
from iqtorch.experts import experts_forward
from iqtorch.model import plan_formats
from iqtorch.tensor_ops import grouped_linear

transformers = pytest.importorskip("transformers")

from test_model import dequantized  # noqa: E402
from tiny_models import tiny_config, tiny_model  # noqa: E402
from transformers.models.auto.configuration_auto import CONFIG_MAPPING  # noqa: E402

IDS = torch.tensor([[5, 9, 12, 7, 3, 4], [8, 6, 4, 11, 10, 9]])


@pytest.fixture(autouse=True)
def plain_torch() -> object:
    """Kernels may round activations (to bfloat16 in large batches); here the arithmetic around them is tested."""
    iqtorch.set_backend("torch")
    yield
    iqtorch.set_backend(None)


def expert_layer(gate: bool, bias: bool, transposed: bool, norm: bool, keep_down: bool = False) -> SimpleNamespace:
    """What transformers hands to an experts implementation, with packed weights."""
    torch.manual_seed(0)
    e, h, i = 5, 64, 96
    layer = SimpleNamespace(num_experts=e, has_gate=gate, has_bias=bias, is_transposed=transposed, has_post_expert_norm=norm)
    layer.act_fn = nn.functional.silu
    layer._apply_gate = lambda x: nn.functional.silu(x.chunk(2, -1)[0]) * x.chunk(2, -1)[1]
    layer.post_expert_norm = nn.LayerNorm(h)
    for name, n, k in (("gate_up_proj" if gate else "up_proj", 2 * i if gate else i, h), ("down_proj", h, i)):
        weight = iqtorch.quantize(torch.randn(e, n, k) / k**0.5, "q8_0")
        if keep_down and name == "down_proj":
            weight = weight.dequantize()
        setattr(layer, name, weight.mT if transposed else weight)
        setattr(layer, f"{name}_bias", torch.randn(e, n))
    return layer


def one_by_one(layer: SimpleNamespace, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    """The same with dequantized weights in float64, one token and expert at a time."""

    def project(v: Tensor, name: str, expert: int) -> Tensor:
        w = getattr(layer, name)
        w = (w.dequantize() if isinstance(w, IQTensor) else w)[expert].double()
        y = v @ (w if layer.is_transposed else w.T)
        return y + getattr(layer, f"{name}_bias")[expert] if layer.has_bias else y

    out = []
    for token in range(len(x)):
        total = torch.zeros(x.shape[-1], dtype=torch.float64)
        for expert, weight in zip(index[token].tolist(), weights[token], strict=True):
            if expert >= layer.num_experts:
                continue
            v = x[token].double()
            v = layer._apply_gate(project(v, "gate_up_proj", expert)) if layer.has_gate else layer.act_fn(project(v, "up_proj", expert))
            v = project(v, "down_proj", expert)
            if layer.has_post_expert_norm:
                v = layer.post_expert_norm(v.float()).double()
            total = total + v * weight
        out.append(total)
    return torch.stack(out) if out else x.double()


@pytest.mark.parametrize("tokens", [1, 7, 40, 0])
@pytest.mark.parametrize(
    "flags",
    [(True, False, False, False), (True, True, True, False), (False, False, False, False), (True, False, False, True),
     (True, True, False, False, True), (True, True, True, False, True)],
)  # fmt: skip
def test_grouped_experts_equal_one_token_at_a_time(flags: tuple[bool, ...], tokens: int) -> None:
    layer = expert_layer(*flags)
    x = torch.randn(tokens, 64)
    index = torch.rand(tokens, 6).argsort(1)[:, :2]  # expert 5 of 0..4: none
    index[: tokens // 2, 0] = 3  # crowded
    weights = torch.rand(tokens, 2)
    got, want = experts_forward(layer, x, index, weights), one_by_one(layer, x, index, weights)
    assert got.shape == x.shape and got.dtype == x.dtype
    assert (got - want).norm() <= 1e-5 * want.norm()


@pytest.mark.parametrize("tokens", [1, 40])
def test_grouped_experts_on_the_kernels_of_this_machine(tokens: int) -> None:
    iqtorch.set_backend(None)
    layer = expert_layer(True, True, True, False)
    x, index, weights = torch.randn(tokens, 64), torch.rand(tokens, 5).argsort(1)[:, :2], torch.rand(tokens, 2)
    got, want = experts_forward(layer, x, index, weights), one_by_one(layer, x, index, weights)
    assert (got - want).norm() <= 0.02 * want.norm()


def test_experts_without_an_activation_of_their_own_are_no_case_for_fused_kernels() -> None:
    """GPT-OSS has its gate in `_apply_gate`, and no `act_fn`."""
    layer = expert_layer(True, True, True, False)
    del layer.act_fn
    for name in ("gate_up_proj", "down_proj"):
        w = getattr(layer, name)
        setattr(layer, name, IQTensor(w.packed, w.format, "triton", w.shape, w.dtype, w.transposed))
    assert experts._fused(layer, torch.randn(2, 64), torch.tensor([[0, 1], [2, 3]]), torch.rand(2, 2)) is None


def test_experts_of_dbrx_which_lie_flat() -> None:
    from transformers.models.dbrx.modeling_dbrx import DbrxExperts

    torch.manual_seed(0)
    config = SimpleNamespace(hidden_size=64, ffn_hidden_size=96, moe_num_experts=4, ffn_act_fn={"name": "silu"})
    model = DbrxExperts(config)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1)
    x, index, weights = torch.randn(7, 64), torch.rand(7, 4).argsort(1)[:, :2], torch.rand(7, 2)
    iqtorch.quantize_model(model, Recipe.pure("q8_0"), progress=False)
    assert iqtorch.report(model).packed_fraction == 1 and model.mlp.w1.shape == (4, 96, 64)
    iqtorch.set_fallback("error")
    try:
        got = model(x, index, weights)
    finally:
        iqtorch.set_fallback("warn")
    for name in ("w1", "v1", "w2"):
        setattr(model.mlp, name, nn.Parameter(getattr(model.mlp, name).dequantize().reshape(-1, 64)))
    want = model(x, index, weights)
    assert want.norm() > 0 and (got - want).norm() <= 1e-5 * want.norm()


@pytest.mark.skipif(not hasattr(nn.functional, "grouped_mm"), reason="this PyTorch has no grouped_mm")
@pytest.mark.parametrize("step", [1, 2, 5])
def test_gradients_of_experts_without_the_host(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """As GPUs take them: slices of experts, experts without rows, rows behind the last; and under fake tensors nothing is read."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    rows, k, ends = 64, 96, torch.tensor([2, 2, 7, 8, 11], dtype=torch.int32)
    w = iqtorch.quantize(torch.randn(5, rows, k) / 8, "q8_0")
    monkeypatch.setattr(derivatives, "DENSE_WEIGHTS", step * rows * k)
    g = torch.randn(13, rows, dtype=torch.bfloat16)
    wanted = torch.zeros(13, k)
    for expert, (a, b) in enumerate(zip([0, *ends.tolist()], ends.tolist(), strict=False)):
        wanted[a:b] = g[a:b].float() @ w.dequantize()[expert].float()
    found = derivatives.grouped_transposed(g, w.packed, ends, w.format, w.backend, rows, k)
    torch.testing.assert_close(found.float(), wanted, rtol=0.02, atol=0.02)
    assert not found[11:].any()
    with FakeTensorMode() as mode:
        fake = [mode.from_tensor(t) for t in (g, w.packed, ends)]
        assert derivatives.grouped_transposed(*fake, w.format, w.backend, rows, k).shape == (13, k)


@pytest.mark.skipif(not hasattr(nn.functional, "grouped_mm"), reason="this PyTorch has no grouped_mm")
@pytest.mark.parametrize("tokens", [7, 1])
@pytest.mark.parametrize("rows", [64, 30])
def test_gradients_of_experts_of_any_strides(rows: int, tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gradients as sums, concatenations, transpositions and slices leave them, on the way of GPUs."""
    monkeypatch.setattr(derivatives, "grouped_mm_stays_on", lambda device: True)
    w = iqtorch.quantize(torch.randn(3, rows, 96) / 8, "q8_0")
    dense, ends = w.dequantize().float(), torch.tensor([0, tokens // 2, tokens])
    for use in (
        lambda y: y.sum(),
        lambda y: torch.cat([y, torch.ones(tokens, 3)], 1).sin().sum(),
        lambda y: y.T.contiguous().sin().sum(),
        lambda y: torch.cat([torch.ones(3), y.flatten()]).sin().sum(),
        lambda y: (y.clone() ** 2).sum(),
    ):
        x = torch.randn(tokens, 96, dtype=torch.bfloat16, requires_grad=True)
        y = grouped_linear(x, w, ends)
        y.retain_grad()
        use(y).backward()
        want = torch.cat([y.grad[: tokens // 2].float() @ dense[1], y.grad[tokens // 2 :].float() @ dense[2]])
        torch.testing.assert_close(x.grad.float(), want, rtol=0.02, atol=0.02)


@pytest.mark.skipif(not hasattr(nn.functional, "grouped_mm"), reason="this PyTorch has no grouped_mm")
@pytest.mark.parametrize("step", [1, 2])
def test_gradients_of_experts_bound_their_dense_copy(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.utils._python_dispatch import TorchDispatchMode

    made = []

    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            out = func(*args, **(kwargs or {}))
            if isinstance(out, Tensor) and out.dtype == torch.bfloat16 and out.dim() == 3:
                made.append(len(out))
            return out

    w = iqtorch.quantize(torch.randn(5, 64, 96), "q8_0")
    monkeypatch.setattr(derivatives, "DENSE_WEIGHTS", step * 64 * 96)
    g, ends = torch.randn(9, 64, dtype=torch.bfloat16), torch.tensor([1, 3, 4, 6, 9], dtype=torch.int32)
    with Record():
        derivatives.grouped_transposed(g, w.packed, ends, w.format, w.backend, 64, 96)
    assert made == {1: [1, 2, 2, 2, 2], 2: [2, 3, 2]}[step]


@pytest.mark.skipif(not hasattr(nn.functional, "grouped_mm"), reason="this PyTorch has no grouped_mm")
def test_cards_whose_products_of_groups_stay_on_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    def stays(card: tuple[int, int], version: str) -> bool:
        card_properties = SimpleNamespace(major=card[0], minor=card[1])
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: card_properties)
        monkeypatch.setattr(torch, "__version__", torch.torch_version.TorchVersion(version))
        return derivatives.grouped_mm_stays_on(torch.device("cuda"))

    assert not derivatives.grouped_mm_stays_on(torch.device("cpu"))
    assert [stays(card, "2.13.0") for card in ((8, 0), (9, 0), (10, 0), (10, 3), (12, 0))] == [False, True, True, False, False]
    assert [stays(card, "2.9.1") for card in ((9, 0), (10, 0))] == [True, False]


def test_gradients_of_grouped_experts() -> None:
    layer = expert_layer(True, True, False, False)
    plain = copy.copy(layer)
    plain.gate_up_proj, plain.down_proj = layer.gate_up_proj.dequantize(), layer.down_proj.dequantize()
    index = torch.tensor([[0, 2], [2, 5], [4, 2], [3, 1]])
    gradients = []
    for one in (layer, plain):
        torch.manual_seed(1)
        x, weights = torch.randn(4, 64, requires_grad=True), torch.rand(4, 2).requires_grad_()
        one.gate_up_proj_bias = one.gate_up_proj_bias.detach().clone().requires_grad_()
        (experts_forward(one, x, index, weights) ** 2).sum().backward()
        gradients.append((x.grad, weights.grad, one.gate_up_proj_bias.grad))
    for got, want in zip(*gradients, strict=True):
        assert want.norm() > 0 and (got - want).norm() <= 1e-5 * want.norm()


def test_rows_past_the_last_expert_are_zero() -> None:
    w = iqtorch.quantize(torch.randn(2, 8, 32), "q8_0")
    y = grouped_linear(torch.randn(5, 32), w, torch.tensor([1, 3]))
    assert y[:3].abs().sum() > 0 and torch.equal(y[3:], torch.zeros(2, 8))


def run(model: nn.Module) -> Tensor:
    kwargs = {"decoder_input_ids": IDS} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        out = model(input_ids=IDS, **kwargs)
    return out.logits if hasattr(out, "logits") else out[0]


#: Standard layout, transposed with biases, without gate, bmm.
DEFAULT = ["qwen3_moe", "gpt_oss", "nemotron_h", "llama4_text"]
SLOW = [
    "switch_transformers", "afmoe", "aria_text", "axk1", "bailing_hybrid", "beam", "cohere2_moe", "deepseek_v2", "deepseek_v3",
    "deepseek_v32", "dots3_note_text", "ernie4_5_moe", "exaone_moe", "flex_olmo", "glm4_moe", "glm4_moe_lite", "glm_moe_dsa",
    "granitemoe", "granitemoe_swa", "granitemoehybrid", "granitemoeshared", "hunyuan_v1_moe", "hy_v3", "inkling2_text",
    "inkling_text", "jetmoe", "kimi_linear", "kolibri1", "laguna", "lfm2_moe", "mellum", "mimo_v2_flash", "minimax", "minimax_m2",
    "minimax_m3_vl_text", "mistral4", "mistral_large4_text", "mixtral", "muse_spark_text", "olmoe", "openai_privacy_filter",
    "phimoe", "qwen2_moe", "qwen3_5_moe_text", "qwen3_next", "qwen3_vl_moe_text", "solar_open",
]  # fmt: skip
#: Auto class of the types that are no causal language model.
AUTO = {
    "switch_transformers": "AutoModelForSeq2SeqLM", "openai_privacy_filter": "AutoModelForTokenClassification",
    "qwen3_vl_moe_text": "AutoModel", "mistral_large4_text": "AutoModel", "muse_spark_text": "AutoModel",
    "mistral4": "AutoModelForImageTextToText",
}  # fmt: skip


@pytest.mark.parametrize("model_type", [*DEFAULT, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)])
def test_every_architecture_with_experts(model_type: str, tmp_path: Path) -> None:
    model = tiny_model(model_type, AUTO.get(model_type, "AutoModelForCausalLM"))
    iqtorch.quantize_model(model, Recipe.pure("q8_0"), progress=False)
    report = iqtorch.report(model)
    assert report.packed_fraction >= 0.99
    assert not any(row.matrix for row in report.rows if re.search(r"bias$|norm\.weight$", row.name))
    got = run(model)
    plain = dequantized(model)
    if getattr(plain.config, "_experts_implementation", None) == "iqtorch":
        plain.set_experts_implementation("eager")  # transformers' own loop over experts
    want = run(plain)
    assert (got - want).norm() <= 1e-4 * want.norm()
    model.save_pretrained(tmp_path)
    loaded, info = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    assert torch.equal(run(loaded), got)
    if model.can_generate() and not model.config.is_encoder_decoder:
        generated = loaded.generate(IDS, max_new_tokens=2, min_new_tokens=2, do_sample=False)
        assert generated.shape == (2, 8)


def expert_architectures() -> list[str]:
    """Types whose modeling file has 3-D experts: it uses transformers' decorator, or classes named so."""
    found = []
    folder = Path(transformers.__file__).parent / "models"
    for model_type, config in CONFIG_MAPPING.items():
        file = folder / config.__module__.split(".")[-2] / f"modeling_{config.__module__.split('.')[-2]}.py"
        if file.exists() and re.search(r"@use_experts_implementation|class \w*Experts\(", file.read_text()):
            found.append(model_type)
    return found


@pytest.mark.slow
def test_default_configs_of_all_architectures_with_experts_are_packed_to_99_percent() -> None:
    """At their full size, on the meta device: what the recipe makes of every weight whose rows any format can hold."""
    seen, short = [], {}
    for model_type in expert_architectures():
        model = None
        for auto in ("AutoModelForCausalLM", "AutoModelForImageTextToText", "AutoModelForSeq2SeqLM", "AutoModelForTokenClassification"):
            try:
                with torch.device("meta"):
                    model = getattr(transformers, auto).from_config(CONFIG_MAPPING[model_type]())
                break
            except Exception:  # a config class of a part, or one that cannot be built from its defaults
                continue
        if model is None:
            continue
        choices, notes = plan_formats(model, Recipe.pure("iq2_kl"))
        odd = {name for name, reason in notes.items() if "no multiple of 32" in reason}  # 1407 in a default config, for example
        matrices = sum(p.numel() for name, p in model.named_parameters() if p.dim() > 1 and name not in odd)
        fraction = sum(site.weight.numel() for site, choice in choices if choice.format) / matrices
        seen.append(model_type)
        if fraction < 0.99:
            short[model_type] = round(fraction, 4)
    assert len(seen) >= 40 and not short, (len(seen), short)


def expert_classes() -> set[str]:
    """Every class of the installed modeling files with parameters of more than two dimensions, one of them the number of experts."""
    found = set()
    for file in (Path(transformers.__file__).parent / "models").glob("*/modeling_*.py"):
        for name, body in re.findall(r"^class (\w+)\(.*?\):\n(.*?)(?=^\S)", file.read_text() + "\nend", re.DOTALL | re.MULTILINE):
            sizes = re.findall(r"nn\.Parameter\(\s*torch\.\w+\(((?:[^()]|\([^()]*\))*)\)", body)
            if any("expert" in size and re.sub(r"dtype=.*", "", size).strip(" ,()").count(",") >= 2 for size in sizes):
                found.add(name)
    return found


@pytest.mark.slow
def test_every_class_of_experts_in_the_modeling_files_is_packed() -> None:
    """On the meta device, whatever auto class makes it: no class of experts is missed, and none of its 3-D weights is kept."""
    packed, kept = set(), {}
    for model_type in expert_architectures():
        for make in (tiny_config, lambda name: CONFIG_MAPPING[name]()):
            for auto in ("AutoModelForCausalLM", "AutoModelForImageTextToText", "AutoModelForSeq2SeqLM", "AutoModel"):
                try:
                    with torch.device("meta"):
                        model = getattr(transformers, auto).from_config(make(model_type))
                except Exception:  # a config class of a part, or one that cannot be built so
                    continue
                names = {id(site.weight) for site, choice in plan_formats(model, Recipe.pure("q8_0"))[0] if choice.format}
                for module in model.modules():
                    for name, parameter in module._parameters.items():
                        if (
                            parameter is not None
                            and parameter.dim() == 3
                            and parameter.shape[-1] % 32 == 0
                            and parameter.shape[-2] % 32 == 0
                        ):
                            if id(parameter) in names:
                                packed.add(type(module).__name__)
                            elif "xpert" in type(module).__name__:
                                kept[f"{type(module).__name__}.{name}"] = tuple(parameter.shape)
                break
    # No default config makes these; their weights are `gate_up_proj` and `down_proj` [E, N, K] like those of the others.
    missed = expert_classes() - packed - {"DeepseekOcr2TextExperts", "Gemma4TextExperts", "Qwen3OmniMoeTalkerTextExperts"}
    assert len(packed) >= 40 and not missed and not kept, (len(packed), missed, kept)


def test_dbrx_quantizes_runs_saves_and_loads(tmp_path: Path) -> None:
    """A whole model of DBRX, whose experts lie flat."""
    torch.manual_seed(0)
    config = transformers.DbrxConfig(
        d_model=256, n_heads=4, n_layers=2, max_seq_len=64, vocab_size=128, attn_config={"kv_n_heads": 2, "clip_qkv": 8.0},
        ffn_config={"hidden_size": 256, "ffn_hidden_size": 256, "moe_num_experts": 4, "moe_top_k": 2, "ffn_act_fn": {"name": "silu"}},
    )  # fmt: skip
    config.attn_config.rope_theta = 10000.0  # which transformers 5.24 reads and its config class lacks
    model = transformers.DbrxForCausalLM(config).eval()
    model.save_pretrained(tmp_path / "plain")
    iqtorch.quantize_model(model, Recipe.pure("q8_0"), progress=False)
    assert iqtorch.report(model).packed_fraction >= 0.99
    got = run(model)
    plain = dequantized(model)
    for module in plain.modules():
        if type(module).__name__ == "DbrxExpertGLU":
            for name, parameter in module._parameters.items():
                module._parameters[name] = nn.Parameter(parameter.reshape(-1, parameter.shape[-1]))
    want = run(plain)
    assert (got - want).norm() <= 1e-4 * want.norm()
    model.save_pretrained(tmp_path / "packed")
    loaded, info = transformers.DbrxForCausalLM.from_pretrained(tmp_path / "packed", output_loading_info=True)
    assert not any(info.values()), info
    assert torch.equal(run(loaded), got)
    loading = transformers.DbrxForCausalLM.from_pretrained(
        tmp_path / "plain", quantization_config=iqtorch.IQConfig(recipe=Recipe.pure("q8_0"))
    )
    assert torch.equal(run(loading), got)
    assert loaded.generate(IDS, max_new_tokens=2, min_new_tokens=2, do_sample=False).shape == (2, 8)


def test_a_model_that_is_not_packed_is_a_loud_warning() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(64, 8)
            self.experts = nn.ParameterList([nn.Parameter(torch.randn(8, 64)) for _ in range(3)])

    with pytest.warns(UserWarning, match=r"only 25\.0 % .*experts\.0"):
        iqtorch.quantize_model(Odd(), "q8_0", progress=False)
