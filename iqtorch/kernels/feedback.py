"""Rounding with error feedback (see iqtorch/encode/feedback.py for the method): 256 columns in one launch, a row in each lane of a warp."""

# mypy: ignore-errors

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..encode.choose import parity_words
from ..encode.nearest import SMALLEST_SCALE, TableNearest, nearest
from ..formats import Format
from .launch import _on

#: Rows of a program: its one warp has a row in each lane, and the columns of a group in the registers of each.
ROWS = 32
#: Codebooks of vectors up to this size are compared entry by entry.
ENTRIES = 2048


def supports(fmt: Format) -> bool:
    """Whether the kernel can round a format: single values, and small codebooks of vectors without signs of their own."""
    return fmt.vec == 1 or ("sign" not in fmt.fields and fmt.codebook.entries * fmt.codebook.variants <= ENTRIES)


@triton.jit
def _scale(unit, value, near, old, step, group, groups, count, rows, r, live, OWN: tl.constexpr):
    """Rank of the candidate `step` of each row, and the scale that it stands for."""
    rank = tl.load(near + step * count + old, mask=live, other=0)
    own = (rank * groups + group) * rows if OWN else group * rows
    return rank, tl.load(unit + own + r, mask=live, other=0.0) * tl.load(value + rank, mask=live, other=0.0)


@triton.jit(do_not_specialize=["rows", "groups", "count", "low_count"])
def round_block(
    rest, weight, lower, form, square,
    unit, value, near, rank, low_unit, low_value, low_near, low_rank,
    book, index, other_book, other, odd_code, word, closes,
    kind_out, code_out, value_out, error_out,
    rows, groups, count, low_count, first, last,
    N: tl.constexpr, V: tl.constexpr, ENTRIES: tl.constexpr, KINDS: tl.constexpr, STEPS: tl.constexpr, LOWS: tl.constexpr,
    OWN: tl.constexpr, LOW_OWN: tl.constexpr, AFFINE: tl.constexpr, PARITY: tl.constexpr, SMALLEST: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    """Groups of N columns one after the other: each is rounded with every candidate, then again with the best of each row, and what its
    errors leave is added to the groups that follow.

    Columns are in rounding order and rows lie next to each other; 256 columns of 2^22 rows are addressed in int32.
    `lower` is `[columns, columns]`, from column (second) to column (first);
    `book`, `index` and `other` are by cell for single values (ENTRIES of them for each kind), `book` `[KINDS, ENTRIES, V]` for vectors.
    """
    r = tl.program_id(0) * P + tl.arange(0, P)
    live = r < rows
    columns = groups * N
    j, v = tl.arange(0, N), tl.arange(0, V)
    S: tl.constexpr = N // V
    for group in range(groups):
        a = group * N
        tile = (a + j)[:, None] * rows + r[None, :]
        old = tl.load(rank + group * rows + r, mask=live, other=0)
        old_low = tl.load(low_rank + group * rows + r, mask=live, other=0) if AFFINE else old
        best, chosen = tl.full((P,), float("inf"), tl.float32), tl.zeros((P,), tl.int32)
        for candidate in range(KINDS * STEPS * LOWS + 1):
            final = candidate == KINDS * STEPS * LOWS
            which = tl.where(final, chosen, candidate)
            kind = which // (STEPS * LOWS)
            new, s = _scale(unit, value, near, old, which // LOWS % STEPS, group, groups, count, rows, r, live, OWN)
            x, low = tl.load(rest + tile, mask=live[None, :], other=0.0), tl.zeros((P,), tl.float32)
            if AFFINE:
                new_low, low = _scale(
                    low_unit, low_value, low_near, old_low, which % LOWS, group, groups, low_count, rows, r, live, LOW_OWN
                )
                x += low[None, :]
            twice = tl.where(tl.abs(s) < SMALLEST, 0.0, 2.0 / tl.where(s == 0.0, 1.0, s))
            cost, odd = tl.zeros((P,), tl.float32), tl.zeros((P,), tl.int32)
            for step in range(S):
                at = a + step * V
                if V == 1:
                    wanted = tl.sum(tl.where(j[:, None] == step, x, 0.0), 0)
                    cell = tl.floor(tl.minimum(tl.maximum(wanted * twice, first), last)) - first
                    cell = cell.to(tl.int32) + kind * ENTRIES
                    code, q = tl.load(index + cell), tl.load(book + cell)
                    if PARITY:
                        own = tl.load(word + at)
                        wrong = (odd >> own & 1) ^ tl.load(odd_code + code)
                        if tl.load(closes + at) != 0:  # the last of its word makes the parity even
                            code = tl.where(wrong != 0, tl.load(other + cell), code)
                            q = tl.where(wrong != 0, tl.load(other_book + cell), q)
                        odd = (odd & ~(1 << own)) | (wrong << own)
                    left = wanted - q * s
                    cost += tl.load(form + at) * left * left
                    e = tl.load(weight + at * rows + r, mask=live, other=0.0) + low - q * s
                    x += tl.load(lower + (a + j) * columns + at)[:, None] * e[None, :]
                    if final:
                        place = at * rows + r
                        tl.store(rest + place, left, mask=live)
                        tl.store(value_out + place, q, mask=live)
                        tl.store(error_out + place, e, mask=live)
                        tl.store(code_out + place, code, mask=live)
                else:
                    wanted = tl.sum(tl.where(tl.arange(0, S)[:, None, None] == step, tl.reshape(x, (S, V, P)), 0.0), 0)
                    d = tl.load(form + at * V + v[:, None] * V + v[None, :])
                    seen = tl.sum(d[:, :, None] * wanted[None, :, :], 1)
                    turned = tl.where(s < 0.0, -1.0, 1.0)
                    least, code = tl.full((P,), float("inf"), tl.float32), tl.zeros((P,), tl.int32)
                    for entry in range(ENTRIES):
                        nth = kind * ENTRIES + entry
                        c = tl.load(book + nth[None, :] * V + v[:, None])
                        size = tl.load(square + (at // V) * KINDS * ENTRIES + nth)
                        score = tl.abs(s) * size - 2.0 * turned * tl.sum(c * seen, 0)
                        code = tl.where(score < least, entry, code)
                        least = tl.minimum(score, least)
                    q = tl.load(book + (kind * ENTRIES + code)[None, :] * V + v[:, None])
                    left = wanted - q * s[None, :]
                    cost += tl.sum(tl.sum(d[:, :, None] * left[None, :, :], 1) * left, 0)
                    place = (at + v)[:, None] * rows + r[None, :]
                    e = tl.load(weight + place, mask=live[None, :], other=0.0) + low[None, :] - q * s[None, :]
                    passed_on = tl.load(lower + (a + j)[:, None] * columns + at + v[None, :])
                    x += tl.sum(passed_on[:, :, None] * e[None, :, :], 1)
                    if final:
                        tl.store(rest + place, left, mask=live[None, :])
                        tl.store(value_out + place, q, mask=live[None, :])
                        tl.store(error_out + place, e, mask=live[None, :])
                        tl.store(code_out + (at // V) * rows + r, code, mask=live)
            chosen = tl.where((cost < best) & ~final, candidate, chosen)
            best = tl.minimum(cost, best)
            if final:
                tl.store(rank + group * rows + r, new, mask=live)
                tl.store(kind_out + group * rows + r, kind, mask=live)
                if AFFINE:
                    tl.store(low_rank + group * rows + r, new_low, mask=live)
        tl.debug_barrier()  # errors are read by other lanes than wrote them
        for after in range(group + 1, groups):
            there = after * N + j
            tile = there[:, None] * rows + r[None, :]
            now = tl.load(rest + tile, mask=live[None, :], other=0.0)
            for i in range(N):
                e = tl.load(error_out + (a + i) * rows + r, mask=live, other=0.0)
                now += tl.load(lower + there * columns + a + i)[:, None] * e[None, :]
            tl.store(rest + tile, now, mask=live[None, :])


def feedback(
    fmt: Format,
    order: Tensor,
    lower: Tensor,
    form: Tensor,
    weight: Tensor,
    scales: list[tuple[Tensor, Tensor, Tensor, Tensor]],
    out: tuple[Tensor, Tensor, Tensor, Tensor, Tensor],
) -> None:
    """`Rounding._round_block` on a GPU, for what `supports` says; arguments are those of `encode.compiled.feedback`."""
    device, vec, n = weight.device, fmt.vec, fmt.group_size
    columns, rows = weight.shape
    rest, kind, code, value, error = out
    (unit, values, near, rank), (low_unit, low_values, low_near, low_rank) = (*scales, scales[0])[:2]
    kinds = fmt.codebook.variants if fmt.variant_size == n else 1
    search = nearest(fmt, device)
    square = book = index = other_book = other = odd = word = closes = weight  # read by no format that lacks them
    entries, first, last = fmt.codebook.entries * (fmt.codebook.variants // kinds), 0.0, 0.0
    if isinstance(search, TableNearest):
        lookup = search.lookup
        book, index, entries, first, last = lookup.value, lookup.index, lookup.cells, lookup.low, lookup.high
        if fmt.code_parity:
            places = parity_words(search, order % n)
            ends = [w not in places[i + 1 : n * (i // n + 1)] for i, w in enumerate(places)]
            word, closes = (torch.tensor(t, dtype=torch.int32, device=device) for t in (places, ends))
            other, odd = search.other, search.odd.to(torch.int32)
            which = torch.arange(len(other), device=device) // entries * fmt.codebook.entries
            other_book = search.book[which + other]
    else:
        book = search.books.reshape(-1, vec).contiguous()
        square = ((book @ form) * book).sum(2)
    with _on(device):
        round_block[(triton.cdiv(rows, ROWS),)](
            rest, weight, lower.contiguous(), form.contiguous(), square,
            unit.contiguous(), values, near, rank, low_unit.contiguous(), low_values, low_near, low_rank,
            book, index, other_book, other, odd, word, closes,
            kind, code, value, error,
            rows, columns // n, near.shape[1], low_near.shape[1], first, last,
            n, vec, entries, kinds, len(near), len(low_near) if fmt.affine else 1,
            len(unit) > 1, len(low_unit) > 1, fmt.affine, bool(fmt.code_parity), SMALLEST_SCALE, ROWS, num_warps=1,
        )  # fmt: skip
