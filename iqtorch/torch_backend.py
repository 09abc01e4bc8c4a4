"""The plain-torch backend: canonical bytes, decoded a slice of rows at a time. Runs on any device.

It is the oracle of every kernel test and the fallback where no kernel runs. The functions at the end are the `Backend`
interface of iqtorch/ops.py; the custom operators under them keep torch.compile from tracing the decode.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .errors import UnsupportedOperationError
from .formats import Format, format_by_ggml_type
from .ops import DTYPE_CODE, KERNEL_DTYPES

name = "torch"

_lib = torch.library.Library("iqtorch", "DEF")
_TAGS = (torch.Tag.pt2_compliant_tag,)
#: Weights decoded at a time: bounds the float32 temporaries to some tens of MiB.
_SLICE = 1 << 22

_lib.define("linear(Tensor x, Tensor blocks, int format, int rows, Tensor? bias) -> Tensor", tags=_TAGS)
_lib.define("linear_transposed(Tensor g, Tensor blocks, int format, int k) -> Tensor", tags=_TAGS)
_lib.define("dequantize(Tensor blocks, int format, int rows, int k, int dtype) -> Tensor", tags=_TAGS)
_lib.define("embedding(Tensor ids, Tensor blocks, int format, int k, int dtype) -> Tensor", tags=_TAGS)
_lib.define("grouped_linear(Tensor x, Tensor blocks, Tensor offsets, int format, int rows) -> Tensor", tags=_TAGS)


def _check_same_device(x: Tensor, data: Tensor) -> None:
    if x.device != data.device:
        raise UnsupportedOperationError(f"activations are on {x.device}, the packed weight is on {data.device}; move one with .to(device)")


def _decode(blocks: Tensor, fmt: Format) -> Tensor:
    return fmt.decode(blocks) * fmt.runtime_scale if fmt.runtime_scale != 1.0 else fmt.decode(blocks)


def _row_slices(rows: int, k: int) -> list[slice]:
    step = max(1, _SLICE // max(k, 1))
    return [slice(i, min(i + step, rows)) for i in range(0, rows, step)]


# torch.export's graphs call the operators with activations that may require gradients, hence no_grad in all of them.
@torch.no_grad()
def _linear_op(x: Tensor, blocks: Tensor, format: int, rows: int, bias: Tensor | None) -> Tensor:
    _check_same_device(x, blocks)
    fmt = format_by_ggml_type(format)
    k = fmt.row_length(blocks.shape[-1])
    xf = x.float().reshape(-1, k)
    out = torch.empty((xf.shape[0], rows), dtype=xf.dtype, device=x.device)
    for part in _row_slices(rows, k):
        torch.mm(xf, _decode(blocks[part], fmt).t(), out=out[:, part])
    if bias is not None:
        out += bias
    return out.to(x.dtype).reshape(*x.shape[:-1], rows)


@torch.no_grad()
def _linear_transposed_op(g: Tensor, blocks: Tensor, format: int, k: int) -> Tensor:
    _check_same_device(g, blocks)
    fmt = format_by_ggml_type(format)
    rows = blocks.shape[-2]
    gf = g.float().reshape(-1, rows)
    out = torch.zeros((gf.shape[0], k), dtype=gf.dtype, device=g.device)
    for part in _row_slices(rows, k):
        out.addmm_(gf[:, part], _decode(blocks[part], fmt))
    return out.to(g.dtype).reshape(*g.shape[:-1], k)


@torch.no_grad()
def _dequantize_op(blocks: Tensor, format: int, rows: int, k: int, dtype: int) -> Tensor:
    fmt = format_by_ggml_type(format)
    flat = blocks.reshape(-1, blocks.shape[-1])
    out = torch.empty((flat.shape[0], k), dtype=KERNEL_DTYPES[dtype], device=blocks.device)
    for part in _row_slices(flat.shape[0], k):
        out[part] = _decode(flat[part], fmt).to(out.dtype)
    return out.reshape(*blocks.shape[:-1], k)


@torch.no_grad()
def _embedding_op(ids: Tensor, blocks: Tensor, format: int, k: int, dtype: int) -> Tensor:
    flat = ids.reshape(-1)
    rows = blocks.shape[-2]
    if flat.device.type == "cpu" and flat.numel() and (int(flat.min()) < 0 or int(flat.max()) >= rows):
        raise IndexError(f"embedding ids must be in 0 .. {rows - 1}, got {int(flat.min())} .. {int(flat.max())}")
    if not flat.numel():
        return torch.empty((*ids.shape, k), dtype=KERNEL_DTYPES[dtype], device=blocks.device)
    return _dequantize_op(blocks.index_select(0, flat), format, flat.numel(), k, dtype).reshape(*ids.shape, k)


@torch.no_grad()
def _grouped_linear_op(x: Tensor, blocks: Tensor, offsets: Tensor, format: int, rows: int) -> Tensor:
    _check_same_device(x, blocks)
    out = torch.zeros((x.shape[0], rows), dtype=x.dtype, device=x.device)
    start = 0
    for expert, end in enumerate(offsets.tolist()):
        if end > start:
            out[start:end] = _linear_op(x[start:end], blocks[expert], format, rows, None)
        start = max(start, end)
    return out


for _key, _fn in {
    "linear": _linear_op,
    "linear_transposed": _linear_transposed_op,
    "dequantize": _dequantize_op,
    "embedding": _embedding_op,
    "grouped_linear": _grouped_linear_op,
}.items():
    _lib.impl(_key, _fn, "CompositeExplicitAutograd")


@torch.library.register_fake("iqtorch::linear", lib=_lib)
def _(x: Tensor, blocks: Tensor, format: int, rows: int, bias: Tensor | None) -> Tensor:
    return x.new_empty((*x.shape[:-1], rows))


@torch.library.register_fake("iqtorch::linear_transposed", lib=_lib)
def _(g: Tensor, blocks: Tensor, format: int, k: int) -> Tensor:
    return g.new_empty((*g.shape[:-1], k))


@torch.library.register_fake("iqtorch::dequantize", lib=_lib)
def _(blocks: Tensor, format: int, rows: int, k: int, dtype: int) -> Tensor:
    return blocks.new_empty((*blocks.shape[:-1], k), dtype=KERNEL_DTYPES[dtype])


@torch.library.register_fake("iqtorch::embedding", lib=_lib)
def _(ids: Tensor, blocks: Tensor, format: int, k: int, dtype: int) -> Tensor:
    return blocks.new_empty((*ids.shape, k), dtype=KERNEL_DTYPES[dtype])


@torch.library.register_fake("iqtorch::grouped_linear", lib=_lib)
def _(x: Tensor, blocks: Tensor, offsets: Tensor, format: int, rows: int) -> Tensor:
    return x.new_empty((x.shape[0], rows))


def supports(fmt: Format, rows: int, k: int) -> str | None:
    return None


def pack(blocks: Tensor, fmt: Format) -> Tensor:
    return blocks


def unpack(data: Tensor, fmt: Format, rows: int, k: int) -> Tensor:
    return data


def unpack_rows(data: Tensor, fmt: Format, rows: int, k: int, start: int, stop: int) -> Tensor:
    """Canonical bytes of some rows, in memory of their own."""
    return data[..., start:stop, :].clone()


def copy(data: Tensor) -> Tensor:
    """Packed bytes again, in memory of their own."""
    return data.clone()


def linear(x: Tensor, data: Tensor, fmt: Format, rows: int, bias: Tensor | None, precision: int) -> Tensor:
    return torch.ops.iqtorch.linear(x, data, fmt.ggml_type, rows, bias)


def linear_many(
    x: Tensor, data: list[Tensor], fmts: list[Format], rows: list[int], biases: list[Tensor | None], precision: int
) -> list[Tensor]:
    """`linear` of the same activations with several matrices."""
    return [linear(x, *matrix, precision) for matrix in zip(data, fmts, rows, biases, strict=True)]


def linear_transposed(g: Tensor, data: Tensor, fmt: Format, k: int) -> Tensor:
    return torch.ops.iqtorch.linear_transposed(g, data, fmt.ggml_type, k)


def dequantize(data: Tensor, fmt: Format, rows: int, k: int, dtype: torch.dtype) -> Tensor:
    return torch.ops.iqtorch.dequantize(data, fmt.ggml_type, rows, k, DTYPE_CODE[dtype])


def embedding(ids: Tensor, data: Tensor, fmt: Format, rows: int, k: int, dtype: torch.dtype) -> Tensor:
    return torch.ops.iqtorch.embedding(ids, data, fmt.ggml_type, k, DTYPE_CODE[dtype])


def grouped_linear(x: Tensor, data: Tensor, offsets: Tensor, fmt: Format, rows: int, precision: int) -> Tensor:
    return torch.ops.iqtorch.grouped_linear(x, data, offsets, fmt.ggml_type, rows)
