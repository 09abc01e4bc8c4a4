"""Prints the header directory of the torch beside the running interpreter (nothing if there is none). Used by CMakeLists.txt.

Must not import torch: an isolated build cannot, though the headers are there.
"""

from __future__ import annotations

import importlib.util
import sysconfig
from pathlib import Path


def candidates() -> list[Path]:
    """Directories that may hold torch's headers, the most specific first."""
    found: list[Path] = []
    spec = importlib.util.find_spec("torch")
    if spec is not None and spec.submodule_search_locations:
        found += [Path(location) / "include" for location in spec.submodule_search_locations]
    found += [Path(sysconfig.get_path(key)) / "torch" / "include" for key in ("purelib", "platlib")]
    return found


if __name__ == "__main__":
    print(next((path.as_posix() for path in candidates() if (path / "torch/csrc/stable/library.h").exists()), ""))
