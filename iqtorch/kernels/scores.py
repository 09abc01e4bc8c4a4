"""The nearest entry of a codebook for each of many vectors: scores as matrix products, of which only the lowest leaves the registers."""

# mypy: ignore-errors

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import _on

#: Queries of a program, and entries at a time: their scores and numbers take 64 registers of each of 256 threads.
QUERIES, ENTRIES = 128, 64
#: A matrix product of tensor cores sums at least so many.
DEPTH = 16


@triton.jit(do_not_specialize=["count"])
def lowest(query, book, out, count, entries, WIDTH: tl.constexpr, DEPTH: tl.constexpr, Q: tl.constexpr, E: tl.constexpr, SUM: tl.constexpr):
    """The column of `book` `[WIDTH, entries]` with the lowest product with each row of `query` `[count, WIDTH]`, the first of equals."""
    q = tl.program_id(0).to(tl.int64) * Q + tl.arange(0, Q)
    i, e = tl.arange(0, DEPTH), tl.arange(0, E)
    # Beyond the last, queries repeat it; beyond the width, zeros.
    row = tl.minimum(q, count - 1)
    asked = tl.load(query + row[:, None] * WIDTH + i[None, :], mask=i[None, :] < WIDTH, other=0.0)
    at = book + i[:, None] * entries + e[None, :]
    best, where = tl.full((Q, E), float("inf"), tl.float32), tl.zeros((Q, E), tl.int32)
    for first in range(0, entries, E):
        score = tl.dot(asked, tl.load(at + first, mask=i[:, None] < WIDTH, other=0.0), input_precision=SUM)
        lower = score < best
        best, where = tl.where(lower, score, best), tl.where(lower, first, where)
    least = tl.min(best, 1)
    found = tl.min(tl.where(best == least[:, None], where + e[None, :], entries), 1)
    tl.store(out + q, tl.minimum(found, entries - 1), mask=q < count)


def best_entries(query: Tensor, matrix: Tensor) -> Tensor:
    """int32 `[Q]`: the column of `matrix` `[W, E]` whose product with each row of `query` `[Q, W]` (both float32) is the lowest.

    Sums are those of three products of TF32 each, as good as float32; scores that differ by less than their rounding may change places.
    W is at most DEPTH, E a multiple of ENTRIES.
    """
    out = query.new_empty(len(query), dtype=torch.int32)
    if not len(query):
        return out
    width, entries = matrix.shape
    precision = "ieee" if torch.version.hip else "tf32x3"
    with _on(query.device):
        lowest[(triton.cdiv(len(query), QUERIES),)](
            query.contiguous(), matrix.contiguous(), out, len(query), entries, width, DEPTH, QUERIES, ENTRIES, precision, num_warps=8
        )
    return out
