"""Recipes fitted to a model: the budget holds, the prediction is about right, the choice beats a uniform one."""

from __future__ import annotations

import itertools
import random
from pathlib import Path

import pytest
import torch
from torch import nn

import iqtorch
from iqtorch import IQTensor
from iqtorch.errors import RecipeError, UnknownFormatError
from iqtorch.fit import _allocate, _gain, _hull, _Option, fit

FORMATS = ("iq4_nl", "q5_0", "q6_0", "q8_0")


class Tiny(nn.Module):
    """Embedding, two layers of very different influence on the output, head."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(50, 64)
        self.strong = nn.Linear(64, 64)
        self.weak = nn.Linear(64, 64)
        self.head = nn.Linear(64, 50, bias=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        return self.head(x + 3 * torch.tanh(self.strong(x)) + 0.01 * torch.tanh(self.weak(x)))


class Broken(Tiny):
    """A model that must not be run."""

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        raise AssertionError("the model was run")


def batches() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(0, 50, (4, 32), generator=generator) for _ in range(2)]


def kl(model: nn.Module, base: nn.Module) -> float:
    with torch.no_grad():
        total = 0.0
        for batch in batches():
            p, q = torch.log_softmax(base(batch), -1), torch.log_softmax(model(batch), -1)
            total += float((p.exp() * (p - q)).sum(-1).mean()) / 2
    return total


def packed_bpw(model: nn.Module) -> float:
    packed = [p for p in model.parameters() if isinstance(p, IQTensor)]
    return sum(8 * p.to_blocks().numel() for p in packed) / sum(p.numel() for p in packed)


def test_fitted_recipe() -> None:
    model = Tiny()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = fit(model, target_bpw=5.5, batches=batches(), formats=FORMATS)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model.training
    assert set(found.formats) == {"embed.weight", "strong.weight", "weak.weight", "head.weight"}
    assert found.sensitivity["weak.weight"] < found.sensitivity["strong.weight"] / 10
    assert found.formats["weak.weight"] == "iq4_nl"
    assert f"predicted {found.predicted_kl:.5f}" in str(found)
    unmeasured = fit(model, target_bpw=5.5, batches=batches(), formats=FORMATS, measure=False)
    assert unmeasured.achieved_kl is None and "achieved" not in str(unmeasured)

    fitted = iqtorch.quantize_model(Tiny(), found.recipe, progress=False)
    assert {n: p.format.name for n, p in fitted.named_parameters() if isinstance(p, IQTensor)} == found.formats
    assert packed_bpw(fitted) == pytest.approx(found.bits_per_weight)
    assert 5.0 < found.bits_per_weight <= 5.5
    uniform = iqtorch.quantize_model(Tiny(), iqtorch.Recipe.pure("q5_0"), progress=False)
    achieved = kl(fitted, model)
    # `fit` computes with decoded weights, the packed model with kernels that round activations
    assert found.achieved_kl == pytest.approx(achieved, rel=0.05)
    assert f"achieved {found.achieved_kl:.5f}" in str(found)
    assert achieved < kl(uniform, model)
    assert 0.5 < achieved / found.predicted_kl < 2


def test_recipe_fit_shows_what_it_found(capsys: pytest.CaptureFixture[str]) -> None:
    recipe = iqtorch.Recipe.fit(Tiny(), target_bpw=5.5, batches=batches())
    assert "bits per weight, KL divergence in nats: predicted 0." in (shown := capsys.readouterr().err) and ", achieved 0." in shown
    assert iqtorch.Recipe.fit(Tiny(), None, target_bpw=5.5, batches=batches(), progress=False) == recipe
    assert not capsys.readouterr().err


def test_text_of_its_own(tmp_path: Path) -> None:
    """Without batches the text inside the package is taken, if the model has a tokenizer."""
    pytest.importorskip("transformers")
    from iqtorch import data, evaluate, hf

    model, tokenizer = data.load_tiny_llama()
    ids = hf.encode(tokenizer, data.calibration_text()[:20_000])
    batches = list(evaluate.windows(model, ids)[:4].split(1))
    keep = r"layers\.[1-3]|embed"
    found = fit(model, target_bpw=4.5, formats=("iq4_nl", "q5_0"), skip=(keep,), measure=False)
    assert found == fit(model, target_bpw=4.5, batches=batches, formats=("iq4_nl", "q5_0"), skip=(keep,), measure=False)
    with pytest.raises(RecipeError, match="Tiny was not loaded from a folder.*batches="):
        iqtorch.Recipe.fit(Tiny(), target_bpw=5)
    model.config._name_or_path = str(tmp_path)
    with pytest.raises(RecipeError, match="has no tokenizer.*batches="):
        iqtorch.Recipe.fit(model, target_bpw=5)


def test_more_bits_cost_less() -> None:
    costs = [fit(Tiny(), target_bpw=bpw, batches=batches(), formats=FORMATS).predicted_kl for bpw in (4.5, 5.0, 6.5, 8.5)]
    assert costs == sorted(costs, reverse=True)
    assert len(set(costs)) == 4


def test_skipped_weights_and_rows_that_do_not_fit() -> None:
    model = Tiny()
    model.odd = nn.Linear(33, 8)  # never quantized
    found = fit(model, target_bpw=5.0, batches=batches(), formats=("iq2_k", "iq4_nl", "q8_0"), skip=("head",))
    assert set(found.formats) == {"embed.weight", "strong.weight", "weak.weight"}
    assert set(found.formats.values()) <= {"iq4_nl", "q8_0"}  # rows of 64: iq2_k is replaced by its fallback


def test_importance_is_used() -> None:
    model = Tiny()
    one = torch.zeros(64)
    one[:4] = 1
    names = ("strong.weight", "weak.weight", "head.weight", "embed.weight")
    plain = fit(model, target_bpw=5.5, batches=batches(), formats=FORMATS)
    weighted = fit(model, dict.fromkeys(names, one), target_bpw=5.5, batches=batches(), formats=FORMATS)
    assert weighted.sensitivity != plain.sensitivity
    with pytest.raises(iqtorch.errors.ImportanceError, match=r"strong\.weight"):
        fit(model, {"strong.weight": torch.ones(7)}, target_bpw=5.5, batches=batches(), formats=FORMATS)


def test_calibration_is_used() -> None:
    """Weights are measured as error feedback will round them, so less divergence is predicted, and found."""
    torch.manual_seed(0)
    base = Tiny()
    calibration = iqtorch.calibrate(base, batches())
    plain = fit(base, target_bpw=4.6, batches=batches(), formats=FORMATS)
    found = fit(base, target_bpw=4.6, batches=batches(), formats=FORMATS, calibration=calibration)
    assert found.sensitivity["strong.weight"] < plain.sensitivity["strong.weight"]
    assert iqtorch.Recipe.fit(base, target_bpw=6.0, batches=batches(), calibration=calibration) != iqtorch.Recipe.default("iq4_nl")


def test_a_bar_shows_each_weight(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")  # to rich, standard error is a terminal
    monkeypatch.setenv("COLUMNS", "160")
    for show in (True, False):
        fit(Tiny(), target_bpw=5.5, batches=batches(), formats=("q4_0", "q8_0"), measure=False, progress=show)
        shown = capsys.readouterr().err
        assert ("measuring" in shown and "weight" in shown) == show


def test_refusals() -> None:
    with pytest.raises(RecipeError, match=r"smallest formats take 4\.500 .* target is 3"):
        fit(Broken(), target_bpw=3, batches=batches(), formats=FORMATS)  # before the model runs
    with pytest.raises(RecipeError, match="needs batches"):
        fit(Tiny(), target_bpw=5, batches=[], formats=FORMATS)
    with pytest.raises(UnknownFormatError, match="q4_9"):
        fit(Tiny(), target_bpw=5, batches=batches(), formats=("q4_9",))


def test_experts_and_tied_weights() -> None:
    pytest.importorskip("transformers")
    from gguf_models import ids, tiny

    model = tiny("qwen3-moe", torch.float32, tie_word_embeddings=True)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = fit(model, target_bpw=6.0, batches=[ids()], formats=FORMATS)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert "model.layers.0.mlp.experts.gate_up_proj" in found.formats
    assert "lm_head.weight" not in found.formats
    fitted = iqtorch.quantize_model(model, found.recipe, progress=False)
    assert packed_bpw(fitted) == pytest.approx(found.bits_per_weight)


def test_allocation_is_optimal_where_the_budget_is_used_up() -> None:
    rng = random.Random(0)
    for _ in range(50):
        options = {
            f"w{i}": _hull([_Option(f"f{j}", rng.randint(1, 30), rng.random()) for j in range(5)]) for i in range(4)
        }  # fmt: skip
        for steps in options.values():
            gains = [_gain(a, b) for a, b in itertools.pairwise(steps)]
            assert gains == sorted(gains, reverse=True)
            assert all(gain > 0 for gain in gains)
        least = sum(steps[0].bits for steps in options.values())
        for extra in range(0, 60, 7):
            found = _allocate(options, least + extra)
            used = sum(option.bits for option in found.values())
            assert used <= least + extra
            best = min(
                sum(o.cost for o in choice) for choice in itertools.product(*options.values()) if sum(o.bits for o in choice) <= used
            )
            # greedy steps along convex hulls; a step that no longer fits is passed over, which may cost up to one step
            largest = max((a.cost - b.cost for steps in options.values() for a, b in itertools.pairwise(steps)), default=0)
            assert sum(option.cost for option in found.values()) <= best + largest
        everything = _allocate(options, 10**6)
        assert all(option is steps[-1] for option, steps in zip(everything.values(), options.values(), strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("uniform", ["iq2_kl", "iq3_k", "iq4_ks"])
def test_embedded_model(uniform: str) -> None:
    """At the size of one format everywhere, the fitted mix is better on text that it has not seen."""
    from iqtorch import data, evaluate, hf

    base, tokenizer = data.load_tiny_llama()
    importance = iqtorch.Importance.load(data.TINY_LLAMA_IMPORTANCE)
    plain, _ = data.load_tiny_llama()
    iqtorch.quantize_model(plain, iqtorch.Recipe.pure(uniform), importance, progress=False)
    size = packed_bpw(plain)
    text = hf.encode(tokenizer, data.calibration_text())[: 4 * 512].view(4, 1, 512)
    found = fit(base, importance, target_bpw=size, batches=list(text))
    fitted, _ = data.load_tiny_llama()
    iqtorch.quantize_model(fitted, found.recipe, importance, progress=False)
    assert packed_bpw(fitted) == pytest.approx(found.bits_per_weight)
    assert found.bits_per_weight <= size
    ids = hf.encode(tokenizer, data.heldout_text())[: 24 * 512]
    fitted_kl, plain_kl = (evaluate.kl_divergence(model, base, ids).mean_kl for model in (fitted, plain))
    print(f"{uniform}: {size:.3f} bits, KL {plain_kl:.5f}; fitted {found}; on held-out text {fitted_kl:.5f}")
    assert fitted_kl < plain_kl
    assert 0.7 < found.achieved_kl / found.predicted_kl < 1.4
