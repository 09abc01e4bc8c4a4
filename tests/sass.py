"""Compiles the Triton kernels for GPUs that are not there, and counts instructions of the result."""

from __future__ import annotations

import collections
import os
import re
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from iqtorch.formats import get_format
from iqtorch.kernels import matrix, repack, routed, scores, vector
from iqtorch.kernels.choices import MMA, Device, compiler_options, gemm_tile, gemv_registers, rdna
from iqtorch.kernels.layout import layout

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
INSTRUCTION = re.compile(r"^\s*/\*([0-9a-f]{4,6})\*/\s+(.*?);")


def compile_kernel(kernel: Any, constants: dict[str, Any], pointers: dict[str, str], arch: int | str, warps: int, **options: Any) -> Any:
    """A kernel for `arch` (80, 90, 100 or a name such as `gfx942`); integers that a launch specialises on are multiples of 16.

    `warps` unless the options say `num_warps`.
    """
    constants = {name: value for name, value in constants.items() if name in kernel.arg_names}
    signature, attributes = {}, {}
    for i, (name, parameter) in enumerate(zip(kernel.arg_names, kernel.params, strict=True)):
        signature[name] = "constexpr" if name in constants else pointers.get(name, "i32")
        if name not in constants and not parameter.do_not_specialize:
            attributes[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    target = GPUTarget("hip", arch, 64 if arch.startswith("gfx9") else 32) if isinstance(arch, str) else GPUTarget("cuda", arch, 32)
    return triton.compile(source, target=target, options={"num_warps": warps, "num_stages": 3, "enable_fp_fusion": True, **options})


def device(arch: int | str, asm: bool) -> Device:
    """What `device_facts` says of such a card."""
    if isinstance(arch, str):
        return Device(132, asm) if arch.startswith("gfx9") else rdna(132)
    return Device(132, asm, mma=MMA.get(arch // 10, 2) if asm else 3, ahead=asm and arch >= 90)


def gemv(
    name: str,
    arch: int | str = 90,
    digits: int = 1,
    asm: bool = True,
    rows: int = 8,
    passes: int = 2,
    dtype: str = "*bf16",
    tokens: int = 1,
) -> tuple[Any, float]:
    """The vector kernel for long rows, and the weights per thread and step of its loop."""
    s = layout(get_format(name)).scheme
    constants = {
        "S": s, "MODE": "one", "DIGITS": digits, "TOKENS": tokens, "ROWS": rows, "PASSES": passes, "RUNS": 128, "EP": 1, "ASM": asm,
        "bias": None, "ids": None, "per_token": 1,
    }  # fmt: skip
    pointers = {"x": dtype, "data": "*u8", "book": "*i32", "lut": "*fp32", "y": dtype}
    constants["AHEAD"] = device(arch, asm).ahead
    options = compiler_options(device(arch, asm), 4, gemv_registers(device(arch, asm), s, 4, digits, tokens))
    return compile_kernel(vector.gemv, constants, pointers, arch, 4, **options), rows * passes * s.run


def gemm(name: str, arch: int | str = 90, tokens: int = 16, asm: bool = True, grouped: bool = False) -> tuple[Any, float]:
    """The matrix kernel, and the weights per thread and step of its loop."""
    s = layout(get_format(name)).scheme
    facts = device(arch, asm)
    tile = gemm_tile(8192, tokens, 32, 132, facts.tile_tokens)
    constants = {"S": s, "GROUPED": grouped, "BN": tile.rows, "BM": tile.tokens, "EP": 8 if grouped else 1, "ASM": asm, "bias": None}
    constants |= {"FRAGMENT": facts.fragments, "AHEAD": facts.ahead}
    if not grouped:
        constants["offsets"] = None
    pointers = {"xs": "*fp16", "steps": "*fp32", "data": "*u8", "book": "*i32", "lut": "*fp32", "y": "*bf16", "offsets": "*i32"}
    options = compiler_options(facts, tile.warps) | {"num_stages": tile.stages}
    kernel = compile_kernel(matrix.gemm, constants, pointers, arch, tile.warps, **options)
    return kernel, tile.rows * 4 * s.run / (32 * tile.warps)


def experts(name: str, arch: int | str = 90, asm: bool = True) -> list[Any]:
    """The two fused kernels of experts, for int8 activations."""
    s = layout(get_format(name)).scheme
    constants = {"S": s, "DIGITS": 1, "ROWS": 4, "RUNS": 32, "ASM": asm, "ACTIVATION": "silu"}
    constants["AHEAD"] = device(arch, asm).ahead
    pointers = {"x": "*bf16", "data": "*u8", "book": "*i32", "lut": "*fp32", "y": "*bf16", "ids": "*i64", "weights": "*bf16"}
    options = compiler_options(device(arch, asm), 1, gemv_registers(device(arch, asm), s, 1, 1))
    return [compile_kernel(k, constants, pointers, arch, 1, **options) for k in (routed.gated, routed.weighted)]


def dequantize(name: str, arch: int | str = 90, asm: bool = True) -> Any:
    constants = {"S": layout(get_format(name)).scheme, "ROWS": 4, "RUNS": 32, "ASM": asm, "ids": None}
    pointers = {"data": "*u8", "book": "*i32", "lut": "*fp32", "out": "*bf16"}
    return compile_kernel(matrix.dequantize, constants, pointers, arch, 4, enable_fp_fusion=False)


def moves(name: str, way: str, arch: int | str = 90, **constants: int) -> Iterator[tuple[repack.Region, Any]]:
    """The kernels that pack (or `unpack`) long rows of a format: of each region, and the units that a thread makes: `MOVED`.

    `constants`: values of arguments of the launch.
    """
    fmt = get_format(name)
    for region in (repack.packing if way == "pack" else repack.unpacking)(name):
        tile = repack.tile(8192, region.move.size * 8192 // fmt.block_size)
        assert tile[0] * tile[1] == MOVED * 32 * tile[2]
        pointers = {"source": "*i32", "target": {1: "*u8", 2: "*i16", 4: "*i32"}[region.move.store], "table": "*i32", "places": "*i64"}
        yield (
            region,
            compile_kernel(repack.move_bits, {"M": region.move, "ROWS": tile[0], "BLOCK": tile[1]} | constants, pointers, arch, tile[2]),
        )


#: Scores per thread of a turn of `lowest`.
SCORES = scores.QUERIES * scores.ENTRIES // 256


def lowest(arch: int | str = 90) -> Any:
    precision = "ieee" if isinstance(arch, str) else "tf32x3"
    constants = {"WIDTH": 16, "DEPTH": scores.DEPTH, "Q": scores.QUERIES, "E": scores.ENTRIES, "SUM": precision}
    return compile_kernel(scores.lowest, constants, {"query": "*fp32", "book": "*fp32", "out": "*i32"}, arch, 8)


#: Units per thread of `moves`.
MOVED = 16


def _cuobjdump(kernel: Any, *options: str) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin", delete=False) as file:
        file.write(kernel.asm["cubin"])
    try:
        return subprocess.run([TOOLS / "cuobjdump", *options, file.name], capture_output=True, text=True, check=True).stdout
    finally:
        os.unlink(file.name)


def resources(kernel: Any) -> dict[str, int]:
    """Registers, spilled bytes (stack) and so on, as the assembler reports them."""
    line = _cuobjdump(kernel, "-res-usage")
    return {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", line)}


def listing_of(kernel: Any) -> list[tuple[int, str]]:
    """Address and text of every instruction."""
    found = [(int(m[1], 16), m[2].strip()) for m in map(INSTRUCTION.match, _cuobjdump(kernel, "-sass").splitlines()) if m]
    return [(address, text) for address, text in found if not text.startswith("NOP")]


def loop(kernel: Any) -> collections.Counter[str]:
    """Instructions of the main loop, by name up to the first dot: the shortest one with tensor cores, else the longest innermost one."""
    listing = listing_of(kernel)
    backward = []
    for address, text in listing:
        target = re.search(r"0x([0-9a-f]+)", text) if "BRA" in text else None
        if target and int(target[1], 16) < address - 64:
            backward.append((int(target[1], 16), address))
    # waits for barriers, placed behind the end of the kernel, jump back into the loop
    ends = [address for address, text in listing if "EXIT" in text]
    backward = [pair for pair in backward if not any(pair[0] <= address <= pair[1] for address in ends)]
    products = [address for address, text in listing if re.match(r"(@!?\w+ )?\w*MMA\b", text)]
    if products:
        around = [pair for pair in backward if any(pair[0] <= address <= pair[1] for address in products)]
        low, high = min(around, key=lambda pair: pair[1] - pair[0])
    else:
        inner = [a for a in backward if not any(a != b and b[0] >= a[0] and b[1] <= a[1] for b in backward)]
        low, high = max(inner, key=lambda pair: pair[1] - pair[0])
    names = [re.sub(r"^@!?U?P[T0-9]+\s+", "", text).split()[0] for address, text in listing if low <= address <= high]
    return collections.Counter(name.split(".")[0] for name in names)


def feedback(name: str, arch: int | str = 90) -> Any:
    """The kernel that rounds columns with error feedback."""
    from iqtorch.encode.feedback import feedback_effort
    from iqtorch.encode.nearest import SMALLEST_SCALE, TableNearest, nearest
    from iqtorch.kernels import feedback as rounding

    fmt = get_format(name).for_encoding
    effort, search = feedback_effort(fmt), nearest(fmt, torch.device("cpu"))
    kinds = fmt.codebook.variants if fmt.variant_size == fmt.group_size else 1
    entries = search.lookup.cells if isinstance(search, TableNearest) else fmt.codebook.entries * fmt.codebook.variants // kinds
    constants = {
        "N": fmt.group_size, "V": fmt.vec, "ENTRIES": entries, "KINDS": kinds, "STEPS": 2 * effort.reach + 1,
        "LOWS": 2 * effort.min_reach + 1 if fmt.affine else 1, "OWN": fmt.scale_values is None, "LOW_OWN": False, "AFFINE": fmt.affine,
        "PARITY": bool(fmt.code_parity), "SMALLEST": SMALLEST_SCALE, "P": rounding.ROWS,
    }  # fmt: skip
    floats = ("rest", "weight", "lower", "form", "square", "unit", "value", "low_unit", "low_value", "book", "other_book")
    integers = ("near", "rank", "low_near", "low_rank", "index", "other", "odd_code", "word", "closes", "kind_out", "code_out")
    pointers = {**dict.fromkeys((*floats, "value_out", "error_out"), "*fp32"), **dict.fromkeys(integers, "*i32")}
    return compile_kernel(rounding.round_block, constants, pointers | {"first": "fp32", "last": "fp32"}, arch, 1)
