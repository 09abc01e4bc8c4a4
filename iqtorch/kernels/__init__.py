"""The `triton` backend: kernels for NVIDIA and AMD GPUs. Implements `iqtorch.ops.Backend` on plain tensors.

Importing this module registers the operators but imports no Triton; the kernels load with the first call.
"""

from __future__ import annotations

import importlib.util
from functools import lru_cache

import torch
from torch import Tensor

from ..formats import Format
from ..ops import DTYPE_CODE
from . import library as _library
from .layout import layout

name = "triton"

__all__ = [
    "dequantize",
    "embedding",
    "grouped_linear",
    "linear",
    "linear_transposed",
    "name",
    "pack",
    "routed_gated",
    "routed_linear",
    "routed_weighted",
    "supports",
    "unpack",
]

#: Oldest NVIDIA architecture the kernels are compiled and checked for.
_MIN_CAPABILITY = (8, 0)
#: Words within one matrix are addressed in int32.
_MAX_WEIGHTS = 1 << 33


@lru_cache
def _unusable() -> str | None:
    """Why no kernel can run on this machine, or None."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed (pip install triton)"
    if _library.INTERPRETED:
        return None
    if not torch.cuda.is_available():
        return "no CUDA or ROCm device is available to this PyTorch build"
    if torch.version.hip is None:
        found, i = min((torch.cuda.get_device_capability(i), i) for i in range(torch.cuda.device_count()))
        if found < _MIN_CAPABILITY:
            card, needed = torch.cuda.get_device_name(i), ".".join(map(str, _MIN_CAPABILITY))
            return (
                f"{card} (cuda:{i}) has compute capability {found[0]}.{found[1]}, the kernels need {needed}; "
                "CUDA_VISIBLE_DEVICES can hide it from newer ones"
            )
    return None


def supports(fmt: Format, rows: int, k: int) -> str | None:
    """None if the kernels can run a `[rows, k]` matrix of this format here, else the reason in words."""
    reason = _unusable()
    if reason is not None:
        return reason
    if fmt.interleave != 1:
        return f"{fmt.name} merges {fmt.interleave} rows; kernels run its plain format {fmt.plain}"
    if rows <= 0:
        return f"the matrix has {rows} rows"
    if rows * k >= _MAX_WEIGHTS:
        return f"one matrix may have 2^33 weights, [{rows}, {k}] has more (the number of experts is not bounded)"
    return None


def pack(blocks: Tensor, fmt: Format) -> Tensor:
    """Canonical bytes uint8 `[..., rows, row_bytes]` -> device layout uint8 `[..., packed_bytes]`, on the same device."""
    if blocks.is_cuda and _unusable() is None:
        from . import launch, repack

        with launch._on(blocks.device):
            # made here, not by the first product: that may run in the memory pool of a CUDA graph, which must not keep them
            layout(fmt).tables(blocks.device)
            return repack.pack(blocks, fmt.name)
    return layout(fmt).pack(blocks)


def unpack(data: Tensor, fmt: Format, rows: int, k: int) -> Tensor:
    """Inverse of `pack`, bit for bit."""
    if data.is_cuda and _unusable() is None:
        from . import launch, repack

        with launch._on(data.device):
            return repack.unpack(data, fmt.name, rows, k)
    return layout(fmt).unpack(data, rows, k)


def unpack_rows(data: Tensor, fmt: Format, rows: int, k: int, start: int, stop: int) -> Tensor:
    """Canonical bytes of some rows, in memory of their own; all are unpacked for a moment."""
    return unpack(data, fmt, rows, k)[..., start:stop, :].clone()


def copy(data: Tensor) -> Tensor:
    """Packed bytes again, in memory of their own."""
    return data.clone()


def linear(x: Tensor, data: Tensor, fmt: Format, rows: int, bias: Tensor | None, precision: int) -> Tensor:
    """`x [..., K]` (float32, bfloat16, float16, float64; any strides) times the transposed matrix, plus bias: `[..., rows]`."""
    return torch.ops.iqtorch_triton.linear.default(x, data, fmt.ggml_type, rows, bias, precision)


def linear_many(
    x: Tensor, data: list[Tensor], fmts: list[Format], rows: list[int], biases: list[Tensor | None], precision: int
) -> list[Tensor]:
    """`linear` of the same activations with several matrices."""
    return [linear(x, *matrix, precision) for matrix in zip(data, fmts, rows, biases, strict=True)]


def linear_transposed(g: Tensor, data: Tensor, fmt: Format, k: int) -> Tensor:
    """`g [..., rows]` times the matrix: `[..., K]`."""
    return torch.ops.iqtorch_triton.linear_transposed.default(g, data, fmt.ggml_type, k)


def dequantize(data: Tensor, fmt: Format, rows: int, k: int, dtype: torch.dtype) -> Tensor:
    """Weights `[..., rows, K]`, computed in float32 exactly as `Format.decode` does, times `fmt.runtime_scale`."""
    return torch.ops.iqtorch_triton.dequantize.default(data, fmt.ggml_type, rows, k, DTYPE_CODE[dtype])


def embedding(ids: Tensor, data: Tensor, fmt: Format, rows: int, k: int, dtype: torch.dtype) -> Tensor:
    """Rows of the matrix for integer ids of any shape: `[*ids.shape, K]`. Ids out of range give rows of zeros (no host check)."""
    return torch.ops.iqtorch_triton.embedding.default(ids, data, fmt.ggml_type, rows, k, DTYPE_CODE[dtype])


def grouped_linear(x: Tensor, data: Tensor, offsets: Tensor, fmt: Format, rows: int, precision: int) -> Tensor:
    """`x [T, K]` sorted by expert, `offsets` int32 `[E]` their cumulative ends: `[T, rows]`; rows past the last end are zeros."""
    return torch.ops.iqtorch_triton.grouped_linear.default(x, data, offsets, fmt.ggml_type, rows, precision)


def routed_linear(x: Tensor, data: Tensor, ids: Tensor, fmt: Format, rows: int, precision: int) -> Tensor:
    """Experts by id, read on the device: `x [T, K]`, or `[T, S, K]`, and ids `[T, S]` -> `[T, S, rows]`.

    For few tokens (decoding): no sort, no host synchronisation. Ids out of range give zeros.
    """
    return torch.ops.iqtorch_triton.routed_linear.default(x, data, ids, fmt.ggml_type, rows, precision)


def routed_gated(x: Tensor, data: Tensor, ids: Tensor, fmt: Format, rows: int, activation: str, precision: int) -> Tensor:
    """`activation(gate) * up` of experts by id: `x [T, K]`, ids `[T, S]` -> `[T, S, rows / 2]`, like `routed_linear`.

    The first half of an expert's `rows` is its gate, the second its up projection; `activation` is one of `library.ACTIVATIONS`.
    """
    return torch.ops.iqtorch_triton.routed_gated.default(x, data, ids, fmt.ggml_type, rows, activation, precision)


def routed_weighted(x: Tensor, data: Tensor, ids: Tensor, weights: Tensor, fmt: Format, rows: int, precision: int) -> Tensor:
    """Sum over S of `weights [T, S]` times the products of `x [T, S, K]` with experts `ids [T, S]`: `[T, rows]`, like `routed_linear`."""
    return torch.ops.iqtorch_triton.routed_weighted.default(x, data, ids, weights, fmt.ggml_type, rows, precision)
