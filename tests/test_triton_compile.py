"""The Triton kernels compiled for GPUs that need not be there: they build, do not spill, and stay within their instructions."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections import Counter
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import golden

from iqtorch.formats import get_format, list_formats

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter compiles nothing", allow_module_level=True)

import sass

from iqtorch.kernels import launch, matrix, routed, vector
from iqtorch.kernels.layout import layout

FORMATS = [n for n in list_formats() if get_format(n).interleave == 1]
ARCHES = [80, 90, 100, 120, "gfx942"]
#: KiB of shared memory that a program may have; 99 on sm_86, sm_89 and sm_120, and so at most on sm_80 too.
SHARED = {90: 227, 100: 227, "gfx942": 64, "gfx1100": 64}

#: Instructions per weight of the vector kernel's loop on sm_90 for one token and int8 activations, everything included.
LIMITS = {
    "iq2_kl": 2.6,
    "iq2_kt": 4.2,
    **dict.fromkeys(["iq4_k", "iq4_ks", "iq4_kss", "iq4_nl", "iq4_xs", "mxfp4", "q4_0", "q4_1", "q4_k"], 3.6),
}
LIMIT = 6.0
#: One format of every family.
FAMILIES = ["q4_k", "iq4_k", "iq6_k", "iq2_kl", "iq3_s", "iq3_kt"]
OLD = version("triton") < "3.7"


def assert_no_spill(kernel: object) -> None:
    """No register in memory, as ptxas or the metadata of the AMD compiler report it; and no more shared memory than there is."""
    assert kernel.metadata.shared <= 1024 * SHARED.get(kernel.metadata.target.arch, 99)
    if "cubin" in kernel.asm:
        assert sass.resources(kernel)["STACK"] == 0
    else:
        assert re.findall(r"\.[sv]gpr_spill_count:\s*(\d+)", kernel.asm["amdgcn"]) == ["0", "0"]


def check_sass(kernel: object, weights: float, limit: float) -> None:
    counts = sass.loop(kernel)
    assert sum(counts.values()) / weights <= limit, f"{sum(counts.values()) / weights:.2f} > {limit}: {counts.most_common(12)}"


@pytest.mark.parametrize("arch", ARCHES)
def test_every_kernel_compiles(arch: int | str) -> None:
    asm = not isinstance(arch, str)
    kernels = [
        sass.gemv("iq2_kl", arch, asm=asm, rows=8 if asm else 4)[0],
        sass.gemm("iq2_kl", arch, asm=asm)[0],
        sass.dequantize("iq2_kl", arch, asm),
        *sass.experts("iq2_kl", arch, asm),
    ]
    for kernel in kernels:
        assert "cubin" in kernel.asm if asm else "hsaco" in kernel.asm
        assert_no_spill(kernel)


def test_one_row_and_one_run_compile() -> None:
    """Of an integer 1, Triton makes a constant, which has other methods than a number."""
    s = layout(get_format("mxfp4")).scheme
    constants = {"S": s, "DIGITS": 1, "TOKENS": 1, "ROWS": 1, "PASSES": 1, "RUNS": 1, "EP": 1, "ASM": True, "rows": 1, "runs": 1}
    constants |= {"MODE": "one", "bias": None, "ids": None, "per_token": 1, "offsets": None, "GROUPED": False, "BN": 64, "BM": 16}
    constants |= {"FRAGMENT": True, "slots": 1, "ACTIVATION": "silu", "AHEAD": True}
    pointers = {"x": "*bf16", "data": "*u8", "book": "*i32", "lut": "*fp32", "y": "*bf16", "xs": "*fp16", "steps": "*fp32", "out": "*bf16"}
    routing = {"ids": "*i64", "weights": "*fp32"}
    for kernel in (vector.gemv, matrix.gemm, matrix.dequantize):
        assert_no_spill(sass.compile_kernel(kernel, constants, pointers, 90, 4, maxnreg=255))
    _, packing = next(iter(sass.moves("mxfp4", "pack", rows=1)))
    assert_no_spill(packing)
    constants.pop("ids")
    for kernel in (routed.gated, routed.weighted):
        assert_no_spill(sass.compile_kernel(kernel, constants, pointers | routing, 90, 1, maxnreg=255))


@pytest.mark.parametrize("arch", ARCHES)
def test_scores_of_codebooks_are_products_of_tensor_cores(arch: int | str) -> None:
    """Fewer than 12 instructions per entry and query on sm_90, none of which writes a score to memory."""
    kernel = sass.lowest(arch)
    assert_no_spill(kernel)
    if isinstance(arch, str):
        assert "mfma" in kernel.asm["amdgcn"]
    if arch == 90:
        counts = sass.loop(kernel)
        assert counts["HGMMA"] and not counts["STG"]
        assert sum(counts.values()) / sass.SCORES <= 12


@pytest.mark.parametrize("name", ["iq4_ks", "q2_k", "iq4_kss", "iq2_kl"])
def test_rounding_keeps_a_group_in_registers(name: str) -> None:
    """But for some words of 32 columns with parities. And no sum has become a product of tensor cores, which is less exact."""
    kernel = sass.feedback(name)
    assert sass.resources(kernel)["STACK"] <= (32 if name == "iq4_kss" else 0)
    assert "tt.dot" not in kernel.asm["ttir"]
    assert "hsaco" in sass.feedback(name, "gfx942").asm


@pytest.mark.parametrize("name", FAMILIES)
def test_plain_twins_compile_for_amd(name: str) -> None:
    s = layout(get_format(name)).scheme
    tile = launch.gemv_tile(8192, 8192 // s.run, 1, 304, s, most=8)
    assert_no_spill(sass.gemv(name, "gfx942", asm=False, rows=tile.rows, passes=tile.passes)[0])
    kernel, _ = sass.gemm(name, "gfx942", asm=False)
    assert_no_spill(kernel)
    assert "mfma" in kernel.asm["amdgcn"]
    assert_no_spill(sass.dequantize(name, "gfx942", asm=False))


@pytest.mark.parametrize("name", ["q4_k", "iq2_kl", "iq3_s"])
def test_plain_twins_fit_threads_with_fewer_registers(name: str) -> None:
    """RDNA: 32 threads per warp, 256 registers each. The matrix kernel spills some of them (docs/gpu.md)."""
    s = layout(get_format(name)).scheme
    tile = launch.gemv_tile(8192, 8192 // s.run, 1, 96, s, most=sass.device("gfx1100", False).tile_rows)
    kernel, _ = sass.gemv(name, "gfx1100", asm=False, rows=tile.rows, passes=tile.passes)
    assert kernel.metadata.num_warps == 8
    assert_no_spill(kernel)
    assert_no_spill(sass.dequantize(name, "gfx1100", asm=False))
    assert "wmma" in sass.gemm(name, "gfx1100", tokens=32, asm=False)[0].asm["amdgcn"]


#: What an H200's memory leaves time for: instructions per byte of canonical blocks, read and written (docs/gpu.md).
MEMORY = 15.6
#: Ways back that take more, in multiples of that: parities of up to fifteen bits, and codes of 15 bits from three arrays.
SLOWER = {("iq4_kss", "unpack"): 1.7, ("iq4_kt", "unpack"): 1.5}


def counted(name: str) -> dict[str, float]:
    """Instructions per weight of packing and unpacking by the table there."""
    document = (Path(__file__).parent.parent / "docs" / "gpu.md").read_text(encoding="utf-8")
    (row,) = re.findall(rf"^\| {name} \| [\d.]+ \| ([\d.]+) \| ([\d.]+) \|$", document, re.MULTILINE)
    return {way: float(count) for way, count in zip(("pack", "unpack"), row)}


def check_moving(name: str, way: str) -> None:
    """All kernels that pack or unpack a format: within what memory leaves time for, and a tenth of what was counted."""
    fmt, total = get_format(name), 0.0
    for region, kernel in sass.moves(name, way):
        assert_no_spill(kernel)
        total += len(sass.listing_of(kernel)) / sass.MOVED * region.move.size
    assert total / fmt.block_bytes <= MEMORY * SLOWER.get((name, way), 1.0), way
    if not OLD:
        assert total / fmt.block_size <= 1.1 * counted(name)[way] + 0.05, way  # (the table is rounded)


@pytest.mark.parametrize("name", ["iq2_kl", "iq2_ks", "iq4_ks", "q4_k", "q8_0"])
def test_packing_is_not_bound_by_instructions(name: str) -> None:
    check_moving(name, "pack")


@pytest.mark.parametrize(
    "what",
    [("gemv", "iq2_kl", 1, 1), ("gemv", "iq3_s", 1, 1), ("gemv", "iq2_kt", 2, 1), ("gemv", "iq5_k", 2, 2), ("gemm", "iq2_kl", 16)],
    ids=str,
)
def test_a_kernel_compiles_within_two_seconds(what: tuple[Any, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Processor time, of ptxas too, so that other work on the machine hardly counts; the best of three, from an empty cache."""
    kind, name, *rest = what

    def compile_() -> None:
        if kind == "gemv":
            s = layout(get_format(name)).scheme
            tile = launch.gemv_tile(8192, 8192 // s.run, 1, 132, s, *rest)
            sass.gemv(name, digits=rest[0], rows=tile.rows, passes=tile.passes, tokens=rest[1])
        else:
            sass.gemm(name, tokens=rest[0])

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "first"))
    sass.dequantize("q8_0")  # loads the compiler
    spent = []
    while len(spent) < 3 and not (spent and min(spent) < 2.0):
        monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / str(len(spent))))
        before = sum(os.times()[:4])
        compile_()
        spent.append(sum(os.times()[:4]) - before)
        assert list((tmp_path / str(len(spent) - 1)).rglob("*.cubin")), "nothing was compiled"
    assert min(spent) < 2.0, spent


@pytest.mark.parametrize("name", ["iq2_kl", "q4_k", "iq3_s", "iq4_kt"])
def test_nothing_is_read_before_the_kernels_before_have_ended(name: str) -> None:
    """sm_90: every load comes after the wait, and activations are no constants (which a processor may still have from before)."""
    for kernel in (sass.gemv(name)[0], sass.gemm(name)[0], *sass.experts(name)):
        opcodes = [text.split()[1] if text.startswith("@") else text.split()[0] for _, text in sass.listing_of(kernel)]
        wait = opcodes.index("ACQBULK")
        assert opcodes.count("ACQBULK") == 1 and not any(code.startswith(("LDG", "STG", "RED", "ATOM")) for code in opcodes[:wait])
        assert opcodes.index("PREEXIT") > wait, "the next kernel may not start before those before this one have ended"
    assert "ld.global.v4.b32" in sass.gemv(name)[0].asm["ptx"]


def test_experts_are_addressed_in_64_bits() -> None:
    """The grouped matrix kernel: the number of the expert times the bytes of a matrix (the interpreter tests the other kernels)."""
    text = sass.gemm("iq2_kl", 90, grouped=True)[0].asm["ttir"]
    (product,) = re.findall(r"(%\S+) = arith.muli %\S+, %\S+ : i64", text)[:1]
    assert re.search(rf"tt.addptr %data\S*, {re.escape(product)} : !tt.ptr<i8>, i64", text)


def test_weights_and_blocks_are_addressed_in_64_bits() -> None:
    """More than 2^31 elements come out of `dequantize`, more than 2^31 bytes go through `pack`: offsets of stores are int64."""
    region, move = next(sass.moves("iq2_kl", "pack"))
    for text in (sass.dequantize("iq2_kl").asm["ttir"], move.asm["ttir"]):
        (pointers,) = re.findall(r"tt\.store (%\S+),", text)
        assert re.search(rf"{re.escape(pointers)} = tt\.addptr .* tensor<\S*xi64>", text), region


def test_vector_kernel_of_iq2_kl() -> None:
    kernel, weights = sass.gemv("iq2_kl")
    check_sass(kernel, weights, LIMITS["iq2_kl"])
    assert sass.loop(kernel)["SHFL"] / weights == 0.5, "one look-up per pair"
    assert_registers_only(sass.loop(kernel))
    assert_no_spill(kernel)


def assert_registers_only(counts: Counter[str]) -> None:
    """Of the vector kernel's loop: nothing moves between threads through shared memory, nothing waits for another warp."""
    assert counts["BAR"] == counts["STS"] == counts["STSM"] == counts["LDS"] == 0, counts


def assert_weights_stay_in_registers(counts: Counter[str], arch: int) -> None:
    """Of the matrix kernel's loop: the architecture's tensor cores; nothing is stored in shared memory (but by copies from memory)."""
    assert counts[{90: "HGMMA", 100: "UTCHMMA"}.get(arch, "HMMA")] > 0 and counts["STS"] == counts["STSM"] == 0, counts
    # sm_100: from registers to tensor memory
    assert (counts["STTM"] > 0) == (arch == 100), counts


@pytest.mark.parametrize("arch", [80, 90, 100, 120])
def test_matrix_kernel_keeps_weights_in_registers(arch: int) -> None:
    for name in ("iq2_kl", "iq4_k"):
        kernel, weights = sass.gemm(name, arch)
        assert_weights_stay_in_registers(sass.loop(kernel), arch)
        assert_no_spill(kernel)
        # (Triton 3.6 reads the activations word by word on sm_80, and moves more on sm_100)
        check_sass(kernel, weights, 8.5 if OLD and arch != 90 else 6.0)


@pytest.mark.slow
@pytest.mark.parametrize("name", FORMATS)
def test_every_vector_kernel(name: str) -> None:
    """Every format on sm_90: instructions, no spill, nothing through shared memory, for one and two tokens of every precision."""
    s = layout(get_format(name)).scheme
    for digits in (1, 2, 3):
        for tokens in (1, 2):
            tile = launch.gemv_tile(8192, 8192 // s.run, 1, 132, s, digits, tokens)
            kernel, weights = sass.gemv(name, 90, digits, True, tile.rows, tile.passes, tokens=tokens)
            if digits == tokens == 1:
                check_sass(kernel, weights, LIMITS.get(name, LIMIT))
            assert_registers_only(sass.loop(kernel))
            assert_no_spill(kernel)


@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHES)
@pytest.mark.parametrize("name", FORMATS)
def test_every_format_compiles_everywhere(name: str, arch: int | str) -> None:
    """The vector kernel is the same code on all NVIDIA cards (sm_90: see above), so here the one with most registers stands for it."""
    asm = not isinstance(arch, str)
    s = layout(get_format(name)).scheme
    if arch != 90:
        tile = launch.gemv_tile(8192, 8192 // s.run, 1, 132, s, 2, 2, sass.device(arch, asm).tile_rows)
        kernel = sass.gemv(name, arch, 2, asm, tile.rows, tile.passes, tokens=2)[0]
        assert_no_spill(kernel)
        if asm:
            assert_registers_only(sass.loop(kernel))
    for tokens in (16, sass.device(arch, asm).tile_tokens):
        kernel, _ = sass.gemm(name, arch, tokens, asm=asm)
        assert_no_spill(kernel)
        if asm:
            assert_weights_stay_in_registers(sass.loop(kernel), arch)
    assert_no_spill(sass.gemm(name, arch, 16, asm=asm, grouped=True)[0])
    assert_no_spill(sass.dequantize(name, arch, asm))


@pytest.mark.slow
@pytest.mark.parametrize("name", FORMATS)
def test_packing_of_every_format_at_memory_speed(name: str) -> None:
    for way in ("pack", "unpack"):
        check_moving(name, way)


@pytest.mark.parametrize("name", FORMATS)
def test_layout_is_loss_free_and_small(name: str) -> None:
    fmt, files = get_format(name), golden(name)
    plan = layout(fmt)
    for key in ("blocks", "blocks_random"):
        blocks = files[key]
        experts = torch.stack([blocks, blocks.flip(0)])
        packed = plan.pack(experts)
        assert packed.shape == (2, plan.packed_bytes(blocks.shape[0], 512)) and packed.dtype == torch.uint8
        assert torch.equal(plan.unpack(packed, blocks.shape[0], 512), experts)
    assert plan.packed_bytes(4096, 4096) <= 1.03 * 4096 * fmt.row_bytes(4096)


def test_importing_iqtorch_imports_no_triton() -> None:
    code = (
        "import sys, iqtorch, iqtorch.kernels; assert 'triton' not in sys.modules; "
        "print(iqtorch.kernels.supports(iqtorch.get_format('iq2_kl'), 8, 256))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, "CUDA_VISIBLE_DEVICES": ""})
    assert done.returncode == 0, done.stderr
    assert "no CUDA or ROCm device" in done.stdout


def test_choice_of_tiles() -> None:
    s = layout(get_format("iq2_kl")).scheme
    big, small = launch.gemv_tile(8192, 128, 1, 132, s), launch.gemv_tile(256, 16, 1, 132, s)
    assert (big.rows * big.passes, big.warps) == (16, 4)
    assert small.rows * small.passes == 1 and small.runs == 16 and small.warps == 1
    one = launch.gemm_tile(8192, 16, 32, 132)
    assert one.tokens == 16 and one.split == 4
    assert launch.gemm_tile(8192, 1000, 32, 132).split == 1
    assert launch.gemm_tile(64, 5, 3, 132).split == 1
