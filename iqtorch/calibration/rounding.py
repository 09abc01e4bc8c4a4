"""Rounding of one weight by the second moments of its inputs."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..encode import encode
from ..encode.encoder import Objective, Speed
from ..encode.feedback import encode_with_feedback, feedback_effort
from ..encode.metric import Metric, RowFeedback, product
from ..formats import Format, get_format
from ..tensor import IQTensor
from .moments import Moments

#: Damping of the moments, relative to their mean: keeps the feedback from chasing directions that hardly occur.
DAMPING = 0.1
#: Likewise of the curvature in the outputs.
OUTPUT_DAMPING = 0.5

#: Rows, and activations kept aside, that a matrix is judged by.
JUDGED_ROWS, JUDGED_TOKENS = 32, 128

#: What `iqtorch.report` says of a matrix.
FEEDBACK = "rounded with error feedback"
NEAREST = "rounded to nearest: feedback does not help on held-out activations"
PRECISE = "rounded to nearest: its error is below that of 8-bit activations"


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
    notes = {note: [e for e, (_, own) in enumerate(found) if own == note] for note in dict.fromkeys(note for _, note in found)}
    first, *others = sorted(notes, key=lambda note: note != FEEDBACK)
    note = "; ".join([first, *(f"experts {notes[own]} {own}" for own in others)])
    dtype = weight.dtype if weight.dtype != torch.float64 else torch.float32
    return IQTensor.from_blocks(blocks, fmt, dtype), note


def _round_matrix(
    weight: Tensor, fmt: Format, moments: Moments, objective: Objective, curvature: Tensor | None, speed: Speed
) -> tuple[Tensor, str]:
    """Canonical bytes, and what was done."""

    def metric() -> Metric:
        return Metric(shrunk(moments.matrix.to(weight.device), moments.tokens), fmt, DAMPING)

    sample, importance = (t.to(weight.device) for t in (moments.sample, moments.importance.contiguous()))
    with torch.autocast(weight.device.type, enabled=False):
        return best_of([weight], fmt, importance, metric, objective, sample, sample, curvature, speed)[0]


def best_of(
    weights: Sequence[Tensor],
    fmt: Format,
    importance: Tensor,
    metric: Callable[[], Metric],
    objective: Objective,
    x: Tensor,
    y: Tensor,
    curvature: Tensor | None,
    speed: Speed,
) -> list[tuple[Tensor, str]]:
    """Rounds weights of the same input with feedback, all rows together; or to nearest those for which that is nearer to the outputs
    that the loss sees, for activations kept aside, or is off by less than these are as the 8-bit numbers of integer products.

    Args:
        weights: float32 `[N, K]` each.
        importance: float32 `[K]`.
        metric: makes the metric of the feedback, if it comes to that.
        x, y: float32 `[S, K]`: inputs of the original layer, and of the packed one.
        curvature: `[N, N]`, weight of the outputs' errors, if there is only one weight; or None.

    Returns:
        For each weight its canonical bytes, and what was done.
    """
    x, y = (sample[:: max(1, len(sample) // JUDGED_TOKENS)] for sample in (x, y))
    judged = [slice(None, None, max(1, len(weight) // JUDGED_ROWS)) for weight in weights]
    samples = [weight[rows] for weight, rows in zip(weights, judged, strict=True)]
    some, parts = _joined(samples), [len(own) for own in samples]
    seen = None if curvature is None else curvature.to(y)[judged[0], judged[0]]

    def sizes(error: Tensor) -> list[float]:
        """Of each weight's outputs."""
        return [float((own * (own if seen is None else seen @ own)).sum()) for own in error.split(parts)]

    nearest = encode(some, fmt, importance, objective, speed)
    off = product(some - _decoded(fmt, nearest), y.T)
    of_activations, of_inputs = product(some, torch.cat([y - _to_8_bits(y), x - y]).T).tensor_split(2, dim=1)
    # without activations all are zero, and feedback is trusted
    precise = [a < b for a, b in zip(sizes(off), sizes(of_activations), strict=True)]
    fed = [i for i in range(len(weights)) if not precise[i]]
    found: dict[int, tuple[Tensor, str]] = {}
    if fed:
        rows = None if curvature is None else RowFeedback(curvature.to(y.device), OUTPUT_DAMPING)
        effort = feedback_effort(fmt.for_encoding, speed)
        blocks = encode_with_feedback(_joined([weights[i] for i in fed]), fmt, metric(), objective, effort, rows)
        found = {i: (own, FEEDBACK) for i, own in zip(fed, blocks.split([len(weights[i]) for i in fed]), strict=True)}
        after = [found[i][0][judged[i]] if i in found else own for i, own in enumerate(nearest.split(parts))]
        before, now = sizes(of_inputs + off), sizes(of_inputs + product(some - _decoded(fmt, torch.cat(after)), y.T))
    for i, weight in enumerate(weights):
        if i not in found or not now[i] <= before[i]:
            found[i] = encode(weight, fmt, importance, objective, speed), NEAREST if i in found else PRECISE
    return [found[i] for i in range(len(weights))]


def _joined(weights: Sequence[Tensor]) -> Tensor:
    return weights[0] if len(weights) == 1 else torch.cat(list(weights))


def _decoded(fmt: Format, blocks: Tensor) -> Tensor:
    return fmt.decode(blocks) * fmt.runtime_scale


def _to_8_bits(x: Tensor) -> Tensor:
    """Activations `[S, K]` as integer products see them: a scale per 32."""
    groups = x.unflatten(1, (-1, 32))
    scale = (groups.abs().amax(-1, keepdim=True) / 127).clamp(min=1e-30)
    return ((groups / scale).round() * scale).flatten(1)


def shrunk(moments: Tensor, tokens: int) -> Tensor:
    """Moments with their off-diagonal part reduced as far as so few tokens let it be chance; without tokens only importance is left."""
    found = moments * (tokens / (tokens + len(moments)))
    found.diagonal().copy_(moments.diagonal())
    return found
