"""The GGUF reader and writer: good files, damaged files, hostile files."""

from __future__ import annotations

import struct
import time
import warnings
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from iqtorch.errors import UnknownFormatError
from iqtorch.formats import get_format, list_formats
from iqtorch.gguf import (
    GGUFError,
    GGUFFile,
    GGUFLimitError,
    GGUFMagicError,
    GGUFMetadataError,
    GGUFSplitError,
    GGUFTensorError,
    GGUFTruncatedError,
    GGUFTypeError,
    GGUFVersionError,
    TensorSource,
    write_gguf,
)
from iqtorch.gguf.writer import Typed

U32, I32, F32, BOOL, STR, ARR, U64, F64 = 4, 5, 6, 7, 8, 9, 10, 12


# -- bytes by hand -----------------------------------------------------------------------------------------


def text(value: str | bytes) -> bytes:
    raw = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(raw)) + raw


def entry(key: str, kind: int, payload: bytes) -> bytes:
    return text(key) + struct.pack("<I", kind) + payload


def array(kind: int, count: int, payload: bytes = b"") -> bytes:
    return struct.pack("<IQ", kind, count) + payload


def alignment(kind: int, payload: bytes) -> bytes:
    return build((entry("general.alignment", kind, payload),))


def tensor(name: str, ne: tuple[int, ...], kind: int, offset: int = 0) -> bytes:
    return text(name) + struct.pack(f"<I{len(ne)}QIQ", len(ne), *ne, kind, offset)


def header(n_tensors: int, n_entries: int, version: int = 3, magic: bytes = b"GGUF") -> bytes:
    return magic + struct.pack("<IQQ", version, n_tensors, n_entries)


def build(entries: tuple[bytes, ...] = (), tensors: tuple[bytes, ...] = (), data: bytes = b"", alignment: int = 32) -> bytes:
    head = header(len(tensors), len(entries)) + b"".join(entries) + b"".join(tensors)
    return head + bytes(-len(head) % alignment) + data


def one_tensor(ne: tuple[int, ...] = (32, 2), kind: int = 0, offset: int = 0, data: int = 256) -> bytes:
    return build((entry("general.architecture", STR, text("llama")),), (tensor("w", ne, kind, offset),), bytes(data))


@pytest.fixture
def write(tmp_path: Path):
    def put(raw: bytes, name: str = "a.gguf") -> Path:
        path = tmp_path / name
        path.write_bytes(raw)
        return path

    return put


def blocks_of(name: str, rows: int, k: int, seed: int = 0) -> torch.Tensor:
    shape = (rows, get_format(name).row_bytes(k))
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


# -- good files --------------------------------------------------------------------------------------------


def test_file_of_the_gguf_package(tmp_path: Path) -> None:
    path = tmp_path / "a.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_uint32("a.u32", 2**32 - 1)
    writer.add_int8("a.i8", -5)
    writer.add_uint64("a.u64", 2**63)
    writer.add_float32("a.f32", 0.5)
    writer.add_float64("a.f64", 0.1)
    writer.add_bool("a.bool", True)
    writer.add_string("a.text", "Grüße ✓")
    writer.add_array("a.ints", [1, -2, 3])
    writer.add_array("a.texts", ["x", "", "ÿ"])
    writer.add_array("a.bools", [True, False])
    values = np.random.default_rng(0).standard_normal((3, 4, 64)).astype(np.float32)
    writer.add_tensor("f32", values)
    writer.add_tensor("f16", values[0].astype(np.float16))
    packed = gguf.quantize(values[1], gguf.GGMLQuantizationType.Q8_0)
    writer.add_tensor("q8_0", packed, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

    file = GGUFFile(path)
    assert file.version == 3
    found = {key: file.metadata[key] for key in file.metadata}
    assert found == {
        "general.architecture": "llama", "a.u32": 2**32 - 1, "a.i8": -5, "a.u64": 2**63, "a.f32": 0.5, "a.f64": 0.1, "a.bool": True,
        "a.text": "Grüße ✓", "a.ints": [1, -2, 3], "a.texts": ["x", "", "ÿ"], "a.bools": [True, False],
    }  # fmt: skip
    assert file.metadata["a.bool"] is True
    assert file.metadata.length("a.texts") == 3
    assert list(file.tensors) == ["f32", "f16", "q8_0"]
    assert torch.equal(file.data("f32"), torch.from_numpy(values))
    assert torch.equal(file.data("f16"), torch.from_numpy(values[0]).half())
    assert file.tensors["q8_0"].shape == (4, 64)
    assert file.tensors["q8_0"].format is get_format("q8_0")
    assert torch.equal(file.data("q8_0"), torch.from_numpy(packed))


def test_version_2_is_read(write) -> None:
    raw = bytearray(one_tensor())
    raw[4:8] = struct.pack("<I", 2)
    assert GGUFFile(write(bytes(raw))).version == 2


def test_every_format_in_one_file(tmp_path: Path) -> None:
    """Row headers count: each tensor is found at its place, and the next one too."""
    path = tmp_path / "all.gguf"
    stored = {f"blk.{i}.{name}": blocks_of(name, 8, 512, seed=i) for i, name in enumerate(list_formats())}
    sources = [TensorSource(key, (8, 512), get_format(key.split(".")[2]), lambda b=b: b) for key, b in stored.items()]
    experts = blocks_of("iq2_kl", 12, 256).view(3, 4, -1)
    sources.append(TensorSource("experts", (3, 4, 256), get_format("iq2_kl"), lambda: experts))
    sources.append(TensorSource.of("last", torch.arange(5.0)))
    write_gguf(path, {"general.architecture": "llama"}, sources)
    file = GGUFFile(path)
    assert len(file.tensors) == len(list_formats()) + 2
    for key, blocks in stored.items():
        assert file.tensors[key].type_name == key.split(".")[2]
        assert file.tensors[key].shape == (8, 512)
        assert torch.equal(file.data(key), blocks)
        file.release([key])
        assert torch.equal(file.data(key), blocks)
    assert torch.equal(file.data("experts"), experts)
    assert file.data("last").tolist() == [0, 1, 2, 3, 4]
    assert list(tmp_path.iterdir()) == [path]


def test_gguf_package_reads_what_is_written(tmp_path: Path) -> None:
    path = tmp_path / "a.gguf"
    weights = torch.randn(4, 64, generator=torch.Generator().manual_seed(0))
    packed = torch.from_numpy(gguf.quantize(weights.numpy(), gguf.GGMLQuantizationType.Q4_0))
    metadata = {
        "general.architecture": "llama", "n": 7, "negative": -7, "x": 0.25, "yes": True, "text": "ja", "ints": [1, 2], "texts": ["a", "b"],
        "floats": Typed([1, 2], F32), "big": Typed(2**40, U64),
    }  # fmt: skip
    sources = [
        TensorSource("q", (4, 64), get_format("q4_0"), lambda: packed),
        TensorSource.of("f", weights),
        TensorSource.of("b", weights.bfloat16()),
    ]
    write_gguf(path, metadata, sources)
    reader = gguf.GGUFReader(path)
    for key, value in metadata.items():
        expected = value.value if isinstance(value, Typed) else value
        assert reader.fields[key].contents() == expected, key
    found = {t.name: t for t in reader.tensors}
    assert np.array_equal(found["q"].data, packed.numpy())
    assert np.array_equal(found["f"].data, weights.numpy())
    assert found["b"].tensor_type == gguf.GGMLQuantizationType.BF16
    ours = GGUFFile(path)
    assert torch.equal(ours.data("b"), weights.bfloat16())
    assert ours.metadata["big"] == 2**40
    assert all(info.offset % 32 == 0 for info in ours.tensors.values())


def test_bytes_that_are_no_utf8_survive(tmp_path: Path, write) -> None:
    raw = build((entry("tokens", ARR, struct.pack("<IQ", STR, 2) + text(b"ok") + text(b"\xff\xfe")),))
    found = GGUFFile(write(raw)).metadata["tokens"]
    assert found[0] == "ok"
    again = tmp_path / "b.gguf"
    write_gguf(again, {"tokens": found}, [])
    assert text(b"\xff\xfe") in again.read_bytes()


def test_nested_arrays(write) -> None:
    inner = struct.pack("<IQ3I", U32, 3, 1, 2, 3) + struct.pack("<IQ", STR, 1) + text("x")
    raw = build((entry("nested", ARR, struct.pack("<IQ", ARR, 2) + inner), entry("after", U32, struct.pack("<I", 9))))
    file = GGUFFile(write(raw))
    assert file.metadata["nested"] == [[1, 2, 3], ["x"]]
    assert file.metadata["after"] == 9


def test_data_is_private_to_the_reader(write) -> None:
    path = write(one_tensor())
    before = path.read_bytes()
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # such as torch's about memory that cannot be written
        GGUFFile(path).data("w").fill_(7.0)
    assert path.read_bytes() == before


@pytest.mark.parametrize("step", [1, 8, 64, 4096])
def test_alignment(write, step: int) -> None:
    entries = (entry("general.alignment", U32, struct.pack("<I", step)),)
    tensors = (tensor("a", (3,), 0), tensor("b", (2,), 0, -(-12 // step) * step))
    pad = bytes(-12 % step)
    raw = build(entries, tensors, struct.pack("<3f", 1, 2, 3) + pad + struct.pack("<2f", 4, 5), step)
    file = GGUFFile(write(raw))
    assert file.data("a").tolist() == [1, 2, 3]
    assert file.data("b").tolist() == [4, 5]


def test_header_of_1500_tensors_is_fast(tmp_path: Path) -> None:
    path = tmp_path / "big.gguf"
    empty = torch.zeros(1, 32)
    metadata = {
        "tokenizer.ggml.tokens": [f"token{i}" for i in range(150_000)],
        "tokenizer.ggml.merges": [f"a{i} b" for i in range(150_000)],
    }
    write_gguf(path, metadata, [TensorSource.of(f"blk.{i}.attn_q.weight", empty) for i in range(1500)])
    GGUFFile(path)
    times = []
    for _ in range(5):
        start = time.process_time()
        file = GGUFFile(path)
        times.append(time.process_time() - start)
    assert len(file.tensors) == 1500
    assert min(times) < 0.1, times


# -- damaged and hostile files -----------------------------------------------------------------------------


def test_truncated_at_every_byte(write, tmp_path: Path) -> None:
    metadata = {"general.architecture": "llama", "tokens": ["a", "bc"], "n": [1, 2, 3], "x": 0.5}
    sources = [TensorSource("q", (4, 256), get_format("iq2_ks"), lambda: blocks_of("iq2_ks", 4, 256)), TensorSource.of("f", torch.ones(7))]
    good = tmp_path / "good.gguf"
    write_gguf(good, metadata, sources)
    raw = good.read_bytes()
    last = max(info.offset + info.nbytes for info in GGUFFile(good).tensors.values())
    for n in range(last):
        with pytest.raises(GGUFError):
            GGUFFile(write(raw[:n]))
    assert len(GGUFFile(write(raw[:last])).tensors) == 2


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_random_damage_is_an_error_or_a_readable_file(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    raw = bytearray(one_tensor())
    for _ in range(data.draw(st.integers(1, 4))):
        raw[data.draw(st.integers(0, len(raw) - 257))] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.mktemp("damage") / "a.gguf"
    path.write_bytes(bytes(raw))
    try:
        file = GGUFFile(path)
        dict(file.metadata)
        for name in file.tensors:
            file.data(name)
    except GGUFError:
        pass  # any other exception fails the test


HUGE = 2**63
ATTACKS = [
    ("empty", b"", GGUFTruncatedError, "0 bytes"),
    ("magic", header(0, 0, magic=b"GGML") + bytes(32), GGUFMagicError, "GGML"),
    ("version 0", header(0, 0, version=0) + bytes(32), GGUFVersionError, "version 0"),
    ("version 1", header(0, 0, version=1) + bytes(32), GGUFVersionError, "version 1"),
    ("version 4", header(0, 0, version=4) + bytes(32), GGUFVersionError, "version 4"),
    ("big-endian", header(0, 0, version=0x03000000) + bytes(32), GGUFVersionError, "big-endian"),
    ("entry count", header(0, HUGE) + bytes(64), GGUFLimitError, str(HUGE)),
    ("tensor count", header(HUGE, 0) + bytes(64), GGUFLimitError, str(HUGE)),
    ("entry count beyond file", header(0, 1000) + bytes(64), GGUFTruncatedError, "1000 metadata"),
    ("tensor count beyond file", header(1000, 0) + bytes(64), GGUFTruncatedError, "1000 tensors"),
    ("43 bytes that hang", header(0, 1) + text("k") + struct.pack("<IIQ", ARR, U32, 2**61)[:10] , GGUFTruncatedError, "length of 'k'"),
    ("key length", header(0, 1) + struct.pack("<Q", 2**64 - 1) + bytes(64), GGUFLimitError, "18446744073709551615"),
    ("key too long", build((entry("k" * 70000, U32, bytes(4)),)), GGUFLimitError, "70000"),
    ("key empty", build((entry("", U32, bytes(4)),)), GGUFMetadataError, "empty"),
    ("key not utf-8", build((text(b"\xff\xfe") + struct.pack("<II", U32, 1),)), GGUFMetadataError, "UTF-8"),
    ("key twice", build(2 * (entry("k", U32, bytes(4)),)), GGUFMetadataError, "there twice"),
    ("value type", build((entry("k", 13, bytes(8)),)), GGUFMetadataError, "type 13"),
    ("bool of 2", build((entry("k", BOOL, b"\2"),)), GGUFMetadataError, "bool of value 2"),
    ("string length", build((entry("k", STR, struct.pack("<Q", 2**62)),)), GGUFLimitError, str(2**62)),
    ("string beyond file", build((entry("k", STR, struct.pack("<Q", 5000)),)), GGUFTruncatedError, "5000"),
    ("string of 2 MB", build((entry("k", STR, text("x" * (2 << 20))),)), GGUFLimitError, "2097152"),
    ("array length", build((entry("k", ARR, struct.pack("<IQ", U32, 2**62)),)), GGUFTruncatedError, "needs"),
    ("array of 2^61 doubles", build((entry("k", ARR, struct.pack("<IQ", F64, 2**61)),)), GGUFTruncatedError, str(2**64)),
    ("string array length", build((entry("k", ARR, struct.pack("<IQ", STR, 2**62)),)), GGUFLimitError, str(2**62)),
    ("string array beyond file", build((entry("k", ARR, struct.pack("<IQ", STR, 9)),)), GGUFTruncatedError, "9 elements"),
    ("string in array", build((entry("k", ARR, struct.pack("<IQQ", STR, 1, 2**60)),)), GGUFLimitError, "element 0"),
    ("array element type", build((entry("k", ARR, struct.pack("<IQ", 77, 1) + bytes(16)),)), GGUFMetadataError, "type 77"),
    ("arrays nested 3 deep", build((entry("k", ARR, 3 * array(ARR, 1) + array(U32, 1, bytes(4))),)), GGUFLimitError, "nests"),
    ("arrays nested 10000 deep", build((entry("k", ARR, 10000 * array(ARR, 1)),)), GGUFLimitError, "nests"),
    ("name of 10 MB", build((), (tensor("x" * 10_000_000, (1,), 0),), bytes(4)), GGUFLimitError, "10000000"),
    ("0 dimensions", one_tensor(()), GGUFTensorError, "0 dimensions"),
    ("5 dimensions", one_tensor((1, 1, 1, 1, 1)), GGUFTensorError, "5 dimensions"),
    ("2^32-1 dimensions", build((), (text("w") + struct.pack("<I", 2**32 - 1) + bytes(64),)), GGUFTensorError, "4294967295 dimensions"),
    ("dimension 0", one_tensor((0, 2)), GGUFTensorError, r"\[0, 2\]"),
    ("product 2^64", one_tensor((2**32, 2**32)), GGUFTensorError, "below 2\\^63"),
    ("dimension 2^64-1", one_tensor((2**64 - 1, 2)), GGUFTensorError, "below 2\\^63"),
    ("exabyte", one_tensor((2**61, 1)), GGUFTruncatedError, "beyond the end"),
    ("size that wraps", one_tensor((2**60, 4), kind=28), GGUFTruncatedError, str(2**65)),
    ("unknown type", one_tensor(kind=9999), GGUFTypeError, r"9999.*157 iq2_kl.*id_map"),
    *(
        (f"interleaved type {name}", one_tensor(kind=kind), GGUFTypeError, f"id {kind} is {name}, rows interleaved.*original$")
        for kind, name in ((208, "q8_0_r8"), (31, "q4_0_4_4"), (32, "q4_0_4_8"), (33, "q4_0_8_8"))
    ),
    *(
        (f"type {name} of another program", one_tensor(kind=kind), GGUFTypeError, f"id {kind} is {name}, which is not read here.*original$")
        for kind, name in ((135, "iq2_bn"), (41, "q1_0_g128"))
    ),
    ("retired type", one_tensor(kind=4), GGUFTypeError, "type id 4;.*id_map"),
    ("row length", one_tensor((33, 2), kind=8), GGUFTensorError, "multiple of 32"),
    ("rows of _r4", one_tensor((256, 3), kind=337), GGUFTensorError, "3 rows: iq2_k_r4 merges 4"),
    ("vector of _r4", one_tensor((256,), kind=337), GGUFTensorError, "1 rows"),
    ("offset unaligned", one_tensor(offset=4), GGUFTensorError, "offset 4, not a multiple"),
    ("offset beyond", one_tensor(offset=1 << 20), GGUFTruncatedError, "beyond the end"),
    ("offset 2^64-32", one_tensor(offset=2**64 - 32), GGUFTruncatedError, "beyond the end"),
    ("data too short", one_tensor(data=255), GGUFTruncatedError, "1 beyond"),
    ("row header forgotten", one_tensor((256, 1), kind=144, data=136), GGUFTruncatedError, "4 beyond"),
    ("overlap", build((), (tensor("a", (64,), 0), tensor("b", (8,), 0, 128)), bytes(256)), GGUFTensorError, "'a' and 'b' overlap"),
    ("name twice", build((), (tensor("a", (8,), 0), tensor("a", (8,), 0, 32)), bytes(64)), GGUFTensorError, "'a' is there twice"),
    *(
        (f"alignment {n}", alignment(U32, struct.pack("<I", n)), GGUFMetadataError, f"is {n}, must be a power of two")
        for n in (0, 3, 33, 2**30, 2**32 - 1)
    ),
    ("alignment as text", alignment(STR, text("32")), GGUFMetadataError, "must be a uint32"),
    ("alignment as bool", alignment(BOOL, b"\1"), GGUFMetadataError, "must be a uint32"),
    ("alignment as array", alignment(ARR, array(U32, 1, struct.pack("<I", 32))), GGUFMetadataError, "must be a uint32"),
    ("split count as text", build((entry("split.count", STR, text("2")),)), GGUFMetadataError, "whole number"),
    ("split count 65535", build((entry("split.count", 2, struct.pack("<H", 65535)),)), GGUFLimitError, "65535 parts"),
    ("split file renamed", build((entry("split.count", 2, struct.pack("<H", 2)),)), GGUFSplitError, "-00001-of-00002"),
]  # fmt: skip


@pytest.mark.parametrize(("raw", "kind", "message"), [attack[1:] for attack in ATTACKS], ids=[attack[0] for attack in ATTACKS])
def test_attack(write, raw: bytes, kind: type[GGUFError], message: str) -> None:
    path = write(raw)
    start = time.process_time()
    with pytest.raises(kind, match=message) as caught:
        GGUFFile(path)
    assert time.process_time() - start < 1.0
    assert str(path) in str(caught.value)
    assert isinstance(caught.value, ValueError)


def test_names_are_only_names(write) -> None:
    """A tensor's name is never a path."""
    raw = build((), (tensor("../../etc/passwd", (8,), 0), tensor("", (8,), 0, 32)), bytes(64))
    assert list(GGUFFile(write(raw)).tensors) == ["../../etc/passwd", ""]


def test_unknown_type_can_be_mapped(write) -> None:
    raw = one_tensor((256, 1), kind=9999, data=256)
    with pytest.raises(UnknownFormatError):
        GGUFFile(write(raw))
    file = GGUFFile(write(raw), id_map={9999: "iq4_ks"})
    assert file.tensors["w"].format is get_format("iq4_ks")
    assert file.tensors["w"].nbytes == 140
    clash = GGUFFile(write(one_tensor((256, 1), kind=144)), id_map={144: "q4_0"})  # another program's use of the id
    assert clash.tensors["w"].format is get_format("q4_0")
    with pytest.raises(UnknownFormatError, match="did you mean"):
        GGUFFile(write(raw), id_map={9999: "iq4_kz"})


def test_random_bytes_decode_in_bounds(write) -> None:
    """Whatever the bytes of a tensor, decoding stays inside its tables."""
    for name in list_formats():
        fmt = get_format(name)
        raw = build((), (tensor("w", (256, 4), fmt.ggml_type),), bytes([255]) * (4 * fmt.row_bytes(256)))
        blocks = GGUFFile(write(raw)).data("w")
        assert fmt.decode(blocks, (4, 256)).shape == (4, 256)


# -- split files -------------------------------------------------------------------------------------------


def split(folder: Path, parts: int = 3, **wrong: int) -> list[Path]:
    paths = []
    for i in range(parts):
        path = folder / f"model-{i + 1:05d}-of-{parts:05d}.gguf"
        metadata = {"split.no": Typed(i, 2), "split.count": Typed(parts, 2), "split.tensors.count": parts}
        metadata |= {key.replace("_", "."): value for key, value in wrong.items()} if i == 1 else {}
        metadata |= {"general.architecture": "llama"} if i == 0 else {}
        write_gguf(path, metadata, [TensorSource.of(f"w{i}", torch.full((4,), float(i)))])
        paths.append(path)
    return paths


def test_split_file(tmp_path: Path) -> None:
    paths = split(tmp_path)
    for path in paths:  # any part opens all
        file = GGUFFile(path)
        assert file.paths == paths
        assert file.metadata["general.architecture"] == "llama"
        assert {name: file.data(name).tolist() for name in file.tensors} == {f"w{i}": 4 * [float(i)] for i in range(3)}


def test_split_file_with_faults(tmp_path: Path) -> None:
    paths = split(tmp_path)
    paths[1].unlink()
    with pytest.raises(GGUFSplitError, match=r"part 2 of 3 is missing: model-00002-of-00003\.gguf"):
        GGUFFile(paths[0])
    (paths[1]).write_bytes(paths[2].read_bytes())
    with pytest.raises(GGUFSplitError, match="says it is part 3 of 3, expected 2 of 3"):
        GGUFFile(paths[0])
    split(tmp_path, split_count=2)
    with pytest.raises(GGUFSplitError, match="part 2 of 2, expected 2 of 3"):
        GGUFFile(paths[0])
    split(tmp_path)
    write_gguf(paths[2], {"split.no": Typed(2, 2), "split.count": Typed(3, 2)}, [TensorSource.of("w0", torch.ones(4))])
    with pytest.raises(GGUFTensorError, match="'w0' is there twice"):
        GGUFFile(paths[0])
    write_gguf(paths[2], {"split.no": Typed(2, 2), "split.count": Typed(3, 2)}, [])
    with pytest.raises(GGUFSplitError, match="hold 2 tensors, their header says 3"):
        GGUFFile(paths[0])
    paths[2].write_bytes(paths[2].read_bytes()[:20])
    with pytest.raises(GGUFTruncatedError, match="00003-of-00003"):
        GGUFFile(paths[0])


# -- writer ------------------------------------------------------------------------------------------------


def test_writer_refuses(tmp_path: Path) -> None:
    path = tmp_path / "a.gguf"
    path.write_bytes(b"old")
    good = TensorSource.of("w", torch.ones(2, 3))
    no_header = TensorSource("w", (4, 256), get_format("iq2_ks"), lambda: torch.zeros(4, 70, dtype=torch.uint8))
    for metadata, sources, kind, message in (
        ({"k": object()}, [good], GGUFMetadataError, "'k' is a object"),
        ({"k": [1, "a"]}, [good], GGUFMetadataError, "'k'"),
        ({"k": 2**40}, [good], GGUFMetadataError, "does not fit"),
        ({}, [good, good], GGUFTensorError, "name taken"),
        ({}, [TensorSource.of("w" * 2000, torch.ones(2))], GGUFTensorError, "too long"),
        ({}, [TensorSource.of("w", torch.ones(1, 1, 1, 1, 1))], GGUFTensorError, "too many dimensions"),
        ({}, [TensorSource.of("w", torch.ones(2, dtype=torch.complex64))], GGUFTensorError, "complex64"),
        ({}, [no_header], GGUFTensorError, "280 bytes"),
        ({}, [TensorSource("w", (4,), torch.float32, lambda: torch.zeros(4, dtype=torch.float16))], GGUFTensorError, "float16"),
    ):
        with pytest.raises(kind, match=message):
            write_gguf(path, metadata, sources)
        assert path.read_bytes() == b"old"  # an interrupted run leaves the old file, and nothing else
        assert list(tmp_path.iterdir()) == [path]
