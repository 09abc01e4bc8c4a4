"""Registration of the `iqtorch_triton::*` operators. Imports neither Triton nor a GPU: the kernels load with the first call."""

from __future__ import annotations

import os

import torch
from torch import Tensor

from ..ops import KERNEL_DTYPES, refuse_elsewhere

_lib = torch.library.Library("iqtorch_triton", "DEF")
_TAGS = (torch.Tag.pt2_compliant_tag,)

#: Triton's interpreter runs kernels on CPU tensors; then (tests) the operators exist for the CPU too.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

_lib.define("linear(Tensor x, Tensor data, int format, int rows, Tensor? bias, int precision) -> Tensor", tags=_TAGS)
_lib.define("linear_transposed(Tensor g, Tensor data, int format, int k) -> Tensor", tags=_TAGS)
_lib.define("dequantize(Tensor data, int format, int rows, int k, int dtype) -> Tensor", tags=_TAGS)
_lib.define("embedding(Tensor ids, Tensor data, int format, int rows, int k, int dtype) -> Tensor", tags=_TAGS)
_lib.define("grouped_linear(Tensor x, Tensor data, Tensor offsets, int format, int rows, int precision) -> Tensor", tags=_TAGS)
_lib.define("routed_linear(Tensor x, Tensor data, Tensor ids, int format, int rows, int precision) -> Tensor", tags=_TAGS)
_lib.define("routed_gated(Tensor x, Tensor data, Tensor ids, int format, int rows, str activation, int precision) -> Tensor", tags=_TAGS)
_lib.define("routed_weighted(Tensor x, Tensor data, Tensor ids, Tensor weights, int format, int rows, int precision) -> Tensor", tags=_TAGS)

#: Activation functions of gates that `routed_gated` computes.
ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu")


# torch.export's graphs call the operators with activations that may require gradients, hence no_grad in all of them.
@torch.no_grad()
def _linear(x: Tensor, data: Tensor, format: int, rows: int, bias: Tensor | None, precision: int) -> Tensor:
    from . import launch

    return launch.linear(x, data, format, rows, bias, precision)


@torch.no_grad()
def _linear_transposed(g: Tensor, data: Tensor, format: int, k: int) -> Tensor:
    from . import launch

    return launch.linear_transposed(g, data, format, k)


@torch.no_grad()
def _dequantize(data: Tensor, format: int, rows: int, k: int, dtype: int) -> Tensor:
    from . import launch

    return launch.dequantize(data, format, rows, k, KERNEL_DTYPES[dtype])


@torch.no_grad()
def _embedding(ids: Tensor, data: Tensor, format: int, rows: int, k: int, dtype: int) -> Tensor:
    from . import launch

    return launch.embedding(ids, data, format, rows, k, KERNEL_DTYPES[dtype])


@torch.no_grad()
def _grouped_linear(x: Tensor, data: Tensor, offsets: Tensor, format: int, rows: int, precision: int) -> Tensor:
    from . import launch

    return launch.grouped_linear(x, data, offsets, format, rows, precision)


@torch.no_grad()
def _routed_linear(x: Tensor, data: Tensor, ids: Tensor, format: int, rows: int, precision: int) -> Tensor:
    from . import launch

    return launch.routed_linear(x, data, ids, format, rows, precision)


@torch.no_grad()
def _routed_gated(x: Tensor, data: Tensor, ids: Tensor, format: int, rows: int, activation: str, precision: int) -> Tensor:
    from . import routed

    return routed.routed_gated(x, data, ids, format, rows, activation, precision)


@torch.no_grad()
def _routed_weighted(x: Tensor, data: Tensor, ids: Tensor, weights: Tensor, format: int, rows: int, precision: int) -> Tensor:
    from . import routed

    return routed.routed_weighted(x, data, ids, weights, format, rows, precision)


_OPERATORS = {
    "linear": _linear,
    "linear_transposed": _linear_transposed,
    "dequantize": _dequantize,
    "embedding": _embedding,
    "grouped_linear": _grouped_linear,
    "routed_linear": _routed_linear,
    "routed_gated": _routed_gated,
    "routed_weighted": _routed_weighted,
}
for _key, _fn in _OPERATORS.items():
    for _device in ("CUDA", "CPU") if INTERPRETED else ("CUDA",):
        _lib.impl(_key, _fn, _device)
if not INTERPRETED:
    _elsewhere = refuse_elsewhere("iqtorch_triton", _OPERATORS, "CPU", "cuda")


@torch.library.register_fake("iqtorch_triton::linear", lib=_lib)
def _(x: Tensor, data: Tensor, format: int, rows: int, bias: Tensor | None, precision: int) -> Tensor:
    return x.new_empty((*x.shape[:-1], rows))


@torch.library.register_fake("iqtorch_triton::linear_transposed", lib=_lib)
def _(g: Tensor, data: Tensor, format: int, k: int) -> Tensor:
    return g.new_empty((*g.shape[:-1], k))


@torch.library.register_fake("iqtorch_triton::dequantize", lib=_lib)
def _(data: Tensor, format: int, rows: int, k: int, dtype: int) -> Tensor:
    return data.new_empty((*data.shape[:-1], rows, k), dtype=KERNEL_DTYPES[dtype])


@torch.library.register_fake("iqtorch_triton::embedding", lib=_lib)
def _(ids: Tensor, data: Tensor, format: int, rows: int, k: int, dtype: int) -> Tensor:
    return data.new_empty((*ids.shape, k), dtype=KERNEL_DTYPES[dtype])


@torch.library.register_fake("iqtorch_triton::grouped_linear", lib=_lib)
def _(x: Tensor, data: Tensor, offsets: Tensor, format: int, rows: int, precision: int) -> Tensor:
    return x.new_empty((x.shape[0], rows))


@torch.library.register_fake("iqtorch_triton::routed_linear", lib=_lib)
def _(x: Tensor, data: Tensor, ids: Tensor, format: int, rows: int, precision: int) -> Tensor:
    return x.new_empty((*ids.shape, rows))


@torch.library.register_fake("iqtorch_triton::routed_gated", lib=_lib)
def _(x: Tensor, data: Tensor, ids: Tensor, format: int, rows: int, activation: str, precision: int) -> Tensor:
    return x.new_empty((*ids.shape, rows // 2))


@torch.library.register_fake("iqtorch_triton::routed_weighted", lib=_lib)
def _(x: Tensor, data: Tensor, ids: Tensor, weights: Tensor, format: int, rows: int, precision: int) -> Tensor:
    return x.new_empty((x.shape[0], rows))
