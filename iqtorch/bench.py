"""`iqtorch bench`: packed products against a plain bfloat16 `nn.Linear` on this machine.

A quick look at what a machine gives; benchmarks/cpu.py and benchmarks/gpu.py measure with more care and more choices.
"""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from .errors import EvaluationError
from .formats import get_format
from .quantize import encode_blocks
from .tensor import IQTensor

FORMATS = ("iq2_kl", "iq3_k", "iq4_ks", "iq6_k")
ROWS = (1, 8, 128)
#: Largest error of a product relative to its norm: activations rounded to 8 bits give 0.5 to 1 % (bfloat16 results: 0.2 %).
TOLERANCE = 0.02
W = TypeVar("W", bound=Tensor)
#: Seconds that each figure takes, and the least number of times that both products run in turn.
_SECONDS, _REPEATS = 0.3, 5
#: Rows that are quantized; the others repeat them.
_DISTINCT = 64


@dataclass(frozen=True)
class Timing:
    """One product `[rows, K] @ [N, K].T`.

    Attributes:
        format, n, k, rows: of the product.
        packed_us, plain_us: microseconds, packed and with bfloat16 weights; medians of runs in turn, or with GPU kernels of replays of a
            CUDA graph, in which launches take no part.
        speedup: median of the ratios of neighbours (of GPU kernels: of the medians).
        gb_per_s: packed bytes read per second.
        error: RMS error of the packed product relative to the float64 product of the decoded weights.
    """

    format: str
    n: int
    k: int
    rows: int
    packed_us: float
    plain_us: float
    speedup: float
    gb_per_s: float
    error: float


def run(
    formats: Sequence[str],
    shapes: Sequence[tuple[int, int]],
    rows: Sequence[int],
    device: str = "cpu",
    threads: int | None = None,
    megabytes: float = 256,
    progress: Callable[[int, int], object] | None = None,
) -> list[Timing]:
    """Times formats x shapes x rows of activations.

    Args:
        formats: names.
        shapes: `(N, K)` of the weights.
        rows: rows of bfloat16 activations.
        device: where to run.
        threads: of the CPU; default as torch is set.
        megabytes: copies of the weights, packed and plain, that are used in turn.
        progress: called with (done, total).

    Raises:
        UnknownFormatError, ShapeError: unknown name; rows that a format cannot hold.
        EvaluationError: a product whose values are wrong is not timed.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    found, total = [], len(formats) * len(shapes) * len(rows)
    try:
        for n, k in shapes:
            plain = _copies(torch.randn(n, k, dtype=torch.bfloat16, device=device), megabytes)
            for name in formats:
                weights = _copies(_weights(name, n, k, device), megabytes)
                for m in rows:
                    found.append(_timing(weights, plain, m))
                    if progress:
                        progress(len(found), total)
    finally:
        torch.set_num_threads(before)
    return found


def machine(device: str = "cpu") -> str:
    """The machine in a line."""
    if device.startswith("cuda"):
        return f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}"
    cpu = f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} of {os.cpu_count()} threads"
    return f"{cpu}, torch {torch.__version__}"


def _weights(name: str, n: int, k: int, device: str) -> IQTensor:
    fmt = get_format(name)
    fmt.row_bytes(k)
    some = torch.randn(min(n, _DISTINCT), k, generator=torch.Generator().manual_seed(0), device="cpu")
    blocks = encode_blocks(some, fmt, None, "rmse", "fast")
    return IQTensor.from_blocks(blocks.repeat(-(-n // len(blocks)), 1)[:n].contiguous().to(device), fmt)


def _copies(weight: W, megabytes: float) -> list[W]:
    copies = [cast(W, weight.clone()) for _ in range(round(megabytes * 1e6 / weight.nbytes) - 1)]
    return [weight, *copies]


def _timing(weights: list[IQTensor], plain: list[Tensor], m: int) -> Timing:
    weight = weights[0]
    n, k = weight.shape
    x = torch.randn(m, k, dtype=torch.bfloat16, device=weight.device)
    error = _error(x, weight)
    if not error < TOLERANCE:
        raise EvaluationError(
            f"the product of {weight!r} with {m} rows has an error of {error:.3g}, more than {TOLERANCE}: it is not timed"
        )
    if weight.backend == "triton":
        packed, dense = (_in_a_graph(x, kind) for kind in (weights, plain))
        speedup = dense / packed
    else:
        packed, dense, speedup = _in_turn(x, weights, plain)
    nbytes = n * weight.format.row_bytes(k)
    return Timing(weight.format.name, n, k, m, packed * 1e6, dense * 1e6, speedup, nbytes / packed / 1e9, error)


def _in_a_graph(x: Tensor, weights: Sequence[Tensor]) -> float:
    """Seconds of a product on a GPU, without its launch."""
    from .kernels.launch import _on
    from .kernels.timing import microseconds

    with _on(x.device):
        return microseconds(lambda i: F.linear(x, weights[i]), len(weights), x.device) / 1e6


def _in_turn(x: Tensor, weights: Sequence[Tensor], plain: Sequence[Tensor]) -> tuple[float, float, float]:
    """Seconds of a packed and of a plain product, and their ratio: medians, the latter of ratios of neighbours."""
    ratios: list[float] = []
    times: tuple[list[float], list[float]] = ([], [])
    start, i = time.perf_counter(), -1
    while i < _REPEATS or time.perf_counter() - start < _SECONDS:
        i += 1
        pair = [_timed(x, kind[i % len(kind)]) for kind in (weights, plain)]
        if i:  # the first run warms up
            for kept, spent in zip(times, pair, strict=True):
                kept.append(spent)
            ratios.append(pair[1] / pair[0])
    return median(times[0]), median(times[1]), median(ratios)


def _timed(x: Tensor, weight: Tensor) -> float:
    start = time.perf_counter()
    F.linear(x, weight)
    if x.is_cuda:
        torch.cuda.synchronize(x.device)
    return time.perf_counter() - start


def _error(x: Tensor, weight: IQTensor) -> float:
    n = weight.shape[0]
    few = weight.format.decode(weight.to_blocks()[:_DISTINCT].cpu()).double() * weight.format.runtime_scale
    wanted = (x.cpu().double() @ few.T).repeat(1, -(-n // len(few)))[:, :n]  # the other rows repeat these
    return float((F.linear(x, weight).cpu().double() - wanted).norm() / wanted.norm())
