"""Every format against the reference's golden bytes, the `gguf` package, and itself."""

from __future__ import annotations

import copy
import json
import pickle
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from iqtorch.errors import BlockSizeError, ShapeError, UnknownFormatError
from iqtorch.formats import Format, format_by_ggml_type, get_format, list_formats, register
from iqtorch.formats.base import FIELD_NAMES, Field, Run, _codebook_tensor, bits_to_float, float_to_bits
from iqtorch.formats.ik_trellis import OFFSET, OFFSET_ALTERNATE, generate

GOLDEN = Path(__file__).parent / "golden"
FORMATS = [get_format(name) for name in list_formats()]
KINDS = ("", "_noimatrix", "_random")

# type, GGUF id, weights per block, bytes per block, row bytes at K = 4096
SIZES = """
iq1_kt 158 256 56 900      iq2_kt 153 256 68 1092     iq2_ks 145 256 70 1122     iq2_k 137 256 76 1216
iq2_kl 157 256 86 1378     iq3_kt 154 256 100 1604    iq3_ks 156 256 102 1634    iq3_k 138 256 110 1760
iq4_kss 146 256 128 2052   iq4_kt 155 256 128 2052    iq4_ks 144 256 136 2180    iq4_k 139 256 144 2304
iq5_ks 152 256 168 2692    iq5_k 140 256 176 2816     iq6_k 141 256 212 3392     q6_0 133 32 26 3328
iq2_k_r4 337 256 76 1216   iq3_k_r4 338 256 110 1760  iq4_k_r4 339 256 144 2304  iq5_k_r4 340 256 176 2816
iq4_ks_r4 344 256 136 2180 iq5_ks_r4 352 256 168 2692 q4_0 2 32 18 2304          q4_1 3 32 20 2560
q5_0 6 32 22 2816          q5_1 7 32 24 3072          q8_0 8 32 34 4352          q2_k 10 256 84 1344
q3_k 11 256 110 1760       q4_k 12 256 144 2304       q5_k 13 256 176 2816       q6_k 14 256 210 3360
iq2_xxs 16 256 66 1056     iq2_xs 17 256 74 1184      iq3_xxs 18 256 98 1568     iq1_s 19 256 50 800
iq4_nl 20 32 18 2304       iq3_s 21 256 110 1760      iq2_s 22 256 82 1312       iq4_xs 23 256 136 2176
iq1_m 29 256 56 896        mxfp4 39 32 17 2176
""".split()  # noqa: SIM905
SIZE_ROWS = [(SIZES[i], *map(int, SIZES[i + 1 : i + 5])) for i in range(0, len(SIZES), 5)]

all_formats = pytest.mark.parametrize("fmt", FORMATS, ids=lambda f: f.name)


def golden(fmt: Format) -> dict[str, torch.Tensor]:
    return load_file(GOLDEN / f"{fmt.name}.safetensors")


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal as bit patterns (so 0.0 differs from -0.0), all NaNs alike."""
    return bool(((a.view(torch.int32) == b.view(torch.int32)) | (a.isnan() & b.isnan())).all())


def random_blocks(fmt: Format, rows: int, k: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 256, (rows, fmt.row_bytes(k)), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def polynomial(fmt: Format) -> Format:
    """iq6_k as the reference's CPU `to_float` sees it: other values in the place of the table."""
    values = json.loads((GOLDEN / "iq6_k_polynomial.json").read_text())["variants"]

    class Book(type(fmt.codebook)):  # the record's codebooks are int8; only this oracle is float
        def tensor(self, device="cpu", dtype=torch.float32):
            return torch.tensor(values, dtype=dtype, device=device).reshape(-1, 1)

    book = fmt.codebook
    return replace(fmt, codebook=Book(book.build, book.vec, book.entries, book.variants))


# -- golden files ------------------------------------------------------------------------------------------


def test_golden_files_and_formats_correspond() -> None:
    assert sorted(path.stem for path in GOLDEN.glob("*.safetensors")) == sorted(list_formats())
    assert sorted(row[0] for row in SIZE_ROWS) == sorted(list_formats())


@all_formats
def test_golden_metadata(fmt: Format) -> None:
    with safe_open(GOLDEN / f"{fmt.name}.safetensors", "pt") as file:
        meta = file.metadata()
    assert int(meta["type_id"]) == fmt.ggml_type
    assert int(meta["block_size"]) == fmt.block_size
    assert int(meta["type_size"]) == fmt.block_bytes
    assert int(meta["row_meta_size"]) == fmt.row_header_bytes
    assert int(meta["interleaved_rows"]) == fmt.interleave
    assert int(meta["row_bytes"]) == fmt.row_bytes(int(meta["K"]))
    assert ("blocks_noimatrix" not in golden(fmt)) == fmt.requires_importance


@all_formats
def test_decode_is_bit_exact(fmt: Format) -> None:
    data = golden(fmt)
    oracle = polynomial(fmt) if fmt.name == "iq6_k" else fmt
    compared = 0
    for kind in KINDS:
        if f"blocks{kind}" in data:
            blocks, expected = data[f"blocks{kind}"], data[f"dequant{kind}"]
            assert same_bits(oracle.decode(blocks, expected.shape), expected), kind
            compared += 1
    assert compared == (2 if fmt.requires_importance else 3)


def test_iq6_k_table_is_near_the_polynomial() -> None:
    fmt = get_format("iq6_k")
    values = np.array(json.loads((GOLDEN / "iq6_k_polynomial.json").read_text())["variants"])
    assert np.abs(fmt.codebook.values[..., 0] - values).max() < 0.489
    data = golden(fmt)
    error = (fmt.decode(data["blocks"]) - data["dequant"]).norm() / data["dequant"].norm()
    assert error < 0.005


@all_formats
def test_pack_inverts_unpack(fmt: Format) -> None:
    data = golden(fmt)
    for kind in KINDS:
        if f"blocks{kind}" in data:
            blocks = data[f"blocks{kind}"]
            assert torch.equal(fmt.pack(fmt.unpack(blocks)), blocks), kind
    # Any bytes at all, scales that are NaN included: every stored bit belongs to exactly one field.
    blocks = random_blocks(fmt, 8, 3 * fmt.block_size)
    assert torch.equal(fmt.pack(fmt.unpack(blocks)), blocks)


@all_formats
def test_fields_cover_each_bit_once(fmt: Format) -> None:
    size = fmt.wire.plain_bytes if fmt.wire else fmt.interleave * fmt.block_bytes
    used = np.zeros(8 * size, np.int64)
    for name, field in fmt.fields.items():
        assert name in FIELD_NAMES
        for run in field.runs:
            for i in range(run.width):
                np.add.at(used, run.start + i, 1)
    assert (used == 1).all()


@all_formats
def test_parts_stay_inside_their_tables(fmt: Format) -> None:
    """No byte pattern can index past a codebook or a scale table."""
    parts = fmt.unpack(random_blocks(fmt, 16, 2 * fmt.block_size, seed=1))
    limits = {"code": fmt.codebook.entries, "variant": fmt.codebook.variants}
    for name, table in (("scale", fmt.scale_values), ("min", fmt.min_values)):
        if table is not None:
            limits[name] = len(table)
    for name, limit in limits.items():
        if name in fmt.fields:
            assert 1 << fmt.fields[name].width == limit
            assert 0 <= int(parts[name].min()) <= int(parts[name].max()) < limit


@all_formats
def test_decode_of_stacked_and_strided_blocks(fmt: Format) -> None:
    blocks = golden(fmt)["blocks_random"]
    expected = fmt.decode(blocks)
    stacked = blocks.repeat(3, 1, 1)
    assert same_bits(fmt.decode(stacked, (3, *expected.shape)), expected.repeat(3, 1, 1))
    wide = torch.full((blocks.shape[0], blocks.shape[1] + 5), 0xA5, dtype=torch.uint8)
    wide[:, 2:-3] = blocks
    assert same_bits(fmt.decode(wide[:, 2:-3]), expected)


def test_decode_in_slices_of_rows() -> None:
    """A matrix larger than one working slice decodes to the same numbers."""
    fmt = get_format("q8_0")
    k = 1 << 21
    blocks = random_blocks(fmt, 1, k).repeat(5, 1)
    whole = fmt.decode(blocks)
    assert same_bits(whole, whole[:1].expand(5, k).contiguous())


# -- other oracles -----------------------------------------------------------------------------------------

STANDARD = [fmt for fmt in FORMATS if fmt.ggml_type in set(gguf.GGMLQuantizationType)]


def test_all_standard_types_are_covered() -> None:
    assert len(STANDARD) == 20


@pytest.mark.parametrize("fmt", STANDARD, ids=lambda f: f.name)
def test_decode_equals_gguf_package(fmt: Format) -> None:
    qtype = gguf.GGMLQuantizationType(fmt.ggml_type)
    assert gguf.GGML_QUANT_SIZES[qtype] == (fmt.block_size, fmt.block_bytes)
    assert qtype.name.lower() == fmt.name
    blocks = random_blocks(fmt, 64, 2 * fmt.block_size, seed=2)
    with np.errstate(all="ignore"):  # random float16 scales include NaN and Inf
        expected = torch.from_numpy(gguf.dequantize(blocks.numpy(), qtype))
    ours = fmt.decode(blocks)
    finite = expected.isfinite()
    assert finite.float().mean() > 0.7
    assert torch.equal(finite, ours.isfinite())
    assert torch.equal(ours[finite], expected[finite])


@pytest.mark.parametrize("fmt", [f for f in FORMATS if f.plain], ids=lambda f: f.name)
def test_interleaved_to_plain_and_back(fmt: Format) -> None:
    plain = get_format(fmt.plain)
    data = golden(fmt)
    for kind in KINDS:
        blocks = data[f"blocks{kind}"]
        moved = plain.pack(fmt.unpack(blocks))
        assert moved.shape == blocks.shape
        assert not torch.equal(moved, blocks)
        assert same_bits(plain.decode(moved), data[f"dequant{kind}"])
        assert torch.equal(fmt.pack(plain.unpack(moved)), blocks)


@pytest.mark.parametrize(
    ("index", "offset", "values"),
    [
        (0, OFFSET, [-47, -36, -39, -86, -38, -38, -47, -35]),
        (1, OFFSET, [21, 1, 59, -23, 33, 8, 13, 43]),
        (8191, OFFSET, [-17, -22, -28, 59, -59, -33, 51, 5]),
        (12345, OFFSET, [-47, -24, 21, -50, 30, 42, 29, -26]),
        (65535, OFFSET, [26, -32, -16, -9, -25, -62, 17, 10]),
        (0, OFFSET_ALTERNATE, [-40, -79, -43, -79, -27, -90, -48, -69]),
        (32767, OFFSET_ALTERNATE, [26, -32, -16, -9, -25, -62, 17, 10]),
    ],
)
def test_trellis_vectors(index: int, offset: int, values: list[int]) -> None:
    assert generate(index + 1, 8, offset)[index].tolist() == values


def test_trellis_codebooks() -> None:
    assert get_format("iq2_kt").codebook.values[0, 12345].tolist() == [-47, -24, 21, -50, 30, 42, 29, -26]
    assert get_format("iq3_kt").codebook.values[0, 12345].tolist() == [47, 24, 21, 50, 30, 42, 29, 26]
    assert get_format("iq4_kt").codebook.values[1, 0].tolist() == [-40, -79, -43, -79]
    assert (get_format("iq2_kt").runtime_scale, get_format("iq3_kt").runtime_scale) == (1.05, 1.01)
    assert all(fmt.runtime_scale == 1 for fmt in FORMATS if fmt.name not in ("iq2_kt", "iq3_kt"))


# -- sizes and registry ------------------------------------------------------------------------------------


@pytest.mark.parametrize("row", SIZE_ROWS, ids=lambda row: row[0])
def test_sizes(row: tuple[str, int, int, int, int]) -> None:
    name, ggml_type, block_size, block_bytes, row_bytes = row
    fmt = get_format(name)
    assert (fmt.ggml_type, fmt.block_size, fmt.block_bytes, fmt.row_bytes(4096)) == (ggml_type, block_size, block_bytes, row_bytes)
    assert fmt.bits_per_weight() == row_bytes / 512
    assert format_by_ggml_type(ggml_type) is fmt
    for n in (1, 2, 7, 100):
        assert fmt.row_length(fmt.row_bytes(n * block_size)) == n * block_size
    for k in (0, -block_size, block_size - 1, block_size + 1):
        with pytest.raises(ShapeError, match=f"multiple of {block_size} weights, got {k}"):
            fmt.row_bytes(k)
    for wrong in (0, fmt.row_header_bytes, row_bytes - 1, row_bytes + 1):
        with pytest.raises(BlockSizeError, match=f"{wrong} bytes"):
            fmt.row_length(wrong)


@all_formats
def test_fallback_fits_rows_of_32(fmt: Format) -> None:
    if fmt.block_size == 32:
        assert fmt.fallback is None
    else:
        assert fmt.fallback is not None
        fallback = get_format(fmt.fallback)
        assert fallback.block_size == 32
        assert fallback.bits_per_weight() > fmt.bits_per_weight() - 0.01
        with pytest.raises(ShapeError, match=fmt.fallback):
            fmt.row_bytes(96)


def test_unknown_names_and_ids() -> None:
    assert get_format("IQ2_KL") is get_format("iq2_kl") is get_format(get_format("iq2_kl"))
    with pytest.raises(UnknownFormatError, match=r"'iq2kl'.*did you mean.*'iq2_kl'.*list_formats"):
        get_format("iq2kl")
    with pytest.raises(UnknownFormatError, match="unknown format 'zzzzzz'; iqtorch.list_formats"):
        get_format("zzzzzz")
    with pytest.raises(UnknownFormatError, match=r"type id 12345.*157 iq2_kl"):
        format_by_ggml_type(12345)


def test_registration_refuses_duplicates() -> None:
    fmt = get_format("iq2_kl")
    for twin in (fmt, replace(fmt, name="new"), replace(fmt, ggml_type=9999)):
        with pytest.raises(ValueError, match="registered already"):
            register(twin)
    assert len(list_formats()) == len(SIZE_ROWS)


@all_formats
def test_record_is_a_singleton(fmt: Format) -> None:
    assert pickle.loads(pickle.dumps(fmt)) is fmt
    assert copy.deepcopy(fmt) is fmt
    assert fmt.name in repr(fmt)


def test_decode_refuses_wrong_bytes() -> None:
    fmt = get_format("iq2_k_r4")
    good = golden(fmt)["blocks"]
    for blocks, message in (
        (good.to(torch.int16), "uint8"),
        (good[0], "rows, row_bytes"),
        (good[:, :-1], "bytes are no row"),
        (good[:6], "merges 4 rows, got 6"),
    ):
        with pytest.raises(BlockSizeError, match=message):
            fmt.decode(blocks)
    with pytest.raises(BlockSizeError, match=r"not \(8, 256\)"):
        fmt.decode(good, (8, 256))


# -- fields and floats -------------------------------------------------------------------------------------


@st.composite
def layouts(draw: st.DrawFn) -> tuple[int, list[list[tuple[int, int]]]]:
    """Elements of a few runs each, scattered over the bits of a block without overlap."""
    count = draw(st.integers(1, 6))
    widths = draw(st.lists(st.integers(1, 9), min_size=1, max_size=3))
    order = draw(st.permutations(range(count * len(widths))))
    gaps = draw(st.lists(st.integers(0, 5), min_size=len(order), max_size=len(order)))
    starts: dict[int, int] = {}
    position = 0
    for slot, gap in zip(order, gaps, strict=True):
        position += gap
        starts[slot] = position
        position += widths[slot // count]
    return position // 8 + 1, [[(starts[r * count + e], width) for e in range(count)] for r, width in enumerate(widths)]


@settings(max_examples=100, deadline=None)
@given(layouts(), st.integers(0, 2**32 - 1))
def test_field_read_and_write(layout: tuple[int, list[list[tuple[int, int]]]], seed: int) -> None:
    size, runs = layout
    field = Field(len(runs[0]), tuple(Run(np.array([s for s, _ in run]), run[0][1]) for run in runs))
    rng = np.random.default_rng(seed)
    values = rng.integers(0, 1 << field.width, (2, field.count))
    blocks = torch.zeros(2, size, dtype=torch.uint8)
    field.write(blocks, torch.from_numpy(values).to(torch.int32))
    assert torch.equal(field.read(blocks), torch.from_numpy(values).to(torch.int32))
    for row in range(2):  # and bit by bit, with Python integers
        number = int.from_bytes(blocks[row].numpy().tobytes(), "little")
        for e in range(field.count):
            low = 0
            for run in runs:
                start, width = run[e]
                assert number >> start & ((1 << width) - 1) == int(values[row, e]) >> low & ((1 << width) - 1)
                low += width


@pytest.mark.parametrize("name", ["iq2_kl", "q4_k"])
def test_decode_of_stand_ins_leaves_nothing_behind(name: str) -> None:
    """Tables made under a `FakeTensorMode` are not those of later decodes, nor the other way round."""
    fmt = get_format(name)
    blocks = torch.zeros(4, fmt.row_bytes(512), dtype=torch.uint8)
    want = fmt.decode(blocks)
    for clear in (False, True):
        if clear:
            _codebook_tensor.cache_clear()
        with FakeTensorMode() as mode:
            stand_in = fmt.decode(mode.from_tensor(blocks))
        assert type(stand_in) is FakeTensor and stand_in.shape == want.shape
        assert torch.equal(fmt.decode(blocks), want)


def test_float_patterns() -> None:
    halves = torch.arange(65536, dtype=torch.int32)
    expected = torch.from_numpy(np.arange(65536, dtype=np.uint16).view(np.float16).astype(np.float32))
    assert same_bits(bits_to_float(halves, "f16"), expected)
    finite = expected.isfinite()
    assert torch.equal(float_to_bits(expected[finite], "f16"), halves[finite])
    assert float_to_bits(torch.tensor([1e9, -1e9]), "f16").tolist() == [0x7BFF, 0xFBFF]
    singles = torch.tensor([0.0, -0.0, 1e-45, 1.5, -3e38])
    assert same_bits(bits_to_float(float_to_bits(singles, "f32"), "f32"), singles)
    powers = torch.arange(256, dtype=torch.int32)
    assert bits_to_float(powers, "e8m0").double().tolist() == [2.0 ** (i - 128) for i in range(256)]
    assert torch.equal(float_to_bits(bits_to_float(powers[:255], "e8m0"), "e8m0"), powers[:255])
