"""The compiled CPU kernels as a backend (`iqtorch.ops.Backend`).

A packed matrix is one uint8 tensor of `layout(fmt).packed_bytes(rows, k)` bytes (see `layout.py`). The functions here are
thin: each calls an operator `torch.ops.iqtorch_cpu.*` of the extension module on plain tensors. Without the compiled module
`supports` says why, and everything else raises `KernelUnavailableError`.
"""

from __future__ import annotations

import os
import warnings
from functools import lru_cache

import torch
from torch import Tensor

from ..errors import BlockSizeError, KernelUnavailableError
from ..formats import Format, get_format, list_formats
from ..ops import DTYPE_CODE, KERNEL_DTYPES, refuse_elsewhere
from . import kernel_file, memory
from .layout import ROWS, layout

name = "cpu"

_PRODUCTS = ("linear", "linear_many", "linear_transposed", "dequantize", "embedding", "grouped_linear")
_ENCODERS = ("encode", "write_field", "feedback", "unit_factor")
_OPERATORS = (*_PRODUCTS, *_ENCODERS, "pack", "unpack", "register_format", "isa_list", "isa_select")


def _load() -> str | None:
    """Loads the extension module; returns why it cannot be used, or None. Kernels that are missing, unusable or out of date warn."""
    file, changed = kernel_file.find()
    names = ", ".join(changed[:3]) + (f" and {len(changed) - 3} more" if len(changed) > 3 else "")
    if file is None and changed:
        return _unusable(f"the installed kernels were built from other C++ sources than those here ({names})")
    if file is None:
        return _unusable("iqtorch was installed without its compiled kernels")
    if changed:
        warnings.warn(f"C++ sources changed since the kernels were built ({names}); rebuild: {kernel_file.REBUILD}", stacklevel=2)
    try:
        torch.ops.load_library(file)
    except OSError as error:
        return _unusable(f"the compiled kernels do not load with torch {torch.__version__}: {_first_line(error)}")
    missing = [name for name in _OPERATORS if not hasattr(torch.ops.iqtorch_cpu, name)]
    if missing:
        return _unusable(f"the compiled kernels are of another version than the Python package: no {', '.join(missing)}")
    try:
        torch.ops.iqtorch_cpu.isa_select("")
    except RuntimeError as error:
        return _first_line(error)
    try:
        _register_format(get_format("iq4_nl"))
    except RuntimeError as error:
        return _unusable(_first_line(error))
    return None


def _unusable(reason: str) -> str:
    remedy = kernel_file.REBUILD if kernel_file.SOURCES.is_dir() else kernel_file.REINSTALL
    warnings.warn(f"{reason}; matrix products run on plain torch, many times slower. Remedy: {remedy}", RuntimeWarning, stacklevel=2)
    return f"{reason} ({remedy})"


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]


def _register_format(fmt: Format) -> None:
    made = layout(fmt)
    torch.ops.iqtorch_cpu.register_format(*map(torch.from_numpy, (made.ints, made.floats, made.table, made.units, made.terms)))


@lru_cache(maxsize=256)
def _register(fmt: Format) -> str | None:
    """Tells the kernels about a format; returns why they cannot run it, or None."""
    try:
        _register_format(fmt)
    except (KernelUnavailableError, RuntimeError) as error:
        return _first_line(error)
    return None


def _require(fmt: Format) -> None:
    reason = supports(fmt, 1, fmt.block_size)
    if reason is not None:
        raise KernelUnavailableError(f"no compiled CPU kernels for {fmt.name}: {reason}")


def capabilities() -> dict[str, str]:
    """Which instruction sets can run here.

    Returns:
        `{"isa": name in use, name: "available" or the reason why not, ...}`, the best first; `IQTORCH_ISA` forces one.

    Raises:
        KernelUnavailableError: there are no compiled kernels, or `IQTORCH_ISA` names what this CPU cannot run.
    """
    if _unavailable is not None:
        raise KernelUnavailableError(_unavailable)
    chosen, *rest = torch.ops.iqtorch_cpu.isa_list().splitlines()
    found = {"isa": chosen}
    for line in rest:
        isa, _, reason = line.partition("=")
        found[isa] = reason or "available"
    return found


def select_isa(isa: str | None) -> None:
    """Uses one instruction set from now on (`"scalar"`, `"avx2"`, `"avxvnni"`, `"avx512"`, `"avx512bf16"`, `"amx"`, `"i8mm"`, `"neon"`).

    None: `IQTORCH_ISA` or the best.

    Raises:
        KernelUnavailableError: unknown, or this CPU cannot run it.
    """
    if _unavailable is not None and isa is not None:
        raise KernelUnavailableError(_unavailable)
    try:
        torch.ops.iqtorch_cpu.isa_select(isa or "")
    except RuntimeError as error:
        raise KernelUnavailableError(_first_line(error)) from None


# -- the backend -----------------------------------------------------------------------------------------------


def supports(fmt: Format, rows: int, k: int) -> str | None:
    """None if the kernels can run a matrix of this format and shape, else the reason why not.

    Raises:
        KernelUnavailableError: `IQTORCH_ISA` asks for an instruction set that this CPU lacks.
    """
    if _unavailable is not None:
        if "IQTORCH_ISA" in os.environ and "IQTORCH_ISA" in _unavailable:
            raise KernelUnavailableError(_unavailable)
        return _unavailable
    if fmt.interleave != 1:
        return f"{fmt.name} interleaves {fmt.interleave} rows; unpack it to {fmt.plain} first"
    if rows < 1 or k < 1 or k % fmt.block_size:
        return f"{fmt.name} needs at least one row of a positive multiple of {fmt.block_size} weights, got {rows} x {k}"
    return _register(fmt)


def copy(data: Tensor) -> Tensor:
    """Packed bytes again, in memory of their own."""
    if type(data) is not Tensor or not data.is_cpu:  # tracing passes stand-ins for tensors
        return data.clone()
    return memory.empty(data.numel()).view(data.shape).copy_(data)


def pack(blocks: Tensor, fmt: Format) -> Tensor:
    """Canonical bytes uint8 `[..., rows, row_bytes]` -> packed uint8 `[..., packed_bytes]`, at most 3 % more bytes.

    Raises:
        BlockSizeError: the bytes are no rows of this format.
        KernelUnavailableError: no compiled kernels for this format.
    """
    _require(fmt)
    fmt.check_blocks(blocks)
    rows, k = blocks.shape[-2], fmt.row_length(blocks.shape[-1])
    if rows == 0:
        raise BlockSizeError(f"a {fmt.name} matrix needs at least one row, got shape {tuple(blocks.shape)}")
    lead, size = blocks.shape[:-2], layout(fmt).packed_bytes(rows, k)
    out = memory.empty(size * lead.numel()).view(*lead, size)
    for source, target in zip(blocks.reshape(-1, *blocks.shape[-2:]), out.view(-1, size)):
        torch.ops.iqtorch_cpu.pack(source.contiguous(), target, fmt.ggml_type)
    return out


def unpack(data: Tensor, fmt: Format, rows: int, k: int) -> Tensor:
    """Packed -> canonical bytes uint8 `[..., rows, row_bytes]`, bit for bit."""
    _require(fmt)
    out = torch.empty((*data.shape[:-1], rows, fmt.row_bytes(k)), dtype=torch.uint8, device="cpu")
    for source, target in zip(data.reshape(-1, data.shape[-1]), out.view(-1, *out.shape[-2:])):
        torch.ops.iqtorch_cpu.unpack(source.contiguous(), target, fmt.ggml_type)
    return out


def unpack_rows(data: Tensor, fmt: Format, rows: int, k: int, start: int, stop: int) -> Tensor:
    """Canonical bytes of some rows, in memory of their own: of the groups of rows around them, the others are not touched."""
    made, full = layout(fmt), rows - rows % ROWS
    first, last = min(start // ROWS * ROWS, full), min(-(-stop // ROWS) * ROWS, full)
    header, tiles, size = fmt.row_header_bytes, made.header_bytes(rows), made.tile_bytes * (k // fmt.block_size) // ROWS
    parts = []
    if first < last:
        group = data.new_zeros((*data.shape[:-1], made.packed_bytes(last - first, k)))
        group[..., : header * (last - first)] = data[..., header * first : header * last]
        group[..., made.header_bytes(last - first) :] = data[..., tiles + size * first : tiles + size * last]
        parts.append(unpack(group, fmt, last - first, k)[..., start - first : stop - first, :])
    if stop > full:  # rows that make no group are kept as they are
        rest = data[..., tiles + size * full :].unflatten(-1, (rows - full, -1))
        parts.append(rest[..., max(start - full, 0) : stop - full, :])
    return torch.cat(parts, -2) if parts else data.new_empty((*data.shape[:-1], 0, fmt.row_bytes(k)))


def linear(x: Tensor, data: Tensor, fmt: Format, rows: int, bias: Tensor | None, precision: int) -> Tensor:
    """`x [..., K]` times the transposed matrix, plus bias: `[..., rows]` in `x.dtype`. `precision`: 0 float, 1 int8 allowed."""
    return _linear(x, data, fmt.ggml_type, rows, bias, precision)


def linear_many(
    x: Tensor, data: list[Tensor], fmts: list[Format], rows: list[int], biases: list[Tensor | None], precision: int
) -> list[Tensor]:
    """`linear` of the same activations with several matrices: bit for bit the same results."""
    return torch.ops.iqtorch_cpu.linear_many.default(x, data, [fmt.ggml_type for fmt in fmts], rows, biases, precision)


def linear_transposed(g: Tensor, data: Tensor, fmt: Format, k: int) -> Tensor:
    """`g [..., rows]` times the matrix: `[..., K]`, always in float precision."""
    return torch.ops.iqtorch_cpu.linear_transposed.default(g, data, fmt.ggml_type, k)


def dequantize(data: Tensor, fmt: Format, rows: int, k: int, dtype: torch.dtype) -> Tensor:
    """Weights `[..., rows, K]`, computed in float32."""
    return torch.ops.iqtorch_cpu.dequantize.default(data, fmt.ggml_type, rows, k, DTYPE_CODE[dtype])


def embedding(ids: Tensor, data: Tensor, fmt: Format, rows: int, k: int, dtype: torch.dtype) -> Tensor:
    """Rows of the matrix for integer `ids` of any shape: `[*ids.shape, K]`.

    Raises:
        IndexError: an id below 0 or not below `rows`.
    """
    return torch.ops.iqtorch_cpu.embedding.default(ids, data, fmt.ggml_type, rows, k, DTYPE_CODE[dtype])


def grouped_linear(x: Tensor, data: Tensor, offsets: Tensor, fmt: Format, rows: int, precision: int) -> Tensor:
    """`x [T, K]` sorted by expert; expert e owns the rows up to int32 `offsets[e]`. Rows past the last offset are zeros."""
    return torch.ops.iqtorch_cpu.grouped_linear.default(x, data, offsets, fmt.ggml_type, rows, precision)


def _register_fakes() -> None:
    """Shapes and dtypes of the operators' results, for torch.compile and torch.export."""
    fake = torch.library.register_fake

    @fake("iqtorch_cpu::linear")
    def _(x: Tensor, data: Tensor, format: int, rows: int, bias: Tensor | None, precision: int) -> Tensor:
        return x.new_empty((*x.shape[:-1], rows))

    @fake("iqtorch_cpu::linear_many")
    def _(x: Tensor, data: list[Tensor], formats: list[int], rows: list[int], bias: list[Tensor | None], precision: int) -> list[Tensor]:
        return [x.new_empty((*x.shape[:-1], n)) for n in rows]

    @fake("iqtorch_cpu::linear_transposed")
    def _(g: Tensor, data: Tensor, format: int, k: int) -> Tensor:
        return g.new_empty((*g.shape[:-1], k))

    @fake("iqtorch_cpu::dequantize")
    def _(data: Tensor, format: int, rows: int, k: int, dtype: int) -> Tensor:
        return data.new_empty((*data.shape[:-1], rows, k), dtype=KERNEL_DTYPES[dtype])

    @fake("iqtorch_cpu::embedding")
    def _(ids: Tensor, data: Tensor, format: int, rows: int, k: int, dtype: int) -> Tensor:
        return data.new_empty((*ids.shape, k), dtype=KERNEL_DTYPES[dtype])

    @fake("iqtorch_cpu::grouped_linear")
    def _(x: Tensor, data: Tensor, offsets: Tensor, format: int, rows: int, precision: int) -> Tensor:
        return x.new_empty((x.shape[0], rows))


#: Why the compiled kernels cannot be used; None if they can.
_unavailable = _load()
if _unavailable is None:
    _register_fakes()
    _elsewhere = refuse_elsewhere("iqtorch_cpu", _PRODUCTS, "CompositeExplicitAutograd", "cpu")
    _linear = torch.ops.iqtorch_cpu.linear.default  # looked up once: it takes a fifth of a microsecond
    # All at once, so that a packed tensor works wherever it comes from (a pickle, another process).
    for _fmt in map(get_format, list_formats()):
        if _fmt.interleave == 1:
            _register(_fmt)
