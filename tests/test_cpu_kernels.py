"""The compiled CPU kernels: every format on every instruction set of this machine, against float64 products of decoded weights."""

from __future__ import annotations

import dataclasses
import itertools
import mmap
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from iqtorch import cpu_ext
from iqtorch.cpu_ext import memory
from iqtorch.errors import BlockSizeError, KernelUnavailableError
from iqtorch.formats import Format, get_format, list_formats
from iqtorch.formats.base import bits, float_to_bits

PLAIN = [get_format(name) for name in list_formats() if get_format(name).interleave == 1]
#: One of each kind of decoder, for checks that do not depend on the bits of a format.
KINDS = [get_format(n) for n in ("iq2_kl", "iq2_k", "iq4_kss", "q4_k", "q8_0", "mxfp4", "iq1_m", "iq2_xxs", "iq3_s", "iq3_kt", "iq4_kt")]
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
UNAVAILABLE: str | None = cpu_ext.supports(get_format("iq2_kl"), 16, 256)

pytestmark = pytest.mark.skipif(UNAVAILABLE is not None, reason=str(UNAVAILABLE))

all_formats = pytest.mark.parametrize("fmt", PLAIN, ids=lambda f: f.name)
kinds = pytest.mark.parametrize("fmt", KINDS, ids=lambda f: f.name)


#: What this build contains; those that this CPU lacks are skipped with the reason.
BUILT = [
    isa
    for isa, reason in (cpu_ext.capabilities() if UNAVAILABLE is None else {}).items()
    if isa != "isa" and not reason.startswith("this build")
]


@pytest.fixture(params=BUILT)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    reason = cpu_ext.capabilities()[request.param]
    if reason != "available":
        pytest.skip(f"{request.param}: {reason}")
    cpu_ext.select_isa(request.param)
    yield request.param
    cpu_ext.select_isa(None)


def random_bytes(fmt: Format, rows: int, k: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 256, (rows, fmt.row_bytes(k)), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def random_blocks(fmt: Format, rows: int, k: int, seed: int = 0) -> Tensor:
    """Random bytes whose float scales are ordinary numbers, so that products are finite."""
    parts = fmt.unpack(random_bytes(fmt, rows, k, seed))
    generator = torch.Generator().manual_seed(seed + 1)
    for name in {"d", "dmin"} & parts.keys():
        value = torch.rand(parts[name].shape, generator=generator) * 0.01 + 0.001
        if fmt.d_kind != "e8m0":
            value = value * torch.where(torch.rand(value.shape, generator=generator) < 0.3, -1.0, 1.0)
        parts[name] = float_to_bits(value, fmt.d_kind)
    return fmt.pack(parts)


def weights(fmt: Format, blocks: Tensor) -> Tensor:
    return fmt.decode(blocks) * fmt.runtime_scale


def activations(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def rounded_to_int8(x: Tensor) -> Tensor:
    """What a product sees of float32 activations: multiples of a step per 32 values."""
    cells = x.float().unflatten(-1, (-1, 32))
    step = cells.abs().amax(-1, keepdim=True) / 127
    inverse = torch.where(step > 0, 127 / cells.abs().amax(-1, keepdim=True), 0)
    return ((cells * inverse).round().double() * step.double()).flatten(-2)


def error(actual: Tensor, expected: Tensor) -> float:
    """Relative root mean square error."""
    return float((actual.double() - expected).norm() / expected.norm())


# -- layout --------------------------------------------------------------------------------------------------


def tiles_bit_by_bit(fmt: Format, blocks: Tensor) -> Tensor:
    """16 canonical rows without their headers -> the tile of each block, written from `Layout.parts` alone."""
    made = cpu_ext.layout(fmt)
    body = blocks[:, fmt.row_header_bytes :].view(16, -1, fmt.block_bytes).transpose(0, 1)
    tiles = torch.zeros(body.shape[0], made.tile_bytes, dtype=torch.int32)
    for field, places in made.parts:
        elements = field.read(body).to(torch.int64)  # [blocks, 16, count]
        for place in places:
            stride = np.broadcast_to(np.asarray(place.stride), place.byte.shape)
            for i in range(place.width):
                bit = elements >> (place.low + i) & 1
                for row in range(16):
                    where = torch.from_numpy(place.byte + stride * row + (place.shift + i) // 8)
                    tiles.index_add_(1, where, (bit[:, row] << torch.from_numpy((place.shift + i) % 8)).int())
    return tiles.to(torch.uint8)


@all_formats
def test_layout_moves_every_bit_once(fmt: Format) -> None:
    made = cpu_ext.layout(fmt)
    source, target = set(), set()
    for plane, byte, shift, mask in made.terms.tolist():
        for bit in (bit for bit in range(8) if mask >> bit & 1):
            assert 0 <= bit - shift < 8
            source.add((byte, bit - shift))
            target.add((plane, bit))
    assert source == target == {(byte, bit) for byte in range(fmt.block_bytes) for bit in range(8)}
    assert int(made.units.sum()) == fmt.block_bytes
    assert sum(mask.bit_count() for mask in made.terms[:, 3].tolist()) == 8 * fmt.block_bytes


@all_formats
def test_packing_puts_bits_where_the_layout_says(fmt: Format) -> None:
    k = 5 * fmt.block_size  # more blocks than are packed side by side
    blocks = random_bytes(fmt, 32, k)
    packed = cpu_ext.pack(blocks, fmt)
    headers = blocks[:, : fmt.row_header_bytes].reshape(-1)
    assert torch.equal(packed[: headers.numel()], headers)
    tiles = packed[cpu_ext.layout(fmt).header_bytes(32) :].view(2, 5, -1)
    for group in range(2):
        assert torch.equal(tiles[group], tiles_bit_by_bit(fmt, blocks[16 * group : 16 * group + 16]))


@all_formats
@pytest.mark.parametrize(("rows", "blocks"), [(1, 1), (16, 3), (37, 2), (64, 9)])
def test_packing_is_exact_both_ways(fmt: Format, rows: int, blocks: int) -> None:
    k = blocks * fmt.block_size
    canonical = random_bytes(fmt, rows, k)
    packed = cpu_ext.pack(canonical, fmt)
    assert torch.equal(cpu_ext.unpack(packed, fmt, rows, k), canonical)
    # every byte that is written is read: nothing else is in the packed tensor but the padding of the headers
    assert packed.nbytes - canonical.nbytes == -(rows // 16 * 16 * fmt.row_header_bytes) % 64


@all_formats
@pytest.mark.parametrize("k", [1, 16])
def test_packed_size(fmt: Format, k: int) -> None:
    for rows in range(1, 70):
        canonical = rows * fmt.row_bytes(k * fmt.block_size)
        assert canonical <= cpu_ext.layout(fmt).packed_bytes(rows, k * fmt.block_size) <= 1.03 * canonical


def test_packing_keeps_experts_apart_and_reads_any_memory() -> None:
    fmt = get_format("iq2_kl")
    blocks = torch.stack([random_bytes(fmt, 20, 512, seed) for seed in range(3)])
    strided = torch.empty(3, 20, fmt.row_bytes(512) + 5, dtype=torch.uint8)[..., 3:-2].copy_(blocks)
    packed = cpu_ext.pack(strided, fmt)
    assert packed.shape == (3, cpu_ext.layout(fmt).packed_bytes(20, 512))
    assert torch.equal(cpu_ext.unpack(packed, fmt, 20, 512), blocks)


def test_layouts_that_lose_bits_are_refused() -> None:
    made = cpu_ext.layout(get_format("q8_0"))
    numbers = [torch.from_numpy(part) for part in (made.ints, made.floats, made.table, made.units)]
    twice = made.terms.copy()
    twice[1] = twice[0]
    with pytest.raises(RuntimeError, match="moves a bit twice"):
        torch.ops.iqtorch_cpu.register_format(*numbers, torch.from_numpy(twice))
    with pytest.raises(RuntimeError, match="leaves out bits"):
        torch.ops.iqtorch_cpu.register_format(*numbers, torch.from_numpy(made.terms[1:].copy()))


# -- memory ----------------------------------------------------------------------------------------------------


def advised_huge(address: int) -> bool:
    """Whether huge pages were asked for the mapping that an address is in (Linux)."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):
            low, high = (int(end, 16) for end in line.split()[0].split("-"))
            inside = low <= address < high
        elif inside and line.startswith("VmFlags:"):
            return "hg" in line.split()
    raise AssertionError(f"{address:x} is in no mapping")


@pytest.mark.skipif(not Path("/proc/self/smaps").exists() or not hasattr(mmap, "MADV_HUGEPAGE"), reason="huge pages are asked for on Linux")
def test_weights_lie_in_huge_pages() -> None:
    fmt = get_format("q8_0")
    packed = [cpu_ext.pack(random_bytes(fmt, rows, 1024), fmt) for rows in (512, 1024, 4096)]
    for weight in (*packed, cpu_ext.copy(packed[0])):
        assert weight.data_ptr() % 64 == 0 and advised_huge(weight.data_ptr())
        assert weight.untyped_storage().nbytes() == weight.nbytes
    assert torch.equal(cpu_ext.copy(packed[0]), packed[0])


def test_mappings_start_at_a_huge_page_and_are_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_current", None)
    first, second = memory.empty(3 << 20), memory.empty(70_001)
    assert first.data_ptr() % memory.HUGE_PAGE == 0
    assert second.data_ptr() == first.data_ptr() + (3 << 20)
    assert memory.empty(memory.CHUNK).data_ptr() % memory.HUGE_PAGE == 0  # does not fit: a new mapping
    assert memory.empty(100).nbytes == 100


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE


@pytest.mark.skipif(not Path("/proc/self/statm").exists() or not hasattr(mmap, "MADV_DONTNEED"), reason="pages are given back on Linux")
def test_memory_comes_back_with_each_weight() -> None:
    keep = memory.empty(1 << 16)
    before = resident()
    weights = [memory.empty(24 << 20).fill_(1) for _ in range(3)]
    keep.fill_(7)
    assert resident() - before > 60 << 20
    first = weights[0].clone()
    del weights[1]
    assert resident() - before < 80 << 20  # two and the copy
    assert torch.equal(weights[0], first) and (weights[1] == 1).all()
    del weights, first
    assert resident() - before < 12 << 20
    assert (keep == 7).all()


# -- decoding --------------------------------------------------------------------------------------------------


@all_formats
def test_dequantize_is_the_oracle_bit_for_bit(fmt: Format, isa: str) -> None:
    for rows, seed in ((37, 0), (16, 1)):
        blocks = random_bytes(fmt, rows, 512, seed)
        packed = cpu_ext.pack(blocks, fmt)
        expected = weights(fmt, blocks)
        actual = cpu_ext.dequantize(packed, fmt, rows, 512, torch.float32)
        same = (actual.view(torch.int32) == expected.view(torch.int32)) | (actual.isnan() & expected.isnan())
        # a negated zero has no sign in an integer product
        assert bool((same | ((actual == 0) & (expected == 0))).all())


@kinds
@pytest.mark.parametrize("dtype", FLOATS[1:])
def test_dequantize_rounds_once(fmt: Format, dtype: torch.dtype, isa: str) -> None:
    blocks = random_blocks(fmt, 19, 512)
    actual = cpu_ext.dequantize(cpu_ext.pack(blocks, fmt), fmt, 19, 512, dtype)
    assert torch.equal(actual, weights(fmt, blocks).to(dtype))


@all_formats
def test_embedding(fmt: Format, isa: str) -> None:
    blocks = random_blocks(fmt, 37, 512)
    packed = cpu_ext.pack(blocks, fmt)
    ids = torch.tensor([[0, 36, 16], [15, 36, 1]])
    for index in (ids, ids.int(), ids.mT):
        for dtype in FLOATS:
            actual = cpu_ext.embedding(index, packed, fmt, 37, 512, dtype)
            assert torch.equal(actual, weights(fmt, blocks)[index.long()].to(dtype))


def test_embedding_of_no_ids_and_of_wrong_ids() -> None:
    fmt = get_format("iq4_ks")
    packed = cpu_ext.pack(random_blocks(fmt, 20, 256), fmt)
    assert cpu_ext.embedding(torch.empty(0, 3, dtype=torch.long), packed, fmt, 20, 256, torch.float32).shape == (0, 3, 256)
    for wrong in (-1, 20):
        with pytest.raises(IndexError, match=rf"id {wrong} .* 20 rows"):
            cpu_ext.embedding(torch.tensor([3, wrong]), packed, fmt, 20, 256, torch.float32)


# -- products --------------------------------------------------------------------------------------------------


@all_formats
def test_linear_in_float(fmt: Format, isa: str) -> None:
    blocks = random_blocks(fmt, 49, 768)
    packed, exact = cpu_ext.pack(blocks, fmt), weights(fmt, blocks).double()
    for m in (1, 2, 3, 7, 8, 13, 16, 45):
        x = activations(m, 768, seed=m)
        # the matrix unit and bfloat16 dot products round weights and activations to bfloat16
        bound = 3e-3 if isa in ("amx", "avx512bf16") and m >= 16 else 2e-6
        assert error(cpu_ext.linear(x, packed, fmt, 49, None, 0), x.double() @ exact.T) < bound


@all_formats
def test_linear_in_int8(fmt: Format, isa: str) -> None:
    rows = 7 * 16 + 1  # kernels take four, two and one groups of 16 at a time
    blocks = random_blocks(fmt, rows, 768)
    packed, exact = cpu_ext.pack(blocks, fmt), weights(fmt, blocks).double()
    for m in (1, 2, 3, 7, 8, 13, 45, 66):
        x = activations(m, 768, seed=m)
        actual = cpu_ext.linear(x, packed, fmt, rows, None, 1)
        if isa == "amx" and m >= 16:
            assert error(actual, x.double() @ exact.T) < 3e-3
        else:
            assert error(actual, rounded_to_int8(x) @ exact.T) < 1e-5


@pytest.mark.parametrize("name", ["iq2_kl", "q6_k", "iq4_nl"])
def test_linear_of_more_than_one_chunk(name: str, isa: str) -> None:
    """Beyond the rows of activations, the rows of weights and the columns that the kernels keep in a cache at a time."""
    fmt = get_format(name)
    blocks = random_blocks(fmt, 530, 1280)
    packed, exact = cpu_ext.pack(blocks, fmt), weights(fmt, blocks).double()
    x = activations(549, 1280)
    for precision, bound in ((0, 3e-3), (1, 1e-2)):
        assert error(cpu_ext.linear(x, packed, fmt, 530, None, precision), x.double() @ exact.T) < bound


@kinds
def test_error_of_int8_activations(fmt: Format) -> None:
    """At most 1 % on Gaussian activations and the largest, and on heavy-tailed ones with outliers up to 6e4; 0.3 % in float."""
    blocks = random_blocks(fmt, 256, 1024)
    packed, exact = cpu_ext.pack(blocks, fmt), weights(fmt, blocks).double()
    gaussian = activations(8, 1024)
    heavy = gaussian / activations(8, 1024, seed=5).abs().clamp(min=0.05)
    heavy[:, 17] = 6e4
    most = exact[:5].sign().float() * 8e31  # sums are largest; docs/cpu.md has the limit
    for x in (gaussian, heavy, gaussian * 1e-20, gaussian * 1e20, most, most[:1]):
        expected = x.double() @ exact.T
        assert error(cpu_ext.linear(x, packed, fmt, 256, None, 1), expected) < 1e-2
        assert error(cpu_ext.linear(x, packed, fmt, 256, None, 0), expected) < 3e-3


def test_extreme_operands_do_not_saturate(isa: str) -> None:
    """All weights and activations at their extremes: pairs of products are largest."""
    for fmt, least in itertools.product(PLAIN, (True, False)):
        parts = fmt.unpack(random_blocks(fmt, 16, 256))
        sums = fmt.codebook.values[0].astype(int).sum(-1)
        parts["code"].fill_(int(sums.argmin() if least else sums.argmax()))
        blocks = fmt.pack(parts)
        if not torch.equal(fmt.unpack(blocks)["code"], parts["code"]):
            continue  # iq4_kss: codes of four neighbours depend on each other
        x = torch.full((3, 256), 5.0)
        x[1] = -5.0
        packed, exact = cpu_ext.pack(blocks, fmt), weights(fmt, blocks).double()
        for rows in (x, x[:1], x[1:2]):
            wrong = (cpu_ext.linear(rows, packed, fmt, 16, None, 1).double() - rows.double() @ exact.T).abs()
            assert bool((wrong <= 1e-5 * (rows.double().abs() @ exact.abs().T)).all()), (fmt.name, least, len(rows))


@kinds
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("rows", [7, 33])
def test_linear_dtypes_shapes_strides_and_bias(fmt: Format, rows: int, dtype: torch.dtype, isa: str) -> None:
    k = 256
    blocks = random_blocks(fmt, rows, k)
    packed, exact = cpu_ext.pack(blocks, fmt), weights(fmt, blocks).double()
    bias = activations(rows, seed=3, dtype=dtype)
    tolerance = {torch.float32: 3e-3, torch.bfloat16: 6e-3, torch.float16: 3e-3}[dtype]
    for shape in ((k,), (1, k), (3, k), (2, 3, k), (2, 1, 5, k), (20, k)):
        wide = activations(*shape[:-1], 2 * k, seed=1, dtype=dtype)
        for x in (wide[..., :k], wide[..., ::2], wide[..., k:].contiguous()):
            actual = cpu_ext.linear(x, packed, fmt, rows, bias, 0)
            assert actual.dtype == dtype and actual.shape == (*shape[:-1], rows)
            assert error(actual, x.double() @ exact.T + bias.double()) < tolerance
    transposed = activations(k, 6, dtype=dtype).mT
    assert error(cpu_ext.linear(transposed, packed, fmt, rows, None, 0), transposed.double() @ exact.T) < tolerance


def test_linear_of_an_empty_batch() -> None:
    fmt = get_format("iq2_kl")
    packed = cpu_ext.pack(random_blocks(fmt, 20, 256), fmt)
    for shape in ((0, 256), (2, 0, 256)):
        for precision in (0, 1):
            assert cpu_ext.linear(torch.empty(shape), packed, fmt, 20, None, precision).shape == (*shape[:-1], 20)


def test_not_a_number_and_infinity_stay_in_their_row(isa: str) -> None:
    fmt = get_format("iq4_ks")
    packed = cpu_ext.pack(random_blocks(fmt, 20, 256), fmt)
    for m in (1, 3, 20):
        for precision in (0, 1):
            for value in (float("nan"), float("inf")):
                x = activations(m, 256)
                x[m // 2, 100] = value
                finite = cpu_ext.linear(x, packed, fmt, 20, None, precision).isfinite()
                assert not finite[m // 2].any()
                assert finite.sum() == 20 * (m - 1)


def test_float16_extremes(isa: str) -> None:
    """The largest and the smallest halves: what fits a half is right, what does not is an infinity of the right sign."""
    fmt = get_format("iq4_ks")
    blocks = random_blocks(fmt, 33, 256)
    packed, exact = cpu_ext.pack(blocks, fmt), weights(fmt, blocks).double()
    largest, smallest = 65504.0, 2.0**-24
    for m in (1, 5, 20):
        sign = torch.where(torch.arange(m * 256).view(m, 256) % 3 == 0, -1.0, 1.0)
        spike = torch.zeros(m, 256)
        spike[:, 7] = largest
        for x in (largest * sign, spike / 16, smallest * sign, smallest * 1000 * sign):
            x = x.half()
            expected = x.double() @ exact.T
            for precision in (0, 1):
                actual = cpu_ext.linear(x, packed, fmt, 33, None, precision).double()
                large = expected.abs() > 70000
                assert torch.equal(actual[large], expected[large].sign() * torch.inf)
                fits = expected.abs() < 60000
                assert bool(((actual - expected)[fits].abs() <= 1e-2 * expected.norm() / expected.numel() ** 0.5 + smallest).all())
            back = cpu_ext.linear_transposed(x[:, :33], packed, fmt, 256).double()
            wanted = x[:, :33].double() @ exact
            assert torch.equal(back.isinf() | (wanted.abs() > 65000), wanted.abs() > 65000)
            assert bool(((back - wanted)[back.isfinite()].abs() <= 1e-3 * wanted.abs()[back.isfinite()] + smallest).all())


@pytest.mark.parametrize("name", ["q4_0", "iq2_kl"])
def test_zero_and_tiny_activations(name: str, isa: str) -> None:
    fmt = get_format(name)
    packed = cpu_ext.pack(random_blocks(fmt, 20, 256), fmt)
    for m in (1, 5):
        assert not cpu_ext.linear(torch.zeros(m, 256), packed, fmt, 20, None, 1).any()
        assert cpu_ext.linear(torch.full((m, 256), 1e-42), packed, fmt, 20, None, 1).isfinite().all()


@all_formats
def test_transposed_product(fmt: Format, isa: str) -> None:
    blocks = random_blocks(fmt, 37, 512)
    packed, exact = cpu_ext.pack(blocks, fmt), weights(fmt, blocks).double()
    for shape in ((37,), (5, 37), (2, 3, 37), (35, 37)):
        g = activations(*shape)
        assert error(cpu_ext.linear_transposed(g, packed, fmt, 512), g.double() @ exact) < 2e-6
    wide = activations(70, 37, dtype=torch.bfloat16)  # many rows: bfloat16 weights where there are bfloat16 products
    assert error(cpu_ext.linear_transposed(wide, packed, fmt, 512), wide.double() @ exact) < 4e-3
    assert error(cpu_ext.linear_transposed(wide.float(), packed, fmt, 512), wide.double() @ exact) < 2e-6
    few = activations(3, 5)
    assert error(cpu_ext.linear_transposed(few, cpu_ext.pack(blocks[:5], fmt), fmt, 512), few.double() @ exact[:5]) < 2e-6
    half = activations(3, 74, dtype=torch.bfloat16)[:, ::2]
    assert error(cpu_ext.linear_transposed(half, packed, fmt, 512), half.double() @ exact) < 4e-3
    assert cpu_ext.linear_transposed(torch.empty(0, 37), packed, fmt, 512).shape == (0, 512)


@pytest.mark.parametrize(("name", "rows", "k"), [("iq2_kl", 530, 5120), ("q4_0", 8, 288), ("iq4_kss", 16, 512)])
def test_transposed_product_by_slices(name: str, rows: int, k: int) -> None:
    """More columns than are made dense at a time, and fewer rows than are interleaved."""
    fmt = get_format(name)
    blocks = random_blocks(fmt, rows, k)
    packed, exact = cpu_ext.pack(blocks, fmt), weights(fmt, blocks).double()
    for dtype, bound in ((torch.bfloat16, 4e-3), (torch.float16, 5e-4), (torch.float32, 2e-6)):
        g = activations(33, rows, dtype=dtype)
        assert error(cpu_ext.linear_transposed(g, packed, fmt, k), g.double() @ exact) < bound


@kinds
def test_grouped_linear(fmt: Format, isa: str) -> None:
    blocks = torch.stack([random_blocks(fmt, 33, 256, seed) for seed in range(4)])
    packed, exact = cpu_ext.pack(blocks, fmt), weights(fmt, blocks).double()
    x = activations(29, 256)
    offsets = torch.tensor([3, 3, 25, 26], dtype=torch.int32)  # the second expert gets nothing, three rows are nobody's
    expected = torch.cat([x[a:b].double() @ w.T for a, b, w in zip([0, 3, 3, 25], offsets.tolist(), exact)])
    actual = cpu_ext.grouped_linear(x, packed, offsets, fmt, 33, 0)
    assert error(actual[:26], expected) < 3e-3
    assert not actual[26:].any()
    assert cpu_ext.grouped_linear(x[:0], packed, torch.zeros(4, dtype=torch.int32), fmt, 33, 1).shape == (0, 33)


@kinds
def test_threads_do_not_change_a_bit(fmt: Format) -> None:
    blocks = random_blocks(fmt, 200, 1024)
    packed, before = cpu_ext.pack(blocks, fmt), torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(
                [cpu_ext.linear(activations(m, 1024), packed, fmt, 200, None, p) for m in (1, 4, 70) for p in (0, 1)]
                + [cpu_ext.linear_transposed(activations(9, 200), packed, fmt, 1024)]
                + [cpu_ext.pack(blocks, fmt), cpu_ext.dequantize(packed, fmt, 200, 1024, torch.float32)]
            )
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other))


# -- operators and refusals --------------------------------------------------------------------------------------


def test_operators_pass_opcheck() -> None:
    fmt = get_format("iq2_kl")
    packed = cpu_ext.pack(torch.stack([random_blocks(fmt, 33, 256, seed) for seed in range(2)]), fmt)
    one, kind, ops = packed[0].contiguous(), fmt.ggml_type, torch.ops.iqtorch_cpu
    for x in (activations(3, 256), activations(2, 5, 256, dtype=torch.bfloat16), activations(1, 512)[:, ::2]):
        torch.library.opcheck(ops.linear.default, (x, one, kind, 33, activations(33), 1))
        torch.library.opcheck(ops.linear.default, (x, one, kind, 33, None, 0))
    torch.library.opcheck(ops.linear_transposed.default, (activations(2, 33), one, kind, 256))
    torch.library.opcheck(ops.dequantize.default, (packed, kind, 33, 256, 2))
    torch.library.opcheck(ops.embedding.default, (torch.tensor([[1, 2]]), one, kind, 33, 256, 1))
    torch.library.opcheck(ops.grouped_linear.default, (activations(5, 256), packed, torch.tensor([2, 5], dtype=torch.int32), kind, 33, 1))


def test_operators_refuse_what_does_not_fit() -> None:
    fmt = get_format("iq2_kl")
    packed = cpu_ext.pack(random_blocks(fmt, 33, 256), fmt)
    with pytest.raises(ValueError, match="33 x 512 weights has .* bytes"):
        cpu_ext.linear(activations(2, 512), packed, fmt, 33, None, 1)
    with pytest.raises(ValueError, match="multiple of 256"):
        cpu_ext.linear(activations(2, 100), packed, fmt, 33, None, 1)
    with pytest.raises(ValueError, match="float32, bfloat16 or float16"):
        cpu_ext.linear(activations(2, 256).double(), packed, fmt, 33, None, 1)
    with pytest.raises(ValueError, match="one number per row"):
        cpu_ext.linear(activations(2, 256), packed, fmt, 33, activations(32), 1)
    with pytest.raises(ValueError, match="offsets must not decrease"):
        cpu_ext.grouped_linear(activations(5, 256), packed[None], torch.tensor([6], dtype=torch.int32), fmt, 33, 1)
    with pytest.raises(BlockSizeError, match="at least one row"):
        cpu_ext.pack(torch.empty(0, fmt.row_bytes(256), dtype=torch.uint8), fmt)
    interleaved = get_format("iq2_k_r4")
    assert "iq2_k" in str(cpu_ext.supports(interleaved, 16, 256))
    with pytest.raises(KernelUnavailableError, match="iq2_k_r4"):
        cpu_ext.pack(torch.zeros(4, interleaved.row_bytes(256), dtype=torch.uint8), interleaved)


@pytest.mark.parametrize(
    ("name", "scales", "shown"),
    [
        ("q6_k", range(-200, 56), "256 scales of -200 .. 55"),
        ("q4_k", range(0, 128, 3)[:43], "43 scales of 0 .. 126"),
        ("q2_k", range(120, 136), "16 scales of 120 .. 135"),
    ],
)
def test_scales_that_do_not_fit_the_kernels_are_named(name: str, scales: range, shown: str) -> None:
    fmt = dataclasses.replace(get_format(name), scale_values=tuple(scales))
    with pytest.raises(KernelUnavailableError, match=f"{name} has {shown}"):
        cpu_ext.layout(fmt)


@pytest.mark.parametrize(
    ("name", "signs", "parity", "shown"),
    [
        ("iq3_xxs", None, False, "8 bits for 4 weights and no signs"),
        ("iq2_s", None, False, "10 bits for 8 weights and no signs"),
        ("iq2_xxs", 256, False, "8 bits for 8 weights and a sign bit per weight"),
        ("iq1_s", 32, True, "11 bits for 8 weights and seven signs of eight"),
        ("q4_0", 32, False, "4 bits for 1 weights and a sign bit per weight"),
    ],
)
def test_signs_that_no_decoder_reads_are_named(name: str, signs: int | None, parity: bool, shown: str) -> None:
    """Decoders are chosen by their codes: with other signs than theirs they would give wrong weights."""
    fmt = get_format(name)
    fields = {key: field for key, field in fmt.fields.items() if key != "sign"}
    if signs:
        fields["sign"] = bits(signs, (lambda i: 8 * fmt.block_bytes + (7 if parity else 1) * i, 7 if parity else 1))
    with pytest.raises(KernelUnavailableError, match=f"{name} has codes of {shown} beside them"):
        cpu_ext.layout(dataclasses.replace(fmt, fields=fields, sign_parity=parity))


def test_every_plain_format_has_kernels() -> None:
    assert [fmt.name for fmt in PLAIN if cpu_ext.supports(fmt, 5, 2 * fmt.block_size) is not None] == []
