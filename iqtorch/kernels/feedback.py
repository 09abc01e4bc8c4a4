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


def supports(fmt: Format) -> bool:
    """Whether the kernel can round a format: single values, and pairs without signs of their own."""
    return fmt.vec == 1 or (fmt.vec == 2 and "sign" not in fmt.fields)


# No sum of products of two tensors below: of `tl.sum(a[:, :, None] * b[None], 1)` Triton makes a product of tensor cores, in TF32, and
# where the sum is shorter than the instruction's (8 numbers) it counts them more than once.


@triton.jit
def _column(x, j, at):
    """Column `at` of `x [N, P]`."""
    return tl.sum(tl.where(j[:, None] == at, x, 0.0), 0)


@triton.jit
def _passed_on(lower, second, columns, first, e):
    """What the errors `e [P]` of column `first` add to the columns `second [N]`."""
    return tl.load(lower + second * columns + first)[:, None] * e[None, :]


@triton.jit
def _keep(rest, value_out, error_out, place, left, value, e, live):
    """Stores what became of a column."""
    tl.store(rest + place, left, mask=live)
    tl.store(value_out + place, value, mask=live)
    tl.store(error_out + place, e, mask=live)


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
    `book`, `index` and `other` are by cell for single values (ENTRIES of them for each kind), `book` `[KINDS, ENTRIES, 2]` for pairs.
    """
    r = tl.program_id(0) * P + tl.arange(0, P)
    live = r < rows
    columns = groups * N
    j = tl.arange(0, N)
    for group in range(groups):
        tl.debug_barrier()  # what other lanes added to these columns
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
            for step in range(N // V):
                at = a + step * V
                place = at * rows + r
                if V == 1:
                    wanted = _column(x, j, step)
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
                    e = tl.load(weight + place, mask=live, other=0.0) + low - q * s
                    x += _passed_on(lower, a + j, columns, at, e)
                    if final:
                        _keep(rest, value_out, error_out, place, left, q, e, live)
                        tl.store(code_out + place, code, mask=live)
                else:
                    wanted0, wanted1 = _column(x, j, 2 * step), _column(x, j, 2 * step + 1)
                    form00, form01, form11 = tl.load(form + 2 * at), tl.load(form + 2 * at + 1), tl.load(form + 2 * at + 3)
                    turned = tl.where(s < 0.0, -2.0, 2.0)
                    seen0, seen1 = turned * (form00 * wanted0 + form01 * wanted1), turned * (form01 * wanted0 + form11 * wanted1)
                    least, code = tl.full((P,), float("inf"), tl.float32), tl.zeros((P,), tl.int32)
                    for entry in range(ENTRIES):
                        nth = kind * ENTRIES + entry
                        size = tl.load(square + at // 2 * KINDS * ENTRIES + nth)
                        score = tl.abs(s) * size - (tl.load(book + 2 * nth) * seen0 + tl.load(book + 2 * nth + 1) * seen1)
                        code = tl.where(score < least, entry, code)
                        least = tl.minimum(score, least)
                    nth = kind * ENTRIES + code
                    q0, q1 = tl.load(book + 2 * nth), tl.load(book + 2 * nth + 1)
                    left0, left1 = wanted0 - q0 * s, wanted1 - q1 * s
                    cost += form00 * left0 * left0 + 2.0 * form01 * left0 * left1 + form11 * left1 * left1
                    e0 = tl.load(weight + place, mask=live, other=0.0) + low - q0 * s
                    e1 = tl.load(weight + place + rows, mask=live, other=0.0) + low - q1 * s
                    x += _passed_on(lower, a + j, columns, at, e0) + _passed_on(lower, a + j, columns, at + 1, e1)
                    if final:
                        _keep(rest, value_out, error_out, place, left0, q0, e0, live)
                        _keep(rest, value_out, error_out, place + rows, left1, q1, e1, live)
                        tl.store(code_out + at // 2 * rows + r, code, mask=live)
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
                now += _passed_on(lower, there, columns, a + i, e)
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
