"""Rounding of one weight by the second moments of its inputs."""

from __future__ import annotations

import torch
from torch import Tensor

from ..encode import encode
from ..encode.encoder import Objective
from ..encode.feedback import Metric, encode_with_feedback
from ..formats import Format, get_format
from ..tensor import IQTensor
from .moments import Moments

#: Damping of the moments, relative to their mean: keeps the feedback from chasing directions that hardly occur.
DAMPING = 0.05

#: What `iqtorch.report` says of a matrix.
FEEDBACK = "rounded with error feedback"
NEAREST = "rounded to nearest: feedback does not help on held-out activations"


def quantize_calibrated(weight: Tensor, fmt: Format, moments: tuple[Moments, ...], objective: Objective = "model") -> tuple[IQTensor, str]:
    """Quantizes a checked weight (see `iqtorch.quantize`) by rounding with error feedback.

    Args:
        weight: `[N, K]`, or `[E, N, K]` for experts.
        fmt: the format; an `_r4` format gives a tensor of the plain format.
        moments: of its inputs, one per matrix.
        objective: as in `iqtorch.quantize`.

    Returns:
        The packed weight, and a note on what was done: a matrix for which feedback does worse than rounding to nearest, on the
        activations kept aside, is rounded to nearest.
    """
    fmt = get_format(fmt.plain) if fmt.plain else fmt
    matrices = weight if weight.dim() == 3 else weight[None]
    found = [_round_matrix(matrix.detach().float(), fmt, own, objective) for matrix, own in zip(matrices, moments, strict=True)]
    blocks = torch.stack([b for b, _ in found]) if weight.dim() == 3 else found[0][0]
    kept = [e for e, (_, helped) in enumerate(found) if not helped]
    note = FEEDBACK if len(kept) < len(found) else NEAREST
    if 0 < len(kept) < len(found):
        note = f"{FEEDBACK}; experts {kept} {NEAREST}"
    dtype = weight.dtype if weight.dtype != torch.float64 else torch.float32
    return IQTensor.from_blocks(blocks, fmt, dtype), note


def _round_matrix(weight: Tensor, fmt: Format, moments: Moments, objective: Objective) -> tuple[Tensor, bool]:
    """Canonical bytes, and whether they are those of error feedback."""
    importance = moments.importance.to(weight.device)
    start = encode(weight, fmt, importance, "rmse")
    metric = Metric(shrunk(moments.matrix.to(weight.device), moments.tokens), fmt, DAMPING)
    fed = encode_with_feedback(weight, fmt, metric, objective, start=start)
    before, after = (held_out_error(weight, fmt, blocks, moments.sample) for blocks in (start, fed))
    return (fed, True) if after <= before else (encode(weight, fmt, importance, objective), False)


def held_out_error(weight: Tensor, fmt: Format, blocks: Tensor, sample: Tensor) -> float:
    """Squared error of the outputs for some activations `[S, K]`, summed."""
    error = weight - fmt.decode(blocks) * fmt.runtime_scale
    return float((error @ sample.to(weight.device).T).square().sum())


def shrunk(moments: Tensor, tokens: int) -> Tensor:
    """Moments with their off-diagonal part reduced as far as so few tokens let it be chance; without tokens only importance is left."""
    return moments * (tokens / (tokens + len(moments))) + torch.diag(moments.diagonal() * (len(moments) / (tokens + len(moments))))
