"""Reader of GGUF files: memory-mapped, all tensor types of iqtorch, split files, safe on hostile input.

The header is walked once with Python integers; every length, count and offset is checked against the bytes of the file before
it is used, and no tensor is touched before the whole header (of all parts) is accepted. Metadata arrays are decoded when asked for.
Layout: GGUF specification (ggml docs/gguf.md); sizes of quantized tensors: `Format.row_bytes`.
"""

from __future__ import annotations

import math
import mmap
import re
import struct
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import ShapeError, UnknownFormatError
from ..formats import Format, format_by_ggml_type, get_format
from . import limits
from .errors import (
    GGUFLimitError,
    GGUFMagicError,
    GGUFMetadataError,
    GGUFSplitError,
    GGUFTensorError,
    GGUFTruncatedError,
    GGUFTypeError,
    GGUFVersionError,
)

__all__ = ["GGUFFile", "Metadata", "TensorInfo"]

#: Plain tensor types by GGUF id.
DTYPES = {
    0: torch.float32, 1: torch.float16, 30: torch.bfloat16, 28: torch.float64,
    24: torch.int8, 25: torch.int16, 26: torch.int32, 27: torch.int64,
}  # fmt: skip

#: Scalar metadata types by id: struct code (also numpy's).
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "B", 10: "Q", 11: "q", 12: "d"}
_SIZES = {kind: struct.calcsize(code) for kind, code in SCALARS.items()}
UINT32, BOOL, STRING, ARRAY = 4, 7, 8, 9

_U32 = struct.Struct("<I").unpack_from
_U64 = struct.Struct("<Q").unpack_from
_SPLIT_NAME = re.compile(r"^(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf$")

#: Types of other programs that are not read, by id (ik_llama.cpp and llama.cpp, `ggml.h`): rows interleaved for a kind of CPU, and others.
_INTERLEAVED = {
    31: "q4_0_4_4", 32: "q4_0_4_8", 33: "q4_0_8_8",
    202: "q4_0_r8", 206: "q5_0_r4", 208: "q8_0_r8", 210: "q2_k_r4", 211: "q3_k_r4", 212: "q4_k_r4", 213: "q5_k_r4", 214: "q6_k_r4",
    216: "iq2_xxs_r4", 217: "iq2_xs_r4", 218: "iq3_xxs_r4", 219: "iq1_s_r4", 220: "iq4_nl_r4", 221: "iq3_s_r4", 222: "iq2_s_r4",
    223: "iq4_xs_r8", 229: "iq1_m_r4", 230: "bf16_r16", 233: "q6_0_r4", 335: "iq2_bn_r4", 353: "mxfp4_r8", 397: "q8_k_r16",
    398: "q8_kv_r8", 399: "q8_k_r8",
}  # fmt: skip
_OTHERS = {34: "tq1_0", 35: "tq2_0", 36: "i2_s", 41: "q1_0_g128", 134: "iq1_bn", 135: "iq2_bn", 151: "q8_kv"}


def _named(ggml_type: int) -> str | None:
    """What to say of a type of other programs."""
    if name := _INTERLEAVED.get(ggml_type):
        return f"type id {ggml_type} is {name}, rows interleaved for one kind of CPU; make the file without repacking, or from the original"
    if name := _OTHERS.get(ggml_type):
        return f"type id {ggml_type} is {name}, which is not read here; make the file in another format from the original"
    return None


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies.

    Attributes:
        name: as in the file.
        shape: PyTorch order, `[..., rows, K]`.
        ggml_type: type id in the file.
        format: record of a quantized type, else None.
        dtype: of a plain type, else None.
        offset: first byte in its file.
        nbytes: bytes of the data, without padding.
        part: which file of a split one.
    """

    name: str
    shape: tuple[int, ...]
    ggml_type: int
    format: Format | None
    dtype: torch.dtype | None
    offset: int
    nbytes: int
    part: int = 0

    @property
    def type_name(self) -> str:
        return self.format.name if self.format else str(self.dtype).removeprefix("torch.")


@dataclass(frozen=True)
class _Value:
    """A metadata value, not decoded: its type ids (arrays: those of the elements after it), place and number of elements."""

    kinds: tuple[int, ...]
    start: int
    count: int


class Metadata(Mapping[str, Any]):
    """Metadata of a file: key -> int, float, bool, str or list, decoded on access."""

    def __init__(self, buffer: memoryview, values: dict[str, _Value]) -> None:
        self._buffer = buffer
        self._values = values
        self._decoded: dict[str, Any] = {}

    def __getitem__(self, key: str) -> Any:
        if key not in self._decoded:
            self._decoded[key] = _decode(self._buffer, self._values[key])[0]
        return self._decoded[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def kinds(self, key: str) -> tuple[int, ...]:
        """GGUF type ids of a value: `(4,)` is a uint32, `(9, 8)` an array of strings."""
        return self._values[key].kinds

    def length(self, key: str) -> int:
        """Elements of an array, without decoding it; 1 for anything else."""
        return self._values[key].count if self._values[key].kinds[0] == ARRAY else 1


class GGUFFile:
    """An open GGUF file (all parts of a split one).

    Args:
        path: the file, or any part of a split one (`NAME-00001-of-00003.gguf`); the others are found beside it.
        id_map: formats for type ids that iqtorch does not know or that another program uses differently, `{200: "iq4_ks"}`.

    Attributes:
        metadata: of the first part.
        tensors: by name, in file order.

    Raises:
        GGUFError: one of its subclasses, with the place, the value found and the limit.
        OSError: a file cannot be opened.
    """

    def __init__(self, path: str | Path, *, id_map: Mapping[int, str | Format] | None = None) -> None:
        self.path = Path(path)
        formats = {int(i): get_format(f) for i, f in (id_map or {}).items()}
        first = _Part(self.path, formats, 0)
        parts = [first]
        if "split.count" in first.metadata and first.whole_number("split.count") > 1:
            parts = _split_parts(first, formats)
        self._parts = parts
        self.metadata = parts[0].metadata
        self.version = parts[0].version
        self.tensors: dict[str, TensorInfo] = {}
        for part in parts:
            for info in part.tensors:
                if info.name in self.tensors:
                    raise GGUFTensorError(f"{part.path}: tensor {info.name!r} is there twice")
                self.tensors[info.name] = info
        if len(parts) > 1 and "split.tensors.count" in self.metadata:
            expected = first.whole_number("split.tensors.count")
            if expected != len(self.tensors):
                raise GGUFSplitError(
                    f"{self.path}: the parts hold {len(self.tensors)} tensors, their header says {expected}; download them again"
                )

    @property
    def paths(self) -> list[Path]:
        return [part.path for part in self._parts]

    def data(self, name: str) -> Tensor:
        """The tensor as stored, a view of the memory-mapped file (private: writing into it never reaches the file).

        Returns:
            uint8 blocks `[..., rows, row_bytes]` of a quantized tensor, else its plain dtype and shape.

        Raises:
            KeyError: no such tensor.
        """
        info = self.tensors[name]
        raw = self._parts[info.part].bytes[info.offset : info.offset + info.nbytes]
        if info.format is not None:
            return raw.view(*info.shape[:-1], info.format.row_bytes(info.shape[-1]))
        dtype = info.dtype or torch.uint8
        if info.offset % dtype.itemsize:
            raw = raw.clone()
        return raw.view(dtype).view(info.shape)

    def release(self, names: Iterable[str]) -> None:
        """Lets go of the memory that reading these tensors took (they can be read again): keeps a loader's footprint small."""
        for name in names:
            info = self.tensors[name]
            start = -(-info.offset // mmap.PAGESIZE) * mmap.PAGESIZE
            length = (info.offset + info.nbytes - start) // mmap.PAGESIZE * mmap.PAGESIZE
            if length > 0 and hasattr(mmap, "MADV_DONTNEED"):
                self._parts[info.part].map.madvise(mmap.MADV_DONTNEED, start, length)


def models_in(folder: Path) -> list[Path]:
    """The GGUF files in a folder; of a split file its first part, or if that is missing another."""
    found: dict[str, Path] = {}
    for file in sorted(folder.glob("*.gguf")):
        match = _SPLIT_NAME.match(file.name)
        found.setdefault(match["stem"] if match else file.name, file)
    return list(found.values())


def _split_parts(first: _Part, formats: dict[int, Format]) -> list[_Part]:
    count = first.whole_number("split.count")
    match = _SPLIT_NAME.match(first.path.name)
    if count > limits.MAX_PARTS:
        raise GGUFLimitError(f"{first.path}: split into {count} parts, at most {limits.MAX_PARTS} are read")
    if match is None or int(match["count"]) != count:
        raise GGUFSplitError(f"{first.path}: a part of {count}, so its name must end in -00001-of-{count:05d}.gguf; rename it as it was")
    parts = []
    for i in range(count):
        path = first.path.with_name(f"{match['stem']}-{i + 1:05d}-of-{count:05d}.gguf")
        if not path.is_file():
            raise GGUFSplitError(f"{first.path}: part {i + 1} of {count} is missing: {path.name}")
        part = _Part(path, formats, i)
        numbers = (part.whole_number("split.no"), part.whole_number("split.count"))
        if numbers != (i, count):
            raise GGUFSplitError(f"{path}: says it is part {numbers[0] + 1} of {numbers[1]}, expected {i + 1} of {count}")
        parts.append(part)
    return parts


class _Part:
    """One file: its mapped bytes and parsed header."""

    def __init__(self, path: Path, formats: dict[int, Format], number: int) -> None:
        self.path = path
        self.size = path.stat().st_size
        self.pos = 0
        if self.size < 24:
            raise GGUFTruncatedError(f"{path}: {self.size} bytes are no GGUF file; its header alone has 24")
        # private mapping: a tensor over the page cache, whose pages are copied if anything writes into them
        with path.open("rb") as file:
            self.map = mmap.mmap(file.fileno(), self.size, access=mmap.ACCESS_COPY)
        self.bytes = torch.frombuffer(self.map, dtype=torch.uint8)
        self.buffer = memoryview(self.map)
        self.array_strings = 0
        self._header()
        n_tensors = self._u64("number of tensors")
        n_values = self._u64("number of metadata entries")
        self._limit("tensors", n_tensors, limits.MAX_TENSORS, each=24)
        self._limit("metadata entries", n_values, limits.MAX_METADATA, each=13)
        values: dict[str, _Value] = {}
        for i in range(n_values):
            key = self._string(f"key {i}", limits.MAX_KEY_BYTES)
            if not key or key in values:
                raise GGUFMetadataError(f"{path}: metadata key {key!r} is {'there twice' if key else 'empty'}")
            values[key] = self._value(key, self._u32(f"type of {key!r}"), limits.MAX_ARRAY_DEPTH)
        self.metadata = Metadata(self.buffer, values)
        self.tensors = self._tensors(n_tensors, formats, number)

    # -- checked reading -----------------------------------------------------------------------------------

    def _need(self, n: int, what: str) -> int:
        """Moves on by n bytes and returns where they start."""
        start = self.pos
        if n > self.size - start:
            raise GGUFTruncatedError(
                f"{self.path}: {what} needs {n} bytes at {start}, the file ends after {self.size - start}; download it again"
            )
        self.pos = start + n
        return start

    def _u32(self, what: str) -> int:
        return int(_U32(self.buffer, self._need(4, what))[0])

    def _u64(self, what: str) -> int:
        return int(_U64(self.buffer, self._need(8, what))[0])

    def _limit(self, what: str, n: int, most: int, each: int) -> None:
        if n > most:
            raise GGUFLimitError(f"{self.path}: claims {n} {what}, at most {most} are read")
        if n * each > self.size - self.pos:
            raise GGUFTruncatedError(f"{self.path}: claims {n} {what} in the {self.size - self.pos} bytes left; download it again")

    def _string(self, what: str, most: int) -> str:
        n = self._u64(f"length of {what}")
        if n > most:
            raise GGUFLimitError(f"{self.path}: {what} has {n} bytes, at most {most} are read")
        start = self._need(n, what)
        try:
            return str(self.buffer[start : start + n], "utf-8")
        except UnicodeDecodeError as error:
            raise GGUFMetadataError(f"{self.path}: {what} is not UTF-8: {bytes(self.buffer[start : start + min(n, 40)])!r}") from error

    def whole_number(self, key: str) -> int:
        """A metadata value that must be an integer >= 0."""
        value = self.metadata.get(key)
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            raise GGUFMetadataError(f"{self.path}: {key} must be a whole number, got {value!r}")
        return value

    # -- header --------------------------------------------------------------------------------------------

    def _header(self) -> None:
        magic = bytes(self.buffer[:4])
        if magic != b"GGUF":
            raise GGUFMagicError(f"{self.path}: starts with {magic!r}, a GGUF file with b'GGUF'")
        self.pos = 4
        self.version = self._u32("version")
        if self.version not in limits.VERSIONS:
            swapped = int.from_bytes(self.version.to_bytes(4, "little"), "big")
            if swapped in (1, *limits.VERSIONS):
                raise GGUFVersionError(f"{self.path}: big-endian (version {swapped} byte-swapped); convert it to little-endian")
            raise GGUFVersionError(f"{self.path}: GGUF version {self.version}, read are {limits.VERSIONS}; convert it again")

    def _value(self, key: str, kind: int, depth: int) -> _Value:
        """Walks over a value of type `kind`, checking it."""
        start = self.pos
        if kind in SCALARS:
            self._need(_SIZES[kind], repr(key))
            if kind == BOOL and self.buffer[start] > 1:
                raise GGUFMetadataError(f"{self.path}: {key!r} is a bool of value {self.buffer[start]}")
            return _Value((kind,), start, 1)
        if kind == STRING:
            n = self._u64(f"length of {key!r}")
            most = limits.MAX_STRING_BYTES_OF.get(key, limits.MAX_STRING_BYTES)
            if n > most:
                raise GGUFLimitError(f"{self.path}: {key!r} has {n} bytes, at most {most} are read")
            self._need(n, repr(key))
            return _Value((kind,), start, 1)
        if kind != ARRAY:
            raise GGUFMetadataError(f"{self.path}: {key!r} has the unknown type {kind}")
        if depth == 0:
            raise GGUFLimitError(f"{self.path}: {key!r} nests arrays more than {limits.MAX_ARRAY_DEPTH} deep")
        inner = self._u32(f"element type of {key!r}")
        count = self._u64(f"length of {key!r}")
        start = self.pos
        if inner in SCALARS:
            self._need(count * _SIZES[inner], repr(key))
            return _Value((kind, inner), start, count)
        self.array_strings += count
        self._limit(f"elements of {key!r} (and of the arrays before it)", self.array_strings, limits.MAX_ARRAY_STRINGS, each=0)
        self._limit(f"elements of {key!r}", count, limits.MAX_ARRAY_STRINGS, each=8)
        if inner == STRING:
            self._skip_strings(key, count)
            return _Value((kind, inner), start, count)
        kinds: set[tuple[int, ...]] = {self._value(key, inner, depth - 1).kinds for _ in range(count)}
        return _Value((kind, inner, *(min(kinds)[1:] if kinds else ())), start, count)

    def _skip_strings(self, key: str, count: int) -> None:
        # the one loop that runs hundreds of thousands of times: kept flat
        buffer, pos, last, most = self.buffer, self.pos, self.size - 8, limits.MAX_STRING_BYTES
        for i in range(count):
            if pos > last:
                raise GGUFTruncatedError(f"{self.path}: ends within element {i} of {count} of {key!r}; download it again")
            n = _U64(buffer, pos)[0]
            if n > most:
                raise GGUFLimitError(f"{self.path}: element {i} of {key!r} has {n} bytes, at most {most} are read")
            pos += 8 + n
        self._need(pos - self.pos, repr(key))

    def _tensors(self, count: int, formats: dict[int, Format], number: int) -> list[TensorInfo]:
        entries = []
        for i in range(count):
            name = self._string(f"name of tensor {i}", limits.MAX_NAME_BYTES)
            n_dims = self._u32(f"dimensions of {name!r}")
            if not 1 <= n_dims <= limits.MAX_DIMENSIONS:
                raise GGUFTensorError(f"{self.path}: tensor {name!r} has {n_dims} dimensions, allowed are 1 to {limits.MAX_DIMENSIONS}")
            ne = [self._u64(f"dimension {d} of {name!r}") for d in range(n_dims)]
            entries.append((name, ne, self._u32(f"type of {name!r}"), self._u64(f"offset of {name!r}")))
        alignment = self._alignment()
        data = -(-self.pos // alignment) * alignment
        tensors = [self._tensor(*entry, data, alignment, formats, number) for entry in entries]
        _check_overlap(self.path, tensors)
        return tensors

    def _alignment(self) -> int:
        key = "general.alignment"
        if key not in self.metadata:
            return limits.DEFAULT_ALIGNMENT
        if self.metadata.kinds(key) != (UINT32,):
            raise GGUFMetadataError(f"{self.path}: {key} has type {self.metadata.kinds(key)}, must be a uint32 (type {UINT32})")
        value = int(self.metadata[key])
        if value & (value - 1) or not 1 <= value <= limits.MAX_ALIGNMENT:
            raise GGUFMetadataError(f"{self.path}: {key} is {value}, must be a power of two from 1 to {limits.MAX_ALIGNMENT}")
        return value

    def _tensor(
        self, name: str, ne: list[int], ggml_type: int, offset: int, data: int, alignment: int, formats: dict[int, Format], number: int
    ) -> TensorInfo:
        def refuse(what: str) -> GGUFTensorError:
            return GGUFTensorError(f"{self.path}: tensor {name!r} {what}")

        if min(ne) < 1 or math.prod(ne) > limits.MAX_ELEMENTS:
            raise refuse(f"has dimensions {ne}: each must be at least 1 and their product below 2^63")
        fmt, dtype = formats.get(ggml_type), None
        if fmt is None and (dtype := DTYPES.get(ggml_type)) is None:
            try:
                fmt = format_by_ggml_type(ggml_type)
            except UnknownFormatError as error:
                known = _named(ggml_type) or f"{error}; pass id_map={{{ggml_type}: NAME}} if you know it"
                raise GGUFTypeError(f"{self.path}: tensor {name!r}: {known}") from error
        rows = math.prod(ne[1:])
        if fmt is None:
            nbytes = rows * ne[0] * (dtype or torch.uint8).itemsize
        else:
            try:
                nbytes = rows * fmt.row_bytes(ne[0])
            except ShapeError as error:
                raise refuse(f"has rows of {ne[0]} weights: {error}") from error
            if len(ne) < 2 and fmt.row_header_bytes == 0 and fmt.interleave == 1:
                ne = [ne[0], 1]  # a quantized vector is one row
            if len(ne) < 2 or ne[1] % fmt.interleave:
                raise refuse(f"has {ne[1] if len(ne) > 1 else 1} rows: {fmt.name} merges {fmt.interleave}")
        if offset % alignment:
            raise refuse(f"starts at offset {offset}, not a multiple of the alignment {alignment}")
        if data + offset + nbytes > self.size:
            short = data + offset + nbytes - self.size
            raise GGUFTruncatedError(
                f"{self.path}: tensor {name!r} ({fmt.name if fmt else dtype}, {ne}) has {nbytes} bytes at {data + offset}, "
                f"{short} beyond the end of the file; download it again"
            )
        return TensorInfo(name, tuple(reversed(ne)), ggml_type, fmt, dtype, data + offset, nbytes, number)


def _check_overlap(path: Path, tensors: list[TensorInfo]) -> None:
    ordered = sorted(tensors, key=lambda t: t.offset)
    for a, b in pairwise(ordered):
        if a.offset + a.nbytes > b.offset:
            raise GGUFTensorError(f"{path}: tensors {a.name!r} and {b.name!r} overlap: {a.offset} + {a.nbytes} > {b.offset}")


def _decode(buffer: memoryview, value: _Value) -> tuple[Any, int]:
    """The decoded value and the position after it (already checked by `_Part._value`)."""
    kind, pos = value.kinds[0], value.start
    if kind == STRING:
        n = _U64(buffer, pos)[0]
        # tokens need not be UTF-8: what is not comes back as surrogates, and is written again as it was
        return str(buffer[pos + 8 : pos + 8 + n], "utf-8", "surrogateescape"), pos + 8 + n
    if kind in SCALARS:
        decoded = struct.unpack_from("<" + SCALARS[kind], buffer, pos)[0]
        return bool(decoded) if kind == BOOL else decoded, pos + _SIZES[kind]
    inner = value.kinds[1]
    if inner in SCALARS:
        end = pos + value.count * _SIZES[inner]
        numbers = np.frombuffer(buffer[pos:end], "<" + SCALARS[inner]).tolist()
        return [bool(v) for v in numbers] if inner == BOOL else numbers, end
    out = []
    for _ in range(value.count):
        nested = inner == ARRAY
        element = _Value((ARRAY, _U32(buffer, pos)[0]), pos + 12, _U64(buffer, pos + 4)[0]) if nested else _Value((inner,), pos, 1)
        decoded, pos = _decode(buffer, element)
        out.append(decoded)
    return out, pos
