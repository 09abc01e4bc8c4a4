"""Products with packed weights that autograd, torch.func and forward mode can differentiate by activations."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from . import ops
from .formats import Format


def needs_derivative(x: Tensor) -> bool:
    """Whether what is computed from `x` has to be differentiable: backward, or forward (dual tensors, which do not say that they are)."""
    return (x.requires_grad and torch.is_grad_enabled()) or forward_ad._current_level >= 0


class _Linear(torch.autograd.Function):
    """`x -> x W^T` for a packed W; `_LinearTransposed` is its derivative, and the reverse."""

    @staticmethod
    def compute(x: Tensor, packed: Tensor, fmt: Format, backend: str, rows: int, k: int) -> Tensor:
        return ops.get_backend(backend).linear(x, packed, fmt, rows, None, ops.FLOAT)

    @staticmethod
    def forward(ctx: Any, *args: Any) -> Tensor:
        _, packed, *ctx.meta = args
        ctx.save_for_backward(packed)
        return _Linear.compute(*args)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return (_LinearTransposed.apply(grads[0], *ctx.saved_tensors, *ctx.meta), None, None, None, None, None)


class _LinearTransposed(torch.autograd.Function):
    """`g -> g W`."""

    @staticmethod
    def compute(g: Tensor, packed: Tensor, fmt: Format, backend: str, rows: int, k: int) -> Tensor:
        return ops.get_backend(backend).linear_transposed(g, packed, fmt, k)

    @staticmethod
    def forward(ctx: Any, *args: Any) -> Tensor:
        _, packed, *ctx.meta = args
        ctx.save_for_backward(packed)
        return _LinearTransposed.compute(*args)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return (_Linear.apply(grads[0], *ctx.saved_tensors, *ctx.meta), None, None, None, None, None)


class _Transformed(torch.autograd.Function):
    """Both of them for torch.func, which asks for another form; to go through it takes 30 microseconds, so that nobody else does.

    Arguments: whether it is `_LinearTransposed`, then theirs.
    """

    @staticmethod
    def forward(transposed: bool, *args: Any) -> Tensor:
        return (_LinearTransposed if transposed else _Linear).compute(*args)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.transposed, _, packed, *ctx.meta = inputs
        ctx.save_for_backward(packed)
        ctx.save_for_forward(packed)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad = _Transformed.apply(not ctx.transposed, grads[0], *ctx.saved_tensors, *ctx.meta)
        return (None, grad, None, None, None, None, None)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor:
        return _Transformed.apply(ctx.transposed, tangents[1], *ctx.saved_tensors, *ctx.meta)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], transposed: bool, x: Tensor, *matrix: Any) -> tuple[Tensor, int]:
        batch = in_dims[1]
        assert batch is not None, "there is nothing else to be batched"
        return _Transformed.apply(transposed, x.movedim(batch, 0), *matrix), 0


def differentiable(transposed: bool, *args: Any) -> Tensor:
    """A product that autograd or torch.func can differentiate."""
    if forward_ad._current_level >= 0 or (not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active()):
        return _Transformed.apply(transposed, *args)
    return (_LinearTransposed if transposed else _Linear).apply(*args)


class GroupedLinear(torch.autograd.Function):
    """Rows of x, sorted by expert, times each one's matrix (see `tensor_ops.grouped_linear`)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, packed: Tensor, offsets: Tensor, fmt: Format, backend: str, rows: int, k: int) -> Tensor:
        ctx.save_for_backward(packed, offsets)
        ctx.meta = (fmt, backend, rows, k)
        return ops.get_backend(backend).grouped_linear(x, packed, offsets, fmt, rows, ops.FLOAT)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        packed, offsets = ctx.saved_tensors
        fmt, backend, rows, k = ctx.meta
        if grads[0].dtype == torch.bfloat16 and rows % 8 == 0 and grouped_mm_stays_on(packed.device):
            return grouped_transposed(grads[0], packed, offsets, fmt, backend, rows, k), None, None, None, None, None, None
        out = grads[0].new_zeros((grads[0].shape[0], k))
        start = 0
        for expert, end in enumerate(offsets.tolist()):
            if end > start:
                out[start:end] = ops.get_backend(backend).linear_transposed(grads[0][start:end], packed[expert], fmt, k)
            start = max(start, end)
        return out, None, None, None, None, None, None


#: Weights of experts that are dequantized at a time for gradients: bounds the temporary copy (half a GiB in bfloat16, and one expert).
DENSE_WEIGHTS = 1 << 28


def grouped_mm_stays_on(device: torch.device) -> bool:
    """Whether PyTorch's product of groups in bfloat16 is a kernel for this device; elsewhere it reads the offsets on the host."""
    if device.type != "cuda" or not hasattr(F, "grouped_mm"):
        return False
    card = torch.cuda.get_device_capability(device)
    return card == (9, 0) or (card == (10, 0) and torch.__version__ >= "2.13")  # compares as versions do


def grouped_transposed(g: Tensor, packed: Tensor, offsets: Tensor, fmt: Format, backend: str, rows: int, k: int) -> Tensor:
    """bfloat16 gradients `g [T, rows]`, sorted by expert, times the matrix of each one's expert: `[T, K]`.

    Some experts at a time are dequantized and multiplied by `F.grouped_mm`, which wants `rows` to be a multiple of 8. Here the host
    reads no value and no shape depends on the routing: where `grouped_mm_stays_on` the device, it can be captured in a graph.
    """
    out = g.new_zeros((g.shape[0], k))
    if g.shape[0] == 0:
        return out
    g = g.clone(memory_format=torch.contiguous_format)  # `contiguous` leaves a single row its stride, and memory that is not aligned
    row = torch.arange(g.shape[0], device=g.device)[:, None]
    begin = offsets.new_zeros(1)
    step = max(1, DENSE_WEIGHTS // (rows * k))
    for start in range(0, packed.shape[0], step):
        # with the expert before: the group of all rows up to `begin`, whose result is dropped
        group = slice(max(start - 1, 0), start + step)
        dense = ops.get_backend(backend).dequantize(packed[group], fmt, rows, k, g.dtype)
        end = offsets[group][-1:]
        out = torch.where((row >= begin) & (row < end), F.grouped_mm(g, dense, offs=offsets[group]), out)
        begin = end
    return out
