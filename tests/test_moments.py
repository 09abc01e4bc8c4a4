"""Second moments of activations: `iqtorch.calibrate`, its sample and its file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from calibration_cases import llama, tokens
from safetensors.torch import save_file
from torch import Tensor, nn

import iqtorch
from iqtorch.calibration import moments as collecting
from iqtorch.calibration.moments import HELD_OUT, SAMPLE
from iqtorch.errors import CalibrationError

transformers = pytest.importorskip("transformers")


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(64, 96), nn.Linear(64, 96), nn.Linear(96, 64)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.relu(self.gate(x)) * self.up(x))


@pytest.mark.parametrize("in_stripes", [False, True])
def test_moments_are_means_of_products(in_stripes: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wide matrices are summed in float32, a stripe of columns at a time."""
    if in_stripes:
        monkeypatch.setattr(collecting, "WIDE", 16)
        monkeypatch.setattr(collecting, "STRIPE", 10)
    torch.manual_seed(0)
    model = Mlp()
    batches = [torch.randn(5, 40, 64) for _ in range(3)]
    found = iqtorch.calibrate(model, batches)
    rows = torch.cat([b.reshape(-1, 64) for b in batches])
    (own,) = found["gate.weight"]
    assert own.tokens + len(own.sample) == 600
    assert len(own.sample) >= 600 // HELD_OUT - 3
    total = own.matrix.double() * own.tokens + own.sample.double().T @ own.sample.double()
    torch.testing.assert_close(total, rows.double().T @ rows.double(), rtol=1e-5, atol=1e-3)
    hidden = torch.relu(model.gate(rows)) * model.up(rows)
    torch.testing.assert_close(found["down.weight"][0].importance, hidden.detach().square().mean(0), rtol=0.2, atol=1e-3)


def test_autocast_is_for_the_model_alone() -> None:
    torch.manual_seed(0)
    model, batches = Mlp(), [torch.randn(5, 40, 64) for _ in range(2)]
    want, importance = iqtorch.calibrate(model, batches), iqtorch.collect_importance(model, batches)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found, again = iqtorch.calibrate(model, batches), iqtorch.collect_importance(model, batches)
    assert torch.equal(found["gate.weight"][0].matrix, want["gate.weight"][0].matrix)
    assert torch.equal(again["gate.weight"], importance["gate.weight"])


def test_shared_inputs_are_counted_once() -> None:
    model = llama()
    found = iqtorch.calibrate(model, tokens())
    layer = "model.layers.1."
    assert found[layer + "self_attn.q_proj.weight"] is found[layer + "self_attn.v_proj.weight"]
    assert found[layer + "mlp.gate_proj.weight"] is found[layer + "mlp.up_proj.weight"]
    assert found[layer + "mlp.gate_proj.weight"] is not found[layer + "self_attn.q_proj.weight"]
    assert len(found) == 2 * 7 + 1
    assert found.nbytes <= 4 * (2 * (3 * 256**2 + 512**2) + 256**2) + 9 * SAMPLE * 512 * 4


def test_long_texts_keep_a_bounded_sample() -> None:
    found = iqtorch.calibrate(nn.Sequential(nn.Linear(8, 8)), [torch.randn(40 * SAMPLE, 8) for _ in range(3)])
    (own,) = found["0.weight"]
    assert SAMPLE // 4 <= len(own.sample) <= SAMPLE
    assert own.tokens > 110 * SAMPLE


def test_save_and_load(tmp_path: Path) -> None:
    found = iqtorch.calibrate(llama(), tokens())
    found.save(tmp_path / "calibration.safetensors")
    again = iqtorch.Calibration.load(tmp_path / "calibration.safetensors")
    assert list(again) == list(found)
    for name in found:
        for a, b in zip(found[name], again[name], strict=True):
            assert a.tokens == b.tokens and torch.equal(a.matrix, b.matrix) and torch.equal(a.sample, b.sample)
    whole = (tmp_path / "calibration.safetensors").read_bytes()
    for damaged in (b"", whole[:1000], b"x" * 100):
        (tmp_path / "damaged").write_bytes(damaged)
        with pytest.raises(CalibrationError, match="damaged"):
            iqtorch.Calibration.load(tmp_path / "damaged")
    for facts, why in (({"version": 2, "tokens": {}, "keys": {}}, "has version 2"), ({"version": 1, "tokens": {}}, "damaged")):
        save_file({}, str(tmp_path / "other"), {"iqtorch.calibration": json.dumps(facts)})
        with pytest.raises(CalibrationError, match=why):
            iqtorch.Calibration.load(tmp_path / "other")
    with pytest.raises(CalibrationError, match="missing"):
        iqtorch.Calibration.load(tmp_path / "missing")
