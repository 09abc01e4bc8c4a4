"""`quantize`: a floating-point weight becomes an `IQTensor`. Input is checked here; the search is in `iqtorch.encode`."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from .encode import Objective, Speed, encode
from .errors import CalibrationError, ImportanceError, ShapeError, WeightError
from .formats import Format, get_format
from .tensor import IQTensor

OBJECTIVES = get_args(Objective)
SPEEDS = get_args(Speed)
Rounding = Literal["nearest", "ldlq", "yaqa"]
ROUNDINGS = get_args(Rounding)


def quantize(
    weight: Tensor,
    format: Format | str,
    importance: Tensor | None = None,
    objective: Objective = "model",
    *,
    speed: Speed = "default",
    name: str = "weight",
) -> IQTensor:
    """Quantizes a weight matrix.

    Args:
        weight: `[N, K]`, or `[E, N, K]` for experts; float16, bfloat16, float32 or float64, on any device.
        format: a format or its name; an `_r4` name gives a tensor of the plain format (the same integers).
        importance: mean squared activation of each input column, `[K]`, or `[E, K]` for experts; None weighs all alike.
        objective: `"model"` (default) for the best model, `"rmse"` for the least importance-weighted squared error.
        speed: how hard to search: `"fast"`, `"default"` or `"best"` (figures in docs/encoders.md).
        name: what to call the weight in error messages.

    Returns:
        An `IQTensor` of the weight's shape, device and dtype (float64 becomes float32).

    Raises:
        UnknownFormatError: no such format.
        ShapeError: not two or three dimensions, an empty dimension, or rows that the format cannot hold.
        WeightError: integer, complex or packed weights, or NaN or Inf among them (the message gives the first position).
        ImportanceError: wrong shape, negative, NaN or Inf.
    """
    fmt = get_format(format)
    check_weight(weight, fmt, name)
    check_options(objective, speed)
    importance = check_importance(importance, weight, name)
    check_finite(weight, name)
    if fmt.plain:
        fmt = get_format(fmt.plain)

    dtype = weight.dtype if weight.dtype != torch.float64 else torch.float32
    return IQTensor.from_blocks(encode_blocks(weight, fmt, importance, objective, speed), fmt, dtype)


@torch.no_grad()
def encode_blocks(weight: Tensor, fmt: Format, importance: Tensor | None, objective: Objective, speed: Speed) -> Tensor:
    """uint8 `[..., N, row_bytes]`: `encode` for a matrix, or for each expert; arguments as `quantize` has checked them."""
    with torch.autocast(weight.device.type, enabled=False):
        if weight.dim() == 2:
            return encode(weight.detach(), fmt, importance, objective, speed)
        blocks = weight.new_empty((*weight.shape[:-1], fmt.row_bytes(weight.shape[-1])), dtype=torch.uint8)
        for e, expert in enumerate(weight.detach()):
            blocks[e] = encode(expert, fmt, None if importance is None else importance[e], objective, speed)
        return blocks


def check_options(objective: str, speed: str) -> None:
    """Raises ValueError for an objective or a speed that does not exist."""
    if objective not in OBJECTIVES:
        raise ValueError(f"objective must be one of {list(OBJECTIVES)}, got {objective!r}")
    if speed not in SPEEDS:
        raise ValueError(f"speed must be one of {list(SPEEDS)}, got {speed!r}")


def check_rounding(rounding: str, calibration: object) -> None:
    """Raises ValueError for a kind of rounding that does not exist, CalibrationError where it and calibration do not go together."""
    if rounding not in ROUNDINGS:
        raise ValueError(f"rounding must be one of {list(ROUNDINGS)}, got {rounding!r}")
    if (rounding == "nearest") != (calibration is None):
        found = "needs calibration" if calibration is None else "makes no use of calibration"
        raise CalibrationError(f"rounding={rounding!r} {found}: pass rounding='ldlq' or 'yaqa' and calibration, or neither")


def check_weight(weight: Tensor, fmt: Format, name: str) -> None:
    """Raises WeightError or ShapeError for a weight that cannot be stored in `fmt` (values are not looked at)."""
    if not isinstance(weight, Tensor):
        raise WeightError(f"{name!r} must be a torch.Tensor, got {type(weight).__name__}; use torch.as_tensor")
    if isinstance(weight, IQTensor):
        raise WeightError(f"{name!r} is packed already ({weight.format.name}); quantize its dequantize() to change the format")
    if not weight.dtype.is_floating_point:
        raise WeightError(f"{name!r} must be floating (float16, bfloat16, float32 or float64), got {weight.dtype}; use .float()")
    if weight.is_meta:
        raise WeightError(f"{name!r} is on the meta device and has no values; load the weights first")
    if weight.dim() not in (2, 3):
        raise ShapeError(f"{name!r} must have 2 dimensions [N, K], or 3 for experts [E, N, K]; got shape {tuple(weight.shape)}")
    if not weight.numel():
        raise ShapeError(f"{name!r} is empty: shape {tuple(weight.shape)}; skip it")
    try:
        fmt.row_bytes(weight.shape[-1])
    except ShapeError as error:
        raise ShapeError(f"{error} ({name!r})") from None


#: Weights that are checked at a time: the check needs four bytes for each of bfloat16, which would double the memory of loading.
_CHECKED = 1 << 21


def check_finite(weight: Tensor, name: str, first_row: int = 0) -> None:
    """Raises WeightError naming the first NaN or Inf; `first_row`: where in dimension 0 of the whole weight this part of it starts."""
    rows = max(1, _CHECKED // max(1, weight.shape[-1]))
    matrices = weight.unbind(0) if weight.dim() == 3 else (weight,)
    if all(bool(torch.isfinite(part).all()) for matrix in matrices for part in matrix.split(rows)):
        return
    finite = torch.isfinite(weight)
    if not bool(finite.all()):
        bad = (~finite).nonzero()
        position = tuple(bad[0].tolist())
        place = (position[0] + first_row, *position[1:])
        raise WeightError(
            f"{name!r} has {len(bad)} NaN or Inf values, the first at {place}: {weight[position].item()}; repair the checkpoint"
        )


def check_importance(importance: Tensor | None, weight: Tensor, name: str) -> Tensor | None:
    """Importance as float32 `[K]` or `[E, K]` on the weight's device.

    Raises:
        ImportanceError: wrong shape, negative, NaN or Inf.
    """
    if importance is None:
        return None
    wanted = (weight.shape[-1],) if weight.dim() == 2 else (weight.shape[0], weight.shape[-1])
    importance = torch.as_tensor(importance, device=weight.device).detach()
    if weight.dim() == 3 and tuple(importance.shape) == (weight.shape[-1],):
        importance = importance.expand(wanted)
    if tuple(importance.shape) != wanted:
        raise ImportanceError(
            f"importance of {name!r} must have shape {wanted} (one value per input column), got {tuple(importance.shape)}"
        )
    importance = importance.to(device=weight.device, dtype=torch.float32)
    bad = ~(torch.isfinite(importance) & (importance >= 0))
    if bool(bad.any()):
        position = tuple(bad.nonzero()[0].tolist())
        raise ImportanceError(
            f"importance of {name!r} must be finite and not negative, got {importance[position].item()} at {position}; collect it again"
        )
    return importance
