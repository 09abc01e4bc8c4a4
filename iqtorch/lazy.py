"""`LazyTensor`: a tensor with shape and dtype whose values are made when they are read, a range of rows at a time.

transformers renames, merges and transposes what a checkpoint holds into the parameters of a model. Given lazy tensors it does so
without reading a byte: each operation is recorded, and reading a range of rows of its result reads only what these rows need.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map, tree_map_only

from .errors import UnsupportedOperationError

#: Makes the plain CPU tensor of rows `[start:stop]` (along dimension 0).
Read = Callable[[int, int], Tensor]

_aten = torch.ops.aten


class LazyTensor(torch.Tensor):
    """Values to come.

    Args:
        like: a meta tensor of its shape and dtype.
        read: makes the values of a range of rows; called from any thread.
        sliceable: reading a tensor range by range costs no more than reading it at once.
        grain: rows that are best read together; 0: any.
        work: bytes that have to be read or made for the whole tensor.
    """

    like: Tensor
    sliceable: bool
    grain: int
    work: int

    @staticmethod
    def __new__(cls, like: Tensor, read: Read, sliceable: bool = True, grain: int = 0, work: int = 0) -> LazyTensor:
        return torch.Tensor._make_wrapper_subclass(cls, like.shape, strides=like.stride(), dtype=like.dtype, device=torch.device("cpu"))

    def __init__(self, like: Tensor, read: Read, sliceable: bool = True, grain: int = 0, work: int = 0) -> None:
        self.like, self._read, self.sliceable, self.grain = like, read, sliceable and like.dim() > 0, grain
        self.work = max(work, like.numel() * like.element_size())

    @classmethod
    def of(cls, shape: Sequence[int], dtype: torch.dtype, read: Read, sliceable: bool = True, grain: int = 0, work: int = 0) -> LazyTensor:
        """A lazy tensor of a shape and dtype."""
        return cls(torch.empty(tuple(shape), dtype=dtype, device="meta"), read, sliceable, grain, work)

    def read(self, start: int = 0, stop: int | None = None) -> Tensor:
        """The values of rows `[start:stop]` (default: all), a plain contiguous CPU tensor; a tensor without dimensions is one row."""
        rows = self.like.shape[0] if self.like.dim() else 1
        stop = rows if stop is None else stop
        if self.like.dim() and stop <= start:
            return torch.empty((0, *self.like.shape[1:]), dtype=self.like.dtype, device="cpu")
        made = self._read(start, stop)
        wanted = (stop - start, *self.like.shape[1:]) if self.like.dim() else ()
        if made.shape != wanted or made.dtype != self.like.dtype:
            raise RuntimeError(f"lazy rows {start}:{stop} are {made.dtype} {list(made.shape)}, expected {self.like.dtype} {list(wanted)}")
        return made.contiguous()

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"LazyTensor(shape={tuple(self.like.shape)}, dtype={self.like.dtype})"

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        kwargs = {key: value for key, value in (kwargs or {}).items() if key not in ("device", "pin_memory", "non_blocking")}
        if func is _aten.empty_like.default:  # nothing but the shape is asked for
            return torch.empty_like(args[0].like, device="cpu", **{k: v for k, v in kwargs.items() if k != "device"})
        if func._schema.is_mutable:
            raise UnsupportedOperationError(f"{func} writes into a tensor whose values are still in a file")
        like = func(*tree_map(_to_meta, args), **tree_map(_to_meta, kwargs))
        many = isinstance(like, list | tuple)
        parts = list(like) if many else [like]
        sources = [a for a in tree_flatten((args, kwargs))[0] if isinstance(a, LazyTensor)]
        work = sum(source.work for source in sources) // len(parts)
        made = []
        for index, part in enumerate(parts):
            values, sliceable = _RULES.get(func, _whole)(func, args, kwargs, part, index if many else None)
            grain = max(source.grain if source.shape[:1] == part.shape[:1] else 0 for source in sources)
            made.append(cls(part, values, sliceable, grain, work))
        return made if many else made[0]


def read(value: Tensor, start: int = 0, stop: int | None = None) -> Tensor:
    """Rows of any tensor, lazy or not, as a plain one."""
    if isinstance(value, LazyTensor):
        return value.read(start, stop)
    value = value.detach()
    return value if value.dim() == 0 else value[start:stop]


def _to_meta(value: Any) -> Any:
    if isinstance(value, LazyTensor):
        return value.like
    return value.to("meta") if isinstance(value, Tensor) else value


# -- how the rows of a result follow from those of the arguments ---------------------------------------------
# A rule gets the operation, its arguments, the result as a meta tensor and its index where there are several,
# and returns what a LazyTensor is made of: (read, sliceable).

_Rule = Callable[[Any, Any, Any, Tensor, "int | None"], tuple[Read, bool]]


def _sliceable(value: Tensor) -> bool:
    return value.sliceable if isinstance(value, LazyTensor) else True


def _whole(func: Any, args: Any, kwargs: Any, like: Tensor, index: int | None) -> tuple[Read, bool]:
    """Any operation: done on whole tensors, each time that rows are asked for."""

    def read_rows(start: int, stop: int) -> Tensor:
        done = func(*tree_map_only(LazyTensor, LazyTensor.read, args), **tree_map_only(LazyTensor, LazyTensor.read, kwargs))
        out: Tensor = done if index is None else done[index]
        return out[start:stop] if out.dim() else out

    return read_rows, False


def _by_row(func: Any, args: Any, kwargs: Any, like: Tensor, index: int | None) -> tuple[Read, bool]:
    """Row i of the result comes from row i of the first argument alone."""
    x, *rest = args

    def read_rows(start: int, stop: int) -> Tensor:
        done = func(read(x, start, stop), *rest, **kwargs)
        out: Tensor = done if index is None else done[index]
        return out

    return read_rows, _sliceable(x)


def _elementwise(func: Any, args: Any, kwargs: Any, like: Tensor, index: int | None) -> tuple[Read, bool]:
    others = [a for a in tree_flatten((args[1:], kwargs))[0] if isinstance(a, Tensor)]
    return (_whole if others else _by_row)(func, args, kwargs, like, index)


def _keeping_rows(*positions: int) -> _Rule:
    """Row by row, if the dimensions at these positions of the arguments are not the first one."""

    def rule(func: Any, args: Any, kwargs: Any, like: Tensor, index: int | None) -> tuple[Read, bool]:
        dims = [args[p] if len(args) > p else 0 for p in positions]
        first = any(d % max(args[0].dim(), 1) == 0 for d in dims)
        return (_whole if first else _by_row)(func, args, kwargs, like, index)

    return rule


def _reshaped(func: Any, args: Any, kwargs: Any, like: Tensor, index: int | None) -> tuple[Read, bool]:
    x = args[0]
    if not (x.dim() and like.dim() and x.shape[0] == like.shape[0]):
        return _whole(func, args, kwargs, like, index)
    return (lambda start, stop: read(x, start, stop).reshape(stop - start, *like.shape[1:])), _sliceable(x)


def _permuted(func: Any, args: Any, kwargs: Any, like: Tensor, index: int | None) -> tuple[Read, bool]:
    return (_by_row if args[1] and args[1][0] % args[0].dim() == 0 else _whole)(func, args, kwargs, like, index)


def _concatenated(func: Any, args: Any, kwargs: Any, like: Tensor, index: int | None) -> tuple[Read, bool]:
    parts: list[Tensor] = list(args[0])
    dim = (args[1] if len(args) > 1 else kwargs.get("dim", 0)) % like.dim()
    sliceable = all(map(_sliceable, parts))
    if dim:
        return (lambda start, stop: torch.cat([read(part, start, stop) for part in parts], dim)), sliceable

    def read_rows(start: int, stop: int) -> Tensor:
        out, offset = [], 0
        for part in parts:
            first, last = max(start - offset, 0), min(stop - offset, part.shape[0])
            if first < last:
                out.append(read(part, first, last))
            offset += part.shape[0]
        return torch.cat(out)

    return read_rows, sliceable


def _stacked(func: Any, args: Any, kwargs: Any, like: Tensor, index: int | None) -> tuple[Read, bool]:
    parts: list[Tensor] = list(args[0])
    dim = (args[1] if len(args) > 1 else kwargs.get("dim", 0)) % like.dim()
    if dim:
        return (lambda start, stop: torch.stack([read(part, start, stop) for part in parts], dim)), all(map(_sliceable, parts))
    return (lambda start, stop: torch.stack([read(part) for part in parts[start:stop]])), True


def _selected(func: Any, args: Any, kwargs: Any, like: Tensor, index: int | None) -> tuple[Read, bool]:
    x, dim, at = args
    if dim % x.dim():
        return _by_row(func, args, kwargs, like, index)
    at %= x.shape[0]
    return (lambda start, stop: read(x, at, at + 1)[0][start:stop] if like.dim() else read(x, at, at + 1)[0]), False


def _range(x: Tensor, first: int) -> tuple[Read, bool]:
    return (lambda start, stop: read(x, first + start, first + stop)), _sliceable(x)


def _cut(func: Any, args: Any, kwargs: Any, like: Tensor, index: int | None) -> tuple[Read, bool]:
    x, dim, start = args[0], args[1] if len(args) > 1 else 0, (args[2] if len(args) > 2 else None) or 0
    if dim % x.dim():
        return _by_row(func, args, kwargs, like, index)
    if len(args) > 4 and args[4] != 1:
        return _whole(func, args, kwargs, like, index)
    return _range(x, min(start % x.shape[0] if start < 0 else start, x.shape[0]))


def _split(func: Any, args: Any, kwargs: Any, like: Tensor, index: int | None) -> tuple[Read, bool]:
    x, sizes, dim = (*args, kwargs.get("dim", 0))[:3]
    if dim % x.dim():
        return _by_row(func, args, kwargs, like, index)
    at = index or 0
    return _range(x, at * sizes if isinstance(sizes, int) else sum(sizes[:at]))


def _indexed(func: Any, args: Any, kwargs: Any, like: Tensor, index: int | None) -> tuple[Read, bool]:
    x, dim, order = args
    if dim % x.dim():
        return _by_row(func, args, kwargs, like, index)

    def read_rows(start: int, stop: int) -> Tensor:
        wanted = order[start:stop]
        low, high = int(wanted.min()), int(wanted.max()) + 1
        return read(x, low, high).index_select(0, wanted - low)

    return read_rows, _sliceable(x)


_RULES: dict[Any, _Rule] = {
    _aten.detach.default: _by_row,
    _aten.alias.default: _by_row,
    _aten.clone.default: _by_row,
    _aten._to_copy.default: _by_row,
    _aten.add.Tensor: _elementwise,
    _aten.sub.Tensor: _elementwise,
    _aten.mul.Tensor: _elementwise,
    _aten.transpose.int: _keeping_rows(1, 2),
    _aten.permute.default: _permuted,
    _aten.view.default: _reshaped,
    _aten._unsafe_view.default: _reshaped,
    _aten.reshape.default: _reshaped,
    _aten.cat.default: _concatenated,
    _aten.stack.default: _stacked,
    _aten.select.int: _selected,
    _aten.slice.Tensor: _cut,
    _aten.split.Tensor: _split,
    _aten.split_with_sizes.default: _split,
    _aten.index_select.default: _indexed,
}
