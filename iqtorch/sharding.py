"""Parts of packed weights: canonical bytes cut at rows and blocks, and what DTensor and FSDP2 ask of a tensor.

A part is kept as its canonical bytes. FSDP2 gathers these and the whole weight is packed for the device from them, so that every
process computes with the same bits as one process alone.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.grad_mode import _unsafe_preserve_version_counter

from . import ops
from .errors import ShapeError
from .formats import Format
from .tensor import IQTensor, dispatch_handler, function_handler
from .tensor_ops import COPIED, fallback

aten = torch.ops.aten

#: Attribute of a module whose packed parameters are split over processes: `{name: (mesh, placements)}`.
SHARDS = "_iqtorch_shards"


def split_blocks(blocks: Tensor, fmt: Format, dim: int, parts: int, rank: int, groups: int = 1, name: str = "weight") -> Tensor:
    """Part `rank` of `parts` of canonical bytes uint8 `[.., N, row_bytes]`, along `dim`; rows keep their header.

    Args:
        groups: the dimension holds this many matrices one after the other (fused gate and up), each is split.

    Raises:
        ShapeError: a part would be empty or, along the last dimension, not of whole blocks.
    """
    last = dim == blocks.ndim - 1
    size = fmt.row_length(blocks.shape[-1]) if last else blocks.shape[dim]
    unit = fmt.block_size if last else 1
    if size % (groups * parts * unit):
        what = f"rows of {size} weights in blocks of {unit}" if last else f"{size} rows"
        raise ShapeError(f"{name!r}: {what} cannot be split over {parts} processes ({fmt.name}); use fewer, or a format of smaller blocks")
    if last:
        header, body = blocks[..., : fmt.row_header_bytes], blocks[..., fmt.row_header_bytes :]
        return torch.cat([header, _pick(body, dim, parts, rank, groups)], dim=-1)
    return _pick(blocks, dim, parts, rank, groups)


def _pick(x: Tensor, dim: int, parts: int, rank: int, groups: int) -> Tensor:
    return torch.cat([group.chunk(parts, dim)[rank] for group in x.chunk(groups, dim)], dim)


def join_blocks(parts: list[Tensor], fmt: Format, dim: int, groups: int = 1) -> Tensor:
    """The whole, from all parts of `split_blocks`."""
    last = dim == parts[0].ndim - 1
    header = parts[0][..., : fmt.row_header_bytes if last else 0]
    bodies = [part[..., fmt.row_header_bytes :].chunk(groups, dim) if last else part.chunk(groups, dim) for part in parts]
    whole = torch.cat([bodies[rank][group] for group in range(groups) for rank in range(len(parts))], dim)
    return torch.cat([header, whole], dim=-1) if last else whole


def gather_blocks(blocks: Tensor, fmt: Format, mesh: Any, placements: Any, transposed: bool = False) -> Tensor:
    """The whole of which each process of a mesh holds a part; every process must call it.

    Args:
        blocks: this process's canonical bytes.
        mesh, placements: how DTensor would describe the split of the weight `[.., N, K]` (`[.., K, N]` if transposed).
    """
    for axis in reversed(range(len(placements))):
        if hasattr(placements[axis], "dim"):
            parts = [torch.empty_like(blocks) for _ in range(mesh.size(axis))]
            dist.all_gather(parts, blocks.contiguous(), group=mesh.get_group(axis))
            dim = stored_dim(placements[axis].dim, blocks.ndim, transposed)
            blocks = join_blocks(parts, fmt, dim, getattr(placements[axis], "split_factor", 1))
    return blocks


def stored_dim(dim: int, ndim: int, transposed: bool) -> int:
    """Dimension of the stored bytes for one of the weight: the last two are exchanged if it is transposed."""
    dim %= ndim
    return 2 * ndim - 3 - dim if transposed and dim >= ndim - 2 else dim


# -- what cuts a tensor in parts, puts it together, or looks at it as something else ---------------------------


def _as_stored(w: IQTensor, blocks: Tensor) -> IQTensor:
    """A tensor like `w` of other canonical bytes, kept as they are."""
    shape = [*blocks.shape[:-1], w.format.row_length(blocks.shape[-1])]
    if w.transposed:
        shape[-2:] = shape[:-3:-1]
    return IQTensor(blocks, w.format, "torch", shape, w.dtype, w.transposed)


@dispatch_handler(aten.split.Tensor)
def _split(func: Any, args: Any, kwargs: Any) -> Any:
    w, size, dim = (*args, 0)[:3]
    if w.shape[dim] % size:
        raise ShapeError(
            f"dimension {dim} of a packed weight of shape {tuple(w.shape)} cannot be split in equal parts of {size}; "
            "use a number of processes that divides it, or leave the weight whole (FSDP: ignored_params)"
        )
    parts, blocks, dim = w.shape[dim] // size, w.to_blocks(), stored_dim(dim, w.dim(), w.transposed)
    return [_as_stored(w, split_blocks(blocks, w.format, dim, parts, rank)) for rank in range(parts)]


@dispatch_handler(aten.slice.Tensor)
def _slice(func: Any, args: tuple[Any, ...], kwargs: Any) -> Any:
    w, dim, start, end, step = list(args) + [0, None, None, 1][len(args) - 1 :]
    dim = stored_dim(dim, w.dim(), w.transposed)
    if dim == w.dim() - 1 or step != 1:
        return fallback(func, args, kwargs)
    if w.backend == "torch":
        return _as_stored(w, aten.slice(w.to_blocks(), dim, start, end))  # a view, which may be written to
    size = w.rows if dim == w.dim() - 2 else w.leading[0]
    first, last, _ = slice(start, end).indices(size)
    last = max(first, last)
    whole = w._deferred()
    if whole is not None:
        blocks = whole.narrow(dim, first, last - first)
        blocks = blocks if last - first == size else blocks.clone()  # does not keep the others in memory
    elif dim == w.dim() - 2:
        blocks = ops.get_backend(w.backend).unpack_rows(w.packed, w.format, w.rows, w.k, first, last)
    else:
        blocks = ops.get_backend(w.backend).unpack(w.packed[first:last], w.format, w.rows, w.k)
    if first == last:
        return _as_stored(w, blocks)  # kernels want rows
    part = IQTensor.from_blocks(blocks, w.format, w.dtype, transposed=w.transposed, defer=True)
    vars(part)[COPIED] = True
    return part


@dispatch_handler(aten.new_zeros.default)
def _new_zeros(func: Any, args: Any, kwargs: Any) -> Any:
    w, size = args[:2]
    if kwargs.get("dtype") not in (None, w.dtype) or len(size) != w.dim() or tuple(size[1:]) != tuple(w.shape[1:]):
        return fallback(func, args, kwargs)
    rows = () if w.leading else (size[1] if w.transposed else size[0],)
    blocks = w.packed.new_zeros((*((size[0], w.rows) if w.leading else rows), w.format.row_bytes(w.k)), device=kwargs.get("device"))
    return _as_stored(w, blocks)  # scales of zero: zeros in every format


@function_handler(torch.Tensor.view)
def _view(self: Tensor, *size: Any) -> Any:
    """FSDP2 asks for a flat view, keeps it, and does not look at it: it alone gets the tensor itself, not a dense copy."""
    if size == (-1,) and isinstance(self, IQTensor) and sys._getframe(2).f_globals["__name__"].startswith("torch.distributed.fsdp"):
        return self._with(self.packed)
    with torch._C.DisableTorchFunctionSubclass():
        return self.view(*size)


@dispatch_handler(aten.view.default, aten.as_strided.default)
def _same_view(func: Any, args: Any, kwargs: Any) -> Any:
    """The tensor itself in its own shape; its values as a flat view, by which DistributedDataParallel sends them at its start."""
    w, size = args[0], tuple(args[1])
    own = tuple(w.shape)
    if size == (-1,):
        return w.dequantize().reshape(-1)
    if len(size) == len(own) and all(n in (-1, m) for n, m in zip(size, own)):
        return w._with(w.packed)
    return fallback(func, args, kwargs)


# -- FSDP2: what is sent, and what becomes of it ---------------------------------------------------------------


def _pre_all_gather(self: IQTensor, mesh: Any, outer_size: Any, outer_stride: Any, module: Any, mp_policy: Any) -> Any:
    return (self.to_blocks(),), (self.format, self.dtype, self.transposed)


def _post_all_gather(
    self: IQTensor, all_gather_outputs: tuple[Tensor, ...], metadata: Any, param_dtype: torch.dtype, *, out: Any = None
) -> Any:
    fmt, dtype, transposed = metadata
    (blocks,) = all_gather_outputs
    if out is None:
        whole = IQTensor.from_blocks(blocks, fmt, dtype, transposed=transposed)
        if not whole.packed.untyped_storage().resizable():  # FSDP2 frees the whole between uses
            whole = whole._with(whole.packed.clone())
        return whole, (whole.packed,)
    packed = ops.get_backend(out.backend).pack(blocks, fmt)
    with _unsafe_preserve_version_counter(out.packed):  # the same bytes as before: what backward has saved stays valid
        out.packed.copy_(packed)
    return None


IQTensor.fsdp_pre_all_gather = _pre_all_gather  # type: ignore[attr-defined]
IQTensor.fsdp_post_all_gather = _post_all_gather  # type: ignore[attr-defined]
