"""What `quantize` refuses, each by name and with what to do."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

from iqtorch import quantize
from iqtorch.errors import ImportanceError, ShapeError, UnknownFormatError, WeightError

GOOD = torch.zeros(2, 256)
NAN = GOOD.clone().index_fill_(1, torch.tensor([7]), torch.nan)


@pytest.mark.parametrize(
    ("weight", "format", "options", "error", "message"),
    [
        ([[0.0] * 256], "iq2_kl", {}, WeightError, "must be a torch.Tensor, got list; use torch.as_tensor"),
        (quantize(GOOD, "q8_0"), "iq2_kl", {}, WeightError, "is packed already (q8_0)"),
        (GOOD.int(), "iq2_kl", {}, WeightError, "must be floating (float16, bfloat16, float32 or float64), got torch.int32; use .float()"),
        (GOOD.to("meta"), "iq2_kl", {}, WeightError, "is on the meta device and has no values; load the weights first"),
        (GOOD[0], "iq2_kl", {}, ShapeError, "must have 2 dimensions [N, K], or 3 for experts [E, N, K]; got shape (256,)"),
        (GOOD[:0], "iq2_kl", {}, ShapeError, "is empty: shape (0, 256)"),
        (GOOD[:, :255], "iq2_kl", {}, ShapeError, "iq2_kl needs rows of a positive multiple of 256 weights, got 255"),
        (NAN, "iq2_kl", {}, WeightError, "has 2 NaN or Inf values, the first at (0, 7): nan"),
        (GOOD, "iq2kl", {}, UnknownFormatError, "did you mean 'iq2_kl'"),
        (GOOD, "iq2_kl", {"objective": "best"}, ValueError, "objective must be one of ['model', 'rmse'], got 'best'"),
        (GOOD, "iq2_kl", {"speed": "slow"}, ValueError, "speed must be one of ['fast', 'default', 'best'], got 'slow'"),
        (
            GOOD,
            "iq2_kl",
            {"importance": torch.ones(255)},
            ImportanceError,
            "must have shape (256,) (one value per input column), got",
        ),
        (GOOD, "iq2_kl", {"importance": -torch.ones(256)}, ImportanceError, "must be finite and not negative, got -1.0 at (0,)"),
        (GOOD, "iq2_kl", {"importance": torch.full((256,), torch.inf)}, ImportanceError, "must be finite and not negative, got inf"),
    ],
)
def test_what_is_refused(weight: Any, format: str, options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        quantize(weight, format, name="layer.weight", **options)
