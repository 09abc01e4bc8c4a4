"""Products with few tokens: int8 digits of the activations times int8 values, exact integer sums per scale.

    gemv        one matrix, or the expert of each token
    row_sums    the same for the kernels of routed.py

Kernels are written once and take their format as a `Scheme` (see layout.py, decode.py). Matrices, activations and results are addressed
in int64, words within one matrix in int32 (`supports` bounds its size). Loads and stores are masked or clamped to their tensor; nothing
is read back by the host.
"""

# mypy: ignore-errors

from __future__ import annotations

import triton
import triton.language as tl

from .asm import LOW_BYTES, bytes_of, dot4, dot4_first, fetch, follow, negate_small_bytes, pack4, permute, two_floats
from .decode import flipped, prepare, quads, trellis_states, trellis_word
from .planes import flatten_last, halving, interleave, load_planes, prefetch_rows, unleave, unleave4
from .scales import prepare_scales, row_scale, scales

# -- which matrix --------------------------------------------------------------------------------------------


@triton.jit
def item_number():
    """Number of the program along the second axis, and, where that is too short (65535 programs), the third: see `launch.items_grid`."""
    return tl.program_id(2) * tl.num_programs(1) + tl.program_id(1)


@triton.jit
def expert_of(offsets, token, experts, EP: tl.constexpr):
    """Number of the expert that owns row `token`: how many end at or before it."""
    e = tl.arange(0, EP)
    ends = tl.load(offsets + e, mask=e < experts, other=2147483647)
    return tl.sum((ends <= token).to(tl.int32), axis=0)


# -- activations ---------------------------------------------------------------------------------------------


@triton.jit
def larger(a, b):
    """Maximum that keeps NaN, so that a NaN activation cannot turn into a number."""
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def digits(x, DIGITS: tl.constexpr, ASM: tl.constexpr):
    """float32 `[n, M, B]` -> the signed integers `round(x / step)`, in their low 8 DIGITS bits, and `step [M, B]`, one per run."""
    top: tl.constexpr = 127.0 if DIGITS == 1 else 32767.0 if DIGITS == 2 else 8388544.0
    if ASM:
        largest = tl.reduce(tl.abs(x), 0, larger)
    else:
        # as integers, NaN is above all numbers
        largest = tl.max(tl.abs(x).to(tl.int32, bitcast=True), axis=0).to(tl.float32, bitcast=True)
    step = largest * (1.0 / top)
    # a run of zeros, or one too small to divide by
    inverse = tl.where(step > 1e-37, 1.0 / tl.where(step > 1e-37, step, 1.0), 0.0)
    y = x * inverse[None, :, :]
    if DIGITS < 3:
        # adding 1.5 * 2^23 leaves the rounded integer in the low bits
        q = (y + 12582912.0).to(tl.int32, bitcast=True)
    else:
        q = tl.where(y < 0.0, y - 0.5, y + 0.5).to(tl.int32)
    return q, step


@triton.jit
def load_run(x, run, inside, N: tl.constexpr, ASM: tl.constexpr):
    """N activations of runs `[1, B]` from the rows `x [M]` (pointers, aligned to 16 bytes) as float32 `[N, M, B]`; zero if not `inside`."""
    if ASM:
        per: tl.constexpr = 128 // x.dtype.element_ty.primitive_bitwidth
        n: tl.constexpr = N // per
        at = tl.where(inside, run, 0)[None, :, :] * n + tl.arange(0, n)[:, None, None]
        words = tl.where(inside[None, :, :], flatten_last(fetch(x[None, :, None], at, 128, False)), 0)
        if per == 4:
            v = words.to(tl.float32, bitcast=True)
        else:
            low, high = two_floats(words, x.dtype.element_ty == tl.bfloat16)
            v = interleave(low, high)
    else:
        at = x[None, :, None] + (run * N)[None, :, :] + tl.arange(0, N)[:, None, None]
        v = tl.load(at, mask=inside[None, :, :], other=0.0).to(tl.float32)
    return v


@triton.jit
def digit_quads(q, i: tl.constexpr, ASM: tl.constexpr):
    """Byte i of integers `[n, M, B]` as quads `[n / 4, M, B]`."""
    a, b, c, d = unleave4(q)
    if ASM:
        pattern: tl.constexpr = ("0x0040", "0x0051", "0x0062")[i]
        v = permute(permute(a, b, pattern), permute(c, d, pattern), "0x5410")
    else:
        v = pack4(a >> (8 * i), b >> (8 * i), c >> (8 * i), d >> (8 * i), ASM)
    return v


@triton.jit
def per_scale(v, S: tl.constexpr):
    """Sums of `[n, M, R, B]` over the elements that share a scale: `[groups, M, R, B]`."""
    n: tl.constexpr = v.shape[0] // S.groups
    if n > 1:
        v = tl.sum(tl.reshape(v, (S.groups, n, v.shape[1], v.shape[2], v.shape[3])), axis=1)
    return v


@triton.jit
def chain(w0, w1, w2, w3, x0, x1, x2, x3, W_SIGNED: tl.constexpr, X_SIGNED: tl.constexpr):
    """Byte dot products of four pairs, one added to the other."""
    acc = dot4_first(w0, x0, W_SIGNED, X_SIGNED)
    acc = dot4(w1, x1, acc, W_SIGNED, X_SIGNED)
    acc = dot4(w2, x2, acc, W_SIGNED, X_SIGNED)
    return dot4(w3, x3, acc, W_SIGNED, X_SIGNED)


@triton.jit
def dot_digit(w, x, S: tl.constexpr, W_SIGNED: tl.constexpr, X_SIGNED: tl.constexpr, ASM: tl.constexpr):
    """`w [quads, R, B]`, `x [quads, M, B]` -> int32 `[groups, M, R, B]`."""
    w, x = w[:, None, :, :], x[:, :, None, :]
    if ASM:
        w0, w1, w2, w3 = unleave4(w)
        x0, x1, x2, x3 = unleave4(x)
        total = chain(w0, w1, w2, w3, x0, x1, x2, x3, W_SIGNED, X_SIGNED)
    else:
        total = tl.sum(bytes_of(w, W_SIGNED) * bytes_of(x, X_SIGNED), axis=4)
    return per_scale(total, S)


@triton.jit
def sum_digit(x, S: tl.constexpr, X_SIGNED: tl.constexpr, ASM: tl.constexpr):
    """Sums of the bytes of `x [quads, M, B]` per scale, int32 `[groups, M, 1, B]`."""
    x = x[:, :, None, :]
    if ASM:
        x0, x1, x2, x3 = unleave4(x)
        ones = tl.full(x0.shape, LOW_BYTES, tl.int32)
        total = chain(ones, ones, ones, ones, x0, x1, x2, x3, True, X_SIGNED)
    else:
        total = tl.sum(bytes_of(x, X_SIGNED), axis=4)
    return per_scale(total, S)


# -- few tokens ----------------------------------------------------------------------------------------------


@triton.constexpr_function
def by_splat(s, digits, asm):
    """Trellis values that need no decoding: their byte sum is taken by the product itself (`splat_dot`)."""
    return bool(asm) and s.family == "trellis" and not s.absolute and digits < 3


@triton.constexpr_function
def by_flip(s, asm):
    """Trellis magnitudes with signs: the product changes signs, of activations or of partial sums (`flipped_dot`)."""
    return bool(asm) and s.absolute


@triton.jit
def flipped_dot(w, flip, x, S: tl.constexpr, X_SIGNED: tl.constexpr, DIGITS: tl.constexpr):
    """`dot_digit` of w with the signs of the bytes changed that the masks `flip` select."""
    if DIGITS == 1:
        # bytes of x or of -x, chosen for every row; digits of 127 have an opposite
        mask = flip[:, None, :, :]
        w0, w1, w2, w3 = unleave4(w[:, None, :, :])
        x0, x1, x2, x3 = unleave4((x[:, :, None, :] & (mask ^ -1)) | (negate_small_bytes(x)[:, :, None, :] & mask))
        total = per_scale(chain(w0, w1, w2, w3, x0, x1, x2, x3, True, True), S)
    else:
        # -w = (w ^ -1) - (-1), byte by byte
        total = dot_digit(w ^ flip, x, S, True, X_SIGNED, True) - dot_digit(flip, x, S, True, X_SIGNED, True)
    return total


@triton.constexpr_function
def value_base(s, asm):
    """Constant that the integer product leaves out of every value."""
    return 0 if by_flip(s, asm) else s.base


@triton.jit
def splat_dot(state, x, S: tl.constexpr, X_SIGNED: tl.constexpr):
    """`sum_k (byte sum of state_k) x_k` for generator states `[codes, R, B]` and quads `x [quads, M, B]`: `[groups, M, R, B]`.

    A value is a sum of four bytes minus 126, so four equal bytes of x decode and multiply it in one dp4a.
    """
    # dimensions are added once, outside the loop: each costs the compiler a conversion of layouts to think about
    state, x = state[:, None, :, :], x[:, :, None, :]
    lo, hi = x, x
    if S.vec == 8:
        lo, hi = unleave(x)
    total = 0
    for i in tl.static_range(tl.constexpr(S.vec)):
        word = lo if i < 4 else hi
        same = permute(word, word, ("0x0000", "0x1111", "0x2222", "0x3333")[i % 4])
        v = trellis_word(state, i, 1, S)
        if i == 0:
            total = dot4_first(v, same, False, X_SIGNED)
        else:
            total = dot4(v, same, total, False, X_SIGNED)
    return per_scale(total, S)


@triton.jit
def run_products(parts, sums, planes, held, lut, S: tl.constexpr, DIGITS: tl.constexpr, ASM: tl.constexpr):
    """Products of runs of weights and activations, float32 `[M, R, B]`, but for the steps of x and a `d` per row.

    `parts` are the digits of x as quads, highest first, and `sums` their sums per scale (used if a constant is added to values).
    """
    splat: tl.constexpr = by_splat(S, DIGITS, ASM)
    base: tl.constexpr = value_base(S, ASM)
    scale, shift, low = scales(planes, lut, S, ASM)
    flip: tl.constexpr = by_flip(S, ASM)
    if splat:
        w = trellis_states(planes, S, ASM)
    elif flip:
        w, wrong = flipped(planes, S)
    else:
        w = quads(planes, held, S, ASM)
    offset = base
    if S.shift != 0:
        offset = shift[:, None, :, :] + base
    value = 0
    weighted = 0
    total = 0
    summed = 0
    for i in tl.static_range(DIGITS):
        if splat:
            part = splat_dot(w, parts[i], S, i == 0)
        elif flip:
            part = flipped_dot(w, wrong, parts[i], S, i == 0, DIGITS)
        else:
            part = dot_digit(w, parts[i], S, S.signed, i == 0, ASM)
        if DIGITS == 3:
            # 24 bits times 8 bits: beyond int32, so digits meet in float32
            if base != 0 or S.shift != 0:
                part += offset * sums[i]
            if S.affine:
                weighted = weighted * 256.0 + sums[i].to(tl.float32)
            value = value * 256.0 + part.to(tl.float32)
        else:
            total = (total << 8) + part
            if base != 0 or S.shift != 0 or S.affine:
                summed = (summed << 8) + sums[i]
    if DIGITS < 3:
        if base != 0 or S.shift != 0:
            total += offset * summed
        value = total.to(tl.float32)
        if S.affine:
            weighted = summed.to(tl.float32)
    value *= scale[:, None, :, :]
    if S.affine:
        value -= low[:, None, :, :] * weighted
    return tl.sum(value, axis=0)


@triton.jit
def all_digits(q, DIGITS: tl.constexpr, ASM: tl.constexpr):
    """Quads of every digit, highest first, as a tuple."""
    if DIGITS == 1:
        parts = (digit_quads(q, 0, ASM),)
    elif DIGITS == 2:
        parts = (digit_quads(q, 1, ASM), digit_quads(q, 0, ASM))
    else:
        parts = (digit_quads(q, 2, ASM), digit_quads(q, 1, ASM), digit_quads(q, 0, ASM))
    return parts


@triton.jit
def all_sums(parts, S: tl.constexpr, DIGITS: tl.constexpr, ASM: tl.constexpr):
    """Sums per scale of every digit, as a tuple like `parts` (unused ones are the quads themselves)."""
    sums = parts
    if value_base(S, ASM) != 0 or S.shift != 0 or S.affine:
        if DIGITS == 1:
            sums = (sum_digit(parts[0], S, True, ASM),)
        elif DIGITS == 2:
            sums = (sum_digit(parts[0], S, True, ASM), sum_digit(parts[1], S, False, ASM))
        else:
            sums = (sum_digit(parts[0], S, True, ASM), sum_digit(parts[1], S, False, ASM), sum_digit(parts[2], S, False, ASM))
    return sums


@triton.jit(do_not_specialize=["tokens", "experts"])
def gemv(
    x,
    data,
    book,
    lut,
    bias,
    ids,
    y,
    tokens,
    rows,
    runs,
    x_stride,
    matrix_bytes,
    experts,
    per_token,
    S: tl.constexpr,
    MODE: tl.constexpr,
    DIGITS: tl.constexpr,
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
    PASSES: tl.constexpr,
    RUNS: tl.constexpr,
    EP: tl.constexpr,
    ASM: tl.constexpr,
    AHEAD: tl.constexpr,
):
    """y[t, n] = sum_k x[t, k] w[n, k] + bias[n] for TOKENS tokens and PASSES times ROWS rows of a program.

    MODE: `one` matrix; `sorted`: tokens sorted by expert, `ids` their cumulative ends; `ids`: the expert of each token.
    `per_token` output rows share one row of x (`ids` only).
    """
    first_row = tl.program_id(0) * (ROWS * PASSES)
    if AHEAD:
        if MODE == "one":
            # weights depend on no kernel before; on their way while activations are read and rounded
            prefetch_rows(data, first_row, ROWS * PASSES, rows, runs, S)
        follow()
    item = item_number()
    token = item.to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    row = tl.minimum(first_row + tl.arange(0, ROWS), rows - 1)[:, None]
    valid = tokens > 0
    if MODE == "sorted":
        expert = expert_of(ids, item, experts, EP)
        valid = expert < experts
        data += tl.minimum(expert, experts - 1).to(tl.int64) * matrix_bytes
    elif MODE == "ids":
        expert = tl.load(ids + item, mask=item < tokens, other=-1).to(tl.int64)
        valid = (expert >= 0) & (expert < experts)
        data += tl.where(valid, expert, 0) * matrix_bytes
    if AHEAD and MODE != "one":
        prefetch_rows(data, first_row, ROWS * PASSES, rows, runs, S)
    source = token // per_token
    held = prepare(book, S, ASM)
    lut = prepare_scales(lut, S, ASM)
    sums = row_sums(
        x + source * x_stride, token < tokens, data, row, ROWS, rows, runs, held, lut, S, DIGITS, TOKENS, ROWS, PASSES, RUNS, ASM
    )
    out = row_totals(sums, data, tl.minimum(first_row + tl.arange(0, ROWS * PASSES), rows - 1)[:, None], rows, runs, S)
    out = tl.where(valid, out, 0.0)
    n = (first_row + tl.arange(0, ROWS * PASSES))[None, :]
    if bias is not None:
        out += tl.load(bias + n, mask=n < rows, other=0.0).to(tl.float32)
    tl.store(y + token[:, None] * rows + n, out.to(y.dtype.element_ty), mask=(token < tokens)[:, None] & (n < rows))


@triton.jit
def repeated(v, COUNT: tl.constexpr):
    """A tuple of v, COUNT (a power of two) times."""
    if COUNT == 1:
        values = (v,)
    else:
        half = repeated(v, halving(COUNT))
        values = half + half
    return values


@triton.jit
def side_by_side(parts, FIRST: tl.constexpr, COUNT: tl.constexpr):
    """Tensors `[M, R, B]` of a tuple, from FIRST on: `[M, COUNT * R, B]`."""
    if COUNT == 1:
        v = parts[FIRST]
    else:
        a = side_by_side(parts, FIRST, halving(COUNT))
        b = side_by_side(parts, FIRST + halving(COUNT), halving(COUNT))
        v = tl.reshape(tl.permute(tl.join(a, b), (0, 3, 1, 2)), (a.shape[0], 2 * a.shape[1], a.shape[2]))
    return v


@triton.jit
def row_sums(
    x,
    present,
    data,
    row,
    stride,
    rows,
    runs,
    held,
    lut,
    S: tl.constexpr,
    DIGITS: tl.constexpr,
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
    PASSES: tl.constexpr,
    RUNS: tl.constexpr,
    ASM: tl.constexpr,
):
    """Products of activations `x [M]` (pointers to rows, read where `present`) with rows `row + p stride` for p < PASSES.

    Float32 `[M, PASSES * R, B]`, to be summed over the last dimension, without a `d` per row. All passes share one rounding of the
    activations; weights are loaded one pass ahead, so that those of the next travel while one is multiplied.
    """
    parts_of_sum = repeated(tl.zeros((TOKENS, ROWS, RUNS), tl.float32), PASSES)
    column = tl.arange(0, RUNS)[None, :]
    for first in range(0, runs, RUNS):
        run = first + column
        inside = present[:, None] & (run < runs)
        v = load_run(x, run, inside, tl.constexpr(S.run), ASM)
        q, step = digits(v, DIGITS, ASM)
        parts = all_digits(q, DIGITS, ASM)
        sums = all_sums(parts, S, DIGITS, ASM)
        run = tl.minimum(run, runs - 1)  # its activations are zero
        planes = load_planes(data, row, run, rows, runs, S, ASM)
        for p in tl.static_range(PASSES):
            here = planes
            if p + 1 < PASSES:
                planes = load_planes(data, tl.minimum(row + (p + 1) * stride, rows - 1), run, rows, runs, S, ASM)
            part = run_products(parts, sums, here, held, lut, S, DIGITS, ASM) * step[:, None, :]
            parts_of_sum = parts_of_sum[1:] + (parts_of_sum[0] + part,)  # noqa: RUF005
    return side_by_side(parts_of_sum, 0, PASSES)


@triton.jit
def row_totals(sums, data, row, rows, runs, S: tl.constexpr):
    """Sums `[M, R, B]` of `row_sums` over the runs, times the scales of rows `[R, 1]` and the format: `[M, R]`."""
    out = tl.sum(sums, axis=2)
    if S.d_size == 0:
        out *= tl.reshape(row_scale(data, row, rows, runs, S), (1, sums.shape[1]))
    return out * S.factor
