"""Jobs of benchmarks/gpu.py in processes of their own: what crashes, hangs or poisons its CUDA context costs one job, not the run."""

from __future__ import annotations

import contextlib
import multiprocessing
import queue
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection
from typing import Any

import torch

#: A job: a function of a module, and its arguments; yields rows.
Job = tuple[Callable[..., Iterator[dict[str, Any]]], tuple[Any, ...]]
_context = multiprocessing.get_context("spawn")


def serve(connection: Connection) -> None:
    """Runs jobs that come through the connection, and sends their rows back as they come."""
    while (job := connection.recv()) is not None:
        part, arguments = job
        try:
            for row in part(*arguments):
                connection.send(("row", row))
        except Exception as error:
            traceback.print_exc()
            connection.send(("lost" if poisoned() else "failed", in_words(error)))
        else:
            connection.send(("done", None))
        with contextlib.suppress(Exception):
            torch.cuda.empty_cache()


def in_words(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"[:300].replace("\n", " ")


def poisoned() -> bool:
    """Whether a kernel has crashed: no later call of this process would succeed."""
    if torch.cuda.is_initialized():
        try:
            torch.cuda.synchronize()
        except Exception:
            return True
    return False


class Worker:
    """A process for jobs, started again after a crash."""

    def __init__(self) -> None:
        self.connection, other = _context.Pipe()
        self.process = _context.Process(target=serve, args=(other,))
        self.process.start()
        other.close()

    def run(self, job: Job, silence: float, until: float, row: Callable[[dict[str, Any]], object]) -> str | None:
        """None, or why the job ended early: it failed, its process died, it gave no row for `silence` seconds, or it is late."""
        with contextlib.suppress(OSError):
            self.connection.send(job)
        while True:
            left = until - time.time()
            try:
                if not self.connection.poll(max(min(silence, left), 0.0)):
                    self.stop()
                    return "its time was over" if left < silence else f"no result for {silence:.0f} seconds"
                kind, value = self.connection.recv()
            except (EOFError, OSError):
                self.process.join(5)
                return f"the process ended with status {self.process.exitcode}"
            if kind == "row":
                row(value)
                continue
            if kind == "lost":
                self.stop()
            return value

    def alive(self) -> bool:
        return self.process.is_alive()

    def stop(self) -> None:
        self.process.kill()
        self.process.join(5)


def run_jobs(
    jobs: Sequence[tuple[str, Job]],
    workers: int,
    until: float,
    row: Callable[[str, dict[str, Any]], object],
    end: Callable[[str, str | None, int, float], object],
    silence: float = 90.0,
) -> list[str]:
    """Runs named jobs in `workers` processes until the time `until`.

    Args:
        row: called with the name of a job and each of its rows.
        end: called with the name of a job, the reason why it failed (or None), the number of its rows and its seconds.
        silence: seconds without a row after which a job counts as hung.

    Returns:
        Names of the jobs that were not started.
    """
    waiting: queue.SimpleQueue[tuple[str, Job]] = queue.SimpleQueue()
    for named in jobs:
        waiting.put(named)
    lock = threading.Lock()

    def work() -> None:
        worker: Worker | None = None
        while time.time() < until:
            try:
                name, job = waiting.get_nowait()
            except queue.Empty:
                break
            started, rows = time.time(), 0

            def keep(found: dict[str, Any], name: str = name) -> None:
                nonlocal rows
                rows += 1
                with lock:
                    row(name, found)

            if worker is None or not worker.alive():
                worker = Worker()
            failure = worker.run(job, silence, until, keep)
            if failure is not None and not worker.alive():
                worker.stop()
            with lock:
                end(name, failure, rows, time.time() - started)
        if worker is not None:
            worker.stop()

    threads = [threading.Thread(target=work) for _ in range(max(1, min(workers, len(jobs))))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    left = []
    with contextlib.suppress(queue.Empty):
        while True:
            left.append(waiting.get_nowait()[0])
    return left
