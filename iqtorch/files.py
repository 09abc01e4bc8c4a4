"""Writing files: places that can take them, and files that are either complete or absent."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import BinaryIO


def check_place(path: str | Path) -> None:
    """Refuses a file or folder that could not be made, before the work whose result goes there.

    Raises:
        OSError: the folder that it is to lie in does not exist, or takes no files.
    """
    folder = Path(path).absolute().parent
    try:
        with tempfile.TemporaryFile(dir=folder):
            return
    except OSError as error:
        what = f"{folder} takes no files ({error.strerror})" if folder.is_dir() else f"{folder} is no folder; make it"
        raise OSError(error.errno, f"cannot be written: {what}, or choose another place", str(path)) from error


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
