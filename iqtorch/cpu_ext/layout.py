"""The packed CPU layout of a format, derived from its record, and the description of it that the C++ kernels read.

16 rows are interleaved. A *tile* is one block of each of 16 rows and has exactly 16 blocks' bytes; a matrix is

    row headers (16 x d per group of rows) | padding to 64 bytes | tiles, group of rows by group of rows, left to right | the rest

where the rest, up to 15 rows, are canonical bytes that are packed for each use: it takes a few microseconds, and rows padded to a
multiple of 16 would take up to 15 times the memory. Inside a tile every field of the format becomes *planes* of 16, 8, 4, 2 or 1 bits,
in one of two arrangements (r = row 0..15, *cell* = 32 neighbouring weights):

    lanes   one element per weight (codes of single weights, sign bits): the 64 bytes of a vector are 4 r + j for the weights
            4 q + j of a cell; a plane of b bits puts vector q at bits b q % 8 of the 64 bytes number b q / 8 of the cell,
            and a plane of one bit vectors 0 .. 7 at bits 0, 1, 4, 5, 2, 3, 6, 7 (`bit_of` of csrc/decoders.inl says why).
            Such a vector is what a dot-product instruction takes: per row, four neighbouring weights.
    rows    everything else: element e is at bits b e % 8 of the 16 bytes number b e / 8, one byte per row.

Two formats have a cell of their own: `iq2_kl` (pairs: five-bit codes in 16-bit lanes, three to a lane) and `iq4_kss` (its
16-bit words stay as stored, two to a 32-bit lane). As no bit is added or lost, packing is a list of shifts and masks
(`Layout.terms`), and going back is the same list the other way (csrc/pack.cpp).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np
import numpy.typing as npt

from ..errors import KernelUnavailableError
from ..formats import Format, ik_trellis
from ..formats.base import Field, bits

#: Changes with what the numbers of `Layout` mean; `kInterface` of csrc/format.h.
INTERFACE = 4

ROWS = 16
CELL = 32
VECTOR = 4 * ROWS
MAX_PLANES = 4

#: How codes become bytes; the numbers are `enum Decoder` of csrc/format.h.
PLAIN, LOOKUP, PAIRS, WORDS, GRID, TRELLIS = range(6)
#: How signs are stored; `enum Sign` of csrc/format.h.
NO_SIGN, SIGN_BITS, SIGN_PARITY = range(3)
#: How the decoders of grids take signs, by bits of code and weights of an entry: those of `find_family` in csrc/kernels.inl.
GRIDS = {(8, 4): SIGN_PARITY, (8, 8): SIGN_PARITY, (9, 4): SIGN_BITS, (9, 8): SIGN_PARITY, (10, 8): SIGN_BITS, (11, 8): NO_SIGN}

IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Place:
    """Where bits `low .. low + width` of the elements of a field go: bit `shift` of the bytes `byte + stride * row`."""

    byte: IntArray
    shift: IntArray
    stride: IntArray | int
    low: int
    width: int


@dataclass(frozen=True, eq=False)
class Layout:
    """Everything the kernels know about a format.

    Attributes:
        tile_bytes: bytes of one tile, `16 * block_bytes`.
        parts: each field with the places of its elements' bits in a tile.
        ints, floats: the numbers of `struct Format` in csrc/format.h, in its order.
        table: uint8 bytes of the lookup table, biased.
    """

    fmt: Format
    tile_bytes: int
    parts: tuple[tuple[Field, tuple[Place, ...]], ...]
    ints: npt.NDArray[np.int32]
    floats: npt.NDArray[np.float32]
    table: npt.NDArray[np.uint8]

    @cached_property
    def units(self) -> npt.NDArray[np.int32]:
        """int32: the stride (1, 2 or 4 bytes) of each stretch of `16 * stride` bytes of a tile, in order."""
        strides = {int(base): int(stride) for part in self.parts for base, stride, _ in _bit_targets(*part).reshape(-1, 3)}
        return np.array([strides[base] for base in sorted(strides)], np.int32)

    @cached_property
    def terms(self) -> npt.NDArray[np.int32]:
        """int32 `[n, 4]`: plane of the tile, byte of the block, left shift (negative: right), mask.

        Plane p of a tile is one byte of each row: byte `p - base / 16` of the elements of the unit that starts at `base`. It is the
        union over its terms of the block's byte, shifted, under the mask; and a block's byte is that of its terms the other way.
        """
        masks: dict[tuple[int, int, int], int] = {}
        for field, places in self.parts:
            source = np.concatenate([run.start[:, None] + np.arange(run.width) for run in field.runs], axis=1)
            base, _, bit = np.moveaxis(_bit_targets(field, places), -1, 0)
            plane, at = base // ROWS + bit // 8, bit % 8
            for key in zip(plane.flat, (source // 8).flat, (at - source % 8).flat, at.flat):
                *where, place = map(int, key)
                masks[tuple(where)] = masks.get(tuple(where), 0) | 1 << place  # type: ignore[index, arg-type]
        return np.array([(*where, mask) for where, mask in sorted(masks.items())], np.int32)

    def header_bytes(self, rows: int) -> int:
        """Bytes before the first tile of a matrix."""
        return -(-(rows // ROWS * ROWS * self.fmt.row_header_bytes) // 64) * 64

    def packed_bytes(self, rows: int, k: int) -> int:
        """Bytes of a packed matrix."""
        tiles = rows // ROWS * (k // self.fmt.block_size) * self.tile_bytes
        return self.header_bytes(rows) + tiles + rows % ROWS * self.fmt.row_bytes(k)


def planes(width: int) -> list[tuple[int, int]]:
    """`(bits, low)` of the planes that hold numbers of `width` bits, the widest first."""
    out, low = [], 0
    for size in (16, 8, 4, 2, 1):
        if width & size:
            out.append((size, low))
            low += size
    return out


def _rows_places(field: Field, offset: int) -> tuple[list[Place], list[tuple[int, int, int]]]:
    element = np.arange(field.count, dtype=np.int64)
    places, described = [], []
    for size, low in planes(field.width):
        if field.count * size % 8:
            raise KernelUnavailableError(f"a plane of {field.count} x {size} bits is no whole number of bytes")
        stride = max(size // 8, 1)
        byte = offset + ROWS * (element * size // 8)
        places.append(Place(byte, element * size % 8, stride, low, size))
        described.append((offset, size, low))
        offset += ROWS * field.count * size // 8
    return places, described


def _lanes_places(field: Field, offset: int) -> list[Place]:
    weight = np.arange(field.count, dtype=np.int64)
    cell, q, j = weight // CELL, weight % CELL // 4, weight % 4
    places = []
    base = offset + cell * VECTOR * field.width + j
    for size, low in planes(field.width):
        at = q & 1 | (q & 2) << 1 | (q & 4) >> 1 if size == 1 else q * size
        places.append(Place(base + VECTOR * (at // 8), at % 8, 4, low, size))
        base = base + VECTOR * size
    return places


def _pairs_places(field: Field, offset: int) -> list[Place]:
    """Eight 5-bit codes per 16-bit lane `2 r + j`: three in word 0, three in word 1, one in byte 2, the last in the spare bits."""
    code = np.arange(field.count, dtype=np.int64)
    cell, q, j = code // 16, code % 16 // 2, code % 2
    base = offset + cell * 160
    last = q == 7
    word = base + VECTOR * (q // 3) + 2 * j
    in_byte = base + 2 * VECTOR + j
    # One bit at a time, because the last code is scattered; `_moves` joins neighbours again.
    spare = ((base + 2 * j, 15), (base + VECTOR + 2 * j, 15), (in_byte, 5), (in_byte, 6), (in_byte, 7))
    places = []
    for low, (byte_of_last, shift_of_last) in enumerate(spare):
        byte = np.where(last, byte_of_last, np.where(q == 6, in_byte, word))
        shift = np.where(last, shift_of_last, np.where(q == 6, 0, 5 * (q % 3)) + low)
        stride = np.where((q == 6) | (last & (low >= 2)), 2, 4)
        places.append(Place(byte, shift, stride, low, 1))
    return places


def _words_places(field: Field, offset: int) -> list[Place]:
    word = np.arange(field.count, dtype=np.int64)
    byte = offset + VECTOR * (word // 2) + 2 * (word % 2)
    return [Place(byte, np.zeros_like(byte), 4, 0, 16)]


def _bit_targets(field: Field, places: tuple[Place, ...]) -> IntArray:
    """`[count, width, 3]`: for each bit of each element the start of its unit of the tile, the unit's stride, the bit within a stride."""
    out = np.empty((field.count, field.width, 3), np.int64)
    for place in places:
        stride = np.broadcast_to(np.asarray(place.stride), place.byte.shape)
        for i in range(place.width):
            out[:, place.low + i] = np.stack((place.byte - place.byte % stride, stride, 8 * (place.byte % stride) + place.shift + i), -1)
    return out


def _codes(fmt: Format) -> tuple[Field, int]:
    """The code field as the kernels see it, and the decoder for it."""
    field, vec = fmt.fields["code"], fmt.vec
    if fmt.wire is not None:
        if fmt.code_parity != 4 or fmt.block_bytes != 128:
            raise KernelUnavailableError(f"{fmt.name} stores its blocks in a form the CPU kernels do not know")
        return bits(64, (lambda i: 16 * i, 16)), WORDS
    if fmt in ik_trellis.FORMATS:
        return field, TRELLIS
    if vec == 1:
        return field, PLAIN if _identity(fmt) is not None else LOOKUP
    if vec == 2 and field.width == 5:
        return field, PAIRS
    if vec in (4, 8):
        return field, GRID
    raise KernelUnavailableError(f"{fmt.name} has codes of {field.width} bits for {vec} weights, which no CPU decoder reads")


def _identity(fmt: Format) -> tuple[int, int] | None:
    """`(xor, bias)` if each value is its code, xor-ed with a constant, minus a bias."""
    if fmt.codebook.variants != 1 or fmt.vec != 1:
        return None
    values = fmt.codebook.values[0, :, 0].astype(np.int64)
    code = np.arange(values.size)
    for flip in (0, values.size // 2):
        bias = (code ^ flip) - values
        if (bias == bias[0]).all():
            return flip, int(bias[0])
    return None


def _linear(values: tuple[int, ...] | None) -> tuple[int, float, float, int]:
    """Stored numbers -> integers as `a * (stored ^ flip) + b`, or (last element 0) through the table of values."""
    if values is None or len(values) < 2:
        return 0, 0.0, float(values[0]) if values else 1.0, 1
    array = np.array(values, np.int64)
    stored = np.arange(array.size)
    for flip in (0, array.size // 2):
        x = stored ^ flip
        a = int(array[x == 1][0] - array[x == 0][0])
        b = int(array[x == 0][0])
        if (a * x + b == array).all():
            return flip, float(a), float(b), 1
    return 0, 0.0, 0.0, 0


def _grid_bytes(values: IntArray, bias: int) -> npt.NDArray[np.uint8]:
    """Entries of a grid as two tables of bytes, and the 64 operands that the low six bits of a shifted entry stand for.

    An entry has 16 bits: the numbers of the levels of its 4 or 8 weights, in 4 or 2 bits each.
    """
    width = 16 // values.shape[1]
    levels, number = np.unique(values, return_inverse=True)
    if levels.size > min(1 << width, 8):
        raise KernelUnavailableError(f"a grid of {levels.size} levels does not fit {width} bits per weight")
    words = (number.reshape(values.shape) << width * np.arange(values.shape[1])).sum(1)
    operands = np.resize(np.resize(levels + bias, 1 << width), 64)
    return np.concatenate((words & 255, words >> 8, operands)).astype(np.uint8)


def _parity_signs() -> npt.NDArray[np.uint8]:
    """Seven signs -> eight, an even number of them set."""
    seven = np.arange(128)
    return (seven | sum(seven >> i & 1 for i in range(7)) % 2 << 7).astype(np.uint8)


def _scale_table(fmt: Format, step: float) -> npt.NDArray[np.int32]:
    """Up to 32 scales plus 128 as bytes, four to a number. More are computed, as bytes too, from `step` (0: they are not linear)."""
    scales = fmt.scale_values or (0,)
    if min(scales) < -128 or max(scales) > 127 or (len(scales) > 32 and step not in (1, 2)):
        raise KernelUnavailableError(
            f"{fmt.name} has {len(scales)} scales of {min(scales)} .. {max(scales)}; the CPU kernels know numbers of -128 .. 127, "
            "and more than 32 of them only if they grow by 1 or by 2"
        )
    table = np.array(scales if len(scales) <= 32 else (0,), np.int64) + 128
    return np.resize(table, 32).astype(np.uint8).view(np.int32)


def _folded_bias(values: IntArray, scales: tuple[int, ...] | None) -> int:
    """What makes each product of a value and a scale an unsigned byte, or -1."""
    products = np.outer(values, scales or (1 << 30,))
    return -int(products.min()) if products.max() - products.min() < 256 and products.min() <= 0 else -1


@lru_cache
def layout(fmt: Format) -> Layout:
    """The layout of a plain format.

    Raises:
        KernelUnavailableError: the format is of a kind the CPU kernels do not know.
    """
    if fmt.interleave != 1:
        raise KernelUnavailableError(f"{fmt.name} interleaves {fmt.interleave} rows; the kernels run its plain form {fmt.plain}")
    if fmt.block_size % CELL or fmt.variant_size % 8 or fmt.group_size % 16:
        raise KernelUnavailableError(
            f"{fmt.name} has variants of no multiple of 8 weights, groups of no multiple of 16, or blocks of no multiple of {CELL}"
        )
    code, decoder = _codes(fmt)
    fields = {"code": code} if decoder == WORDS else {**fmt.fields, "code": code}
    sign = NO_SIGN if "sign" not in fields else SIGN_PARITY if fmt.sign_parity else SIGN_BITS
    if decoder != TRELLIS and sign != (GRIDS.get((code.width, fmt.vec)) if decoder == GRID else NO_SIGN):
        stored = ("no signs", "a sign bit per weight", "seven signs of eight")[sign]
        raise KernelUnavailableError(
            f"{fmt.name} has codes of {code.width} bits for {fmt.vec} weights and {stored} beside them, which no CPU decoder reads"
        )
    described: dict[str, list[tuple[int, int, int]]] = {}
    parts: list[tuple[Field, tuple[Place, ...]]] = []
    offset = 0
    for name in ("code", "sign", "d", "dmin", "scale", "min", "variant"):
        if name not in fields:
            continue
        field = fields[name]
        if name == "code" and decoder == PAIRS:
            places = _pairs_places(field, offset)
        elif name == "code" and decoder == WORDS:
            places = _words_places(field, offset)
        elif field.count == fmt.block_size:
            places = _lanes_places(field, offset)
        else:
            places, described[name] = _rows_places(field, offset)
        described.setdefault(name, [(offset, field.width, 0)])
        parts.append((field, tuple(places)))
        offset += ROWS * field.count * field.width // 8
    if offset != ROWS * fmt.block_bytes:
        raise KernelUnavailableError(f"{fmt.name} has {ROWS * fmt.block_bytes - offset} bytes in 16 blocks that no field names")

    values = fmt.codebook.values.astype(np.int64)
    identity = _identity(fmt) if decoder == PLAIN else None
    delta, variant_in_code = 0, 0
    if fmt.codebook.variants == 2:
        shift = values[1] - values[0]
        if decoder == TRELLIS:
            variant_in_code = ik_trellis.OFFSET_ALTERNATE - ik_trellis.OFFSET
        elif (shift == shift.flat[0]).all():
            delta = int(shift.flat[0])
        else:
            raise KernelUnavailableError(f"{fmt.name} has two codebooks that differ by more than a constant")
    elif fmt.codebook.variants != 1:
        raise KernelUnavailableError(f"{fmt.name} has {fmt.codebook.variants} codebooks; the CPU kernels know one or two")
    # Operands are unsigned bytes, value + bias. Below 128 they fit instructions that sum pairs in 16 bits without saturating.
    # The table has the first codebook, and `delta` is added for the other, modulo 256; if the variant fits the look-up, the table has both.
    low, high = int(values[0].min()) + min(delta, 0), int(values[0].max()) + max(delta, 0)
    flip = 0
    if identity is not None:
        flip, bias = identity
    elif decoder == TRELLIS:
        low, high = (-126, 126)
        bias = 128 if sign else 126
    elif sign:
        low, bias = -high, high if high < 64 else 128
    else:
        bias = -low if high - low < 128 else 128
    largest = bias + high if bias + low >= 0 else 255
    books = values if decoder == LOOKUP and code.width <= 3 else values[:1]
    table = np.zeros(0, np.uint8) if decoder in (PLAIN, TRELLIS) else (books + bias).astype(np.uint8).reshape(-1)
    if decoder in (LOOKUP, WORDS) and table.size < 16:
        table = np.resize(table, 16)
    if decoder == GRID:
        table = np.concatenate((table, _grid_bytes(values[0], bias), _parity_signs()))

    scale_flip, scale_a, scale_b, scale_linear = _linear(fmt.scale_values)
    min_flip, min_a, min_b, min_linear = _linear(fmt.min_values)
    if not min_linear or min_flip or (min_a, min_b) not in ((0.0, min_b), (1.0, 0.0)):
        raise KernelUnavailableError(f"{fmt.name} has minima that are not their stored numbers")
    ints = [
        INTERFACE, fmt.ggml_type, fmt.block_size, fmt.block_bytes, fmt.row_header_bytes, fmt.d_bytes, ROWS * fmt.block_bytes,
        decoder, sign, code.width, fmt.vec, largest, bias, delta, variant_in_code, flip,
        CELL // min(fmt.group_size, CELL), int(fmt.affine), _folded_bias(values, fmt.scale_values),
        scale_flip, scale_linear, *_scale_table(fmt, scale_a),
        np.int64(ik_trellis.MULTIPLIER).astype(np.int32), ik_trellis.OFFSET,
    ]  # fmt: skip
    for name in ("code", "sign", "d", "dmin", "scale", "min", "variant"):
        own = described.get(name, [])
        if len(own) > MAX_PLANES:
            raise KernelUnavailableError(f"field {name} of {fmt.name} needs {len(own)} planes; the CPU kernels know {MAX_PLANES}")
        ints += (
            [fields[name].count if name in fields else 0]
            + [number for plane in own for number in plane]
            + [0] * (3 * (MAX_PLANES - len(own)))
        )
    floats = [fmt.unit, fmt.runtime_scale, scale_a, scale_b, min_b]
    return Layout(fmt, ROWS * fmt.block_bytes, tuple(parts), np.array(ints, np.int32), np.array(floats, np.float32), table)
