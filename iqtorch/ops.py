"""The only door to compute: backends, and the choice between them.

A backend is a module with the functions of `Backend`. It keeps a matrix in one uint8 tensor of its own layout ("packed";
for the plain-torch backend these are the canonical bytes) and computes on plain tensors, never on `IQTensor`s:

    torch    any device; decodes a slice of rows at a time (iqtorch/torch_backend.py: the oracle, and the fallback)
    cpu      the C++ extension (iqtorch/cpu_ext)
    triton   CUDA and ROCm devices (iqtorch/kernels)
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable, Iterable
from typing import Any, Protocol, cast

import torch
from torch import Tensor

from .errors import KernelUnavailableError, UnsupportedOperationError
from .formats import Format

logger = logging.getLogger("iqtorch")


class Backend(Protocol):
    """What a backend module offers. `data` is its packed uint8 tensor; leading dimensions are experts.

    Every product uses the weights times `fmt.runtime_scale`, accumulates in float32 at least, and returns `x.dtype`, which is
    float32, bfloat16 or float16.
    """

    name: str

    def supports(self, fmt: Format, rows: int, k: int) -> str | None:
        """None if the backend can run such a matrix on this machine, else the reason why not."""

    def pack(self, blocks: Tensor, fmt: Format) -> Tensor:
        """Canonical bytes uint8 `[..., rows, row_bytes]` -> packed."""

    def unpack(self, data: Tensor, fmt: Format, rows: int, k: int) -> Tensor:
        """Packed -> canonical bytes, bit for bit."""

    def unpack_rows(self, data: Tensor, fmt: Format, rows: int, k: int, start: int, stop: int) -> Tensor:
        """Canonical bytes `[..., stop - start, row_bytes]` of some rows, in memory of their own."""

    def copy(self, data: Tensor) -> Tensor:
        """Packed bytes again, in memory of their own, on the same device."""

    def linear(self, x: Tensor, data: Tensor, fmt: Format, rows: int, bias: Tensor | None, precision: int) -> Tensor:
        """`x [..., K]` times the transposed matrix, plus bias: `[..., rows]`. `precision` as in `activation_precision`."""

    def linear_many(
        self, x: Tensor, data: list[Tensor], fmts: list[Format], rows: list[int], biases: list[Tensor | None], precision: int
    ) -> list[Tensor]:
        """`linear` of the same activations with several matrices: the same bits."""

    def linear_transposed(self, g: Tensor, data: Tensor, fmt: Format, k: int) -> Tensor:
        """`g [..., rows]` times the matrix: `[..., K]`."""

    def dequantize(self, data: Tensor, fmt: Format, rows: int, k: int, dtype: torch.dtype) -> Tensor:
        """Weights `[..., rows, K]` in `dtype`."""

    def embedding(self, ids: Tensor, data: Tensor, fmt: Format, rows: int, k: int, dtype: torch.dtype) -> Tensor:
        """Rows of the matrix for integer `ids` of any shape: `[*ids.shape, K]`."""

    def grouped_linear(self, x: Tensor, data: Tensor, offsets: Tensor, fmt: Format, rows: int, precision: int) -> Tensor:
        """`x [T, K]` sorted by expert; expert e owns the rows up to int32 `offsets[e]`. Rows past the last offset come back as zeros."""


# -- choice of backend ---------------------------------------------------------------------------------------

_MODULES = {"torch": "iqtorch.torch_backend", "cpu": "iqtorch.cpu_ext", "triton": "iqtorch.kernels"}
_DEVICE_BACKEND = {"cpu": "cpu", "cuda": "triton"}
_forced: str | None = None
_fallbacks: dict[tuple[str, str], str] = {}


#: Backends imported so far: a dict, because torch.compile reads it but cannot trace an import or an `lru_cache`.
_loaded: dict[str, Backend] = {}


def get_backend(name: str) -> Backend:
    """A backend by name.

    Raises:
        KernelUnavailableError: no such backend, or its module cannot be imported here.
    """
    if name in _loaded:
        return _loaded[name]
    if name not in _MODULES:
        raise KernelUnavailableError(f"unknown backend {name!r}; known are {', '.join(_MODULES)}")
    try:
        _loaded[name] = cast(Backend, importlib.import_module(_MODULES[name]))
        return _loaded[name]
    except ImportError as error:
        raise KernelUnavailableError(f"backend {name!r} cannot be imported here: {error}") from error


def set_backend(name: str | None) -> None:
    """Forces one backend for tensors made from now on (`"torch"`, `"cpu"`, `"triton"`), or None to choose by device.

    Raises:
        KernelUnavailableError: unknown backend, or its module cannot be imported here.
    """
    global _forced
    if name is not None:
        get_backend(name)
    _forced = name


def choose_backend(fmt: Format, rows: int, k: int, device: torch.device) -> str:
    """Name of the backend that a matrix of this format and shape gets on a device.

    A fallback to `"torch"` is logged once per reason and shown by `kernel_info()`.

    Raises:
        KernelUnavailableError: the backend was forced by `set_backend` and cannot run this matrix, or `IQTORCH_ISA` asks for an
            instruction set that this CPU lacks.
    """
    name = _forced or _DEVICE_BACKEND.get(device.type)
    if name is None:
        if device.type != "meta":
            _note_fallback(fmt, device.type, f"iqtorch has none for {device.type} devices", logging.WARNING)
        return "torch"
    if name == "torch":
        return name
    try:
        backend = get_backend(name)
    except KernelUnavailableError as error:
        reason: str | None = str(error)
    else:
        reason = backend.supports(fmt, rows, k)  # raises if IQTORCH_ISA asks for what this CPU lacks: no silent fallback then
    if reason is None:
        if _DEVICE_BACKEND.get(device.type) == name:
            return name
        reason = f"it does not run on {device.type} tensors"
    if _forced:
        raise KernelUnavailableError(
            f"backend {name!r} was asked for and cannot run {fmt.name} [{rows}, {k}]: {reason}; set_backend(None) allows others"
        )
    # the CPU's has warned of what is missing when it was imported
    _note_fallback(fmt, name, reason, logging.INFO if name == "cpu" else logging.WARNING)
    return "torch"


def _note_fallback(fmt: Format, name: str, reason: str, level: int) -> None:
    if (fmt.name, reason) not in _fallbacks:
        _fallbacks[fmt.name, reason] = name
        logger.log(level, "%s: %s kernels not used: %s; falling back to plain torch", fmt.name, name, reason)


def kernel_info() -> dict[str, Any]:
    """Which backends can run here and why, the CPU's instruction set in use, and every fallback to plain torch taken so far.

    Returns:
        `{"backends": {name: "available" or reason}, "isa": name or None, "forced": name or None,
        "fallbacks": [{format, backend, reason}]}`.
    """
    from .formats import get_format

    probe = get_format("iq2_kl")
    backends: dict[str, str] = {}
    for name in _MODULES:
        try:
            backends[name] = get_backend(name).supports(probe, 256, 256) or "available"
        except KernelUnavailableError as error:
            backends[name] = str(error)
    isa = cast(Any, get_backend("cpu")).capabilities()["isa"] if backends["cpu"] == "available" else None
    fallbacks = [{"format": f, "backend": backend, "reason": reason} for (f, reason), backend in _fallbacks.items()]
    return {"backends": backends, "isa": isa, "forced": _forced, "fallbacks": fallbacks}


def refuse_elsewhere(namespace: str, operators: Iterable[str], key: str, home: str) -> torch.library.Library:
    """Makes operators that only compute on `home` tensors say so by name where another dispatch key meets them.

    Returns:
        What the registration lives in: keep it.
    """
    library = torch.library.Library(namespace, "IMPL")

    def refusal(operator: str) -> Callable[..., Any]:
        def refuse(*args: Any) -> Any:
            found = sorted({str(t.device) for arg in args for t in (arg if isinstance(arg, list) else [arg]) if isinstance(t, Tensor)})
            raise UnsupportedOperationError(
                f"{namespace}::{operator} computes on {home}, its tensors are on {' and '.join(found)}; "
                "move activations and the packed weight to one device with .to(device), which gives a weight the layout of that device"
            )

        return refuse

    for operator in operators:
        library.impl(operator, refusal(operator), key)
    return library


# -- precision of activations --------------------------------------------------------------------------------

FLOAT, INT8 = 0, 1
PRECISIONS = {"float": FLOAT, "int8": INT8}
_precision = INT8

#: Dtypes that backends compute in; others go through a dense float32 copy.
KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
#: How operators take a dtype: AOTInductor of PyTorch 2.10 hands on another one than a graph has for an argument of type ScalarType.
DTYPE_CODE = {dtype: code for code, dtype in enumerate(KERNEL_DTYPES)}


def set_activation_precision(precision: str) -> None:
    """Precision of the activations inside matrix products.

    Args:
        precision: `"int8"` (default) lets a kernel round activations to 8 bits with a scale per 32 values where that is
            faster (relative error of a product at most 1 %); `"float"` never does, and from 16 rows on may round them to
            bfloat16 (docs/cpu.md). Products that need gradients use float.

    Raises:
        ValueError: another word.
    """
    global _precision
    if precision not in PRECISIONS:
        raise ValueError(f"activation precision must be one of {list(PRECISIONS)}, got {precision!r}")
    _precision = PRECISIONS[precision]


def activation_precision() -> int:
    """Code of the current precision as kernels take it: 0 = float, 1 = int8 allowed."""
    return _precision
