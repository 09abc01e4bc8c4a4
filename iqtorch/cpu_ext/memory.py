"""Memory for packed weights, in huge pages where the system has them.

Kernels read weights once per product: with 4 KiB pages a third of the time goes to address translation. Weights therefore lie one
after the other in large mappings that start at a huge page and for which huge pages are asked; a mapping of its own for each would
waste part of a huge page each time. Nothing is reserved: pages are taken when they are first written, and given back with the weight.
"""

from __future__ import annotations

import ctypes
import functools
import mmap
import threading
import weakref
from typing import Any

import torch
from torch import Tensor

HUGE_PAGE = 1 << 21
#: Bytes of address space of a mapping, if no weight needs more.
CHUNK = 64 * HUGE_PAGE
#: Weights below this size come from the ordinary allocator.
SMALL = 1 << 16

_LINE = 64
_HUGE, _DONTNEED = getattr(mmap, "MADV_HUGEPAGE", None), getattr(mmap, "MADV_DONTNEED", None)
_lock = threading.Lock()
#: The mapping that is being filled (it lives as long as a weight in it), and the offsets of its free bytes.
_current: weakref.ref[mmap.mmap] | None = None
_free, _end = 0, 0


def empty(count: int) -> Tensor:
    """Uninitialised uint8 `[count]` on a cache line."""
    global _current, _free, _end
    if count < SMALL or _HUGE is None:
        return torch.empty(count, dtype=torch.uint8, device="cpu")
    with _lock:
        memory = _current() if _current is not None else None
        if memory is None or count > _end - _free:
            size = max(CHUNK, -(-count // HUGE_PAGE) * HUGE_PAGE)
            memory = mmap.mmap(-1, size + HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            _free = -torch.frombuffer(memory, dtype=torch.uint8).data_ptr() % HUGE_PAGE
            _end = _free + size
            memory.madvise(_HUGE, _free, size)
            _current = weakref.ref(memory)
        start = _free
        _free = min(_end, start + -(-count // _LINE) * _LINE)
    owner = memoryview(memory)[start : start + count]
    weakref.finalize(owner, _give_back, memory, start, count).atexit = False
    return torch.frombuffer(owner, dtype=torch.uint8)


def _give_back(memory: mmap.mmap, start: int, count: int) -> None:
    """Returns the whole pages inside a range; neighbours may be in use."""
    first, last = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE, (start + count) // mmap.PAGESIZE * mmap.PAGESIZE
    if _DONTNEED is not None and last > first:
        memory.madvise(_DONTNEED, first, last - first)


def trim() -> None:
    """Has the C library return what it keeps of freed memory to the system: it may be as much as the two largest tensors freed so far."""
    release = _malloc_trim()
    if release is not None:
        release(0)


@functools.cache
def _malloc_trim() -> Any:
    try:
        return ctypes.CDLL(None).malloc_trim  # glibc only
    except (AttributeError, OSError, TypeError):
        return None
