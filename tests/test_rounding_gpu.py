"""Calibration, rounding and refining on a GPU: what they find there is what they find on the CPU, or as good.

Without a GPU `tests/test_simulated_device.py` runs this file on a device in host memory.
"""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from calibration_cases import correlated, llama, output_error, tokens
from placement_cases import GPU, needs_gpu
from tiny_models import tiny_model
from torch import nn

import iqtorch
from iqtorch.encode.feedback import encode_with_feedback
from iqtorch.encode.metric import Metric, RowFeedback
from iqtorch.errors import CalibrationError

pytestmark = needs_gpu

#: Single values, with minima, of even parity, pairs, grids with signs, and powers of two as scales.
FORMATS = ["iq4_ks", "q2_k", "iq4_kss", "iq2_kl", "iq2_s", "mxfp4"]


def there(model: nn.Module) -> nn.Module:
    return copy.deepcopy(model).to(GPU)


@pytest.mark.parametrize("curvature", [False, True])
def test_statistics_are_those_of_the_cpu(curvature: bool) -> None:
    model = llama()
    want = iqtorch.calibrate(model, tokens(), curvature=curvature)
    found = iqtorch.calibrate(there(model), tokens(), curvature=curvature)
    assert set(found) == set(want)
    for name in want:
        own, other = found[name][0], want[name][0]
        assert own.matrix.device.type == own.sample.device.type == "cpu" and own.tokens == other.tokens
        torch.testing.assert_close(own.matrix, other.matrix, rtol=1e-3, atol=1e-4 * float(other.matrix.diagonal().mean()))
        torch.testing.assert_close(own.sample, other.sample, rtol=1e-3, atol=1e-3)
        ours, theirs = found.curvature(name), want.curvature(name)
        assert (ours is None) == (theirs is None) == (not curvature)
        if ours is not None and theirs is not None:
            assert (ours - theirs).norm() < 0.02 * theirs.norm()


@pytest.mark.parametrize("by_rows", [False, True])
@pytest.mark.parametrize("name", [*FORMATS, pytest.param("iq1_s", marks=pytest.mark.slow), pytest.param("iq2_kt", marks=pytest.mark.slow)])
def test_feedback_is_as_good_as_on_the_cpu(name: str, by_rows: bool) -> None:
    """By the error that it is to lower; the same bytes again."""
    fmt, x = iqtorch.get_format(name), correlated(512, 1500)
    weight = 0.5 * torch.randn(48, 512, generator=torch.Generator().manual_seed(3))
    h = x.T @ x / len(x)
    g = correlated(48, 500, seed=4)
    o = g.T @ g / len(g)

    def rounded(device: str) -> torch.Tensor:
        rows = RowFeedback(o.to(device), 0.1) if by_rows else None
        return encode_with_feedback(weight.to(device), fmt, Metric(h.to(device), fmt, 0.05), rows=rows).cpu()

    def error(blocks: torch.Tensor) -> float:
        e = weight.double() - fmt.decode(blocks).double() * fmt.runtime_scale
        return float(((e @ h.double()) * (o.double() @ e if by_rows else e)).sum())

    found = rounded(GPU)
    assert torch.equal(found, rounded(GPU))
    assert error(found) == pytest.approx(error(rounded("cpu")), rel=0.03)


@pytest.mark.parametrize("rounding", ["ldlq", "yaqa"])
@pytest.mark.parametrize("name", ["iq4_ks", "iq2_kl"])
def test_a_model_layer_by_layer(name: str, rounding: str) -> None:
    base, batches = llama(), tokens()

    def packed(model: nn.Module, **how: object) -> nn.Module:
        return iqtorch.quantize_model(model, {"_proj": name}, progress=False, **how)

    importance = iqtorch.collect_importance(base, batches)
    found = packed(there(base), calibration=batches, rounding=rounding)
    assert {p.device.type for p in found.parameters()} == {GPU}
    error = output_error(found.cpu(), base, batches)
    assert error < 1.1 * output_error(packed(copy.deepcopy(base), calibration=batches, rounding=rounding), base, batches)
    assert error < 0.95 * output_error(packed(copy.deepcopy(base), importance=importance), base, batches)


@pytest.mark.parametrize("codes", [False, True])
@pytest.mark.parametrize("name", ["q2_k", "iq2_xxs", "iq2_k"])
def test_refining_lowers_the_divergence(name: str, codes: bool) -> None:
    base = llama(initializer_range=0.1, num_hidden_layers=1, intermediate_size=256)
    model = iqtorch.quantize_model(copy.deepcopy(base), {"_proj": name}, progress=False).to(GPU)
    base = there(base)
    found = iqtorch.refine(model, base, tokens(batches=33 if codes else 9, shape=(4, 32)), codes=codes)
    assert found.kept and found.after < found.before and (found.codes > 0) == codes
    assert {p.device.type for p in model.parameters()} == {GPU}


@pytest.mark.parametrize("kind", ["llama", "qwen3_moe"])
def test_a_model_on_the_cpu_visits_the_gpu(kind: str, tmp_path: Path) -> None:
    """Block by block; what comes out is as good as what the CPU makes, and lies there. A second call goes on where the first ended."""
    base, batches = (llama() if kind == "llama" else tiny_model(kind, hidden_size=256, intermediate_size=256)), tokens()
    if kind != "llama":
        base.set_experts_implementation("eager")  # the simulated device has no histc of integers

    def packed(**how: object) -> nn.Module:
        model = iqtorch.quantize_model(
            copy.deepcopy(base), {"_proj": "iq4_ks"}, progress=False, calibration=batches, rounding="ldlq", **how
        )
        assert {p.device.type for p in model.parameters()} == {"cpu"}
        return model

    found = packed(device=GPU, checkpoint=tmp_path)
    assert output_error(found, base, batches) < 1.1 * output_error(packed(), base, batches)
    again = packed(device=GPU, checkpoint=tmp_path)
    for name, value in found.named_parameters():
        if isinstance(value, iqtorch.IQTensor):
            assert torch.equal(value.to_blocks(), again.get_parameter(name).to_blocks())
    for module in found.modules():
        assert "forward" not in vars(module)
    with pytest.raises(CalibrationError, match="'ldlq'"):
        iqtorch.quantize_model(base, "iq4_ks", progress=False, calibration=batches, rounding="yaqa", device=GPU)
