"""What a file holds: checkpoints, GGUF files and importance files, without loading a model."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from .formats import get_format

__all__ = ["inspect", "shown"]

_LONG_ARRAY = 8  # metadata arrays beyond this length (vocabularies) are shown by their length


def inspect(path: str | Path) -> dict[str, Any]:
    """What a file holds.

    Args:
        path: a GGUF file, a safetensors file, a folder of these, or an importance file of either kind.

    Returns:
        `{"kind", "metadata": {key: value}, "rows": [one dict per tensor or weight], "summary": text}`.

    Raises:
        OSError: the file cannot be read or is damaged.
        GGUFError, ImportanceError: a damaged file of these kinds.
    """
    path = Path(path)
    if path.is_dir() or path.suffix == ".safetensors":
        return _result("safetensors", {}, list(_safetensors(path)))
    with path.open("rb") as file:
        magic = file.read(4)
    if magic != b"GGUF":
        return _importance(path)
    from .gguf import GGUFFile

    gguf = GGUFFile(path)
    if gguf.metadata.get("general.type") == "imatrix":
        return _importance(path)
    metadata = {key: f"{n} values" if (n := gguf.metadata.length(key)) > _LONG_ARRAY else gguf.metadata[key] for key in gguf.metadata}
    return _result("gguf", metadata, [_row(t.name, t.type_name, t.shape, t.nbytes) for t in gguf.tensors.values()])


def shown(value: object) -> str:
    """A cell of the table of rows."""
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, tuple):  # least and most
        return " to ".join(f"{bound:,}" for bound in dict.fromkeys(value))
    if isinstance(value, list):
        return " x ".join(map(str, value))
    return "" if value is None else str(value)


def _importance(path: Path) -> dict[str, Any]:
    from .importance import Importance

    found = Importance.load(path)
    metadata = {"datasets": ", ".join(found.datasets), "chunks": found.chunks, "chunk_size": found.chunk_size}
    return {"kind": "importance", "metadata": metadata, "rows": found.summary(), "summary": f"importance of {len(found)} weights"}


def _result(kind: str, metadata: dict[str, Any], rows: list[dict[str, Any]]) -> dict[str, Any]:
    size = sum(row["bytes"] for row in rows)
    weights = sum(math.prod(row["shape"]) for row in rows)
    bpw = 8 * size / max(weights, 1)
    summary = f"{len(rows)} tensors, {weights:,} weights, {size:,} bytes, {bpw:.3f} bits per weight"
    return {"kind": kind, "metadata": metadata, "rows": rows, "summary": summary}


def _row(name: str, format: str, shape: Sequence[int], nbytes: int) -> dict[str, Any]:
    return {"tensor": name, "format": format, "shape": list(shape), "bytes": nbytes, "bpw": 8 * nbytes / max(math.prod(shape), 1)}


def _safetensors(path: Path) -> Iterator[dict[str, Any]]:
    """Packed weights are those that config.json beside the files names."""
    from safetensors import SafetensorError, safe_open

    files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    if not files:
        raise FileNotFoundError(f"no .safetensors file in {path}")
    config = files[0].parent / "config.json"
    quantization = json.loads(config.read_text(encoding="utf-8")).get("quantization_config", {}) if config.exists() else {}
    packed = quantization.get("tensors", {}) if quantization.get("quant_method") == "iqtorch" else {}
    for file in files:
        try:
            with safe_open(file, framework="pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118  (not a dict)
                    stored = tensors.get_tensor(name)
                    yield _row(name, *_stored_as(stored, packed.get(name)), stored.nbytes)
        except SafetensorError as error:
            raise OSError(f"{file} is not a whole safetensors file: {error}") from error


def _stored_as(stored: Tensor, packed: dict[str, Any] | None) -> tuple[str, list[int]]:
    """Format (or dtype) and shape of the weights; `packed` is the tensor's entry in the quantization config, if it has one."""
    shape = list(stored.shape)
    if not packed:
        return str(stored.dtype).removeprefix("torch."), shape
    fmt = get_format(packed["format"])
    return fmt.name, [*shape[:-1], fmt.row_length(shape[-1])]
