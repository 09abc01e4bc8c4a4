"""Which file holds the compiled kernels, and whether it was built from the C++ sources that lie here.

Installing leaves `_C.so` beside this package (in an editable installation: under the same name in site-packages), and with it `_C.sources`,
a line `NAME SHA256` for each source. Wheels have no sources, so there is nothing to compare.
"""

from __future__ import annotations

import hashlib
import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path

SOURCES = Path(__file__).with_name("csrc")
#: What to do where the sources are.
REBUILD = f"pip install -e {SOURCES.parents[2]} (`make` does it by itself)"
#: What to do where they are not.
REINSTALL = "pip install --force-reinstall --no-deps . in a clone of iqtorch, with torch and a C++17 compiler present"


def find() -> tuple[Path | None, list[str]]:
    """The kernels' file, None if none can be used, and the names of sources that were changed since it (or the one nearest) was built.

    Python that runs in a clone's folder imports the package from there, which has no kernels: those of an installation are taken if they
    were built from the very same sources.
    """
    spec = importlib.util.find_spec(f"{__package__}._C")
    if spec is not None and spec.origin is not None:
        return Path(spec.origin), changed(Path(spec.origin))
    known = [file for file in _installed() if stamps(file) and _now()]
    nearest = min(known, key=lambda file: len(changed(file)), default=None)
    names = changed(nearest) if nearest else []
    return None if names else nearest, names


def changed(file: Path) -> list[str]:
    """Names of C++ sources that differ from those that a file was built from; none where that is not known."""
    before, now = stamps(file), _now()
    return sorted(name for name in before.keys() | now.keys() if before.get(name) != now.get(name)) if before and now else []


def stamps(file: Path) -> dict[str, str]:
    """Name -> hash of the sources that a file was built from; empty if it does not say."""
    try:
        lines = file.with_suffix(".sources").read_text(encoding="utf-8").splitlines()
    except OSError:
        return {}
    return dict(line.rpartition(" ")[::2] for line in lines)


def _now() -> dict[str, str]:
    # what editors leave there (`.#pack.cpp`, `pack.cpp~`) is no source; CMakeLists.txt takes the same
    files = (file for kind in ("cpp", "h", "inl") for file in SOURCES.glob(f"[a-z]*.{kind}") if file.is_file())
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def _installed() -> Iterator[Path]:
    for folder in sys.path:
        file = Path(folder, *__package__.split("."), "_C.so")
        if file.exists():
            yield file
