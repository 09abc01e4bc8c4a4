"""`IQTensor`: a packed weight matrix that behaves as an ordinary, frozen floating-point tensor."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import return_and_correct_aliasing

from . import ops
from .errors import ShapeError, UnsupportedOperationError, WeightError
from .formats import Format, get_format

aten = torch.ops.aten

_FROZEN = (
    "packed weights are frozen: requires_grad=True has no meaning for {fmt}; train an adapter (LoRA), or use "
    ".dequantize(). Loading a state dict into a fresh model: call model.requires_grad_(False) first"
)


class IQTensor(torch.Tensor):
    """A weight `[N, K]` (or experts `[E, N, K]`) stored in a quantized format.

    It holds one uint8 tensor `packed`, in the layout of `backend`, and knows its `format`, `shape` and logical `dtype`
    (the dtype `dequantize()` returns; activations of any floating dtype are accepted). `F.linear(x, w)`, `x @ w.T`, `x @ w`
    and `F.embedding(ids, w)` run on the packed bytes, with gradients for activations and bias. Other operations that make a
    new tensor run on a dequantized copy and say so once (see `set_fallback`); writing into a packed weight is an error.

    Make one with `iqtorch.quantize`, `IQTensor.from_blocks`, or by loading a model; not through the constructor.
    """

    packed: Tensor
    format: Format
    backend: str
    transposed: bool

    @staticmethod
    def __new__(
        cls,
        packed: Tensor,
        format: Format | str | None = None,
        backend: str = "torch",
        shape: Sequence[int] | None = None,
        dtype: torch.dtype | None = None,
        transposed: bool = False,
        *,
        requires_grad: bool = False,
    ) -> IQTensor:
        if requires_grad:
            raise UnsupportedOperationError(_FROZEN.format(fmt=format or getattr(packed, "format", "IQTensor")))
        # `IQTensor(w, requires_grad=False)` is how accelerate re-makes a parameter from a moved value.
        shape, dtype = (packed.shape, packed.dtype) if isinstance(packed, IQTensor) else (shape, dtype)
        if shape is None or dtype is None:
            raise TypeError("IQTensor needs shape and dtype; use iqtorch.quantize or IQTensor.from_blocks to make one")
        return torch.Tensor._make_wrapper_subclass(cls, torch.Size(shape), dtype=dtype, device=packed.device, requires_grad=False)

    def __init__(
        self,
        packed: Tensor,
        format: Format | str | None = None,
        backend: str = "torch",
        shape: Sequence[int] | None = None,
        dtype: torch.dtype | None = None,
        transposed: bool = False,
        *,
        requires_grad: bool = False,
    ) -> None:
        source = packed if isinstance(packed, IQTensor) else None
        self.packed = source.packed if source is not None else packed
        self.format = source.format if source is not None else get_format(format or "")
        self.backend = source.backend if source is not None else backend
        self.transposed = source.transposed if source is not None else transposed

    # -- making and reading ----------------------------------------------------------------------------------

    @classmethod
    def from_blocks(
        cls, blocks: Tensor, format: Format | str, dtype: torch.dtype = torch.bfloat16, *, transposed: bool = False
    ) -> IQTensor:
        """A tensor from canonical (GGUF) bytes, kept bit for bit.

        Args:
            blocks: uint8 `[..., N, row_bytes]`, two or three dimensions. Copied where a packed layout is made from them.
            format: the bytes' format; an `_r4` format gives a tensor of the plain format.
            dtype: logical dtype, floating.
            transposed: the tensor is the transposed view `[..., K, N]` of the stored rows.

        Raises:
            UnknownFormatError, BlockSizeError, ShapeError, WeightError: unknown name; bytes, shape or dtype that cannot be.
        """
        fmt = get_format(format)
        if not dtype.is_floating_point:
            raise WeightError(f"the logical dtype of a weight must be floating, got {dtype}; use torch.bfloat16")
        fmt.check_blocks(blocks)
        if blocks.ndim > 3:
            raise ShapeError(f"weights have 2 dimensions, or 3 for experts; got blocks of {blocks.ndim} dimensions")
        if fmt.plain:
            blocks, fmt = repack_rows(blocks, fmt, get_format(fmt.plain)), get_format(fmt.plain)
        return cls._place(blocks, fmt, dtype, transposed)

    @classmethod
    def _place(cls, blocks: Tensor, fmt: Format, dtype: torch.dtype, transposed: bool = False) -> IQTensor:
        """Canonical bytes of a plain format -> tensor in the layout that suits their device."""
        rows, k = blocks.shape[-2], fmt.row_length(blocks.shape[-1])
        backend = ops.choose_backend(fmt, rows, k, blocks.device)
        packed = ops.get_backend(backend).pack(blocks, fmt)
        shape = (*blocks.shape[:-2], k, rows) if transposed else (*blocks.shape[:-2], rows, k)
        return cls(packed, fmt, backend, shape, dtype, transposed)

    def to_blocks(self, format: Format | str | None = None) -> Tensor:
        """Canonical bytes, uint8 `[..., N, row_bytes]`, on this tensor's device.

        Args:
            format: this tensor's format (default), or its `_r4` twin to get interleaved rows.

        Raises:
            ShapeError: another format, or a number of rows that the interleaved format cannot hold.
        """
        blocks = ops.get_backend(self.backend).unpack(self.packed, self.format, self.rows, self.k)
        target = self.format if format is None else get_format(format)
        if target is self.format:
            return blocks
        if target.plain != self.format.name:
            raise ShapeError(f"a tensor of {self.format.name} has no {target.name} bytes; quantize its dequantize() to {target.name}")
        return repack_rows(blocks, self.format, target)

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """A plain tensor of this tensor's shape, in `dtype` (default: its own); includes `format.runtime_scale`."""
        out = self._stored_dense(dtype or self.dtype)
        return out.mT if self.transposed else out

    def _stored_dense(self, dtype: torch.dtype) -> Tensor:
        """Plain weights `[..., N, K]` in the order they are stored."""
        computed = dtype if dtype in ops.KERNEL_DTYPES else torch.float32
        return ops.get_backend(self.backend).dequantize(self.packed, self.format, self.rows, self.k, computed).to(dtype)

    @property
    def rows(self) -> int:
        """Rows `N` of the stored matrix."""
        return self.shape[-1] if self.transposed else self.shape[-2]

    @property
    def k(self) -> int:
        """Length `K` of the stored rows, the contraction dimension of `F.linear`."""
        return self.shape[-2] if self.transposed else self.shape[-1]

    @property
    def nbytes(self) -> int:  # type: ignore[override]
        """Bytes held, in the packed layout."""
        return self.packed.nbytes

    @property
    def bits_per_weight(self) -> float:
        """Bits per weight of the canonical bytes, row headers included."""
        return self.format.bits_per_weight(self.k)

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return (
            f"IQTensor({self.format.name!r}, shape={tuple(self.shape)}, dtype={self.dtype}, device={str(self.device)!r}, "
            f"{self.bits_per_weight:.3f} bpw, backend={self.backend!r})"
        )

    # -- protocol of wrapper subclasses ----------------------------------------------------------------------

    def __tensor_flatten__(self) -> tuple[list[str], dict[str, Any]]:
        return ["packed"], {"format": self.format.name, "backend": self.backend, "dtype": self.dtype, "transposed": self.transposed}

    @classmethod
    def __tensor_unflatten__(cls, inner: dict[str, Tensor], meta: dict[str, Any], outer_size: Any, outer_stride: Any) -> IQTensor:
        return cls(inner["packed"], meta["format"], meta["backend"], outer_size, meta["dtype"], meta["transposed"])

    def _stable_hash_for_caching(self) -> str:
        return f"IQTensor-{self.format.name}-{self.backend}-{tuple(self.shape)}-{self.dtype}-{self.transposed}"

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        # Pickles hold canonical bytes, never a layout of this machine.
        is_param = isinstance(self, torch.nn.Parameter)
        return (_rebuild, (self.to_blocks(), self.format.name, self.dtype, self.transposed, is_param))

    def __deepcopy__(self, memo: dict[int, Any]) -> IQTensor:
        if id(self) not in memo:
            memo[id(self)] = _mark_parameter(self._with(self.packed.clone()), isinstance(self, torch.nn.Parameter))
        return memo[id(self)]

    def _with(self, packed: Tensor, dtype: torch.dtype | None = None) -> IQTensor:
        return IQTensor(packed, self.format, self.backend, self.shape, dtype or self.dtype, self.transposed)

    def _move(self, device: torch.device | None, dtype: torch.dtype | None, non_blocking: bool) -> IQTensor:
        if device is None or device.type == self.device.type or device.type == "meta":
            return self._with(self.packed.to(device=device, non_blocking=non_blocking, copy=True), dtype)
        return IQTensor._place(self.to_blocks().to(device, non_blocking=non_blocking), self.format, dtype or self.dtype, self.transposed)

    def _swapped(self) -> IQTensor:
        """The transposed view: same bytes, last two dimensions exchanged."""
        shape = (*self.shape[:-2], self.shape[-1], self.shape[-2])
        return IQTensor(self.packed, self.format, self.backend, shape, self.dtype, not self.transposed)

    @classmethod
    def __torch_function__(cls, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        handler = _FUNCTIONS.get(func)
        if handler is not None:
            return handler(*args, **(kwargs or {}))
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        handler = _DISPATCH.get(func)
        if handler is not None:
            return handler(func, args, kwargs or {})
        return _fallback(func, args, kwargs or {})


def _rebuild(blocks: Tensor, format: str, dtype: torch.dtype, transposed: bool, is_param: bool) -> IQTensor:
    fmt = get_format(format)
    fmt.check_blocks(blocks)
    return _mark_parameter(IQTensor._place(blocks, fmt, dtype, transposed), is_param)


def _mark_parameter(tensor: IQTensor, is_param: bool) -> IQTensor:
    if is_param:
        tensor._is_param = True  # what nn.Parameter does for tensor subclasses
    return tensor


torch.serialization.add_safe_globals([IQTensor, _rebuild])


def repack_rows(blocks: Tensor, source: Format, target: Format) -> Tensor:
    """Canonical bytes of a format -> those of its interleaved twin, or back; loss-free.

    Raises:
        ShapeError: the number of rows is not a multiple of the rows that are merged.
    """
    merged = max(source.interleave, target.interleave)
    rows = blocks.shape[-2]
    if rows % merged:
        raise ShapeError(f"{target.name} merges {merged} rows: the number of rows must be a multiple of {merged}, got {rows}")
    flat = blocks.reshape(-1, blocks.shape[-1])
    return target.pack(source.unpack(flat)).reshape(blocks.shape)


# -- operations without a packed meaning -----------------------------------------------------------------------

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


def _fallback(func: Any, args: Any, kwargs: Any) -> Any:
    """Runs an aten operation on dequantized copies; refuses to write into a packed weight."""
    name = func.name() if hasattr(func, "name") else str(func)
    for i, spec in enumerate(func._schema.arguments):
        value = args[i] if i < len(args) else kwargs.get(spec.name)
        if spec.alias_info is not None and spec.alias_info.is_write and isinstance(value, IQTensor):
            _refuse(name, "it would write into it: work on w.dequantize() and quantize the result again")
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


class _Linear(torch.autograd.Function):
    """`x -> x W^T` for a packed W; `_LinearTransposed` is its derivative, and the reverse."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, packed: Tensor, fmt: Format, backend: str, rows: int, k: int) -> Tensor:
        ctx.save_for_backward(packed)
        ctx.meta = (fmt, backend, rows, k)
        return ops.get_backend(backend).linear(x, packed, fmt, rows, None, ops.FLOAT)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return (_LinearTransposed.apply(grads[0], *ctx.saved_tensors, *ctx.meta), None, None, None, None, None)


class _LinearTransposed(torch.autograd.Function):
    """`g -> g W`."""

    @staticmethod
    def forward(ctx: Any, g: Tensor, packed: Tensor, fmt: Format, backend: str, rows: int, k: int) -> Tensor:
        ctx.save_for_backward(packed)
        ctx.meta = (fmt, backend, rows, k)
        return ops.get_backend(backend).linear_transposed(g, packed, fmt, k)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return (_Linear.apply(grads[0], *ctx.saved_tensors, *ctx.meta), None, None, None, None, None)


_FUNCTIONS: dict[Any, Callable[..., Any]] = {}
_DISPATCH: dict[Any, Callable[..., Any]] = {}


def _function(*funcs: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    def add(handler: Callable[..., Any]) -> Callable[..., Any]:
        _FUNCTIONS.update(dict.fromkeys(funcs, handler))
        return handler

    return add


def _dispatch(*funcs: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    def add(handler: Callable[..., Any]) -> Callable[..., Any]:
        _DISPATCH.update(dict.fromkeys(funcs, handler))
        return handler

    return add


def _plain(func: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """`func` without our __torch_function__ handlers (it still reaches __torch_dispatch__)."""
    with torch._C.DisableTorchFunctionSubclass():
        return func(*args, **kwargs)


def _product(x: Tensor, w: IQTensor, bias: Tensor | None, transposed: bool) -> Tensor:
    """`x W^T + bias` (`transposed`: `x W`), W the stored `[rows, K]` matrix of a 2-D `w`."""
    if w.dim() != 2:
        raise ShapeError(f"a linear product needs a 2-D weight, got shape {tuple(w.shape)}; select one expert, or use grouped_mm")
    inner, outer = (w.rows, w.k) if transposed else (w.k, w.rows)
    if x.dim() == 0 or x.shape[-1] != inner:
        raise ShapeError(
            f"activations of shape {tuple(x.shape)} do not fit a weight of shape {tuple(w.shape)}: the last dimension must be {inner}"
        )
    if not x.is_floating_point():
        raise UnsupportedOperationError(f"activations must be floating, got {x.dtype}; use x.to({w.dtype})")
    if torch.is_autocast_enabled(x.device.type):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    if x.dtype not in ops.KERNEL_DTYPES:
        dense = w._stored_dense(x.dtype)
        return F.linear(x, dense.T if transposed else dense, bias)
    backend = ops.get_backend(w.backend)
    if torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad)):
        function = _LinearTransposed if transposed else _Linear
        y = function.apply(x, w.packed, w.format, w.backend, w.rows, w.k)
        return y if bias is None else y + bias.to(y.dtype)
    if transposed:
        y = backend.linear_transposed(x, w.packed, w.format, outer)
        return y if bias is None else y + bias.to(y.dtype)
    return backend.linear(x, w.packed, w.format, outer, bias, ops.activation_precision())


@_function(F.linear)
def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    if type(weight) is not IQTensor or isinstance(input, IQTensor):
        return _plain(F.linear, input, weight, bias)
    return _product(input, weight, bias, weight.transposed)


@_function(torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__, torch.mm, torch.Tensor.mm)
def _matmul(input: Tensor, other: Tensor) -> Tensor:
    if type(other) is not IQTensor or isinstance(input, IQTensor) or other.dim() != 2:
        return _plain(torch.matmul, input, other)
    return _product(input, other, None, not other.transposed)


@_function(torch.Tensor.__rmatmul__)
def _rmatmul(self: Tensor, other: Tensor) -> Tensor:
    return _matmul(other, self)


@_function(torch.addmm)
def _addmm(input: Tensor, mat1: Tensor, mat2: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
    if type(mat2) is not IQTensor or isinstance(mat1, IQTensor) or isinstance(input, IQTensor) or beta != 1 or alpha != 1:
        return _plain(torch.addmm, input, mat1, mat2, beta=beta, alpha=alpha)
    return _product(mat1, mat2, input, not mat2.transposed)


@_function(F.embedding)
def _embedding(
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Tensor:
    if type(weight) is not IQTensor or weight.transposed or weight.dim() != 2:
        return _plain(F.embedding, input, weight, padding_idx, max_norm, norm_type, scale_grad_by_freq, sparse)
    if max_norm is not None:
        _refuse("F.embedding with max_norm", "it would rescale the table in place: use max_norm=None")
    dtype = weight.dtype if weight.dtype in ops.KERNEL_DTYPES else torch.float32
    return ops.get_backend(weight.backend).embedding(input, weight.packed, weight.format, weight.rows, weight.k, dtype).to(weight.dtype)


def grouped_linear(x: Tensor, w: IQTensor, offsets: Tensor) -> Tensor:
    """Rows of `x [T, K]`, sorted by expert, times the transposed matrix of each one's expert: `[T, N]`.

    Args:
        x: expert e owns the rows from `offsets[e - 1]` up to `offsets[e]`; rows past the last offset give zeros.
        w: experts, stored `[E, N, K]`.
        offsets: `[E]`, integer, not decreasing.
    """
    if torch.is_autocast_enabled(x.device.type):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    offsets = offsets.to(torch.int32)
    if torch.is_grad_enabled() and x.requires_grad:
        return _GroupedLinear.apply(x, w.packed, offsets, w.format, w.backend, w.rows, w.k)
    return ops.get_backend(w.backend).grouped_linear(x, w.packed, offsets, w.format, w.rows, ops.activation_precision())


class _GroupedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, packed: Tensor, offsets: Tensor, fmt: Format, backend: str, rows: int, k: int) -> Tensor:
        ctx.save_for_backward(packed, offsets)
        ctx.meta = (fmt, backend, k)
        return ops.get_backend(backend).grouped_linear(x, packed, offsets, fmt, rows, ops.FLOAT)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        packed, offsets = ctx.saved_tensors
        fmt, backend, k = ctx.meta
        out = grads[0].new_zeros((grads[0].shape[0], k))
        start = 0
        for expert, end in enumerate(offsets.tolist()):
            if end > start:
                out[start:end] = ops.get_backend(backend).linear_transposed(grads[0][start:end], packed[expert], fmt, k)
            start = max(start, end)
        return out, None, None, None, None, None, None


def _grouped_mm(
    input: Tensor, mat2: Tensor, offs: Tensor | None = None, bias: Tensor | None = None, out_dtype: torch.dtype | None = None
) -> Tensor:
    if type(mat2) is not IQTensor or mat2.dim() != 3 or not mat2.transposed or offs is None or input.dim() != 2:
        if isinstance(mat2, IQTensor):
            mat2 = mat2.dequantize()
        return _plain(F.grouped_mm, input, mat2, offs=offs, bias=bias, out_dtype=out_dtype)
    y = grouped_linear(input, mat2, offs)
    if bias is not None:
        y = y + bias
    return y if out_dtype is None else y.to(out_dtype)


for _func in (getattr(F, "grouped_mm", None), getattr(torch, "_grouped_mm", None)):
    if _func is not None:
        _FUNCTIONS[_func] = _grouped_mm


@_function(torch.bmm, torch.Tensor.bmm)
def _bmm(input: Tensor, mat2: Tensor) -> Tensor:
    if type(mat2) is not IQTensor or not mat2.transposed or isinstance(input, IQTensor) or input.dim() != 3:
        return _plain(torch.bmm, input, mat2)
    experts, tokens, k = input.shape
    if (experts, k) != tuple(mat2.shape[:2]):
        raise ShapeError(f"activations of shape {tuple(input.shape)} do not fit experts of shape {tuple(mat2.shape)}")
    offsets = torch.arange(1, experts + 1, device=input.device) * tokens
    return grouped_linear(input.reshape(-1, k), mat2, offsets).reshape(experts, tokens, -1)


# -- views -----------------------------------------------------------------------------------------------------


@_function(torch.Tensor.t, torch.t, torch.Tensor.T.__get__, torch.Tensor.mT.__get__)  # type: ignore[attr-defined]
def _t(self: IQTensor) -> Tensor:
    return self._swapped()


@_function(torch.transpose, torch.Tensor.transpose, torch.swapaxes, torch.Tensor.swapaxes)
def _transpose(input: IQTensor, dim0: int, dim1: int) -> Tensor:
    if {dim0 % input.dim(), dim1 % input.dim()} == {input.dim() - 2, input.dim() - 1}:
        return input._swapped()
    return _plain(torch.transpose, input, dim0, dim1)


@_function(torch.Tensor.__getitem__)
def _getitem(self: IQTensor, index: Any) -> Tensor:
    if self.dim() == 3 and not isinstance(index, (tuple, slice, list)) and index is not None and index is not Ellipsis:
        scalar = not isinstance(index, Tensor) or (index.dim() == 0 and index.dtype not in (torch.bool, torch.uint8))
        if scalar and not isinstance(index, bool):
            return _select(None, (self, 0, int(index)), {})
    if self.dim() == 2 and not self.transposed and isinstance(index, Tensor) and index.dtype in (torch.int32, torch.int64):
        return _embedding(torch.where(index < 0, index + self.rows, index), self)
    return _plain(torch.Tensor.__getitem__, self, index)


@_dispatch(aten.select.int)
def _select(func: Any, args: Any, kwargs: Any) -> Tensor:
    w, dim, index = args
    if w.dim() != 3 or dim % w.dim() != 0:
        return _fallback(aten.select.int, args, kwargs)
    if not -w.shape[0] <= index < w.shape[0]:
        raise IndexError(f"expert {index} is out of range: the tensor holds {w.shape[0]}")
    return IQTensor(w.packed.select(0, index), w.format, w.backend, w.shape[1:], w.dtype, w.transposed)


@_dispatch(aten.t.default)
def _t_dispatch(func: Any, args: Any, kwargs: Any) -> Tensor:
    return args[0]._swapped()


@_dispatch(aten.transpose.int)
def _transpose_dispatch(func: Any, args: Any, kwargs: Any) -> Tensor:
    w, dim0, dim1 = args
    if {dim0 % w.dim(), dim1 % w.dim()} == {w.dim() - 2, w.dim() - 1}:
        return w._swapped()
    return _fallback(func, args, kwargs)


@_dispatch(aten.permute.default)
def _permute_dispatch(func: Any, args: Any, kwargs: Any) -> Tensor:
    w, dims = args
    order = [d % w.dim() for d in dims]
    if order == list(range(w.dim())):
        return w._with(w.packed)
    if order == [*range(w.dim() - 2), w.dim() - 1, w.dim() - 2]:
        return w._swapped()
    return _fallback(func, args, kwargs)


# -- what reaches __torch_dispatch__ ---------------------------------------------------------------------------


@_dispatch(aten.linear.default)
def _linear_dispatch(func: Any, args: Any, kwargs: Any) -> Tensor:
    x, w, bias = (*args, None)[:3]
    return _linear(x, w, bias) if type(w) is IQTensor and not isinstance(x, IQTensor) else _fallback(func, args, kwargs)


@_dispatch(aten.mm.default)
def _mm_dispatch(func: Any, args: Any, kwargs: Any) -> Tensor:
    x, w = args
    return _matmul(x, w) if type(w) is IQTensor and not isinstance(x, IQTensor) else _fallback(func, args, kwargs)


@_dispatch(aten.addmm.default)
def _addmm_dispatch(func: Any, args: Any, kwargs: Any) -> Tensor:
    bias, x, w = args
    if kwargs or type(w) is not IQTensor or isinstance(x, IQTensor) or isinstance(bias, IQTensor):
        return _fallback(func, args, kwargs)
    return _addmm(bias, x, w)


@_dispatch(aten.embedding.default)
def _embedding_dispatch(func: Any, args: Any, kwargs: Any) -> Tensor:
    w, ids = args[:2]
    return _embedding(ids, w) if w.dim() == 2 and not w.transposed else _fallback(func, args, kwargs)


@_dispatch(aten.detach.default, aten.alias.default)
def _same_bytes(func: Any, args: Any, kwargs: Any) -> Tensor:
    return return_and_correct_aliasing(func, args, kwargs, args[0]._with(func(args[0].packed)))


@_dispatch(aten.clone.default, aten.contiguous.default)
def _copied_bytes(func: Any, args: Any, kwargs: Any) -> Tensor:
    return return_and_correct_aliasing(func, args, kwargs, args[0]._with(func(args[0].packed)))


@_dispatch(aten._to_copy.default)
def _to_copy(func: Any, args: Any, kwargs: Any) -> Tensor:
    w, dtype, device = args[0], kwargs.get("dtype"), kwargs.get("device")
    if dtype is not None and not dtype.is_floating_point:
        return _fallback(func, args, kwargs)
    return w._move(torch.device(device) if device is not None else None, dtype, bool(kwargs.get("non_blocking", False)))


@_dispatch(aten.copy_.default)
def _copy_(func: Any, args: Any, kwargs: Any) -> Tensor:
    target, source = args[0], args[1]
    if not isinstance(target, IQTensor):
        return func(target, source.dequantize(target.dtype).to(target.device), *args[2:], **kwargs)
    if not isinstance(source, IQTensor):
        _refuse("copy_ of a plain tensor", f"quantize it first: iqtorch.quantize(tensor, {target.format.name!r})")
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


@_dispatch(aten.is_pinned.default)
def _is_pinned(func: Any, args: Any, kwargs: Any) -> bool:
    return args[0].packed.is_pinned()


@_dispatch(aten._pin_memory.default)
def _pin_memory(func: Any, args: Any, kwargs: Any) -> Tensor:
    return args[0]._with(args[0].packed.pin_memory())


@_dispatch(aten.empty_like.default)
def _empty_like(func: Any, args: Any, kwargs: Any) -> Tensor:
    w, device = args[0], kwargs.get("device")
    if device is not None and torch.device(device).type not in (w.device.type, "meta") and w.device.type != "meta":
        return w._move(torch.device(device), kwargs.get("dtype"), False)  # another device, another layout
    return w._with(torch.empty_like(w.packed, device=device), kwargs.get("dtype"))


@_dispatch(aten.equal.default)
def _equal(func: Any, args: Any, kwargs: Any) -> bool:
    a, b = args
    if not isinstance(a, IQTensor) or not isinstance(b, IQTensor):
        return bool(_fallback(func, args, kwargs))
    return a.format is b.format and a.shape == b.shape and torch.equal(a.to_blocks(), b.to_blocks())


@_function(torch.Tensor.requires_grad_)
def _requires_grad_(self: Tensor, requires_grad: bool = True) -> Tensor:
    if requires_grad:
        raise UnsupportedOperationError(_FROZEN.format(fmt=self.format.name if isinstance(self, IQTensor) else "IQTensor"))
    return self


@_function(torch.Tensor.requires_grad.__set__)  # type: ignore[attr-defined]
def _set_requires_grad(self: Tensor, value: bool) -> None:
    _requires_grad_(self, value)


@_function(torch.Tensor.share_memory_)
def _share_memory_(self: Tensor) -> NoReturn:
    _refuse("share_memory_", "share its bytes: w.to_blocks().share_memory_(), then IQTensor.from_blocks in the other process")
