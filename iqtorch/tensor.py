"""`IQTensor`: a packed weight matrix that behaves as an ordinary, frozen floating-point tensor."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from . import ops
from .errors import ShapeError, UnsupportedOperationError, WeightError
from .formats import Format, get_format
from .lazy import LazyTensor

FROZEN = (
    "packed weights are frozen: requires_grad=True has no meaning for {fmt}; train an adapter (LoRA), keep this weight plain "
    "(skip=[...] when quantizing), or use .dequantize(). Loading a state dict into a fresh model: call model.requires_grad_(False) first"
)

#: Attributes that make up a tensor.
_STATE = ("packed", "_blocks", "format", "backend", "transposed", "rows", "k", "leading")

#: Handlers by torch function (the fast door, `__torch_function__`) and by aten operator; filled by iqtorch/tensor_ops.py.
FUNCTIONS: dict[Any, Callable[..., Any]] = {}
DISPATCH: dict[Any, Callable[..., Any]] = {}


def function_handler(*funcs: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Registers a handler that is called with the arguments of the torch functions it stands for."""

    def add(handler: Callable[..., Any]) -> Callable[..., Any]:
        FUNCTIONS.update(dict.fromkeys(funcs, handler))
        return handler

    return add


def dispatch_handler(*funcs: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Registers a handler `(func, args, kwargs)` for aten operators."""

    def add(handler: Callable[..., Any]) -> Callable[..., Any]:
        DISPATCH.update(dict.fromkeys(funcs, handler))
        return handler

    return add


@lru_cache(maxsize=1)
def _code_key() -> str:
    """Hash of this package's Python sources. PyTorch keeps compiled code on disk, and it must not serve a later version of them: which
    operators it calls, and with what, follows from handlers that PyTorch does not see."""
    digest = hashlib.sha256()
    for file in sorted(Path(__file__).parent.rglob("*.py")):
        digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


class _Packed:
    """`IQTensor.packed` where it is not made yet: packs the canonical bytes when they are first computed with.

    It has no `__set__`, so that once a tensor has its own `packed`, reading that costs nothing.
    """

    _lock = threading.Lock()

    def __get__(self, tensor: IQTensor | None, owner: type) -> Any:
        if tensor is None:
            return self
        with self._lock:
            state = vars(tensor)
            if "packed" not in state:
                with torch.inference_mode(False):  # whose tensors could not be saved for the gradient of a later product
                    state["packed"] = ops.get_backend(tensor.backend).pack(state["_blocks"], tensor.format)
                del state["_blocks"]
        return state["packed"]


class IQTensor(torch.Tensor):
    """A weight `[N, K]` (or experts `[E, N, K]`) stored in a quantized format.

    It holds one uint8 tensor `packed`, in the layout of `backend`, and knows its `format`, `shape` and logical `dtype`
    (the dtype `dequantize()` returns; activations of any floating dtype are accepted). `F.linear(x, w)`, `x @ w.T`, `x @ w`
    and `F.embedding(ids, w)` run on the packed bytes, with gradients for activations and bias. Other operations that make a
    new tensor run on a dequantized copy and say so once (see `set_fallback`); writing into a packed weight is an error.

    Make one with `iqtorch.quantize`, `IQTensor.from_blocks`, or by loading a model; not through the constructor.
    """

    packed = cast(Tensor, _Packed())
    format: Format
    backend: str
    transposed: bool
    #: The stored matrix is `[rows, k]`, k being the contraction dimension of `F.linear`; `leading` is `()` or `(experts,)`. Plain
    #: attributes, because asking a subclass for `.shape` goes through `__torch_function__` and costs as much as a small product.
    rows: int
    k: int
    leading: tuple[int, ...]

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
            raise UnsupportedOperationError(FROZEN.format(fmt=format or getattr(packed, "format", "IQTensor")))
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
        if isinstance(packed, IQTensor):
            vars(self).update({key: value for key, value in vars(packed).items() if key in _STATE})
            return
        self.packed, self.format, self.backend, self.transposed = packed, get_format(format or ""), backend, transposed
        *leading, self.rows, self.k = shape or ()
        self.leading = tuple(leading)
        if transposed:
            self.rows, self.k = self.k, self.rows

    # -- making and reading ----------------------------------------------------------------------------------

    @classmethod
    def from_blocks(
        cls, blocks: Tensor, format: Format | str, dtype: torch.dtype = torch.bfloat16, *, transposed: bool = False, defer: bool = False
    ) -> IQTensor:
        """A tensor from canonical (GGUF) bytes, kept bit for bit.

        Args:
            blocks: uint8 `[..., N, row_bytes]`, two or three dimensions. Copied where a packed layout is made from them.
            format: the bytes' format; an `_r4` format gives a tensor of the plain format.
            dtype: logical dtype, floating.
            transposed: the tensor is the transposed view `[..., K, N]` of the stored rows.
            defer: on a CPU, keep `blocks` (which must not change) and make the packed layout when it is first computed with.

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
        return cls._place(blocks, fmt, dtype, transposed, defer)

    @classmethod
    def _place(cls, blocks: Tensor, fmt: Format, dtype: torch.dtype, transposed: bool = False, defer: bool = False) -> IQTensor:
        """Canonical bytes of a plain format -> tensor in the layout that suits their device."""
        rows, k = blocks.shape[-2], fmt.row_length(blocks.shape[-1])
        # bytes that are still in a file stay in their order: they are written, not computed with
        backend = "torch" if isinstance(blocks, LazyTensor) else ops.choose_backend(fmt, rows, k, blocks.device)
        shape = (*blocks.shape[:-2], k, rows) if transposed else (*blocks.shape[:-2], rows, k)
        defer = defer and backend != "torch" and blocks.is_cpu
        tensor = cls(blocks if defer else ops.get_backend(backend).pack(blocks, fmt), fmt, backend, shape, dtype, transposed)
        if defer:
            vars(tensor)["_blocks"] = vars(tensor).pop("packed")
        return tensor

    def to_blocks(self, format: Format | str | None = None) -> Tensor:
        """Canonical bytes, uint8 `[..., N, row_bytes]`, on this tensor's device.

        Args:
            format: this tensor's format (default), or its `_r4` twin to get interleaved rows.

        Raises:
            ShapeError: another format, or a number of rows that the interleaved format cannot hold.
        """
        blocks = self._deferred()
        if blocks is None:
            blocks = ops.get_backend(self.backend).unpack(self.packed, self.format, self.rows, self.k)
        target = self.format if format is None else get_format(format)
        if target is self.format:
            return blocks
        if target.plain != self.format.name:
            raise ShapeError(f"a tensor of {self.format.name} has no {target.name} bytes; quantize its dequantize() to {target.name}")
        return repack_rows(blocks, self.format, target)

    def _deferred(self) -> Tensor | None:
        """The canonical bytes, if the tensor is not packed yet."""
        return cast("Tensor | None", vars(self).get("_blocks"))

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """A plain tensor of this tensor's shape, in `dtype` (default: its own); includes `format.runtime_scale`."""
        out = self._stored_dense(dtype or self.dtype)
        return out.mT if self.transposed else out

    def _stored_dense(self, dtype: torch.dtype) -> Tensor:
        """Plain weights `[..., N, K]` in the order they are stored."""
        computed = dtype if dtype in ops.KERNEL_DTYPES else torch.float32
        return ops.get_backend(self.backend).dequantize(self.packed, self.format, self.rows, self.k, computed).to(dtype)

    @property
    def nbytes(self) -> int:  # type: ignore[override]
        """Bytes held, in the packed layout (canonical bytes until the first use, see `defer`)."""
        blocks = self._deferred()
        return self.packed.nbytes if blocks is None else blocks.nbytes

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
        # the precision of activations is a constant of compiled code
        parts = (self.format.name, self.backend, tuple(self.packed.shape), tuple(self.shape), self.dtype, self.transposed)
        return "-".join(map(str, ("IQTensor", _code_key(), *parts, ops.activation_precision())))

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        # Pickles hold canonical bytes, never a layout of this machine.
        is_param = isinstance(self, torch.nn.Parameter)
        return (_rebuild, (self.to_blocks(), self.format.name, self.dtype, self.transposed, is_param))

    def __deepcopy__(self, memo: dict[int, Any]) -> IQTensor:
        if id(self) not in memo:
            memo[id(self)] = _mark_parameter(
                self._with(ops.get_backend(self.backend).copy(self.packed)), isinstance(self, torch.nn.Parameter)
            )
        return memo[id(self)]

    def _with(self, packed: Tensor, dtype: torch.dtype | None = None) -> IQTensor:
        return IQTensor(packed, self.format, self.backend, self.shape, dtype or self.dtype, self.transposed)

    def _move(self, device: torch.device | None, dtype: torch.dtype | None, non_blocking: bool) -> IQTensor:
        if device is None or device == self.device:
            return self._with(ops.get_backend(self.backend).copy(self.packed), dtype)
        if self.device.type == "meta":
            raise UnsupportedOperationError(
                "a packed weight on the meta device has no bytes to copy: module.to_empty(device=...) and load_state_dict, or "
                "load_state_dict(..., assign=True)"
            )
        if device.type in (self.device.type, "meta"):
            return self._with(self.packed.to(device=device, non_blocking=non_blocking, copy=True), dtype)
        return IQTensor._place(self.to_blocks().to(device, non_blocking=non_blocking), self.format, dtype or self.dtype, self.transposed)

    def _swapped(self) -> IQTensor:
        """The transposed view: same bytes, last two dimensions exchanged."""
        shape = (*self.shape[:-2], self.shape[-1], self.shape[-2])
        return IQTensor(self.packed, self.format, self.backend, shape, self.dtype, not self.transposed)

    @classmethod
    def __torch_function__(cls, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        handler = FUNCTIONS.get(func)
        if handler is not None:
            return handler(*args, **(kwargs or {}))
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        return DISPATCH.get(func, tensor_ops.fallback)(func, args, kwargs or {})


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
    if isinstance(blocks, LazyTensor):
        return LazyTensor.of(
            blocks.shape, torch.uint8, lambda start, stop: repack_rows(blocks.read(), source, target)[start:stop], sliceable=False
        )
    flat = blocks.reshape(-1, blocks.shape[-1])
    return target.pack(source.unpack(flat)).reshape(blocks.shape)


from . import tensor_ops  # noqa: E402 (they need the class, and fill the handler tables)
