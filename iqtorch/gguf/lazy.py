"""GGUF files whose tensors are lazy: what streaming conversion reads."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..formats import Format, get_format
from ..lazy import LazyTensor
from ..tensor import repack_rows
from .reader import ARRAY, GGUFFile
from .rope import ROPE_TENSORS
from .writer import Typed

#: Whole-model types of interleaved files are those of the plain formats plus this (ik_llama.cpp, `llama_ftype`).
_INTERLEAVED = 200


class LazyGGUFFile(GGUFFile):
    """A GGUF file that reads rows when they are asked for, and lets go of the mapped memory behind them."""

    def data(self, name: str) -> Tensor:
        """The tensor as stored, lazy; shapes and errors as in `GGUFFile`."""
        stored = super().data(name)
        if name in ROPE_TENSORS:  # their values make the configuration
            return stored

        def read(start: int, stop: int) -> Tensor:
            rows = (stored[start:stop] if stored.dim() else stored).clone()
            self.release([name])
            return rows

        return LazyTensor.of(stored.shape, stored.dtype, read)

    def plain_data(self, name: str) -> tuple[Tensor, Format | torch.dtype]:
        """The tensor, lazy, without interleaved rows, and its type then."""
        info, data = self.tensors[name], self.data(name)
        if info.format is None:
            return data, data.dtype
        plain = get_format(info.format.plain) if info.format.plain else info.format
        return repack_rows(data, info.format, plain) if plain is not info.format else data, plain

    def plain_metadata(self) -> dict[str, Any]:
        """All metadata with their types, as a single file without interleaved rows has them."""
        out: dict[str, Any] = {}
        for key, value in self.metadata.items():
            if key.startswith("split.") or key == "general.alignment":
                continue
            kinds = self.metadata.kinds(key)
            if key == "general.file_type" and value >= _INTERLEAVED:
                value -= _INTERLEAVED
            out[key] = Typed(value, kinds[1] if kinds[0] == ARRAY else kinds[0])
        return out
