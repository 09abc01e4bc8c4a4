"""The registry of tensor formats. Adding a format: write its record, add its module here (see CONTRIBUTING.md)."""

from __future__ import annotations

import difflib

from ..errors import UnknownFormatError
from . import ik_rows4, ik_table, ik_trellis, iquants, kquants, legacy
from .base import Format

__all__ = ["Format", "format_by_ggml_type", "get_format", "list_formats"]

_MODULES = (ik_trellis, ik_table, ik_rows4, legacy, kquants, iquants)

_BY_NAME: dict[str, Format] = {}
_BY_TYPE: dict[int, Format] = {}


def register(fmt: Format) -> None:
    """Adds a format to the registry.

    Raises:
        ValueError: its name or GGUF type id is taken.
    """
    if fmt.name in _BY_NAME or fmt.ggml_type in _BY_TYPE:
        raise ValueError(f"format {fmt.name!r} (GGUF type {fmt.ggml_type}) is registered already; choose another name and id")
    _BY_NAME[fmt.name] = _BY_TYPE[fmt.ggml_type] = fmt


for _module in _MODULES:
    for _fmt in _module.FORMATS:
        register(_fmt)


def list_formats() -> list[str]:
    """Names of all formats."""
    return list(_BY_NAME)


def get_format(name: str | Format) -> Format:
    """The record of a format, by name (case does not matter).

    Raises:
        UnknownFormatError: no such format; the message lists near matches.
    """
    if isinstance(name, Format):
        return name
    found = _BY_NAME.get(str(name).lower())
    if found is None:
        near = difflib.get_close_matches(str(name).lower(), _BY_NAME, n=5, cutoff=0.5)
        hint = f"; did you mean {' or '.join(map(repr, near))}?" if near else ";"
        raise UnknownFormatError(f"unknown format {name!r}{hint} iqtorch.list_formats() lists all {len(_BY_NAME)}")
    return found


def format_by_ggml_type(ggml_type: int) -> Format:
    """The record of a format, by its type id in GGUF files.

    Raises:
        UnknownFormatError: no such id; the message lists the known ones.
    """
    if ggml_type not in _BY_TYPE:
        known = ", ".join(f"{t} {f.name}" for t, f in sorted(_BY_TYPE.items()))
        raise UnknownFormatError(f"unknown GGUF type id {ggml_type}; known are {known}")
    return _BY_TYPE[ggml_type]
