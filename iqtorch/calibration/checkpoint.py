"""What a rounding that was interrupted leaves behind: the packed weights of each finished block, in a folder."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import CalibrationError
from ..formats import get_format
from ..tensor import IQTensor


class Checkpoint:
    """A folder of packed weights, one file per part of a model; a file counts only for the same weights, formats, text and settings.

    Args:
        folder: made if it is missing.
        settings: whatever decides the result besides weights and formats.
        texts: batches of token ids or dictionaries of arguments.
    """

    def __init__(self, folder: str | Path, settings: object, texts: Iterable[Tensor | Mapping[str, Any]]) -> None:
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        digest = hashlib.sha256(repr(settings).encode())
        for text in texts:
            for key, value in sorted(text.items()) if isinstance(text, Mapping) else [("", text)]:
                digest.update(key.encode())
                if isinstance(value, Tensor):
                    digest.update(f"{tuple(value.shape)} {value.dtype}".encode())  # the same tokens in other rows are another text
                digest.update(_bytes(value) if isinstance(value, Tensor) else repr(value).encode())
        self.start = digest

    def load(self, part: str, wanted: Mapping[str, tuple[Tensor, str]]) -> dict[str, tuple[IQTensor, str]] | None:
        """The packed weights and notes of a part, from its original weights and formats; None if it is not finished.

        Raises:
            CalibrationError: the file is of another text, model, recipe or setting.
        """
        from safetensors import SafetensorError, safe_open

        path = self._path(part)
        if not path.exists():
            return None
        try:
            with safe_open(str(path), "pt") as file:
                facts = json.loads((file.metadata() or {})["iqtorch.rounding"])
                if facts["key"] == self._key(wanted):
                    found = {}
                    for name, (format_name, note) in facts["weights"].items():
                        original = wanted[name][0]
                        dtype = original.dtype if original.dtype != torch.float64 else torch.float32
                        blocks = file.get_tensor(name).to(original.device)
                        found[name] = (IQTensor.from_blocks(blocks, get_format(format_name), dtype), note)
                    return found
        except (OSError, SafetensorError, KeyError, ValueError) as error:
            raise CalibrationError(f"{path} is no checkpoint of a rounding, or damaged ({error}); remove it") from error
        raise CalibrationError(f"{path} is of another text, model, recipe or setting; pass an empty folder as checkpoint, or remove it")

    def save(self, part: str, wanted: Mapping[str, tuple[Tensor, str]], packed: Mapping[str, tuple[IQTensor, str]]) -> None:
        """Writes a part; the file appears whole or not at all."""
        from safetensors.torch import save_file

        facts = {"key": self._key(wanted), "weights": {name: (w.format.name, note) for name, (w, note) in packed.items()}}
        tensors = {name: w.to_blocks().cpu().contiguous() for name, (w, _) in packed.items()}
        partial = self._path(part).with_suffix(".partial")
        save_file(tensors, str(partial), {"iqtorch.rounding": json.dumps(facts)})
        os.replace(partial, self._path(part))

    def _path(self, part: str) -> Path:
        return self.folder / f"{part}.safetensors"

    def _key(self, wanted: Mapping[str, tuple[Tensor, str]]) -> str:
        digest = self.start.copy()
        for name, (weight, format_name) in sorted(wanted.items()):
            digest.update(f"{name} {format_name} {tuple(weight.shape)} {weight.dtype}".encode())
            digest.update(_bytes(weight))
        return digest.hexdigest()


def _bytes(value: Tensor) -> bytes:
    return value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes()
