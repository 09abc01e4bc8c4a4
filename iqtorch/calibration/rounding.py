"""Rounding of one weight by the second moments of its inputs."""

from __future__ import annotations

import torch
from torch import Tensor

from ..encode import encode
from ..encode.encoder import Objective
from ..encode.feedback import Metric, RowFeedback, encode_with_feedback
from ..formats import Format, get_format
from ..tensor import IQTensor
from .moments import Moments

#: Damping of the moments, relative to their mean: keeps the feedback from chasing directions that hardly occur.
DAMPING = 0.1
#: Likewise of the curvature in the outputs.
OUTPUT_DAMPING = 0.5

#: Activations kept aside that a matrix is judged by: all its rows times these are plenty.
JUDGES = 128

#: What `iqtorch.report` says of a matrix.
FEEDBACK = "rounded with error feedback"
NEAREST = "rounded to nearest: feedback does not help on held-out activations"


def quantize_calibrated(
    weight: Tensor, fmt: Format, moments: tuple[Moments, ...], objective: Objective = "model", curvature: Tensor | None = None
) -> tuple[IQTensor, str]:
    """Quantizes a checked weight (see `iqtorch.quantize`) by rounding with error feedback.

    Args:
        weight: `[N, K]`, or `[E, N, K]` for experts.
        fmt: the format; an `_r4` format gives a tensor of the plain format.
        moments: of its inputs, one per matrix.
        objective: as in `iqtorch.quantize`.
        curvature: `[N, N]`, of the loss in the outputs: feedback from row to row too.

    Returns:
        The packed weight, and a note on what was done: a matrix for which feedback does worse than rounding to nearest, on the
        activations kept aside, is rounded to nearest.
    """
    fmt = get_format(fmt.plain) if fmt.plain else fmt
    matrices = weight if weight.dim() == 3 else weight[None]
    found = [_round_matrix(matrix.detach().float(), fmt, own, objective, curvature) for matrix, own in zip(matrices, moments, strict=True)]
    blocks = torch.stack([b for b, _ in found]) if weight.dim() == 3 else found[0][0]
    kept = [e for e, (_, helped) in enumerate(found) if not helped]
    note = FEEDBACK if len(kept) < len(found) else NEAREST
    if 0 < len(kept) < len(found):
        note = f"{FEEDBACK}; experts {kept} {NEAREST}"
    dtype = weight.dtype if weight.dtype != torch.float64 else torch.float32
    return IQTensor.from_blocks(blocks, fmt, dtype), note


def _round_matrix(weight: Tensor, fmt: Format, moments: Moments, objective: Objective, curvature: Tensor | None) -> tuple[Tensor, bool]:
    """Canonical bytes, and whether they are those of error feedback."""
    metric = Metric(shrunk(moments.matrix.to(weight.device), moments.tokens), fmt, DAMPING)
    sample = moments.sample.to(weight.device)
    return best_of(weight, weight, fmt, metric, objective, sample, sample, curvature)


def best_of(
    weight: Tensor, wanted: Tensor, fmt: Format, metric: Metric, objective: Objective, x: Tensor, y: Tensor, curvature: Tensor | None
) -> tuple[Tensor, bool]:
    """Canonical bytes of `wanted` rounded with feedback, or of `weight` rounded to nearest where that is nearer, for activations kept
    aside, to the outputs that the loss sees; and whether it was the former.

    Args:
        weight, wanted: float32 `[N, K]`.
        x, y: float32 `[S, K]`: inputs of the original layer, and of the packed one.
        curvature: `[N, N]` or None: weight of the outputs' errors.
    """
    start = encode(weight, fmt, metric.importance, "rmse")
    rows = None if curvature is None else RowFeedback(curvature.to(weight.device), OUTPUT_DAMPING)
    fed = encode_with_feedback(wanted, fmt, metric, objective, start=start, rows=rows)
    step = max(1, len(x) // JUDGES)
    x, y = x[::step], y[::step]
    target = weight @ x.T
    before, after = (_size(target - (fmt.decode(b) * fmt.runtime_scale) @ y.T, curvature) for b in (start, fed))
    return (fed, True) if after <= before else (encode(weight, fmt, metric.importance, objective), False)


def _size(error: Tensor, curvature: Tensor | None) -> float:
    return float((error * (error if curvature is None else curvature.to(error) @ error)).sum())


def held_out_error(weight: Tensor, fmt: Format, blocks: Tensor, sample: Tensor) -> float:
    """Squared error of the outputs for some activations `[S, K]`, summed."""
    return _size((weight - fmt.decode(blocks) * fmt.runtime_scale) @ sample.to(weight.device).T, None)


def shrunk(moments: Tensor, tokens: int) -> Tensor:
    """Moments with their off-diagonal part reduced as far as so few tokens let it be chance; without tokens only importance is left."""
    found = moments * (tokens / (tokens + len(moments)))
    found.diagonal().copy_(moments.diagonal())
    return found
