"""Calibration with what it cannot trust: damped, reported, or refused by name, and never worse than without it."""

from __future__ import annotations

import copy
import dataclasses
import logging

import pytest
import torch
from calibration_cases import correlated, llama, moments_of, output_error, tokens
from torch import Tensor, nn

import iqtorch
from iqtorch.calibration import quantize_calibrated, sequence
from iqtorch.calibration.rounding import FEEDBACK, NEAREST
from iqtorch.encode import encode
from iqtorch.errors import CalibrationError


def test_dead_columns_and_few_tokens(caplog: pytest.LogCaptureFixture) -> None:
    """Reported and damped: finite weights, no worse than nearest on activations of the same kind."""
    x = correlated(256, 4000)
    x[:, 17] = 0
    model = nn.Sequential(nn.Linear(256, 24, bias=False))
    with caplog.at_level(logging.WARNING, "iqtorch"):
        found = iqtorch.calibrate(model, [x[:100]])
    assert "only 88 tokens" in caplog.text and "1 of the 256 inputs" in caplog.text
    (own,) = found["0.weight"]
    assert own.tokens < 256 and own.dead == 1
    fmt = iqtorch.get_format("iq3_k")
    weight = model[0].weight.detach()
    packed, _ = quantize_calibrated(weight, fmt, (own,))
    assert torch.isfinite(packed.dequantize(torch.float32)).all()
    plain = fmt.decode(encode(weight, fmt, own.importance)) * fmt.runtime_scale
    fed, nearest = (((weight - w) @ x[1000:].T).square().sum() for w in (packed.dequantize(torch.float32), plain))
    assert fed <= 1.02 * nearest


@pytest.mark.parametrize("rounding", ["ldlq", "yaqa"])
def test_dead_columns_and_few_tokens_layer_by_layer(rounding: str, caplog: pytest.LogCaptureFixture) -> None:
    base = llama()
    base.model.layers[0].post_attention_layernorm.weight.data[7] = 0
    text, unseen = tokens(batches=1, shape=(2, 40)), tokens(batches=8)[6:]
    recipe = {r"layers\..*proj": "iq3_k"}
    with caplog.at_level(logging.WARNING, "iqtorch"):
        model = iqtorch.quantize_model(copy.deepcopy(base), recipe, calibration=text, rounding=rounding, progress=False)  # type: ignore[arg-type]
    assert "mlp.gate_proj.weight' has 256 columns and saw only 70 tokens" in caplog.text
    assert "1 of the 256 inputs of 'model.layers.0.mlp.gate_proj.weight' were always zero" in caplog.text
    by_importance = iqtorch.quantize_model(copy.deepcopy(base), recipe, iqtorch.collect_importance(base, text), progress=False)
    assert output_error(model, base, unseen) < 1.02 * output_error(by_importance, base, unseen)


@pytest.mark.parametrize("rounding", ["ldlq", "yaqa"])
def test_a_layer_falls_back_alone_and_says_so(rounding: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One input's moments are made up, so that feedback for them does harm on the activations kept aside."""
    finish = sequence._Pairs.finish
    paired = torch.eye(256).view(128, 2, 256).sum(1).repeat_interleave(2, 0)  # each column with its neighbour

    def finished(self: sequence._Pairs, name: str, rows: int) -> sequence._Statistics:
        found = finish(self, name, rows)
        if "layers.1.mlp.gate" not in name:
            return found
        signs = torch.tensor([1.0, -1.0]).repeat(128)
        x = torch.randn(200, 128, generator=torch.Generator().manual_seed(0)).repeat_interleave(2, 1) * signs
        return dataclasses.replace(found, moments=paired, cross=torch.zeros_like(paired), x=x, y=x)

    monkeypatch.setattr(sequence._Pairs, "finish", finished)
    base = llama()
    model = iqtorch.quantize_model(
        copy.deepcopy(base), {r"layers\..*proj": "iq3_k"}, calibration=tokens(), rounding=rounding, progress=False
    )  # type: ignore[arg-type]
    harmed = {f"model.layers.1.mlp.{name}_proj.weight" for name in ("gate", "up")}
    notes = {row.name: row.reason.partition("; ")[2] for row in iqtorch.report(model).rows if "_proj" in row.name}
    assert {name for name, note in notes.items() if note == NEAREST} == harmed
    assert {note for name, note in notes.items() if name not in harmed} == {FEEDBACK}
    for name in harmed:
        expected = encode(base.get_parameter(name).detach(), iqtorch.get_format("iq3_k"), torch.ones(256))
        assert torch.equal(model.get_parameter(name).to_blocks(), expected)


def test_misleading_moments_fall_back_to_nearest() -> None:
    """Neighbouring columns that go together in the moments, and against each other in the held-out activations."""
    g = torch.Generator().manual_seed(3)
    weight = torch.randn(8, 256, generator=g)
    x = torch.randn(700, 128, generator=g).repeat_interleave(2, 1) + 0.1 * torch.randn(700, 256, generator=g)
    own = moments_of(x[:500], sample=x[500:] * torch.tensor([1.0, -1.0]).repeat(128))
    packed, note = quantize_calibrated(weight, iqtorch.get_format("iq4_ks"), (own,))
    assert note == NEAREST
    assert torch.equal(packed.to_blocks(), encode(weight, iqtorch.get_format("iq4_ks"), own.importance))


def test_not_finite_activations() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    with torch.no_grad():
        model[0].weight[3, 3] = float("nan")
    with pytest.raises(CalibrationError, match=r"1\.weight.*not finite"):
        iqtorch.calibrate(model, [torch.randn(64, 8)])
    broken = llama()
    broken.model.layers[0].input_layernorm.weight.data[5] = float("inf")
    before = copy.deepcopy(broken.state_dict())
    for calibration in (tokens(),):
        with pytest.raises(CalibrationError, match="not finite"):
            iqtorch.quantize_model(broken, "iq4_ks", calibration=calibration, rounding="ldlq", progress=False)
    assert broken.state_dict().keys() == before.keys()
    assert not any(isinstance(p, iqtorch.IQTensor) for p in broken.parameters())


def test_not_finite_gradients() -> None:
    """The activations are finite, and the slope of a root at zero is not."""

    class Root(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.sqrt(x - x.detach())

    model = nn.Sequential(nn.Linear(8, 8), Root(), nn.Linear(8, 8))
    iqtorch.calibrate(model, [torch.randn(64, 8)])
    with pytest.raises(CalibrationError, match=r"gradients in the outputs of '0\.weight' are not finite; use float32, or rounding='ldlq'"):
        iqtorch.calibrate(model, [torch.randn(64, 8)], curvature=True)


def test_calibration_of_another_model_or_tokenizer() -> None:
    model = llama()
    with pytest.raises(CalibrationError, match="0 to 63; use the model's own tokenizer"):
        iqtorch.calibrate(model, [torch.full((1, 8), 64)])
    with pytest.raises(CalibrationError, match="own tokenizer"):
        iqtorch.quantize_model(model, "iq4_ks", calibration=[torch.full((1, 8), 64)], rounding="ldlq", progress=False)
    other = iqtorch.calibrate(llama(hidden_size=512), tokens())
    with pytest.raises(CalibrationError, match="another model"):
        iqtorch.quantize_model(model, "iq4_ks", calibration=other, rounding="ldlq", progress=False)
    assert not any(isinstance(p, iqtorch.IQTensor) for p in model.parameters())


def test_text_of_another_tokenizer_with_valid_ids(caplog: pytest.LogCaptureFixture) -> None:
    """Ids that the model has, but of other words: a trained model is told by its surprise, and its own text is not complained of."""
    from iqtorch.data import calibration_text, load_tiny_llama

    base, tokenizer = load_tiny_llama()
    ids = torch.tensor(tokenizer(calibration_text()[:2000], add_special_tokens=False).input_ids)[:256][None]
    name = "model.layers.0.self_attn.q_proj.weight"
    iqtorch.calibrate(base, [ids], only=[name])
    assert "tokenizer" not in caplog.text
    other = torch.randperm(base.config.vocab_size, generator=torch.Generator().manual_seed(0))[ids]
    iqtorch.calibrate(base, [other], only=[name])
    assert "is it of the model's own tokenizer?" in caplog.text
    caplog.clear()
    iqtorch.quantize_model(copy.deepcopy(base), {"layers.0.self_attn.q": "iq4_ks"}, calibration=[other], rounding="ldlq", progress=False)
    assert "is it of the model's own tokenizer?" in caplog.text
    caplog.clear()
    iqtorch.calibrate(llama(), tokens())  # untrained: knows nothing of any text
    assert "tokenizer" not in caplog.text


def test_arguments_that_do_not_go_together() -> None:
    model = llama()
    with pytest.raises(CalibrationError, match="rounding='ldlq' or 'yaqa' and calibration"):
        iqtorch.quantize_model(model, "iq4_ks", rounding="ldlq")
    with pytest.raises(CalibrationError, match="rounding='ldlq' or 'yaqa' and calibration"):
        iqtorch.quantize_model(model, "iq4_ks", calibration=tokens())
    with pytest.raises(ValueError, match="rounding must be one of"):
        iqtorch.quantize_model(model, "iq4_ks", calibration=tokens(), rounding="gptq")  # type: ignore[arg-type]
    with pytest.raises(CalibrationError, match="no batches"):
        iqtorch.quantize_model(model, "iq4_ks", calibration=[], rounding="ldlq", progress=False)
    with pytest.raises(CalibrationError, match="no activations were seen"):
        iqtorch.calibrate(model, [])
