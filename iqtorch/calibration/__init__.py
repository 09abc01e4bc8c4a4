"""Calibration: second moments of the inputs of a model's layers, and rounding by them.

Where importance is the mean square of each activation, `[K]`, calibration is the mean product of every two of them, `[K, K]`: it
tells which errors of a row cancel, so that the rounding of one weight can make up for that of the others.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import torch
from torch import nn

from ..encode.encoder import Objective, Speed
from ..errors import CalibrationError
from ..tensor import IQTensor
from .moments import Batch, Calibration, Moments, calibrate
from .rounding import quantize_calibrated
from .sequence import Target, quantize_in_sequence

__all__ = ["Batch", "Calibration", "Moments", "Target", "calibrate", "quantize_calibrated", "quantize_in_sequence", "round_weights"]


def round_weights(
    model: nn.Module,
    targets: Sequence[Target],
    calibration: Calibration | Iterable[Batch],
    objective: Objective = "model",
    curvature: bool = False,
    checkpoint: str | Path | None = None,
    speed: Speed = "default",
    device: torch.device | str | None = None,
) -> Iterator[tuple[str, IQTensor, str]]:
    """Rounds the weights that calibration covers with error feedback: by a `Calibration` each for itself, by batches in sequence.

    Yields:
        Name, packed weight, and a note on what was done.

    Raises:
        CalibrationError: calibration that does not fit the model.
    """
    if not isinstance(calibration, Calibration):
        yield from quantize_in_sequence(
            model, targets, calibration, objective, curvature, checkpoint, speed, None if device is None else torch.device(device)
        )
        return
    if checkpoint is not None or device is not None:
        raise CalibrationError("checkpoint= and device= are for rounding layer by layer: pass batches as calibration, not a Calibration")
    if curvature and not any(calibration.curvature(t.name) is not None for t in targets):
        raise CalibrationError("rounding='yaqa' needs the curvature in the outputs: iqtorch.calibrate(model, batches, curvature=True)")
    fitting = [(t, calibration.for_weight(t.name, t.matrix.shape)) for t in targets]
    for target, moments in fitting:
        if moments is not None:
            own = calibration.curvature(target.name) if curvature else None
            yield target.name, *quantize_calibrated(target.matrix, target.format, moments, objective, own, speed)
