"""The device layout of a packed matrix, derived from its `Format` record. Plain torch: no Triton here.

The bits of a row keep their order along K, but are sorted by meaning into planes: one plane holds one power-of-two
slice of one field (a 5-bit code is a plane of 4 bits and a plane of 1 bit), row after row. A thread that owns a *run* of
32 or 64 neighbouring weights of a row then finds its part of every plane in one aligned load, in a vector kernel and in a
matrix kernel alike. Tensor cores want another order along K; the kernels give that order to the activations instead
(`kernels.matrix.stage`), once per product, and no shuffled copy of the weights exists.

Inside a plane, 32-bit words are sliced so that one shift and one mask bring four codes into four bytes (`slice` 8) or eight
codes into eight nibbles (`slice` 4), the operands of byte permutes and byte dot products.

`Scheme` is the part of this that kernels see: a frozen record of constants that they specialise on.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from ..formats import Format
from ..formats.base import Field, Parts, Run, bits_to_float
from ..formats.ik_trellis import MULTIPLIER, OFFSET, OFFSET_ALTERNATE
from ..formats.layout import signed_bytes

#: Planes and matrices start at multiples of this, for 16-byte loads.
ALIGN = 16
#: Pad scales to whole bytes where the whole layout stays within this factor of the canonical bytes.
PAD_LIMIT = 1.03
#: Tables of 64 entries are too many registers for byte permutes, but IQ6_K's is a rounded cubic polynomial: this one gives all 64
#: entries exactly in float16. Bits of (-1024 - center, 1024 + 256 + constant, linear, square, cube), the variable code - center.
CUBIC = tuple(int(np.float16(c).view(np.uint16)) for c in (-1024 - 26, 1024 + 256 - 19, 2.8457, -0.01921, 0.0012121))


def _int32(value: int) -> int:
    value &= 0xFFFFFFFF
    return value - (1 << 32) if value >> 31 else value


@dataclass(frozen=True)
class Scheme:
    """Constants of one format for the kernels. Planes are named by their index; tuples of planes list the lowest bits first.

    Attributes:
        family: how a code becomes values: `direct`, `table`, `cubic`, `pairs`, `grid` or `trellis`.
        run: weights of one row that one thread handles together.
        vec: weights per code.
        planes: bits per 256 weights of each plane; 0 for planes with one item per row.
        row_items: bytes per row of those.
        code: planes of the code, as `(plane, width)`.
        scale, minimum: planes of the scale (and variant), of the minimum; empty if there are none.
        group: weights per scale.
        scale_bits: bits of the scale alone; a variant bit lies above them.
        scale_map, min_map: `(first, step)` of an arithmetic sequence of scale values, or None: look up in at most 32 values.
        scale_wraps: stored scales are two's complement bytes.
        sign: `""`, `bits` (a plane), `word` (four times 7 bits and a scale in 32 bits) or `code` (above the code's bits).
        sign_plane, d_plane, dmin_plane, exponent_plane: plane indices, -1 if absent.
        d_kind: `f16`, `f32`, `e8m0`.
        d_size: weights per `d`; 0 = one per row.
        unit, factor: power of two on `d`; the format's runtime scale.
        base: constant added to every value (trellis: 126 less than a sum of four bytes; with signs, 128, so that bit 7 is the sign).
        signed: values are two's complement bytes.
        shift: added to values whose variant bit is set.
        variant_entries: added to codes whose variant bit is set.
        code_bits: bits of the code alone (sign bits may lie above).
        entries: size of the codebook (all variants).
        start: first state of the trellis generator.
        cubic: coefficients of the polynomial that the table is (`CUBIC`), or ().
        steps: its multiplier to the powers 1 .. vec.
        absolute: trellis values are magnitudes, with signs apart.
        parity: the lowest bit of weights 2i (i < 8) of each 32 holds bit i of the scale; the bit itself follows from the even
            parity of the codes 2i, 2i + 1, 2i + 16, 2i + 17 (IQ4_KSS).
        spare: bit 15 of the eight codes of a group holds one bit each of its scale and variant (IQ4_KT: 15-bit codes).
    """

    family: str
    run: int
    vec: int
    planes: tuple[int, ...]
    row_items: tuple[int, ...]
    code: tuple[tuple[int, int], ...]
    scale: tuple[tuple[int, int], ...]
    minimum: tuple[tuple[int, int], ...]
    group: int
    scale_bits: int
    scale_map: tuple[int, int] | None
    min_map: tuple[int, int] | None
    scale_wraps: bool
    sign: str
    sign_plane: int
    d_plane: int
    dmin_plane: int
    exponent_plane: int
    d_kind: str
    d_size: int
    unit: float
    factor: float
    base: int
    signed: bool
    shift: int
    variant_entries: int
    code_bits: int
    entries: int
    start: int
    cubic: tuple[int, ...]
    steps: tuple[int, ...]
    absolute: bool
    parity: bool
    spare: bool

    @property
    def quads(self) -> int:
        """Groups of four weights in a run."""
        return self.run // 4

    @property
    def groups(self) -> int:
        """Scales in a run (at least one)."""
        return max(self.run // self.group, 1)

    @property
    def affine(self) -> bool:
        return self.dmin_plane >= 0


@dataclass(frozen=True, eq=False)
class Plane:
    """`width` bits, from bit `low` on, of every element of a field; `size` weights per element (0: one element per row)."""

    field: str
    low: int
    width: int
    size: int
    slice: int

    def row_bytes(self, k: int) -> int:
        return self.width // 8 if self.size == 0 else k // self.size * self.width // 8

    def words(self) -> Field:
        """Where the elements of one unit (a word, or as many bytes as `width` needs) lie."""
        if self.width >= 8 and self.slice >= self.width:
            return Field(1, (Run(np.zeros(1, np.int64), self.width),))
        per_word = 32 // self.width
        n = np.arange(per_word)
        lanes = 32 // self.slice
        return Field(per_word, (Run(self.slice * (n % lanes) + self.width * (n // lanes), self.width),))


def _split(width: int) -> list[int]:
    """A width as falling powers of two: 13 -> 8, 4, 1."""
    return [1 << b for b in range(5, -1, -1) if width >> b & 1]


def _sequence(values: tuple[int, ...] | None) -> tuple[int, int] | None:
    """`(first, step)` if the values are an arithmetic sequence."""
    if values is None:
        return (1, 0)
    step = values[1] - values[0] if len(values) > 1 else 0
    return (values[0], step) if all(v == values[0] + i * step for i, v in enumerate(values)) else None


class Layout:
    """Planes of one format, and the exact way from canonical bytes to them and back.

    Args:
        fmt: a plain format (not row-interleaved).
    """

    def __init__(self, fmt: Format) -> None:
        self.fmt = fmt
        fields, book = fmt.fields, fmt.codebook
        values = book.values.astype(np.int32)
        vec, group = fmt.vec, fmt.group_size
        variant = "variant" in fields
        self._variant_in_code = variant and fmt.variant_size < group
        difference = np.unique(values[1] - values[0]) if book.variants == 2 else np.zeros(1, np.int32)
        shift = int(difference[0]) if len(difference) == 1 and not self._variant_in_code else 0
        trellis = fmt.name.endswith("_kt")
        absolute = trellis and bool((values >= 0).all())
        code_bits = fields["code"].width + (1 if self._variant_in_code else 0)
        line = values[0, :, 0] - np.arange(book.entries)
        self._wrap = vec == 1 and book.entries == 256 and bool(((line == 0) | (line == -256)).all())
        constant = vec == 1 and bool((line == line[0]).all())
        family = "trellis" if trellis else "direct" if constant or self._wrap else "table" if vec == 1 else "pairs" if vec == 2 else "grid"
        run = 64 if fmt.block_size == 256 and vec != 4 and not trellis and code_bits <= 3 * vec else 32
        sign = ""
        if "sign" in fields:
            sign = "bits" if not fmt.sign_parity else "word" if "scale" in fields and fmt.group_size == 32 else "code"
        self._sign = sign

        self.planes: list[Plane] = []

        def add(field: str, width: int, size: int, slice_: int = 0) -> tuple[tuple[int, int], ...]:
            made, low = [], 0
            for part in _split(width):
                self.planes.append(Plane(field, low, part, size, max(part, slice_) if part < 32 else 32))
                made.append((len(self.planes) - 1, part))
                low += part
            return tuple(made)

        if family == "table" and code_bits == 6:
            family = "cubic"
        slices = {"direct": 8, "cubic": 8, "table": 4, "pairs": 8}
        scale_bits = fields["scale"].width + (1 if variant and not self._variant_in_code else 0) if "scale" in fields else 0
        spare = code_bits == 15 and scale_bits == group // vec == 8
        stored_code = 16 if spare else code_bits + (fields["sign"].width if sign == "code" else 0)
        code = add("code", stored_code, vec, slices.get(family, 0))
        sign_plane = {"bits": lambda: add("sign", 1, 1, 8), "word": lambda: add("sign", 32, 32)}.get(sign, tuple)()
        d_size = fmt.block_size if "d" in fields else 0
        d_bits = 8 * fmt.d_bytes
        d_plane = add("d", d_bits, d_size)
        dmin_plane = add("dmin", d_bits, d_size) if fmt.affine else ()
        exponent_plane = add("exponent", 8, 0) if d_size else ()
        widths = {"scale": scale_bits} if scale_bits else {}
        if sign == "word" or fmt.code_parity or spare:
            widths = {}  # the scale lies in the sign word, or in spare bits of the codes
        if "min" in fields:
            widths["min"] = fields["min"].width
        padded = sum(p.width / p.size for p in self.planes if p.size) + len(widths) * 8 / group
        pad = padded <= PAD_LIMIT * 8 * fmt.block_bytes / fmt.block_size and all(w <= 8 for w in widths.values())
        made = {name: add(name, 8 if pad else width, group) for name, width in widths.items()}

        def first(planes: tuple[tuple[int, int], ...]) -> int:
            return planes[0][0] if planes else -1

        self.scheme = Scheme(
            family=family,
            run=run,
            vec=vec,
            planes=tuple(256 * p.width // p.size if p.size else 0 for p in self.planes),
            row_items=tuple(0 if p.size else p.width // 8 for p in self.planes),
            code=code,
            scale=made.get("scale", ()),
            minimum=made.get("min", ()),
            group=group,
            scale_bits=fields["scale"].width if "scale" in fields else 0,
            scale_map=(0, 1) if fmt.scale_values == signed_bytes() else _sequence(fmt.scale_values),
            min_map=_sequence(fmt.min_values),
            scale_wraps=fmt.scale_values == signed_bytes(),
            sign=sign,
            sign_plane=first(sign_plane),
            d_plane=first(d_plane),
            dmin_plane=first(dmin_plane),
            exponent_plane=first(exponent_plane),
            d_kind=fmt.d_kind,
            d_size=d_size,
            unit=fmt.unit,
            factor=fmt.runtime_scale,
            base=(-128 if absolute else -126) if trellis else int(line[0]) if family == "direct" and not self._wrap else 0,
            signed=self._wrap or family not in ("direct", "trellis"),
            shift=shift,
            variant_entries=book.entries if variant and not shift and not self._variant_in_code else 0,
            code_bits=code_bits,
            entries=book.variants * book.entries,
            start=OFFSET if trellis else 0,
            cubic=CUBIC if family == "cubic" else (),
            steps=tuple(_int32(pow(MULTIPLIER, i + 1, 1 << 32)) for i in range(vec)) if trellis else (),
            absolute=absolute,
            parity=bool(fmt.code_parity),
            spare=spare,
        )
        if trellis and self.scheme.variant_entries and book.entries != OFFSET_ALTERNATE - OFFSET:
            raise ValueError(f"{fmt.name}: a variant of the generator must start `entries` = {book.entries} later")

    # -- sizes -----------------------------------------------------------------------------------------------

    def starts(self, rows: int, k: int) -> list[int]:
        """First byte of each plane, and the bytes of the matrix."""
        out = [0]
        for plane in self.planes:
            out.append(out[-1] + -(-rows * plane.row_bytes(k) // ALIGN) * ALIGN)
        return out

    def packed_bytes(self, rows: int, k: int) -> int:
        return self.starts(rows, k)[-1]

    # -- canonical bytes <-> planes --------------------------------------------------------------------------

    def pack(self, blocks: Tensor) -> Tensor:
        """uint8 `[..., rows, row_bytes]` -> uint8 `[..., packed_bytes]` on the same device."""
        rows, k = blocks.shape[-2], self.fmt.row_length(blocks.shape[-1])
        starts = self.starts(rows, k)
        flat = blocks.reshape(-1, rows, blocks.shape[-1])
        out = torch.zeros((flat.shape[0], starts[-1]), dtype=torch.uint8, device=blocks.device)
        for matrix, packed in zip(flat, out, strict=True):
            for lo, hi in _slices(rows, k):
                parts = self._join(self.fmt.unpack(matrix[lo:hi]))
                for plane, start in zip(self.planes, starts, strict=False):
                    size = plane.row_bytes(k)
                    target = packed[start : start + rows * size].view(rows, size)[lo:hi]
                    target.copy_(_write(plane, parts[plane.field]))
        return out.reshape(*blocks.shape[:-2], starts[-1])

    def unpack(self, data: Tensor, rows: int, k: int) -> Tensor:
        """Inverse of `pack`, bit for bit."""
        starts = self.starts(rows, k)
        flat = data.reshape(-1, starts[-1])
        out = torch.empty((flat.shape[0], rows, self.fmt.row_bytes(k)), dtype=torch.uint8, device=data.device)
        for packed, matrix in zip(flat, out, strict=True):
            for lo, hi in _slices(rows, k):
                parts: Parts = {}
                for plane, start in zip(self.planes, starts, strict=False):
                    size = plane.row_bytes(k)
                    source = packed[start : start + rows * size].view(rows, size)[lo:hi]
                    values = _read(plane, source) << plane.low
                    parts[plane.field] = parts[plane.field] | values if plane.field in parts else values
                matrix[lo:hi] = self.fmt.pack(self._part(parts))
        return out.reshape(*data.shape[:-1], rows, -1)

    def _join(self, parts: Parts) -> Parts:
        """The fields of the format -> the fields of the planes."""
        out, fmt, s = dict(parts), self.fmt, self.scheme
        if self._variant_in_code:
            out["code"] = parts["code"] | out.pop("variant") << fmt.fields["code"].width
        elif "variant" in parts:
            variant = out.pop("variant")
            out["scale"] = parts["scale"] | variant.repeat_interleave(parts["scale"].shape[1] // variant.shape[1], 1) << s.scale_bits
        if self._sign == "code":
            out["code"] = out["code"] | out.pop("sign") << s.code_bits
        elif self._sign == "word":
            seven = out.pop("sign").unflatten(1, (-1, 4))
            shifts = 7 * torch.arange(4, device=seven.device, dtype=torch.int32)
            out["sign"] = (seven << shifts).sum(-1, dtype=torch.int32) | out.pop("scale") << 28
        if s.parity:
            shifts = torch.arange(8, device=out["code"].device, dtype=torch.int32)
            code = out["code"].clone().unflatten(1, (-1, 2, 8, 2))
            code[:, :, 0, :, 0] = code[:, :, 0, :, 0] & ~1 | (out.pop("scale")[..., None] >> shifts) & 1
            out["code"] = code.flatten(1)
        if s.spare:
            shifts = torch.arange(8, device=out["code"].device, dtype=torch.int32)
            bits = (out.pop("scale")[..., None] >> shifts) & 1
            out["code"] = (out["code"].unflatten(1, (-1, 8)) | bits << 15).flatten(1)
        if s.d_size:
            out["exponent"] = self._exponent(parts) & 255
        return out

    def _part(self, joined: Parts) -> Parts:
        """Inverse of `_join`."""
        out, fmt, s = dict(joined), self.fmt, self.scheme
        out.pop("exponent", None)
        if s.parity:
            shifts = torch.arange(8, device=out["code"].device, dtype=torch.int32)
            code = out["code"].clone().unflatten(1, (-1, 2, 8, 2))
            out["scale"] = ((code[:, :, 0, :, 0] & 1) << shifts).sum(-1, dtype=torch.int32)
            code[:, :, 0, :, 0] &= ~1
            four = code[:, :, 0, :, 0] ^ code[:, :, 0, :, 1] ^ code[:, :, 1, :, 0] ^ code[:, :, 1, :, 1]
            code[:, :, 0, :, 0] |= (four ^ four >> 1 ^ four >> 2 ^ four >> 3) & 1
            out["code"] = code.flatten(1)
        if s.spare:
            shifts = torch.arange(8, device=out["code"].device, dtype=torch.int32)
            bits = (out["code"].unflatten(1, (-1, 8)) >> 15) & 1
            out["scale"] = (bits << shifts).sum(-1, dtype=torch.int32)
            out["code"] = out["code"] & 0x7FFF
        if self._sign == "code":
            out["sign"] = out["code"] >> s.code_bits
            out["code"] = out["code"] & ((1 << s.code_bits) - 1)
        elif self._sign == "word":
            word = out["sign"]
            shifts = 7 * torch.arange(4, device=word.device, dtype=torch.int32)
            out["sign"] = ((word[..., None] >> shifts) & 127).flatten(1)
            out["scale"] = (word >> 28) & 15
        if self._variant_in_code:
            width = fmt.fields["code"].width
            out["variant"] = out["code"] >> width
            out["code"] = out["code"] & ((1 << width) - 1)
        elif "variant" in fmt.fields:
            count = fmt.fields["scale"].count // fmt.fields["variant"].count
            out["variant"] = (out["scale"][:, ::count] >> s.scale_bits) & 1
            out["scale"] = out["scale"] & ((1 << s.scale_bits) - 1)
        return {name: out[name] for name in ("d", "dmin", "scale", "min", "variant", "code", "sign") if name in out}

    def _exponent(self, parts: Parts) -> Tensor:
        """int32 `[R, 1]`: a power of two that bounds `|d * scale|` (and `|dmin * min|`) of a row, for 16-bit operands."""
        largest = bits_to_float(parts["d"], self.fmt.d_kind).abs().nan_to_num(0.0, 0.0, 0.0).amax(1, keepdim=True)
        largest = largest * self.fmt.unit * max(abs(v) for v in self.fmt.scale_values or (1,))
        if self.fmt.affine:
            low = bits_to_float(parts["dmin"], self.fmt.d_kind).abs().nan_to_num(0.0, 0.0, 0.0).amax(1, keepdim=True)
            largest = torch.maximum(largest, low * max(abs(v) for v in self.fmt.min_values or (1,)))
        return torch.frexp(largest).exponent.to(torch.int32).clamp(-126, 126)

    # -- tables ----------------------------------------------------------------------------------------------

    def tables(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """`(book, lut)` for the kernels (cached): the codebook, and float32 values of scales that are no sequence.

        `book` is int32. `table`: the value of each entry as an integer, then the same as bytes in words, each word 32
        times (of the first variant). `cubic`: the values, then two constants of `asm.cubic`, 32 times each. `pairs`: both values as
        bytes, then as float16. `grid`: the values of each entry as bytes;
        then, for 7-bit signs, the byte masks of 128 sign patterns.
        """
        return _tables(self.fmt.name, device)


_FEW_ROWS = 1 << 22


def _slices(rows: int, k: int) -> Iterator[tuple[int, int]]:
    """Slices of rows that bound the int32 temporaries."""
    step = max(1, _FEW_ROWS // k)
    return ((i, min(i + step, rows)) for i in range(0, rows, step))


def _write(plane: Plane, values: Tensor) -> Tensor:
    """int32 `[R, n]` -> the plane's bytes, uint8 `[R, row_bytes]`."""
    words = plane.words()
    # Fewer elements than a word holds only occur where the row ends on a byte within that word.
    short = -values.shape[1] % words.count
    values = torch.nn.functional.pad(values >> plane.low, (0, short)) & _mask(plane.width)
    unit = max(words.count * plane.width // 8, plane.width // 8)
    out = torch.zeros((*values.shape[:1], values.shape[1] // words.count, unit), dtype=torch.uint8, device=values.device)
    words.write(out, values.unflatten(1, (-1, words.count)))
    return out.flatten(1)[:, : (values.shape[1] - short) * plane.width // 8]


def _read(plane: Plane, data: Tensor) -> Tensor:
    """Inverse of `_write`, without the shift by `low`."""
    words = plane.words()
    unit = max(words.count * plane.width // 8, plane.width // 8)
    count = data.shape[1] * 8 // plane.width
    padded = torch.nn.functional.pad(data, (0, -data.shape[1] % unit))
    return words.read(padded.unflatten(1, (-1, unit))).flatten(1)[:, :count]


def _mask(width: int) -> int:
    return (1 << width) - 1 if width < 32 else -1


@lru_cache(maxsize=128)
def layout(fmt: Format) -> Layout:
    """The device layout of a plain format (cached)."""
    return Layout(fmt)


@lru_cache(maxsize=256)
def _tables(name: str, device: torch.device) -> tuple[Tensor, Tensor]:
    from ..formats import get_format

    fmt = get_format(name)
    s, values = layout(fmt).scheme, fmt.codebook.values.reshape(-1, fmt.vec)
    book = np.zeros(4, np.int32)
    if s.family == "cubic":
        held = np.array([0x64646464, 0x10001 * s.cubic[3]], np.uint32).view(np.int32)
        book = np.concatenate([fmt.codebook.values[0, :, 0].astype(np.int32), held.repeat(32)])
    elif s.family == "table":
        first = fmt.codebook.values[0, :, 0]
        book = np.concatenate([first.astype(np.int32), first.view(np.int32).repeat(32)])
    elif s.family == "pairs":
        halves = values.astype(np.float16).view(np.int32)[:, 0]
        book = np.concatenate([np.ascontiguousarray(values).view(np.int16).astype(np.int32)[:, 0] & 0xFFFF, halves])
    elif s.family == "grid":
        book = np.ascontiguousarray(values).view(np.int32).reshape(-1)
        if fmt.sign_parity:
            pattern = np.arange(128)
            signs = (pattern[:, None] >> np.arange(8)) & 1
            signs[:, 7] = signs[:, :7].sum(1) & 1
            book = np.concatenate([book, (signs * 255).astype(np.uint8).view(np.int32).reshape(-1)])
    lut = np.zeros(32, np.float32)
    if s.scale_map is None and fmt.scale_values is not None:
        lut[: len(fmt.scale_values)] = fmt.scale_values
    return torch.from_numpy(book.copy()).to(device), torch.from_numpy(lut).to(device)
