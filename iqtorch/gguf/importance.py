"""Importance in GGUF files: per weight the sums of squares and the token counts, so that files can be merged exactly."""

from __future__ import annotations

from pathlib import Path

import torch

from ..importance import CHUNK_SIZE, Importance, ImportanceEntry
from .errors import GGUFMetadataError, GGUFTensorError
from .reader import GGUFFile
from .writer import TensorSource, write_gguf

#: Suffix of the sums, and the older spelling.
_SUMS = (".in_sum2", ".sums")


def load(path: str | Path) -> Importance:
    """Reads the GGUF kind.

    Raises:
        GGUFError: a damaged file, or one of another `general.type`.
        ImportanceError: a value is negative or not finite.
    """
    file = GGUFFile(path)
    kind = file.metadata.get("general.type")
    if kind != "imatrix":
        raise GGUFMetadataError(f"{path}: general.type is {kind!r}, an importance file has 'imatrix'; `iqtorch importance` makes one")
    entries: dict[str, ImportanceEntry] = {}
    for stored, info in file.tensors.items():
        suffix = next((s for s in _SUMS if stored.endswith(s)), None)
        if suffix is None:
            continue
        name = stored.removesuffix(suffix)
        if info.dtype != torch.float32 or len(info.shape) > 2:
            raise GGUFTensorError(f"{path}: {stored!r} is {info.type_name} of shape {info.shape}, expected float32 [experts, columns]")
        sums = file.data(stored).double().reshape(-1, info.shape[-1])
        counts = torch.zeros(sums.shape[0], dtype=torch.float64, device="cpu")
        if (name + ".counts") in file.tensors:
            found = file.data(name + ".counts").double().reshape(-1)
            if found.numel() not in (1, sums.shape[0]):
                raise GGUFTensorError(f"{path}: {name!r} has {sums.shape[0]} sums and {found.numel()} counts")
            counts = found.expand(sums.shape[0])
        mean = torch.where(counts[:, None] > 0, sums / counts[:, None].clamp(min=1), 1.0).float()
        experts = "_exps." in name or sums.shape[0] > 1
        entries[name] = ImportanceEntry(mean if experts else mean[0], counts)
    datasets = file.metadata.get("imatrix.datasets", [])
    return Importance(
        entries,
        datasets=[d for d in datasets if isinstance(d, str)] if isinstance(datasets, list) else [],
        chunks=int(file.metadata.get("imatrix.chunk_count", 0)),
        chunk_size=int(file.metadata.get("imatrix.chunk_size", CHUNK_SIZE)) or CHUNK_SIZE,
    )


def save(importance: Importance, path: str | Path) -> None:
    """Writes the GGUF kind."""
    tensors = []
    for name, entry in importance.file_entries().items():
        mean = entry.mean.reshape(-1, entry.mean.shape[-1]).double()
        tensors.append(TensorSource.of(name + ".in_sum2", (mean * entry.count[:, None]).float()))
        tensors.append(TensorSource.of(name + ".counts", entry.count.float()[:, None]))
    metadata = {
        "general.type": "imatrix",
        "imatrix.datasets": list(importance.datasets) or ["unknown"],
        "imatrix.chunk_count": importance.chunks,
        "imatrix.chunk_size": importance.chunk_size,
    }
    write_gguf(path, metadata, tensors)
