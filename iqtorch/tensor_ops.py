"""What operations do to an `IQTensor`: products, views, copies, and the fallback for everything else.

`function_handler`s are reached first, before dispatch (3 microseconds cheaper per call); `dispatch_handler`s serve the calls that
C++ code, autograd and tracing make.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import return_and_correct_aliasing

from . import ops
from .derivatives import GroupedLinear, differentiable, needs_derivative
from .errors import ShapeError, UnsupportedOperationError, WeightError
from .tensor import FROZEN, FUNCTIONS, IQTensor, dispatch_handler, function_handler

aten = torch.ops.aten

# -- operations without a packed meaning -----------------------------------------------------------------------

#: Marks rows of a packed weight that are a copy where those of a plain tensor are a view.
COPIED = "_copied"

_fallback_mode = "warn"
_warned: set[str] = set()


def set_fallback(mode: str) -> None:
    """What happens when an operation has no packed form and runs on a dequantized copy.

    Args:
        mode: `"warn"` (default; once per operation), `"silent"`, or `"error"`.

    Raises:
        ValueError: another word.
    """
    global _fallback_mode
    if mode not in ("warn", "silent", "error"):
        raise ValueError(f"mode must be 'warn', 'silent' or 'error', got {mode!r}")
    _fallback_mode = mode


def _refuse(name: str, remedy: str) -> NoReturn:
    raise UnsupportedOperationError(f"{name} is not possible on a packed weight (IQTensor); {remedy}")


def fallback(func: Any, args: Any, kwargs: Any) -> Any:
    """Runs an aten operation on dequantized copies; refuses to write into a packed weight."""
    name = func.name() if hasattr(func, "name") else str(func)
    for i, spec in enumerate(func._schema.arguments):
        value = args[i] if i < len(args) else kwargs.get(spec.name)
        if spec.alias_info is not None and spec.alias_info.is_write and isinstance(value, IQTensor):
            _refuse(name, "it would write into it: work on w.dequantize() and quantize the result again (an adapter: merge_adapter)")
    if _fallback_mode == "error":
        _refuse(name, "use w.dequantize(), or iqtorch.set_fallback('warn') to let it run on a dequantized copy")
    if _fallback_mode == "warn" and name not in _warned:
        _warned.add(name)
        warnings.warn(
            f"{name} has no packed form: it runs on a dequantized copy (iqtorch.set_fallback('error') refuses instead)", stacklevel=3
        )
    args, kwargs = torch.utils._pytree.tree_map_only(IQTensor, lambda t: t.dequantize(), (args, kwargs))
    return func(*args, **kwargs)


# -- products (the fast door, __torch_function__) --------------------------------------------------------------


def _plain(func: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """`func` without our __torch_function__ handlers (it still reaches __torch_dispatch__)."""
    with torch._C.DisableTorchFunctionSubclass():
        return func(*args, **kwargs)


def autocasts(x: Tensor) -> bool:
    """Whether autocast is on where `x` is; PyTorch has no answer for the meta device."""
    device = "cpu" if x.is_cpu else x.device.type
    return device != "meta" and torch.is_autocast_enabled(device)


def _product(x: Tensor, w: IQTensor, bias: Tensor | None, transposed: bool, autocast: bool = True) -> Tensor:
    """`x W^T + bias` (`transposed`: `x W`), W the stored `[rows, K]` matrix of a 2-D `w`; `autocast`: where it is on, it applies."""
    if w.leading:
        raise ShapeError(f"a linear product needs a 2-D weight, got shape {tuple(w.shape)}; select one expert, or use grouped_mm")
    inner, outer = (w.rows, w.k) if transposed else (w.k, w.rows)
    shape = x.shape  # asking once is what small products are sensitive to
    if not shape or shape[-1] != inner:
        raise ShapeError(
            f"activations of shape {tuple(x.shape)} do not fit a weight of shape {tuple(w.shape)}: the last dimension must be {inner}"
        )
    if bias is not None and bias.numel() != outer:
        raise ShapeError(f"a bias of shape {tuple(bias.shape)} does not fit a product with {outer} columns")
    if autocast and autocasts(x):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    if x.dtype not in ops.KERNEL_DTYPES:
        if not x.is_floating_point():
            raise UnsupportedOperationError(f"activations must be floating, got {x.dtype}; use x.to({w.dtype})")
        dense = w._stored_dense(x.dtype)
        return F.linear(x, dense.T if transposed else dense, bias)
    backend = ops.get_backend(w.backend)
    if needs_derivative(x) or (bias is not None and needs_derivative(bias)):
        y = differentiable(transposed, x, w.packed, w.format, w.backend, w.rows, w.k)
        return y if bias is None else y + bias.to(y.dtype)
    if transposed:
        y = backend.linear_transposed(x, w.packed, w.format, outer)
        return y if bias is None else y + bias.to(y.dtype)
    return backend.linear(x, w.packed, w.format, outer, bias, ops.activation_precision())


@function_handler(F.linear)
def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    if type(weight) is not IQTensor or isinstance(input, IQTensor):
        return _plain(F.linear, input, weight, bias)
    return _product(input, weight, bias, weight.transposed)


@function_handler(torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__)
def _matmul(input: Tensor, other: Tensor, *, out: Tensor | None = None) -> Tensor:
    if type(other) is not IQTensor or isinstance(input, IQTensor) or other.leading:
        return _plain(torch.matmul, input, other, out=out)
    y = _product(input, other, None, not other.transposed, autocast=out is None)
    return y if out is None else _write(y, out)


@function_handler(torch.mm, torch.Tensor.mm)
def _mm(input: Tensor, mat2: Tensor, *, out: Tensor | None = None) -> Tensor:
    return _matmul(input, mat2, out=out)


def _write(y: Tensor, out: Tensor) -> Tensor:
    """A result into `out=`, as PyTorch's operators do it: autocast does not apply, gradients and other dtypes or devices are refused."""
    if isinstance(out, IQTensor):
        _refuse("out=", "it would write into it")
    if torch.is_grad_enabled() and (y.requires_grad or out.requires_grad):
        raise RuntimeError("out=... does not support automatic differentiation, but one of the arguments requires grad")
    if out.device != y.device:
        raise RuntimeError(f"Expected out tensor to be on {y.device}, but it is on {out.device}")
    if out.dtype != y.dtype:
        raise RuntimeError(f"Expected out tensor to have dtype {y.dtype}, but got {out.dtype} instead")
    return (out if out.shape == y.shape else out.resize_(y.shape)).copy_(y)


@function_handler(torch.Tensor.__rmatmul__)
def _rmatmul(self: Tensor, other: Tensor) -> Tensor:
    return _matmul(other, self)


@function_handler(torch.addmm)
def _addmm(input: Tensor, mat1: Tensor, mat2: Tensor, *, beta: float = 1, alpha: float = 1, out: Tensor | None = None) -> Tensor:
    if type(mat2) is not IQTensor or isinstance(mat1, IQTensor) or isinstance(input, IQTensor) or beta != 1 or alpha != 1:
        return _plain(torch.addmm, input, mat1, mat2, beta=beta, alpha=alpha, out=out)
    if out is None and autocasts(mat1):
        mat1, input = (t.to(torch.get_autocast_dtype(mat1.device.type)) for t in (mat1, input))
    if input.dtype != mat1.dtype:
        raise RuntimeError(f"addmm adds a product of {mat1.dtype} to a tensor of {input.dtype}: both must have the same dtype")
    bias = input.dim() == 1 and input.shape[0] == mat2.shape[1]
    y = _product(mat1, mat2, input if bias else None, not mat2.transposed, autocast=False)
    if not bias:
        y = y + input.expand_as(y)  # the product itself is not broadcast
    return y if out is None else _write(y, out)


@function_handler(torch.Tensor.addmm_)
def _addmm_(self: Tensor, mat1: Tensor, mat2: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
    if type(mat2) is not IQTensor or isinstance(mat1, IQTensor) or isinstance(self, IQTensor):
        return _plain(torch.Tensor.addmm_, self, mat1, mat2, beta=beta, alpha=alpha)
    y = _product(mat1, mat2, None, not mat2.transposed, autocast=False)
    if (self.shape, self.dtype) != (y.shape, y.dtype):
        raise RuntimeError(f"addmm_ of {y.dtype} {tuple(y.shape)} into {self.dtype} {tuple(self.shape)}: both must be the same")
    if beta == 0:
        return self.copy_(alpha * y)  # whatever it holds, NaN too, is ignored
    return (self if beta == 1 else self.mul_(beta)).add_(y, alpha=alpha)


@function_handler(F.embedding)
def _embedding(
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Tensor:
    if type(weight) is not IQTensor or weight.transposed or weight.leading:
        return _plain(F.embedding, input, weight, padding_idx, max_norm, norm_type, scale_grad_by_freq, sparse)
    if max_norm is not None:
        _refuse("F.embedding with max_norm", "it would rescale the table in place: use max_norm=None")
    logical = weight.dtype
    dtype = logical if logical in ops.KERNEL_DTYPES else torch.float32
    return ops.get_backend(weight.backend).embedding(input, weight.packed, weight.format, weight.rows, weight.k, dtype).to(logical)


def grouped_linear(x: Tensor, w: IQTensor, offsets: Tensor) -> Tensor:
    """Rows of `x [T, K]`, sorted by expert, times the transposed matrix of each one's expert: `[T, N]`.

    Args:
        x: expert e owns the rows from `offsets[e - 1]` up to `offsets[e]`; rows past the last offset give zeros.
        w: experts, stored `[E, N, K]`.
        offsets: `[E]`, integer, not decreasing.
    """
    if autocasts(x):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    offsets = offsets.to(torch.int32)
    if needs_derivative(x):
        return GroupedLinear.apply(x, w.packed, offsets, w.format, w.backend, w.rows, w.k)
    return ops.get_backend(w.backend).grouped_linear(x, w.packed, offsets, w.format, w.rows, ops.activation_precision())


def _grouped_mm(
    input: Tensor, mat2: Tensor, offs: Tensor | None = None, bias: Tensor | None = None, out_dtype: torch.dtype | None = None
) -> Tensor:
    if type(mat2) is not IQTensor or not mat2.leading or not mat2.transposed or offs is None or input.dim() != 2:
        if isinstance(mat2, IQTensor):
            mat2 = mat2.dequantize()
        return _plain(F.grouped_mm, input, mat2, offs=offs, bias=bias, out_dtype=out_dtype)
    y = grouped_linear(input, mat2, offs)
    if bias is not None:
        y = y + bias
    return y if out_dtype is None else y.to(out_dtype)


for _func in (getattr(F, "grouped_mm", None), getattr(torch, "_grouped_mm", None)):
    if _func is not None:
        FUNCTIONS[_func] = _grouped_mm


@function_handler(torch.bmm, torch.Tensor.bmm)
def _bmm(input: Tensor, mat2: Tensor, *, out: Tensor | None = None) -> Tensor:
    if type(mat2) is not IQTensor or not mat2.transposed or isinstance(input, IQTensor) or input.dim() != 3 or out is not None:
        return _plain(torch.bmm, input, mat2, out=out)
    experts, tokens, k = input.shape
    if (experts, k) != tuple(mat2.shape[:2]):
        raise ShapeError(f"activations of shape {tuple(input.shape)} do not fit experts of shape {tuple(mat2.shape)}")
    offsets = torch.arange(1, experts + 1, device=input.device) * tokens
    return grouped_linear(input.reshape(-1, k), mat2, offsets).reshape(experts, tokens, -1)


# -- views -----------------------------------------------------------------------------------------------------


@function_handler(torch.Tensor.t, torch.t, torch.Tensor.T.__get__, torch.Tensor.mT.__get__)  # type: ignore[attr-defined]
def _t(self: IQTensor) -> Tensor:
    return self._swapped()


@function_handler(torch.transpose, torch.Tensor.transpose, torch.swapaxes, torch.Tensor.swapaxes)
def _transpose(input: IQTensor, dim0: int, dim1: int) -> Tensor:
    if {dim0 % input.dim(), dim1 % input.dim()} == {input.dim() - 2, input.dim() - 1}:
        return input._swapped()
    return _plain(torch.transpose, input, dim0, dim1)


@function_handler(torch.Tensor.__getitem__)
def _getitem(self: IQTensor, index: Any) -> Tensor:
    if self.dim() == 3 and not isinstance(index, (tuple, slice, list)) and index is not None and index is not Ellipsis:
        scalar = not isinstance(index, Tensor) or (index.dim() == 0 and index.dtype not in (torch.bool, torch.uint8))
        if scalar and not isinstance(index, bool):
            return _select(None, (self, 0, int(index)), {})
    if self.dim() == 2 and not self.transposed and type(index) is int:
        if not -self.rows <= index < self.rows:
            raise IndexError(f"row {index} is out of range: the weight has {self.rows}")
        return _embedding(torch.tensor(index % self.rows, device=self.device), self)
    if self.dim() == 2 and not self.transposed and isinstance(index, Tensor) and index.dtype in (torch.int32, torch.int64):
        return _embedding(torch.where(index < 0, index + self.rows, index), self)
    return _plain(torch.Tensor.__getitem__, self, index)


@dispatch_handler(aten.select.int)
def _select(func: Any, args: Any, kwargs: Any) -> Tensor:
    w, dim, index = args
    if w.dim() != 3 or dim % w.dim() != 0:
        return fallback(aten.select.int, args, kwargs)
    if not -w.shape[0] <= index < w.shape[0]:
        raise IndexError(f"expert {index} is out of range: the tensor holds {w.shape[0]}")
    return IQTensor(w.packed.select(0, index), w.format, w.backend, w.shape[1:], w.dtype, w.transposed)


@dispatch_handler(aten.unbind.int)
def _unbind(func: Any, args: Any, kwargs: Any) -> Any:
    w, dim = (*args, 0)[:2]
    if w.dim() != 3 or dim % w.dim() != 0:
        return fallback(func, args, kwargs)
    return [_select(None, (w, 0, expert), {}) for expert in range(w.shape[0])]


@dispatch_handler(aten.t.default)
def _t_dispatch(func: Any, args: Any, kwargs: Any) -> Tensor:
    return args[0]._swapped()


@dispatch_handler(aten.transpose.int)
def _transpose_dispatch(func: Any, args: Any, kwargs: Any) -> Tensor:
    w, dim0, dim1 = args
    if {dim0 % w.dim(), dim1 % w.dim()} == {w.dim() - 2, w.dim() - 1}:
        return w._swapped()
    return fallback(func, args, kwargs)


@dispatch_handler(aten.permute.default)
def _permute_dispatch(func: Any, args: Any, kwargs: Any) -> Tensor:
    w, dims = args
    order = [d % w.dim() for d in dims]
    if order == list(range(w.dim())):
        return w._with(w.packed)
    if order == [*range(w.dim() - 2), w.dim() - 1, w.dim() - 2]:
        return w._swapped()
    return fallback(func, args, kwargs)


@function_handler(torch.Tensor.__setitem__)
def _setitem(self: Tensor, index: Any, value: Any) -> None:
    if isinstance(self, IQTensor):
        _refuse("w[...] = values", "work on w.dequantize() and quantize the result again")
    _plain(torch.Tensor.__setitem__, self, index, value)


# -- what reaches __torch_dispatch__ ---------------------------------------------------------------------------


@dispatch_handler(aten.linear.default)
def _linear_dispatch(func: Any, args: Any, kwargs: Any) -> Tensor:
    x, w, bias = (*args, None)[:3]
    return _linear(x, w, bias) if type(w) is IQTensor and not isinstance(x, IQTensor) else fallback(func, args, kwargs)


@dispatch_handler(aten.mm.default)
def _mm_dispatch(func: Any, args: Any, kwargs: Any) -> Tensor:
    x, w = args
    return _matmul(x, w) if type(w) is IQTensor and not isinstance(x, IQTensor) else fallback(func, args, kwargs)


@dispatch_handler(aten.addmm.default)
def _addmm_dispatch(func: Any, args: Any, kwargs: Any) -> Tensor:
    bias, x, w = args
    if kwargs or type(w) is not IQTensor or isinstance(x, IQTensor) or isinstance(bias, IQTensor):
        return fallback(func, args, kwargs)
    return _addmm(bias, x, w)


@dispatch_handler(aten._grouped_mm.default)
def _grouped_mm_dispatch(func: Any, args: Any, kwargs: Any) -> Tensor:
    x, w = args[:2]
    return _grouped_mm(*args, **kwargs) if type(w) is IQTensor and not isinstance(x, IQTensor) else fallback(func, args, kwargs)


@dispatch_handler(aten.embedding.default)
def _embedding_dispatch(func: Any, args: Any, kwargs: Any) -> Tensor:
    w, ids = args[:2]
    return _embedding(ids, w) if w.dim() == 2 and not w.transposed else fallback(func, args, kwargs)


@dispatch_handler(aten.detach.default, aten.alias.default)
def _same_bytes(func: Any, args: Any, kwargs: Any) -> Tensor:
    if args[0]._deferred() is not None:
        return return_and_correct_aliasing(func, args, kwargs, IQTensor(args[0]))
    return return_and_correct_aliasing(func, args, kwargs, args[0]._with(func(args[0].packed)))


@dispatch_handler(aten.clone.default, aten.contiguous.default)
def _copied_bytes(func: Any, args: Any, kwargs: Any) -> Tensor:
    return return_and_correct_aliasing(func, args, kwargs, args[0]._with(func(args[0].packed)))


@dispatch_handler(aten._to_copy.default)
def _to_copy(func: Any, args: Any, kwargs: Any) -> Tensor:
    w, dtype, device = args[0], kwargs.get("dtype"), kwargs.get("device")
    if dtype is not None and not dtype.is_floating_point:
        return fallback(func, args, kwargs)
    return w._move(torch.device(device) if device is not None else None, dtype, bool(kwargs.get("non_blocking", False)))


@dispatch_handler(aten.copy_.default)
def _copy_(func: Any, args: Any, kwargs: Any) -> Tensor:
    target, source = args[0], args[1]
    if not isinstance(target, IQTensor):
        return func(target, source.dequantize(target.dtype).to(target.device), *args[2:], **kwargs)
    if COPIED in vars(target):
        _refuse("copy_ into some rows", "they are a copy, and the whole would not change: quantize the whole again")
    if not isinstance(source, IQTensor):
        if source.shape == target.shape and torch.equal(source, target.dequantize(source.dtype).to(source.device)):
            return target  # what DistributedDataParallel gets from the first process
        _refuse("copy_ of a plain tensor of other values", f"quantize it first: iqtorch.quantize(tensor, {target.format.name!r})")
    if source.shape != target.shape or source.format is not target.format or source.transposed != target.transposed:
        raise ShapeError(
            f"cannot copy {source.format.name} {tuple(source.shape)} into {target.format.name} {tuple(target.shape)}; "
            "load with assign=True to replace the weight"
        )
    if source.backend != target.backend:
        source = IQTensor(
            ops.get_backend(target.backend).pack(source.to_blocks().to(target.device), target.format),
            target.format,
            target.backend,
            target.shape,
            target.dtype,
            target.transposed,
        )
    target.packed.copy_(source.packed)
    return target


@dispatch_handler(aten.is_pinned.default)
def _is_pinned(func: Any, args: Any, kwargs: Any) -> bool:
    return args[0].packed.is_pinned()


@dispatch_handler(aten._pin_memory.default)
def _pin_memory(func: Any, args: Any, kwargs: Any) -> Tensor:
    return args[0]._with(args[0].packed.pin_memory())


@dispatch_handler(aten.empty_like.default)
def _empty_like(func: Any, args: Any, kwargs: Any) -> Tensor:
    w, device = args[0], kwargs.get("device")
    if device is not None and torch.device(device).type not in (w.device.type, "meta") and w.device.type != "meta":
        return w._move(torch.device(device), kwargs.get("dtype"), False)  # another device, another layout
    return w._with(torch.empty_like(w.packed, device=device), kwargs.get("dtype"))


@dispatch_handler(aten.equal.default)
def _equal(func: Any, args: Any, kwargs: Any) -> bool:
    a, b = args
    if not isinstance(a, IQTensor) or not isinstance(b, IQTensor):
        return bool(fallback(func, args, kwargs))
    return a.format is b.format and a.shape == b.shape and torch.equal(a.to_blocks(), b.to_blocks())


@function_handler(torch.Tensor.requires_grad_)
def _requires_grad_(self: Tensor, requires_grad: bool = True) -> Tensor:
    if requires_grad:
        raise UnsupportedOperationError(FROZEN.format(fmt=self.format.name if isinstance(self, IQTensor) else "IQTensor"))
    return self


@function_handler(torch.Tensor.requires_grad.__set__)  # type: ignore[attr-defined]
def _set_requires_grad(self: Tensor, value: bool) -> None:
    _requires_grad_(self, value)


@function_handler(torch.Tensor.data.__set__)  # type: ignore[attr-defined]
def _set_data(self: Tensor, value: Tensor) -> None:
    if not isinstance(self, IQTensor) or not isinstance(value, IQTensor):
        _refuse(
            "x.data = a tensor of another kind",
            "put a plain parameter in its place first (for resize_token_embeddings too): "
            "module.weight = torch.nn.Parameter(module.weight.dequantize())",
        )
    _plain(torch.Tensor.data.__set__, self, value)  # type: ignore[attr-defined]
    vars(self).pop("packed", None)
    vars(self).update(vars(value))


@function_handler(torch.Tensor.share_memory_)
def _share_memory_(self: Tensor) -> NoReturn:
    _refuse("share_memory_", "share its bytes: w.to_blocks().share_memory_(), then IQTensor.from_blocks in the other process")


@function_handler(torch.Tensor.numpy, torch.Tensor.__array__)
def _numpy(self: Tensor, *args: Any, **kwargs: Any) -> NoReturn:
    _refuse("numpy()", "its weights are w.dequantize().numpy(), its bytes w.to_blocks().numpy()")


@function_handler(torch.Tensor.storage)
def _storage(self: Tensor) -> NoReturn:
    """safetensors ends here when it looks for the memory of a tensor, and takes a NotImplementedError for a null pointer."""
    raise WeightError(
        "a packed weight (IQTensor) has no storage of floating values: save with model.save_pretrained or torch.save, or save its bytes, "
        "w.to_blocks() (PEFT with an adapter on an embedding: save_pretrained(..., save_embedding_layers=False); accelerate's save_state: "
        "safe_serialization=False)"
    )
