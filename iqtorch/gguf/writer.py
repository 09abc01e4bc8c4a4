"""Writer of GGUF files (version 3): metadata first, then tensors one after the other, each produced only when it is its turn."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..files import replacing
from ..formats import Format
from . import limits
from .errors import GGUFMetadataError, GGUFTensorError
from .reader import ARRAY, BOOL, DTYPES, SCALARS, STRING, UINT32

__all__ = ["TensorSource", "Typed", "write_gguf"]

INT32, FLOAT32 = 5, 6
_TYPES = {dtype: ggml_type for ggml_type, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Typed:
    """A metadata value with its GGUF type id (arrays: of the elements), where the natural one is not wanted."""

    value: Any
    kind: int


@dataclass(frozen=True)
class TensorSource:
    """A tensor to write: what the header says of it, and a function that brings its data.

    Attributes:
        name: in the file.
        shape: PyTorch order, `[..., rows, K]`.
        type: a format (the data are its blocks) or a dtype.
        load: returns the blocks or the values, contiguous, when it is time to write them.
    """

    name: str
    shape: tuple[int, ...]
    type: Format | torch.dtype
    load: Callable[[], Tensor]

    @classmethod
    def of(cls, name: str, value: Tensor) -> TensorSource:
        """A plain tensor."""
        return cls(name, tuple(value.shape), value.dtype, lambda: value)

    @property
    def nbytes(self) -> int:
        elements = 1
        for n in self.shape[:-1]:
            elements *= n
        return elements * (self.type.row_bytes(self.shape[-1]) if isinstance(self.type, Format) else self.shape[-1] * self.type.itemsize)

    @property
    def ggml_type(self) -> int:
        if isinstance(self.type, Format):
            return self.type.ggml_type
        if self.type not in _TYPES:
            allowed = ", ".join(str(dtype) for dtype in _TYPES)
            raise GGUFTensorError(f"tensor {self.name!r} is {self.type}; a GGUF file holds {allowed} or a format")
        return _TYPES[self.type]


def write_gguf(path: str | Path, metadata: Mapping[str, Any], tensors: Iterable[TensorSource]) -> None:
    """Writes a file: under another name first, so that an interrupted run leaves no damaged file.

    Args:
        metadata: key -> int (as uint32), float (float32), bool, str, a list of one of these, or `Typed`.
        tensors: in file order; each is loaded when it is written, one at a time.

    Raises:
        GGUFMetadataError: a value of another kind.
        GGUFTensorError: a name that is too long or there twice, a wrong dtype, or data that are not what the header says.
    """
    sources = list(tensors)
    header, _, _ = layout(path, metadata, sources)
    with replacing(path) as file:
        file.write(header)
        for source in sources:
            file.write(_data(source))
            file.write(b"\0" * (-file.tell() % limits.DEFAULT_ALIGNMENT))


def layout(path: str | Path, metadata: Mapping[str, Any], sources: Sequence[TensorSource]) -> tuple[bytes, list[int], int]:
    """The first bytes of a file, the byte at which each tensor starts, and the length of the file; arguments and errors of `write_gguf`."""
    alignment = limits.DEFAULT_ALIGNMENT
    parts = [b"GGUF" + struct.pack("<IQQ", limits.VERSIONS[-1], len(sources), len(metadata))]
    parts += [_text(key) + _value(key, value) for key, value in metadata.items()]
    offsets, offset, names = [], 0, set()
    for source in sources:
        name = _text(source.name)
        if source.name in names or len(name) - 8 > limits.MAX_NAME_BYTES or not 1 <= len(source.shape) <= limits.MAX_DIMENSIONS:
            raise GGUFTensorError(f"{path}: tensor {source.name!r} of shape {source.shape}: name taken or too long, or too many dimensions")
        names.add(source.name)
        ne = source.shape[::-1]
        parts.append(name + struct.pack(f"<I{len(ne)}QIQ", len(ne), *ne, source.ggml_type, offset))
        offsets.append(offset)
        offset += -(-source.nbytes // alignment) * alignment
    header = b"".join(parts)
    header += b"\0" * (-len(header) % alignment)
    return header, [len(header) + offset for offset in offsets], len(header) + offset


def _data(source: TensorSource) -> memoryview:
    data = source.load().detach().cpu().contiguous()
    expected = torch.uint8 if isinstance(source.type, Format) else source.type
    raw = data.reshape(-1).view(torch.uint8)
    if data.dtype != expected or raw.numel() != source.nbytes:
        raise GGUFTensorError(
            f"tensor {source.name!r}: {raw.numel()} bytes of {data.dtype}, {source.type} {source.shape} has {source.nbytes} of {expected}"
        )
    view: memoryview = raw.numpy().data
    return view


def _text(value: str) -> bytes:
    raw = value.encode("utf-8", "surrogateescape")
    return struct.pack("<Q", len(raw)) + raw


def _natural(key: str, value: Any) -> int:
    if isinstance(value, bool | np.bool_):
        return BOOL
    if isinstance(value, int | np.integer):
        return UINT32 if value >= 0 else INT32
    if isinstance(value, float | np.floating):
        return FLOAT32
    if isinstance(value, str):
        return STRING
    raise GGUFMetadataError(f"{key!r} is a {type(value).__name__}, metadata are int, float, bool, str, or lists of one of these")


def _value(key: str, value: Any) -> bytes:
    """Type id and value."""
    if isinstance(value, Typed):
        kind, value = value.kind, value.value
    else:
        kind = _natural(key, (value[0] if len(value) else 0) if isinstance(value, list | tuple) else value)
    try:
        if not isinstance(value, list | tuple):
            return struct.pack("<I", kind) + _scalar(kind, value)
        head = struct.pack("<IIQ", ARRAY, kind, len(value))
        if kind == STRING:
            return head + b"".join(map(_text, value))
        return head + struct.pack(f"<{len(value)}{SCALARS[kind]}", *value)
    except (struct.error, AttributeError, KeyError) as error:
        raise GGUFMetadataError(f"{key!r}: {value!r:.80} does not fit GGUF type {kind}: {error}") from error


def _scalar(kind: int, value: Any) -> bytes:
    return _text(value) if kind == STRING else struct.pack("<" + SCALARS[kind], value)
