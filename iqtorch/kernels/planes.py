"""The stored bits of runs: where the planes of a matrix lie, and words and fields of words in registers.

What belongs to one run comes first in every shape: Triton spreads the last dimensions over the threads, so a thread keeps whole
runs in its registers, and regrouping them moves nothing between threads. Loads are not masked: rows and runs must be clamped to the matrix.
Reshapes, permutations and added dimensions are free at run time, but the compiler converts layouts at each: few of them compile faster.
"""

# mypy: ignore-errors

from __future__ import annotations

import triton
import triton.language as tl

from .asm import fetch, fetch_words, prefetch


@triton.constexpr_function
def run_bits(s, plane):
    """Bits of a plane that belong to one run."""
    return s.planes[plane] * s.run // 256


@triton.constexpr_function
def splat_mask(width, slot):
    """`width` low bits set in every `slot` bits of a 32-bit word."""
    mask = sum(((1 << width) - 1) << i for i in range(0, 32, slot))
    return mask - (1 << 32) if mask >> 31 else mask


@triton.constexpr_function
def low_mask(width):
    return (1 << width) - 1


@triton.constexpr_function
def halving(n):
    return n // 2


@triton.jit
def plane_start(rows, runs, S: tl.constexpr, P: tl.constexpr):
    """First byte of plane P of a matrix (a cast: with one row or run, Triton makes the number a constant)."""
    at = tl.cast(rows, tl.int64) * 0
    for i in tl.static_range(tl.constexpr(P)):
        if S.planes[i] == 0:
            size = tl.cast(rows, tl.int64) * S.row_items[i]
        else:
            # the rows of a plane are whole bytes, the runs of a row need not be
            size = tl.cast(rows, tl.int64) * ((runs * run_bits(S, i)) // 8)
        at += (size + 15) // 16 * 16
    return at


@triton.constexpr_function
def place(s, plane):
    """Position of a plane among those that `load_planes` loads."""
    return sum(1 for bits in s.planes[:plane] if bits)


@triton.constexpr_function
def loaded(s):
    """The planes that `load_planes` loads."""
    return tuple(i for i, bits in enumerate(s.planes) if bits)


@triton.constexpr_function
def runs_per_item(s, plane):
    """Runs that share one item of a plane: more than one for a `d` per block."""
    return s.d_size // s.run if plane in (s.d_plane, s.dmin_plane) else 1


@triton.constexpr_function
def item_bits(s, plane):
    """Bits of one item: of the run, or of the `d` that it shares."""
    return run_bits(s, plane) * runs_per_item(s, plane)


@triton.jit
def load_plane(start, row, run, runs, BITS: tl.constexpr, PER: tl.constexpr, ASM: tl.constexpr):
    """Items of BITS bits, one for PER runs, of rows `[A, 1]` and runs `[1, B]` as int32 `[words, A, B]`.

    With fewer than 8 bits the lowest ones are the item's; what lies above is left over.
    """
    if BITS < 8:
        per: tl.constexpr = 8 // BITS
        at = row * ((runs * BITS) // 8) + run // per
    else:
        at = row * (runs // PER) + run // PER
    if ASM:
        v = tl.permute(fetch(start, at, tl.constexpr(max(BITS, 8))), (2, 0, 1))
    elif BITS >= 32:
        n: tl.constexpr = BITS // 32
        words = start.to(tl.pointer_type(tl.int32), bitcast=True)
        v = tl.load(words + ((at * n)[None, :, :] + tl.arange(0, n)[:, None, None]))
    elif BITS == 16:
        v = tl.load(start.to(tl.pointer_type(tl.uint16), bitcast=True) + at).to(tl.int32)[None, :, :]
    else:
        v = tl.load(start + at).to(tl.int32)[None, :, :]
    if BITS < 8:
        v = v >> (run % per * BITS)[None, :, :]
    return v


@triton.constexpr_function
def apart(s):
    """The plane of four words that stay tensors of their own: both codes and scale lie in them, and want them in different registers."""
    return s.code[0][0] if s.spare else -1


@triton.jit
def load_apart(start, row, run, runs, ASM: tl.constexpr):
    """Items of four words as a tuple of int32 `[1, A, B]`."""
    if ASM:
        words = fetch_words(start, (row * runs + run)[None, :, :], 128, True)
    else:
        words = unleave4(load_plane(start, row, run, runs, 128, 1, ASM))
    return words


@triton.jit
def load_planes(data, row, run, rows, runs, S: tl.constexpr, ASM: tl.constexpr):
    """The stored bits of runs, everything that `quads` and `scales` read: a tuple of int32 `[words, A, B]`, one per plane (see `apart`)."""
    return planes_from(data, row, run, rows, runs, 0, S, ASM)


@triton.jit
def prefetch_rows(data, first, COUNT: tl.constexpr, rows, runs, S: tl.constexpr):
    """Asks for the stored bits of COUNT rows from `first` on, those that `load_planes` will read: a plane has them side by side."""
    for i in tl.static_range(tl.constexpr(len(S.planes))):
        if S.planes[i] > 0:
            size = (runs * run_bits(S, i)) // 8
            start = plane_start(rows, runs, S, i)
            begin = (start + tl.cast(first, tl.int64) * size) // 16 * 16
            end = start + tl.cast(tl.minimum(first + COUNT, rows), tl.int64) * size
            prefetch(data + begin, ((end - begin + 15) // 16 * 16).to(tl.int32))


@triton.jit
def planes_from(data, row, run, rows, runs, I: tl.constexpr, S: tl.constexpr, ASM: tl.constexpr):  # noqa: E741
    which: tl.constexpr = loaded(S)
    P: tl.constexpr = which[I]
    start = data + plane_start(rows, runs, S, P)
    if apart(S) == P:
        planes = (load_apart(start, row, run, runs, ASM),)
    else:
        planes = (load_plane(start, row, run, runs, item_bits(S, P), runs_per_item(S, P), ASM),)
    if len(which) > I + 1:
        planes = planes + planes_from(data, row, run, rows, runs, I + 1, S, ASM)
    return planes


@triton.jit
def plane(planes, S: tl.constexpr, P: tl.constexpr):
    """Plane P of what `load_planes` loaded."""
    return planes[place(S, P)]


@triton.jit
def flatten_last(v):
    """`[n, A, B, m]` -> `[n * m, A, B]`."""
    return tl.reshape(tl.permute(v, (0, 3, 1, 2)), (v.shape[0] * v.shape[3], v.shape[1], v.shape[2]))


@triton.jit
def interleave(a, b):
    """Two `[n, A, B]` -> `[2n, A, B]`, alternating."""
    return flatten_last(tl.join(a, b))


@triton.jit
def unleave(v):
    """Inverse of `interleave`, also for `[2n, M, R, B]`."""
    if len(v.shape) == 3:
        v = tl.permute(tl.reshape(v, (v.shape[0] // 2, 2, v.shape[1], v.shape[2])), (0, 2, 3, 1))
    else:
        v = tl.permute(tl.reshape(v, (v.shape[0] // 2, 2, v.shape[1], v.shape[2], v.shape[3])), (0, 2, 3, 4, 1))
    return tl.split(v)


@triton.jit
def unleave4(v):
    """`[4n, ...]` -> four `[n, ...]`."""
    even, odd = unleave(v)
    v0, v2 = unleave(even)
    v1, v3 = unleave(odd)
    return v0, v1, v2, v3


@triton.jit
def leave4(v0, v1, v2, v3):
    """Inverse of `unleave4`."""
    return interleave(interleave(v0, v2), interleave(v1, v3))


@triton.jit
def word_halves(w):
    """`[4, A, B]` -> its first and second two words, `[2, A, B]` each."""
    return tl.split(tl.permute(tl.reshape(w, (2, 2, w.shape[1], w.shape[2])), (1, 2, 3, 0)))


@triton.jit
def shifts(words, WIDTH: tl.constexpr, EACH: tl.constexpr):
    """`[n, A, B]` -> `[n, A, B, 2, 2]`: each word and its shifts by multiples of WIDTH, EACH in all.

    Joins, not a broadcast: words that also serve otherwise (scales in them) could be wanted in two layouts, and go through shared memory.
    """
    if EACH > 1:
        words = tl.join(shifts(words, 2 * WIDTH, halving(EACH)), shifts(words >> WIDTH, 2 * WIDTH, halving(EACH)))
    return words


@triton.jit
def shifted(words, WIDTH: tl.constexpr, EACH: tl.constexpr):
    """`[n, A, B]` -> `[n * EACH, A, B]`: each word and its shifts by multiples of WIDTH."""
    if EACH > 1:
        words = flatten_last(tl.reshape(shifts(words, WIDTH, EACH), (words.shape[0], words.shape[1], words.shape[2], EACH)))
    return words


@triton.jit
def each(v, COUNT: tl.constexpr):
    """`[n, A, B]` -> `[n * COUNT, A, B]`: every element COUNT times, where a mere broadcast may want another layout."""
    many = tl.broadcast_to(v[:, None, :, :], (v.shape[0], COUNT, v.shape[1], v.shape[2]))
    return tl.reshape(many, (v.shape[0] * COUNT, v.shape[1], v.shape[2]))


@triton.jit
def spread(words, WIDTH: tl.constexpr, COUNT: tl.constexpr):
    """`[n, A, B]` -> `[COUNT, A, B]`: each word and its shifts by multiples of WIDTH (upper bits are left over)."""
    return shifted(words, WIDTH, tl.constexpr(COUNT // words.shape[0]))
