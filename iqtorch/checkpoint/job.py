"""Writing large files piece by piece: in parallel, in bounded memory, and so that a killed run can be taken up again.

While a job runs, its files lie beside their final places under hidden names, at their full length, and a journal lists the pieces that
are on the disk. The files get their names when all of them are complete.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import CheckpointError
from ..lazy import LazyTensor, read
from ..progress import share_bars
from .shards import Layout, Placed

#: Bytes of a piece, where rows can be read one by one.
PIECE = 4 << 20
#: Bytes that the pieces in progress may take together; one that needs more runs alone.
BUDGET = 256 << 20
#: What a piece takes in memory, in units of its `LazyTensor.work`.
_COPIES = 2
#: Seconds of work that a power cut may cost.
_FLUSH = 2.0


@dataclass(frozen=True)
class Piece:
    """Rows of a tensor of a file; `cost`: bytes of memory while it is made."""

    file: int
    tensor: Placed
    start: int
    stop: int
    cost: int

    @property
    def offset(self) -> int:
        return self.tensor.offset + self.start * _row_bytes(self.tensor.value)


def _row_bytes(value: Tensor) -> int:
    return value.numel() * value.element_size() // max(value.shape[0], 1) if value.dim() else value.element_size()


def _pieces(files: Sequence[Layout]) -> list[Piece]:
    out = []
    for number, file in enumerate(files):
        for tensor in file.tensors:
            value = tensor.value
            rows = value.shape[0] if value.dim() else 1
            work = value.work if isinstance(value, LazyTensor) else tensor.nbytes
            step = rows
            if not isinstance(value, LazyTensor) or value.sliceable:
                grain = value.grain if isinstance(value, LazyTensor) else 0
                step = grain or max(1, PIECE // max(_row_bytes(value), 1))
            for start in range(0, rows, max(step, 1)):
                stop = min(start + step, rows)
                out.append(Piece(number, tensor, start, stop, _COPIES * work * (stop - start) // rows))
    return out


@dataclass
class Job:
    """Files to write into a folder.

    Attributes:
        folder: where they go.
        files: what they hold.
        facts: what the result depends on; a journal with other facts is of another job.
        label: what the progress bar says.
        finish: writes the small files that belong to them into the folder it is given; they follow the large ones, `last` the last.
        obsolete: patterns of names that an older checkpoint in the folder may have, and this one does not.
        last: name of the file without which the result is not taken for complete.
    """

    folder: Path
    files: list[Layout]
    facts: dict[str, Any]
    label: str
    finish: Callable[[Path], None] | None = None
    obsolete: tuple[str, ...] = ()
    last: str = "config.json"

    def __post_init__(self) -> None:
        name = self.files[0].name if self.finish is None else "iqtorch"
        self.journal = self.folder / f".{name}.journal"
        headers = hashlib.sha256(b"".join(file.header for file in self.files)).hexdigest()
        self.facts = {**self.facts, "files": {file.name: file.nbytes for file in self.files}, "headers": headers}

    def part(self, file: Layout) -> Path:
        """Where a file lies until the job is done."""
        return self.folder / f".{file.name}.part"

    def run(self, threads: int | None = None, overwrite: bool = False, progress: bool = True) -> None:
        """Writes the files, or what an earlier run of the same job left to write.

        Args:
            threads: pieces made at a time; default `torch.get_num_threads()`.
            overwrite: drop what another job left unfinished, and replace files that are there.
            progress: show a progress bar on standard error.

        Raises:
            CheckpointError: files of these names are there; another job is unfinished in the folder, or running.
            OSError: the disk is full (before anything is written, where the file system can tell).
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        with _locked(self.journal) as journal:
            pieces = _pieces(self.files)
            done = self._resume(journal, overwrite)
            if len(done) < len(pieces):
                fresh = self._allocate()
                done = {number for number in done if pieces[number].file not in fresh}
                self._write(pieces, done, journal, threads or torch.get_num_threads(), progress)
            self._publish()
            self.journal.unlink()

    def _resume(self, journal: int, overwrite: bool) -> set[int]:
        """Numbers of the pieces that are written already."""
        text = os.pread(journal, os.fstat(journal).st_size, 0)
        *lines, torn = text.split(b"\n")
        os.ftruncate(journal, len(text) - len(torn))
        facts = json.loads(json.dumps(self.facts))
        found = json.loads(lines[0]) if lines else None
        if found == facts:
            return {int(number) for line in lines[1:] for number in line.split()}
        if found is not None:
            if not overwrite:
                differing = sorted(key for key in {*facts, *found} if facts.get(key) != found.get(key))
                raise CheckpointError(
                    f"{self.folder} holds an unfinished run that differs in {', '.join(differing)}: run it again as it was to finish it, "
                    "or overwrite it (overwrite=True, --overwrite)"
                )
            for name in found.get("files", {}):
                (self.folder / f".{name}.part").unlink(missing_ok=True)
        there = [file.name for file in self.files if (self.folder / file.name).exists()]
        if self.finish is not None and (self.folder / self.last).exists():
            there.append(self.last)
        if there and not overwrite:
            if not lines:
                self.journal.unlink()
            raise CheckpointError(
                f"{self.folder} has {', '.join(there[:3])} already: choose another place, or overwrite=True (--overwrite)"
            )
        os.ftruncate(journal, 0)
        _append(journal, json.dumps(facts).encode() + b"\n")
        return set()

    def _allocate(self) -> set[int]:
        """Makes room for all files, so that a full disk shows before hours of work; returns the numbers of those that were not there."""
        missing = [file for file in self.files if not self.part(file).exists()]
        needed, free = sum(file.nbytes for file in missing), shutil.disk_usage(self.folder).free
        try:
            if needed > free:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            for file in missing:
                # renamed when it has its full length: a `.part` file that is there is whole
                made = self.part(file).with_suffix(".new")
                with made.open("wb") as new:
                    _reserve(new.fileno(), file.nbytes)
                    new.write(file.header)
                made.rename(self.part(file))
        except OSError as error:
            for file in missing:
                self.part(file).unlink(missing_ok=True)
                self.part(file).with_suffix(".new").unlink(missing_ok=True)
            if len(missing) == len(self.files):
                self.journal.unlink(missing_ok=True)
            if error.errno != errno.ENOSPC:
                raise
            raise OSError(
                errno.ENOSPC, f"no space for {needed:,} bytes, {free:,} are free: nothing was written", str(self.folder)
            ) from None
        return {number for number, file in enumerate(self.files) if file in missing}

    def _write(self, pieces: list[Piece], done: set[int], journal: int, threads: int, progress: bool) -> None:
        with contextlib.ExitStack() as stack:
            fds = [stack.enter_context(self.part(file).open("r+b", buffering=0)).fileno() for file in self.files]
            bar = stack.enter_context(_Bar(self.label, pieces, done, progress))
            log = stack.enter_context(_Journal(journal, fds))
            running: dict[Future[None], int] = {}

            def collect() -> None:
                ended = wait(running, return_when=FIRST_COMPLETED).done
                for future in sorted(ended, key=lambda future: future.exception() is not None):  # what was made is noted before
                    number = running.pop(future)
                    future.result()
                    log.add(number)
                    bar.advance(pieces[number])

            with _pool(threads) as pool:
                for number, piece in enumerate(pieces):
                    if number in done:
                        continue
                    while running and (len(running) >= 2 * threads or piece.cost + sum(pieces[n].cost for n in running.values()) > BUDGET):
                        collect()
                    running[pool.submit(_make, piece, fds[piece.file])] = number
                while running:
                    collect()

    def _publish(self) -> None:
        staging = self.folder / ".iqtorch.staging"
        shutil.rmtree(staging, ignore_errors=True)
        small: list[Path] = []
        if self.finish is not None:
            staging.mkdir()
            self.finish(staging)
            small = sorted(staging.iterdir(), key=lambda path: path.name == self.last)
        for file in self.files:
            if self.part(file).exists():
                self.part(file).replace(self.folder / file.name)
        new = {path.name for path in small} | {file.name for file in self.files}
        for old in [path for pattern in self.obsolete for path in self.folder.glob(pattern) if path.name not in new]:
            old.unlink()
        for path in small:
            with path.open("rb") as made:
                os.fsync(made.fileno())
            path.replace(self.folder / path.name)
        shutil.rmtree(staging, ignore_errors=True)


def _make(piece: Piece, fd: int) -> None:
    data = read(piece.tensor.value, piece.start, piece.stop).contiguous()
    view = data.reshape(-1).view(torch.uint8).numpy().data
    written = 0
    try:
        while written < len(view):
            written += os.pwrite(fd, view[written:], piece.offset + written)
    except OSError as error:
        what = f"{error.strerror} while {piece.tensor.name!r} was written; the same run goes on where it was once there is room"
        raise OSError(error.errno, what) from error


@contextlib.contextmanager
def _pool(threads: int) -> Iterator[ThreadPoolExecutor]:
    """Workers that compute on one thread each: pieces are independent, so they share nothing but the disk."""
    before = torch.get_num_threads()
    pool = ThreadPoolExecutor(threads, "iqtorch", initializer=torch.set_num_threads, initargs=(1,))
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(before)  # the workers' setting is the default of threads to come


class _Journal:
    """Notes pieces once they are on the disk."""

    def __init__(self, fd: int, files: Sequence[int]) -> None:
        self.fd, self.files = fd, files
        self.pending: list[int] = []
        self.flushed = time.monotonic()

    def __enter__(self) -> _Journal:
        return self

    def add(self, number: int) -> None:
        self.pending.append(number)
        if time.monotonic() - self.flushed > _FLUSH:
            self.flush()

    def flush(self) -> None:
        if self.pending:
            for file in self.files:
                os.fsync(file)
            _append(self.fd, " ".join(map(str, self.pending)).encode() + b"\n")
        self.pending, self.flushed = [], time.monotonic()

    def __exit__(self, *_: object) -> None:
        self.flush()  # also after an error: what was made stays made


def _reserve(fd: int, nbytes: int) -> None:
    """Makes a file of this length, with its room on the disk where the system can do that."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(fd, 0, nbytes)
    else:
        os.ftruncate(fd, nbytes)


def _append(fd: int, data: bytes) -> None:
    os.lseek(fd, 0, os.SEEK_END)
    os.write(fd, data)
    os.fsync(fd)


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[int]:
    """The journal, open and held by this process alone (the lock ends with the process)."""
    import fcntl

    fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise CheckpointError(f"another process is writing into {path.parent}; wait for it, or choose another place") from None
        yield fd
    finally:
        os.close(fd)


class _Bar:
    """Progress on standard error: share of the bytes to go through, time left, and the tensor."""

    def __init__(self, label: str, pieces: Sequence[Piece], done: set[int], show: bool) -> None:
        self.bars = share_bars(label, show)
        self.task = self.bars.add_task("", total=sum(p.cost for p in pieces), completed=sum(pieces[n].cost for n in done))

    def __enter__(self) -> _Bar:
        self.bars.start()
        return self

    def advance(self, piece: Piece) -> None:
        self.bars.update(self.task, advance=piece.cost, description=piece.tensor.name)

    def __exit__(self, *_: object) -> None:
        self.bars.stop()


def digest(tensors: Mapping[str, Tensor | None]) -> str:
    """A fingerprint of named tensors."""
    found = hashlib.sha256()
    for name, value in sorted(tensors.items()):
        if value is not None:
            found.update(name.encode() + value.contiguous().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()
