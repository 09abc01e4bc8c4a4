"""Safetensors checkpoints as files: which tensors a folder holds and where they lie, and the header of a file to be written.

The safetensors package checks every header. It can only map files, and mapped pages count as memory of the process, so values are
read here with plain reads, of the rows that are asked for.
"""

from __future__ import annotations

import json
import math
import os
import struct
import weakref
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..errors import CheckpointError
from ..lazy import LazyTensor

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"

#: Names of dtypes in the header, in the order in which the safetensors package lays tensors out in a file.
DTYPES = {
    "U64": torch.uint64, "I64": torch.int64, "F64": torch.float64, "C64": torch.complex64, "F32": torch.float32, "U32": torch.uint32,
    "I32": torch.int32, "BF16": torch.bfloat16, "F16": torch.float16, "U16": torch.uint16, "I16": torch.int16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_ORDER = {dtype: i for i, dtype in enumerate(_NAMES)}


class _File:
    """An open file, read at any place from any thread."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.fd = os.open(path, os.O_RDONLY)
        weakref.finalize(self, os.close, self.fd)

    def read(self, offset: int, nbytes: int) -> Tensor:
        """uint8 `[nbytes]`."""
        out = torch.empty(nbytes, dtype=torch.uint8, device="cpu")
        view, done = out.numpy().data, 0
        while done < nbytes:
            got = os.preadv(self.fd, [view[done:]], offset + done)
            if got == 0:
                raise CheckpointError(f"{self.path} ended at byte {offset + done}: it was changed while it was read; run again")
            done += got
        return out


def read_folder(folder: str | Path) -> dict[str, LazyTensor]:
    """The tensors of a checkpoint folder (`model.safetensors`, or shards named by an index), by name; no values are read yet.

    Raises:
        CheckpointError: no safetensors, shards missing, a damaged file, an index that does not fit its files; all named.
    """
    folder = Path(folder)
    paths = checkpoint_files(folder)
    found: dict[str, LazyTensor] = {}
    place: dict[str, str] = {}
    for path in paths:
        for name, tensor in _read_file(path).items():
            if name in found:
                raise CheckpointError(f"tensor {name!r} is in both {place[name]} and {path.name} of {folder}; remove one of the files")
            found[name], place[name] = tensor, path.name
    if paths[0].name != SINGLE:
        wrong = [f"{name!r} ({file})" for name, file in _weight_map(folder).items() if place.get(name) != file]
        if wrong:
            raise CheckpointError(
                f"{folder / INDEX} names {len(wrong)} tensors that their files do not have: {_some(wrong)}; download it again"
            )
    return found


def checkpoint_files(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint folder, all of them there.

    Raises:
        CheckpointError: as `read_folder`.
    """
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is not a folder with a checkpoint (config.json and .safetensors files)")
    if (folder / SINGLE).is_file():
        return [folder / SINGLE]
    if not (folder / INDEX).is_file():
        others = sorted(p.name for p in folder.iterdir() if p.suffix in (".bin", ".pt", ".pth", ".safetensors"))
        raise CheckpointError(
            f"{folder} has neither {SINGLE} nor {INDEX}{f', but {_some(others)}' if others else ''}; "
            "load the model and save it again with save_pretrained to get safetensors"
        )
    names = sorted(set(_weight_map(folder).values()))
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise CheckpointError(f"{len(missing)} of {len(names)} shards are missing in {folder}: {_some(missing)}; download them again")
    return [folder / name for name in names]


def _weight_map(folder: Path) -> dict[str, str]:
    path = folder / INDEX
    try:
        names = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        plain = all(isinstance(k, str) and isinstance(v, str) and v == Path(v).name for k, v in names.items())
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} is no index of a checkpoint ({error!r}); download it again") from None
    if not plain or not names:
        raise CheckpointError(f"{path}: weight_map must give each tensor the name of a file beside it; download it again")
    return dict(names)


def _read_file(path: Path) -> dict[str, LazyTensor]:
    try:
        with safe_open(path, framework="pt"):  # checks sizes, offsets and dtypes
            pass
    except SafetensorError as error:
        raise CheckpointError(f"{path} is not a whole safetensors file: {error}; download it again") from None
    file = _File(path)
    (length,) = struct.unpack("<Q", file.read(0, 8).numpy().tobytes())
    header = json.loads(file.read(8, length).numpy().tobytes())
    header.pop("__metadata__", None)
    return {name: _lazy(file, name, entry, 8 + length) for name, entry in header.items()}


def _lazy(file: _File, name: str, entry: Mapping[str, Any], data: int) -> LazyTensor:
    if entry["dtype"] not in DTYPES:
        raise CheckpointError(f"{file.path}: tensor {name!r} has dtype {entry['dtype']}, read are {', '.join(DTYPES)}")
    dtype, shape, start = DTYPES[entry["dtype"]], entry["shape"], data + entry["data_offsets"][0]
    row = math.prod(shape[1:]) * dtype.itemsize

    def read(first: int, last: int) -> Tensor:
        raw = file.read(start + first * row, (last - first) * row)
        return raw.view(dtype).view(last - first, *shape[1:]) if shape else raw.view(dtype).view(())

    return LazyTensor.of(shape, dtype, read)


def _some(names: list[str], most: int = 10) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


# -- writing -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Placed:
    """A tensor and the byte of its file where it goes."""

    name: str
    value: Tensor
    offset: int

    @property
    def nbytes(self) -> int:
        return self.value.numel() * self.value.element_size()


@dataclass(frozen=True)
class Layout:
    """A file to be written: its name, its first bytes, where the tensors go, and its length."""

    name: str
    header: bytes
    tensors: tuple[Placed, ...]
    nbytes: int


def layout(name: str, tensors: Mapping[str, Tensor]) -> Layout:
    """A safetensors file as the safetensors package would write these tensors, lazy ones included."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    placed, offset = [], 0
    for key, value in sorted(tensors.items(), key=lambda item: (_ORDER[item[1].dtype], item[0])):
        entry = Placed(key, value, offset)
        end = offset + entry.nbytes
        entries[key] = {"dtype": _NAMES[value.dtype], "shape": list(value.shape), "data_offsets": [offset, end]}
        placed.append(entry)
        offset = end
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    header = struct.pack("<Q", len(text)) + text
    return Layout(name, header, tuple(Placed(p.name, p.value, len(header) + p.offset) for p in placed), len(header) + offset)


def shard_layouts(tensors: Mapping[str, Tensor], max_shard_size: int | str) -> tuple[list[Layout], dict[str, Any] | None]:
    """The files of a checkpoint, split as transformers splits them, and the content of their index (None for a single file)."""
    from huggingface_hub import split_torch_state_dict_into_shards

    like = {name: torch.empty(value.shape, dtype=value.dtype, device="meta") for name, value in tensors.items()}
    split = split_torch_state_dict_into_shards(like, filename_pattern="model{suffix}.safetensors", max_shard_size=max_shard_size)
    files = [layout(file, {name: tensors[name] for name in names}) for file, names in split.filename_to_tensors.items()]
    return files, {"metadata": split.metadata, "weight_map": split.tensor_to_filename} if split.is_sharded else None


def describe_files(paths: Iterable[Path]) -> list[tuple[str, int, int]]:
    """Name, size and time of change of files: whether they are the same as in an earlier run."""
    return [(path.name, (stat := path.stat()).st_size, stat.st_mtime_ns) for path in paths]
