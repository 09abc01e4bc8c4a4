"""What the CPU benchmarks' result files have in common: a description of the machine, then comma-separated columns."""

from __future__ import annotations

import csv
import os
import platform
from collections.abc import Iterable, Sequence
from datetime import date
from pathlib import Path

import torch


def cpu_name() -> str:
    """The processor's name, as the system gives it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def machine(threads: int) -> list[str]:
    """What a reader of the figures must know."""
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else float("nan")
    return [
        f"date: {date.today()}; torch {torch.__version__}; {platform.system()} {platform.release()} {platform.machine()}",
        f"cpu: {cpu_name()}, {os.cpu_count()} logical cores; {torch.backends.cpu.get_cpu_capability()}",
        f"threads: {threads}; clock: {'CPU time of the thread' if threads == 1 else 'wall'}; load average at start: {load:.1f}",
    ]


def show(columns: Sequence[str], row: Sequence[object]) -> None:
    """Prints one row as a line of names and values, at once."""
    print("  ".join(f"{key} {value}" for key, value in zip(columns, row)), flush=True)


def write(path: Path, header: Sequence[str], columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Writes `rows` under `columns`, after the lines of `header` as comments; makes the folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        file.writelines(f"# {line}\n" for line in header)
        writer = csv.writer(file)
        writer.writerow(columns)
        writer.writerows(rows)


def report(path: Path | None, header: Sequence[str], columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Prints all rows, and writes them if there is a path."""
    for row in rows:
        show(columns, row)
    if path:
        write(path, header, columns, rows)
