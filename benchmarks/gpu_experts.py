"""The baseline of benchmarks/gpu.py: a layer of experts in bfloat16 as engines run it today, fused in Triton.

Pairs of token and expert are sorted; tiles of one expert each multiply by its matrix; the routing weights are applied at the end.
Written for this comparison: one kernel for both projections, tiles of 16 tokens (decoding) or 64 and more.
"""

# mypy: ignore-errors

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit(do_not_specialize=["pairs"])
def product(
    x, w, y, order, ends, pairs, rows, k, experts, per_token, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, EP: tl.constexpr
):
    """y[order[i]] = w[expert of i] x[order[i] / per_token], for pairs i in the order of their experts."""
    e = tl.arange(0, EP)
    last = tl.load(ends + e, mask=e < experts, other=0)
    begin = tl.load(ends + e - 1, mask=(e > 0) & (e < experts), other=0)
    tiles = (last - begin + BM - 1) // BM
    up_to = tl.cumsum(tiles, axis=0)
    tile = tl.program_id(1)
    expert = tl.sum((up_to <= tile).to(tl.int32), axis=0)
    if expert >= experts:
        return
    mine = (e == expert).to(tl.int32)
    first = tl.sum(begin * mine, axis=0) + (tile - tl.sum((up_to - tiles) * mine, axis=0)) * BM
    i = first + tl.arange(0, BM)
    inside = i < tl.sum(last * mine, axis=0)
    pair = tl.load(order + i, mask=inside, other=0)
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    acc = tl.zeros((BM, BN), tl.float32)
    base = w + expert.to(tl.int64) * rows * k
    for at in range(0, k, BK):
        c = at + tl.arange(0, BK)
        a = tl.load(x + (pair // per_token)[:, None] * k + c[None, :], mask=inside[:, None] & (c < k)[None, :], other=0.0)
        b = tl.load(base + n[None, :] * k + c[:, None], mask=(n < rows)[None, :] & (c < k)[:, None], other=0.0)
        acc = tl.dot(a, b, acc)
    tl.store(y + pair[:, None] * rows + n[None, :], acc.to(y.dtype.element_ty), mask=inside[:, None] & (n < rows)[None, :])


def experts(x: Tensor, gate_up: Tensor, down: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    """`x [T, H]`, gate_up `[E, 2 I, H]`, down `[E, H, I]`, ids and weights `[T, S]` -> `[T, H]`, with SiLU."""
    tokens, slots = ids.shape
    count, _, hidden = gate_up.shape
    chosen, order = torch.sort(ids.reshape(-1))
    ends = torch.searchsorted(chosen, torch.arange(count, device=x.device), right=True).to(torch.int32)
    pairs = tokens * slots
    bm = 16 if pairs <= 16 * count else 64
    tiles = min(pairs, triton.cdiv(pairs, bm) + count)

    def project(a: Tensor, w: Tensor, per_token: int) -> Tensor:
        out = torch.empty((pairs, w.shape[1]), dtype=x.dtype, device=x.device)
        bn, bk = (64, 128) if bm == 16 else (128, 64)
        product[(triton.cdiv(w.shape[1], bn), tiles)](
            a, w, out, order, ends, pairs, w.shape[1], w.shape[2], count, per_token, BM=bm, BN=bn, BK=bk,
            EP=triton.next_power_of_2(count), num_warps=4, num_stages=4,
        )  # fmt: skip
        return out

    gate, up = project(x, gate_up, slots).chunk(2, -1)
    out = project(torch.nn.functional.silu(gate) * up, down, 1)
    return (out.view(tokens, slots, hidden) * weights[..., None].to(out.dtype)).sum(1)
