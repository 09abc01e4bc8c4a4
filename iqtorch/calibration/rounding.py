"""Rounding of one weight by the second moments of its inputs."""

from __future__ import annotations

import torch
from torch import Tensor

from ..encode import encode
from ..encode.encoder import Objective, Speed
from ..encode.feedback import encode_with_feedback, feedback_effort
from ..encode.metric import Metric, RowFeedback
from ..formats import Format, get_format
from ..tensor import IQTensor
from .moments import Moments

#: Damping of the moments, relative to their mean: keeps the feedback from chasing directions that hardly occur.
DAMPING = 0.1
#: Likewise of the curvature in the outputs.
OUTPUT_DAMPING = 0.5

#: Activations kept aside, and rows, that a matrix is judged by.
JUDGES = 128

#: What `iqtorch.report` says of a matrix.
FEEDBACK = "rounded with error feedback"
NEAREST = "rounded to nearest: feedback does not help on held-out activations"


def quantize_calibrated(
    weight: Tensor,
    fmt: Format,
    moments: tuple[Moments, ...],
    objective: Objective = "model",
    curvature: Tensor | None = None,
    speed: Speed = "default",
) -> tuple[IQTensor, str]:
    """Quantizes a checked weight (see `iqtorch.quantize`) by rounding with error feedback.

    Args:
        weight: `[N, K]`, or `[E, N, K]` for experts.
        fmt: the format; an `_r4` format gives a tensor of the plain format.
        moments: of its inputs, one per matrix.
        objective, speed: as in `iqtorch.quantize`.
        curvature: `[N, N]`, of the loss in the outputs: feedback from row to row too.

    Returns:
        The packed weight, and a note on what was done: a matrix for which feedback does worse than rounding to nearest, on the
        activations kept aside, is rounded to nearest.
    """
    fmt = get_format(fmt.plain) if fmt.plain else fmt
    matrices = weight if weight.dim() == 3 else weight[None]
    found = [
        _round_matrix(matrix.detach().float(), fmt, own, objective, curvature, speed) for matrix, own in zip(matrices, moments, strict=True)
    ]
    blocks = torch.stack([b for b, _ in found]) if weight.dim() == 3 else found[0][0]
    kept = [e for e, (_, helped) in enumerate(found) if not helped]
    note = FEEDBACK if len(kept) < len(found) else NEAREST
    if 0 < len(kept) < len(found):
        note = f"{FEEDBACK}; experts {kept} {NEAREST}"
    dtype = weight.dtype if weight.dtype != torch.float64 else torch.float32
    return IQTensor.from_blocks(blocks, fmt, dtype), note


def _round_matrix(
    weight: Tensor, fmt: Format, moments: Moments, objective: Objective, curvature: Tensor | None, speed: Speed
) -> tuple[Tensor, bool]:
    """Canonical bytes, and whether they are those of error feedback."""
    metric = Metric(shrunk(moments.matrix.to(weight.device), moments.tokens), fmt, DAMPING)
    sample = moments.sample.to(weight.device)
    return best_of(weight, fmt, metric, objective, sample, sample, curvature, speed)


def best_of(
    weight: Tensor, fmt: Format, metric: Metric, objective: Objective, x: Tensor, y: Tensor, curvature: Tensor | None, speed: Speed
) -> tuple[Tensor, bool]:
    """Canonical bytes of `weight` rounded with feedback, or rounded to nearest where that is nearer to the outputs that the loss sees, for
    activations kept aside; and whether it was the former.

    Args:
        weight: float32 `[N, K]`.
        x, y: float32 `[S, K]`: inputs of the original layer, and of the packed one.
        curvature: `[N, N]` or None: weight of the outputs' errors.
    """
    curvature = None if curvature is None else curvature.to(weight.device)
    rows = None if curvature is None else RowFeedback(curvature, OUTPUT_DAMPING)
    fed = encode_with_feedback(weight, fmt, metric, objective, feedback_effort(fmt.for_encoding, speed), rows)
    judged = slice(None, None, max(1, len(weight) // JUDGES))
    x, y = (sample[:: max(1, len(sample) // JUDGES)] for sample in (x, y))
    some = weight[judged]
    target = some @ x.T

    def error(blocks: Tensor) -> float:
        return _size(target - (fmt.decode(blocks) * fmt.runtime_scale) @ y.T, None if curvature is None else curvature[judged, judged])

    if error(fed[judged]) <= error(encode(some, fmt, metric.importance, objective, speed)):
        return fed, True
    return encode(weight, fmt, metric.importance, objective, speed), False


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
