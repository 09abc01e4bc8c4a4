"""How a kernel is timed: the few calls that differ between a GPU and a rehearsal on the CPU."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

#: Bytes of rotating weights per measurement, well above any L2 cache; on the CPU only to run the same code.
ROTATION = {"cuda": 512 << 20, "cpu": 1 << 12}
REPLAYS = {"cuda": 30, "cpu": 1}


def card_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def synchronize(device: torch.device) -> None:
    """Waits for everything that was launched."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def copies_of(size: int, device: torch.device) -> int:
    """How many weights of `size` bytes take turns, so that none is read from cache."""
    return max(2, min(256, ROTATION[device.type] // size))


def rotating(size: int, device: torch.device) -> Tensor:
    """Random bytes `[copies, size]`."""
    return torch.randint(0, 256, (copies_of(size, device), size), dtype=torch.uint8, device=device)


def microseconds(call: Callable[[int], object], copies: int, device: torch.device) -> float:
    """Median time of `call(i)` for i over the copies: one CUDA graph of all of them, replayed. CPU: clock time."""
    if device.type != "cuda":
        started = time.perf_counter()
        for i in range(copies):
            call(i)
        return (time.perf_counter() - started) * 1e6 / copies
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for i in range(2):
            call(i % copies)
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(copies):
            call(i)
    times = []
    for replay in range(REPLAYS["cuda"] + 3):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        if replay >= 3:
            times.append(start.elapsed_time(end) * 1e3 / copies)
    return statistics.median(times)
