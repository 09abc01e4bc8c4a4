"""The `Format` record: every fact of one tensor format, and the decode that follows from it.

All formats of this package are instances of one scheme. A weight is

    w = (d * scale) * value            table, grid and trellis formats
    w = (d * scale) * value - dmin * min            affine formats

where `d` is a float stored once per row or per block, `scale` a small integer stored once per group of
weights, and `value` an entry of a codebook: one stored code selects `vec` neighbouring values, one stored
variant bit chooses between two versions of the codebook, and sign bits may be stored apart.
What differs between formats is where the bits lie. That is written once, as `Field`s, and both reading
(`Format.unpack`) and writing (`Format.pack`) follow from it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ..errors import BlockSizeError, ShapeError

IntArray = npt.NDArray[np.int64]
Parts = dict[str, Tensor]
#: Where a run of bits starts, as a function of the element indices, and its width.
RunSpec = tuple[Callable[[IntArray], "IntArray | int"], int]

#: Names a format may give to its fields, in the order `Format.unpack` returns them.
FIELD_NAMES = ("d", "dmin", "scale", "min", "variant", "code", "sign")

#: How the float `d` (and `dmin`) is stored: bits, bytes.
FLOAT_KINDS = {"f16": 2, "f32": 4, "e8m0": 1}


@dataclass(frozen=True, eq=False)
class Run:
    """`width` consecutive bits per element; `start[i]` is the first bit of element `i`.

    Bit `p` of a block is bit `p % 8` of its byte `p // 8` (so multi-byte fields are little-endian).
    """

    start: IntArray
    width: int

    @cached_property
    def byte(self) -> IntArray:
        return self.start // 8

    @cached_property
    def shift(self) -> IntArray:
        return self.start % 8

    @cached_property
    def span(self) -> int:
        """Bytes that one element may touch."""
        return int((self.shift.max() + self.width + 7) // 8)


@dataclass(frozen=True, eq=False)
class Field:
    """`count` unsigned integers per block; each is the concatenation of its runs, lowest bits first."""

    count: int
    runs: tuple[Run, ...]

    @property
    def width(self) -> int:
        return sum(run.width for run in self.runs)

    def read(self, blocks: Tensor) -> Tensor:
        """uint8 `[..., block_bytes]` -> int32 `[..., count]` (32-bit fields come as their bit pattern)."""
        out = torch.zeros((*blocks.shape[:-1], self.count), dtype=torch.int32, device=blocks.device)
        low = 0
        last = blocks.shape[-1] - 1
        for run in self.runs:
            window = torch.zeros_like(out)
            for i in range(run.span):
                index = torch.from_numpy(np.minimum(run.byte + i, last)).to(blocks.device)
                window |= blocks.index_select(-1, index).to(torch.int32) << (8 * i)
            # `>>` of int32 copies the sign bit: harmless below 32 bits because of the mask that follows.
            if run.width < 32:
                shift = torch.from_numpy(run.shift).to(blocks.device, torch.int32)
                window = (window >> shift).bitwise_and_((1 << run.width) - 1)
            out |= window << low
            low += run.width
        return out

    def write(self, blocks: Tensor, values: Tensor) -> None:
        """Adds int32 `values[..., count]` into zeroed uint8 `blocks[..., block_bytes]`."""
        low = 0
        for run in self.runs:
            if run.width == 32:
                part = values.to(torch.int64) & 0xFFFFFFFF
            else:
                part = (values.to(torch.int64) >> low) & ((1 << run.width) - 1)
            part = part << torch.from_numpy(run.shift).to(blocks.device)
            for i in range(run.span):
                # An element near the end may have no bits in its last byte, which then does not exist.
                used = np.nonzero(run.shift + run.width > 8 * i)[0]
                chosen = torch.from_numpy(used).to(blocks.device)
                index = torch.from_numpy(run.byte[used] + i).to(blocks.device)
                byte = ((part.index_select(-1, chosen) >> (8 * i)) & 255).to(torch.uint8)
                blocks.index_add_(-1, index, byte)  # bits are disjoint: adding is or-ing
            low += run.width


def bits(count: int, *runs: RunSpec) -> Field:
    """A `Field` of `count` elements from `(start_bit(element_index_array), width)` pairs, lowest bits first."""
    index = np.arange(count, dtype=np.int64)
    made = []
    for start, width in runs:
        position = np.broadcast_to(np.asarray(start(index), dtype=np.int64), (count,))
        made.append(Run(np.ascontiguousarray(position), width))
    return Field(count, tuple(made))


def at(byte: int, width_bytes: int) -> Field:
    """One little-endian integer (or float bit pattern) at a byte offset."""
    return bits(1, (lambda i: 8 * byte, 8 * width_bytes))


@dataclass(frozen=True, eq=False)
class Codebook:
    """Integer values a code stands for: int8 `[variants, entries, vec]`, times a power of two `unit`."""

    build: Callable[[], npt.NDArray[np.int8]]
    vec: int
    entries: int
    variants: int = 1

    @cached_property
    def values(self) -> npt.NDArray[np.int8]:
        table = np.ascontiguousarray(self.build(), dtype=np.int8)
        if table.shape != (self.variants, self.entries, self.vec):
            raise ValueError(f"codebook has shape {table.shape}, its record says {(self.variants, self.entries, self.vec)}")
        table.setflags(write=False)
        return table

    def tensor(self, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> Tensor:
        """The values as a `[variants * entries, vec]` tensor (cached per device and dtype)."""
        # A mode that makes stand-ins for tensors gets its own: kept, they would be in everybody's way.
        plain = type(torch.empty(0, device="cpu")) is Tensor
        make = _codebook_tensor if plain else _codebook_tensor.__wrapped__
        return make(self, torch.device(device), dtype)


@lru_cache(maxsize=256)
def _codebook_tensor(book: Codebook, device: torch.device, dtype: torch.dtype) -> Tensor:
    return torch.tensor(book.values.reshape(-1, book.vec), dtype=dtype, device=device)


def table(*variants: tuple[int, ...]) -> Codebook:
    """Codebook of single values; several tuples are the variants."""
    return Codebook(lambda: np.array(variants, np.int8)[:, :, None], 1, len(variants[0]), len(variants))


def integers(width: int, offset: int = 0) -> Codebook:
    """Codebook of the integers `0 .. 2^width - 1`, minus `offset`."""
    return table(tuple(range(-offset, (1 << width) - offset)))


@dataclass(frozen=True)
class Wire:
    """A bijection between the stored bytes of a block and the bytes its fields are read from."""

    plain_bytes: int
    to_plain: Callable[[Tensor], Tensor]
    to_stored: Callable[[Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class Format:
    """One way to store a weight matrix (see the module docstring for the scheme).

    Attributes:
        name: lower-case name, as used everywhere in iqtorch.
        ggml_type: type id in a GGUF file.
        block_size: weights per block.
        block_bytes: bytes per block and row.
        codebook: the values a code stands for.
        fields: where the bits lie; keys from `FIELD_NAMES`. Without `"d"` the row header is `d`.
        d_kind: how `d` (and `dmin`) is stored: `"f16"`, `"f32"` or `"e8m0"`.
        row_header_bytes: bytes before the first block of each row.
        scale_values: integer that each stored scale stands for (index = stored bits); None = no scales.
        min_values: the same for the minima of affine formats.
        unit: power of two that multiplies `d`; keeps the codebook in int8.
        sign_parity: the sign field has 7 bits per 8 weights; the eighth makes the count of ones even.
        code_parity: this many neighbouring codes (in stored order, see `wire`) have an even count of one bits; 0 = free.
        interleave: rows that share a block (4 for the `_r4` formats), else 1.
        plain: for an interleaved format, the name of the format with the same integers row by row.
        wire: extra bijection on the bytes of a block, if any.
        fallback: format to use when the row length is not a multiple of `block_size`.
        requires_importance: the reference refuses to quantize without importance.
        unused_codes: codes that decode but that encoders leave out, because other programs' kernels get them wrong.
        runtime_scale: factor that matrix products apply to the decoded weight (DESIGN: `iq2_kt`, `iq3_kt`).
    """

    name: str
    ggml_type: int
    block_size: int
    block_bytes: int
    codebook: Codebook
    fields: dict[str, Field]
    d_kind: str = "f16"
    row_header_bytes: int = 0
    scale_values: tuple[int, ...] | None = None
    min_values: tuple[int, ...] | None = None
    unit: float = 1.0
    sign_parity: bool = False
    code_parity: int = 0
    interleave: int = 1
    plain: str | None = None
    wire: Wire | None = field(default=None, repr=False)
    fallback: str | None = None
    requires_importance: bool = False
    unused_codes: tuple[int, ...] = ()
    runtime_scale: float = 1.0

    def __repr__(self) -> str:
        return f"Format({self.name!r}, ggml_type={self.ggml_type}, {self.bits_per_weight():.4f} bpw)"

    def __reduce__(self) -> tuple[Callable[[str], Format], tuple[str]]:
        from . import get_format

        return get_format, (self.name,)

    def __deepcopy__(self, memo: dict[int, object]) -> Format:
        return self

    # -- sizes ---------------------------------------------------------------------------------------------

    @property
    def vec(self) -> int:
        """Weights that one code stands for."""
        return self.codebook.vec

    @property
    def group_size(self) -> int:
        """Weights that share one scale."""
        return self.block_size if "scale" not in self.fields else self.block_size * self.interleave // self.fields["scale"].count

    @property
    def variant_size(self) -> int:
        """Weights that share one variant bit (`block_size` if there is none)."""
        return self.block_size if "variant" not in self.fields else self.block_size * self.interleave // self.fields["variant"].count

    @cached_property
    def for_encoding(self) -> Format:
        """This record as encoders see it: `unused_codes` stand for the value of code 0, which comes first and is chosen instead."""
        if not self.unused_codes:
            return self
        values = self.codebook.values.copy()
        values[:, list(self.unused_codes)] = values[:, :1]
        return replace(self, codebook=replace(self.codebook, build=lambda: values), unused_codes=())

    @property
    def affine(self) -> bool:
        """True if the format subtracts a minimum."""
        return "dmin" in self.fields

    @property
    def d_bytes(self) -> int:
        return FLOAT_KINDS[self.d_kind]

    def row_bytes(self, k: int) -> int:
        """Bytes of one row of `k` weights, row header included.

        Raises:
            ShapeError: `k` is not a positive multiple of `block_size`.
        """
        if k <= 0 or k % self.block_size:
            hint = f"use fallback=True for {self.fallback}, or skip it" if self.fallback and k > 0 and k % 32 == 0 else "skip it"
            raise ShapeError(f"{self.name} needs rows of a positive multiple of {self.block_size} weights, got {k}; {hint}")
        return self.row_header_bytes + k // self.block_size * self.block_bytes

    def row_length(self, row_bytes: int) -> int:
        """Weights in a row of `row_bytes` bytes; inverse of `row_bytes`.

        Raises:
            BlockSizeError: no row length gives that many bytes.
        """
        blocks, rest = divmod(row_bytes - self.row_header_bytes, self.block_bytes)
        if blocks <= 0 or rest:
            raise BlockSizeError(
                f"{row_bytes} bytes are no row of {self.name}: rows have "
                f"{f'{self.row_header_bytes} + ' if self.row_header_bytes else ''}n * {self.block_bytes} bytes"
            )
        return blocks * self.block_size

    def bits_per_weight(self, k: int = 4096) -> float:
        """Bits per weight of rows of `k` weights, row header included."""
        return 8 * self.row_bytes(k) / k

    # -- bytes <-> integers --------------------------------------------------------------------------------

    def unpack(self, blocks: Tensor) -> Parts:
        """Canonical bytes to the integers they hold.

        Args:
            blocks: uint8 `[R, row_bytes]` on any device.

        Returns:
            int32 tensors by field name, each `[R, n]` with its elements in row order; `d` and `dmin` are bit patterns.
        """
        rows, row_bytes = blocks.shape
        k = self.row_length(row_bytes)
        n = self.interleave
        if rows % n:
            raise ShapeError(f"{self.name} merges {n} rows: the number of rows must be a multiple of {n}, got {rows}")
        grouped = blocks.reshape(rows // n, n * row_bytes)
        header, body = grouped.split([n * self.row_header_bytes, n * (row_bytes - self.row_header_bytes)], dim=1)
        body = body.reshape(rows // n, k // self.block_size, n * self.block_bytes)
        if self.wire:
            body = self.wire.to_plain(body)
        parts: Parts = {}
        for name in FIELD_NAMES:
            if name in self.fields:
                read = self.fields[name].read(body).unflatten(-1, (n, -1))
                parts[name] = read.transpose(1, 2).reshape(rows, -1)
            elif name == "d":
                parts[name] = _header_field(self.d_bytes, n).read(header).reshape(rows, 1)
        return parts

    def pack(self, parts: Parts) -> Tensor:
        """Integers to canonical bytes, uint8 `[R, row_bytes]`; inverse of `unpack`."""
        rows, codes = parts["code"].shape
        n = self.interleave
        k = codes * self.vec
        nb = k // self.block_size
        device = parts["code"].device
        body = torch.zeros((rows // n, nb, self.wire.plain_bytes if self.wire else n * self.block_bytes), dtype=torch.uint8, device=device)
        header = torch.zeros((rows // n, n * self.row_header_bytes), dtype=torch.uint8, device=device)
        for name, values in parts.items():
            if name in self.fields:
                split = values.reshape(rows // n, n, nb, -1).transpose(1, 2).reshape(rows // n, nb, -1)
                self.fields[name].write(body, split)
            else:
                _header_field(self.d_bytes, n).write(header, values.reshape(rows // n, n))
        if self.wire:
            body = self.wire.to_stored(body)
        return torch.cat([header, body.reshape(rows // n, -1)], dim=1).reshape(rows, self.row_bytes(k))

    # -- integers -> weights -------------------------------------------------------------------------------

    def scales(self, parts: Parts) -> tuple[Tensor, Tensor | None]:
        """float32 `d * scale` `[R, K / group_size]`, and for affine formats `dmin * min`, likewise."""
        scale = bits_to_float(parts["d"], self.d_kind) * self.unit
        if self.scale_values is not None:
            lut = torch.tensor(self.scale_values, dtype=torch.float32, device=scale.device)
            scale = _expand(scale, parts["scale"].shape[1]) * lut[parts["scale"].long()]
        if not self.affine:
            return scale, None
        low = bits_to_float(parts["dmin"], self.d_kind)
        if self.min_values is not None:
            lut = torch.tensor(self.min_values, dtype=torch.float32, device=low.device)
            # q4_1 and q5_1 add their stored minimum: a single implicit `min` of -1, with no field.
            low = low * lut[0] if "min" not in parts else _expand(low, parts["min"].shape[1]) * lut[parts["min"].long()]
        return scale, low

    def values(self, parts: Parts) -> Tensor:
        """float32 `[R, K]`: the codebook values, signs applied, before any scale."""
        code = parts["code"].long()
        if "variant" in parts:
            code = code + _expand(parts["variant"].long(), code.shape[1]) * self.codebook.entries
        values = self.codebook.tensor(code.device)[code].flatten(1)
        if "sign" in parts:
            negative = self.expand_signs(parts["sign"])
            values = torch.where(negative, -values, values)
        return values

    def expand_signs(self, sign: Tensor) -> Tensor:
        """bool `[R, K]`: which weights are negated, from the sign field."""
        if not self.sign_parity:
            return sign.bool()
        shifts = torch.arange(7, device=sign.device, dtype=sign.dtype)
        seven = (sign[..., None] >> shifts) & 1
        return torch.cat([seven, seven.sum(-1, keepdim=True, dtype=sign.dtype) & 1], -1).flatten(1).bool()

    def fold_signs(self, negative: Tensor) -> Tensor:
        """int32 sign field from bool `[R, K]`: inverse of `expand_signs`."""
        bits = negative.to(torch.int32)
        if not self.sign_parity:
            return bits
        shifts = torch.arange(7, device=bits.device, dtype=torch.int32)
        return (bits.unflatten(1, (-1, 8))[..., :7] << shifts).sum(-1, dtype=torch.int32)

    def weights(self, parts: Parts) -> Tensor:
        """float32 `[R, K]` weights of unpacked integers, without `runtime_scale`."""
        values = self.values(parts)
        scale, low = self.scales(parts)
        out = _expand(scale, values.shape[1]) * values
        return out if low is None else out - _expand(low, values.shape[1])

    def decode(self, blocks: Tensor, shape: tuple[int, ...] | torch.Size | None = None) -> Tensor:
        """The plain-torch oracle: canonical bytes to float32 weights, without `runtime_scale`.

        Args:
            blocks: uint8 `[..., rows, row_bytes]` on any device.
            shape: shape of the result, `[..., rows, K]`; checked against the bytes when given.

        Returns:
            float32 tensor, bit for bit the reference's `to_float` (`iq6_k`: its integer table).

        Raises:
            BlockSizeError: the bytes are not whole rows of this format, or not those of `shape`.
        """
        self.check_blocks(blocks, shape)
        flat = blocks.reshape(-1, blocks.shape[-1])
        k = self.row_length(blocks.shape[-1])
        # int32 and float32 temporaries are many times the packed size: bounded by working on slices of rows.
        step = max(self.interleave, (1 << 22) // k // self.interleave * self.interleave)
        out = torch.empty((flat.shape[0], k), dtype=torch.float32, device=blocks.device)
        for i in range(0, flat.shape[0], step):
            out[i : i + step] = self.weights(self.unpack(flat[i : i + step]))
        return out.reshape(*blocks.shape[:-1], k)

    def check_blocks(self, blocks: Tensor, shape: tuple[int, ...] | torch.Size | None = None) -> None:
        """Raises BlockSizeError unless `blocks` is uint8 `[..., rows, row_bytes]` (of `shape`, if given)."""
        if blocks.dtype != torch.uint8:
            raise BlockSizeError(f"blocks of {self.name} must be uint8, got {blocks.dtype}; use .view(torch.uint8)")
        if blocks.ndim < 2:
            raise BlockSizeError(f"blocks of {self.name} must be [..., rows, row_bytes], got shape {tuple(blocks.shape)}")
        k = self.row_length(blocks.shape[-1])
        if self.interleave > 1 and blocks.shape[-2] % self.interleave:
            raise BlockSizeError(f"{self.name} merges {self.interleave} rows, got {blocks.shape[-2]} rows")
        if shape is not None and tuple(shape) != (*blocks.shape[:-1], k):
            raise BlockSizeError(
                f"blocks of shape {tuple(blocks.shape)} hold {self.name} weights {(*blocks.shape[:-1], k)}, not {tuple(shape)}"
            )


@lru_cache
def _header_field(d_bytes: int, rows: int) -> Field:
    return bits(rows, (lambda i: 8 * d_bytes * i, 8 * d_bytes))


def _expand(t: Tensor, n: int) -> Tensor:
    """`[R, m]` -> `[R, n]`, each element repeated n / m times."""
    rows, m = t.shape
    return t if m == n else t[:, :, None].expand(rows, m, n // m).reshape(rows, n)


def bits_to_float(pattern: Tensor, kind: str) -> Tensor:
    """int32 bit patterns of `"f16"`, `"f32"` or `"e8m0"` numbers -> float32 (exact).

    `e8m0` is the power-of-two scale of MXFP4, halved because its codebook is doubled: `2^(pattern - 128)`.
    """
    if kind == "f16":
        # int16 holds the pattern's two's complement; subtracting 65536 above 32767 keeps the same bits.
        return torch.where(pattern > 32767, pattern - 65536, pattern).to(torch.int16).view(torch.float16).float()
    if kind == "f32":
        return pattern.to(torch.int32).contiguous().view(torch.float32)
    small = (pattern.clamp(max=1) + 1) * 0x00200000  # no shifts by tensors: they are not vectorized
    return torch.where(pattern < 2, small, (pattern - 1).clamp(min=0) * (1 << 23)).contiguous().view(torch.float32)


def rounded(value: Tensor, kind: str) -> Tensor:
    """float32 -> float32, as `bits_to_float` gives what `float_to_bits` stored."""
    if kind == "f16":
        return value.clamp(-65504.0, 65504.0).half().float()
    return value if kind == "f32" else bits_to_float(float_to_bits(value, kind), kind)


def float_to_bits(value: Tensor, kind: str) -> Tensor:
    """float32 -> int32 bit patterns, rounded to nearest; values too large for f16 become its largest number."""
    value = value.float()
    if kind == "f16":
        return value.clamp(-65504.0, 65504.0).half().view(torch.int16).to(torch.int32) & 0xFFFF
    if kind == "f32":
        return value.contiguous().view(torch.int32)
    exponent = torch.floor(torch.log2(value.clamp(min=2.0**-128)) + 0.5)
    return (exponent + 128).clamp(0, 254).to(torch.int32)
