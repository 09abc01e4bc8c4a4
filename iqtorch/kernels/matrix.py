"""Products with more tokens on tensor cores, and weights as such.

    stage       activations as float16 in the order of tensor-core fragments, for gemm
    gemm        Y^T = W X^T, weights decoded straight into the register operand
    combine     sums the parts of a split product, in a fixed order
    dequantize  weights, or rows of them by id

Formats and addresses as in vector.py.
"""

# mypy: ignore-errors

from __future__ import annotations

import triton
import triton.language as tl

from .asm import float_offset, floats, follow, half_offset, halves, two_rounded
from .decode import pairs_halves, prepare, quads
from .planes import each, load_planes, prefetch_rows
from .scales import power_of_two, prepare_scales, row_exponent, row_scale, scales
from .vector import item_number

# -- more tokens ---------------------------------------------------------------------------------------------


@triton.jit
def fragment_order(i, RUN: tl.constexpr, FRAGMENT: tl.constexpr):
    """Where `stage` puts element i of a row."""
    to = i
    if FRAGMENT:
        t, j, h, e = (i // RUN) % 4, (i // 4) % (RUN // 4), (i // 2) % 2, i % 2
        to = i // (4 * RUN) * (4 * RUN) + 16 * j + 8 * h + 2 * t + e
    return to


@triton.jit(do_not_specialize=["tokens"])
def stage(
    x,
    out,
    steps,
    tokens,
    k,
    x_stride,
    k_padded,
    RUN: tl.constexpr,
    BLOCK: tl.constexpr,
    ONCE: tl.constexpr,
    FRAGMENT: tl.constexpr,
    AHEAD: tl.constexpr,
):
    """Activations for gemm: one row per program, scaled by a power of two to at most 1, as float16; FRAGMENT: in fragment order.

    Position 16 j + 8 h + 2 t + e of 4 RUN neighbours (j < RUN / 4; h, e < 2; t < 4) takes element RUN t + 4 j + 2 h + e.
    Columns up to `k_padded` become zero, `steps[m]` undoes the scaling.
    """
    if AHEAD:
        follow()
    m = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, BLOCK)
    v = tl.load(x + m * x_stride + i, mask=i < k, other=0.0).to(tl.float32)
    largest = tl.max(tl.abs(v), axis=0)
    if not ONCE:
        for first in range(BLOCK, k, BLOCK):
            more = tl.load(x + m * x_stride + first + i, mask=first + i < k, other=0.0).to(tl.float32)
            largest = tl.maximum(largest, tl.max(tl.abs(more), axis=0))
    exponent = (largest.to(tl.int32, bitcast=True) >> 23) - 126  # largest < 2^exponent
    exponent = tl.minimum(tl.maximum(exponent, -126), 126)
    inverse = power_of_two(-exponent)
    tl.store(steps + m, power_of_two(exponent))
    out += m * k_padded
    if ONCE:
        tl.store(out + fragment_order(i, RUN, FRAGMENT), (v * inverse).to(tl.float16), mask=i < k_padded)
    else:
        for first in range(0, k_padded, BLOCK):
            v = tl.load(x + m * x_stride + first + i, mask=first + i < k, other=0.0).to(tl.float32)
            tl.store(out + fragment_order(first + i, RUN, FRAGMENT), (v * inverse).to(tl.float16), mask=first + i < k_padded)


@triton.jit
def operand_rows(n0, BN: tl.constexpr, FRAGMENT: tl.constexpr):
    """Row numbers; FRAGMENT: in the order in which a warp group holds them: for each half of 8 rows, 16 rows apart per warp."""
    i = tl.arange(0, BN)
    if FRAGMENT:
        half, rest = i // (BN // 2), i % (BN // 2)
        i = rest // 8 * 16 + half * 8 + rest % 8
    return n0 + i


@triton.jit
def operand(planes, held, lut, exponent, S: tl.constexpr, BN: tl.constexpr, FRAGMENT: tl.constexpr, ASM: tl.constexpr):
    """float16 weights `[BN, 4 RUN]` of rows as `operand_rows`, columns as `stage` has them; without a `d` per row."""
    scale, shift, low = scales(planes, lut, S, ASM)
    if S.d_size > 0:
        down = power_of_two(-exponent)[None, :, :]
        scale *= down
        if S.affine:
            low *= down
    per: tl.constexpr = S.quads // S.groups
    if ASM and S.family == "pairs":
        f0, f1, f2, f3 = pairs_halves(planes, held, scale, S)
    else:
        base: tl.constexpr = half_offset(S.signed, S.base)
        bias = shift * 0 + base
        if S.shift != 0:
            bias += shift
        q = quads(planes, held, S, ASM)
        f0, f1, f2, f3 = halves(q, each(scale.to(tl.float16), per), each(bias.to(tl.float16), per), S.signed, ASM)
    if S.affine:
        less = each(low.to(tl.float16), per)
        f0, f1, f2, f3 = f0 - less, f1 - less, f2 - less, f3 - less
    f = tl.join(tl.join(f0, f2), tl.join(f1, f3))  # [quads, BN, 4, h, e]
    if FRAGMENT:
        # element 4 j + 2 h + e of thread t -> column 16 j + 8 h + 2 t + e
        f = tl.reshape(f, (S.quads, 2, BN // 16, 8, 4, 2, 2))
        f = tl.permute(f, (2, 1, 3, 0, 5, 4, 6))
    else:
        f = tl.permute(f, (1, 2, 0, 3, 4))
    return tl.reshape(f, (BN, 4 * S.run))


@triton.jit
def step_runs(i, runs):
    """Runs of step `i` of gemm, `[1, 4]`; beyond the row, where activations are zero, its last one."""
    return tl.minimum(4 * i + tl.arange(0, 4), runs - 1)[None, :]


@triton.jit(do_not_specialize=["tokens", "experts", "split"])
def gemm(
    xs,
    steps,
    data,
    book,
    lut,
    bias,
    offsets,
    y,
    tokens,
    rows,
    runs,
    k_padded,
    matrix_bytes,
    experts,
    split,
    S: tl.constexpr,
    GROUPED: tl.constexpr,
    BN: tl.constexpr,
    BM: tl.constexpr,
    EP: tl.constexpr,
    FRAGMENT: tl.constexpr,
    ASM: tl.constexpr,
    AHEAD: tl.constexpr,
):
    """y[m, n] = sum_k xs[m, k] steps[m] w[n, k] + bias[n]; with split > 1, part `s` of the sum over k goes to y[s, m, n].

    GROUPED: rows of x are sorted by expert, `offsets` are their cumulative ends; each program works for one expert, and nothing is split.
    """
    n0 = tl.program_id(0) * BN
    if AHEAD:
        if not GROUPED and tl.program_id(1) + tl.program_id(2) == 0:
            prefetch_rows(data, n0, BN, rows, runs, S)
        follow()
    m_tile, s = tl.program_id(1), tl.program_id(2)
    begin, end = tokens * 0, tokens
    if GROUPED:
        m_tile, s = item_number(), 0
        # Tiles of all experts in a row: find the expert whose tiles include this one.
        e = tl.arange(0, EP)
        ends = tl.load(offsets + e, mask=e < experts, other=0)
        begins = tl.load(offsets + e - 1, mask=(e > 0) & (e < experts), other=0)
        tiles = tl.maximum(ends - begins + BM - 1, 0) // BM
        last = tl.cumsum(tiles, axis=0)
        expert = tl.sum((last <= m_tile).to(tl.int32), axis=0)
        if expert >= experts:
            return
        mine = (e == expert).to(tl.int32)
        begin, end = tl.sum(begins * mine, axis=0), tl.sum(ends * mine, axis=0)
        m_tile -= tl.sum((last - tiles) * mine, axis=0)
        data += expert.to(tl.int64) * matrix_bytes
    m = begin + m_tile * BM + tl.arange(0, BM)
    row = tl.minimum(operand_rows(n0, BN, FRAGMENT), rows - 1)[:, None]
    exponent = tl.zeros((BN, 1), tl.int32)
    if S.d_size > 0:
        exponent = row_exponent(data, row, rows, runs, S, ASM)
    steps_k = (runs + 3) // 4
    part = (steps_k + split - 1) // split
    first = s * part
    acc = tl.zeros((BN, BM), tl.float32)
    held = prepare(book, S, ASM)
    lut = prepare_scales(lut, S, ASM)
    column = tl.arange(0, 4 * S.run)
    source = m.to(tl.int64) * k_padded
    # Loaded one step ahead: the loads of a step wait for nothing, those of the next run meanwhile.
    planes = load_planes(data, row, step_runs(first, runs), rows, runs, S, ASM)
    for i in range(first, tl.minimum(first + part, steps_k)):
        following = load_planes(data, row, step_runs(i + 1, runs), rows, runs, S, ASM)
        w = operand(planes, held, lut, exponent, S, BN, FRAGMENT, ASM)
        planes = following
        xt = tl.load(xs + source[None, :] + (i * (4 * S.run) + column)[:, None], mask=(m < end)[None, :], other=0.0)
        acc = tl.dot(w, xt, acc)
    n = n0 + tl.arange(0, BN)
    last_row = tl.minimum(n, rows - 1)
    up = tl.load(steps + m, mask=m < end, other=0.0)[None, :] * S.factor
    if S.d_size > 0:
        up = up * power_of_two(row_exponent(data, last_row, rows, runs, S, ASM))[:, None]
    else:
        up = up * row_scale(data, last_row[:, None], rows, runs, S)
    out = acc * up
    if bias is not None:
        out += tl.load(bias + n, mask=n < rows, other=0.0).to(tl.float32)[:, None]
    at = (tl.cast(s, tl.int64) * tokens + m.to(tl.int64))[None, :] * rows + n[:, None]
    tl.store(y + at, out.to(y.dtype.element_ty), mask=(n < rows)[:, None] & (m < end)[None, :])


@triton.jit(do_not_specialize=["count", "split"])
def combine(parts, bias, y, count, rows, split, BLOCK: tl.constexpr, AHEAD: tl.constexpr):
    """y = sum over `split` parts, first to last, plus bias; `count` elements each."""
    if AHEAD:
        follow()
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    acc = tl.zeros((BLOCK,), tl.float32)
    for s in range(split):
        acc += tl.load(parts + s * count.to(tl.int64) + i, mask=i < count, other=0.0)
    if bias is not None:
        acc += tl.load(bias + i % rows, mask=i < count, other=0.0).to(tl.float32)
    tl.store(y + i, acc.to(y.dtype.element_ty), mask=i < count)


# -- weights -------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["count"])
def dequantize(
    data,
    book,
    lut,
    ids,
    out,
    count,
    rows,
    runs,
    matrix_bytes,
    S: tl.constexpr,
    ROWS: tl.constexpr,
    RUNS: tl.constexpr,
    ASM: tl.constexpr,
):
    """Weights of `count` rows, in the order of `ids` or as stored; each float32 product rounded as in `Format.decode`.

    Needs `enable_fp_fusion=False`: a fused multiply-add would round once where the format rounds twice.
    """
    # one axis for rows and runs: the others have too few programs for the rows of a large vocabulary
    across = (runs + RUNS - 1) // RUNS
    index = ((tl.program_id(0) // across).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
    run = (tl.program_id(0) % across * RUNS + tl.arange(0, RUNS))[None, :]
    matrix = tl.program_id(1).to(tl.int64)
    row = index
    valid = index < count
    if ids is not None:
        row = tl.load(ids + index, mask=valid, other=0).to(tl.int64)
    inside = (row >= 0) & (row < rows)
    row = tl.minimum(tl.maximum(row, 0), rows - 1).to(tl.int32)
    held = prepare(book, S, ASM)
    lut = prepare_scales(lut, S, ASM)
    column = run
    run = tl.minimum(run, runs - 1)
    data += matrix * matrix_bytes
    planes = load_planes(data, row, run, rows, runs, S, ASM)
    q = quads(planes, held, S, ASM)
    scale, shift, low = scales(planes, lut, S, ASM)
    if S.d_size == 0:
        scale = scale * row_scale(data, row, rows, runs, S)[None, :, :]
    per: tl.constexpr = S.quads // S.groups
    base: tl.constexpr = float_offset(S.signed, S.base)
    f0, f1, f2, f3 = floats(q, S.signed, ASM)
    by = each(scale, per)
    if S.shift != 0:
        add = each((shift + base).to(tl.float32), per)
        f0, f1, f2, f3 = (f0 + add) * by, (f1 + add) * by, (f2 + add) * by, (f3 + add) * by
    else:
        f0, f1, f2, f3 = (f0 + base) * by, (f1 + base) * by, (f2 + base) * by, (f3 + base) * by
    if S.affine:
        less = each(low, per)
        f0, f1, f2, f3 = f0 - less, f1 - less, f2 - less, f3 - less
    if S.factor != 1.0:
        f0, f1, f2, f3 = f0 * S.factor, f1 * S.factor, f2 * S.factor, f3 * S.factor
    if ASM and out.dtype.element_ty.primitive_bitwidth == 16:
        # two weights per word
        half: tl.constexpr = out.dtype.element_ty == tl.bfloat16
        w = tl.permute(tl.join(two_rounded(f0, f1, half), two_rounded(f2, f3, half)), (1, 2, 0, 3))
        words: tl.constexpr = S.quads * 2
        out = out.to(tl.pointer_type(tl.int32), bitcast=True)
    else:
        w = tl.permute(tl.join(tl.join(f0, f2), tl.join(f1, f3)), (1, 2, 0, 3, 4)).to(out.dtype.element_ty)
        words: tl.constexpr = S.run
    w = tl.reshape(w, (ROWS, RUNS, words))
    if ids is not None:
        w = tl.where(inside[:, :, None], w, 0)
    to = ((matrix * count + index) * runs + column)[:, :, None] * words + tl.arange(0, words)[None, None, :]
    tl.store(out + to, w, mask=(valid & (column < runs))[:, :, None])
