"""Writing files that are either complete or absent."""

from __future__ import annotations

import os
from pathlib import Path
from typing import BinaryIO


class replacing:
    """A binary file that takes the place of `path` when the block ends well, and vanishes otherwise."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.temporary = self.path.with_name(f".{self.path.name}.{os.getpid()}.tmp")

    def __enter__(self) -> BinaryIO:
        self.file = open(self.temporary, "wb")
        return self.file

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.file.close()
        if kind is None:
            os.replace(self.temporary, self.path)
        else:
            self.temporary.unlink(missing_ok=True)
