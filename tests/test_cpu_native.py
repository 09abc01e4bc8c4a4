"""The CPU kernels without torch: NEON under an emulator, and every x86 path with the address and the undefined-behaviour sanitizer."""

from __future__ import annotations

import platform
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from test_cpu_kernels import PLAIN, activations, random_blocks, random_bytes, rounded_to_int8, weights

import iqtorch
from iqtorch.cpu_ext.layout import layout
from iqtorch.formats import Format

ROOT = Path(__file__).parent.parent
SOURCES = ROOT / "iqtorch" / "cpu_ext" / "csrc"
MAIN = Path(__file__).parent / "cpu" / "kernels_main.cpp"
COMMON = ("-std=gnu++17", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-w", f"-I{SOURCES}")
AVX2 = ("-mavx2", "-mfma", "-mf16c")
AVX512 = (*AVX2, "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx512vnni", "-mavx512vbmi")
AMX = (*AVX512, "-mavx512bf16", "-mamx-tile", "-mamx-bf16")

pytestmark = pytest.mark.slow


def damaged(fmt: Format, rows: int, k: int, seed: int) -> torch.Tensor:
    """Bytes as a broken or hostile file may have them: all ones, all zeros, or random ones."""
    if seed in (0, 255):
        return torch.full((rows, fmt.row_bytes(k)), seed, dtype=torch.uint8)
    return random_bytes(fmt, rows, k, seed)


def write_cases(path: Path, seed: int = 7, rows: int = 21, m: int = 5) -> None:
    """Formats, matrices and float64 results, in the order that kernels_main.cpp reads."""
    with path.open("wb") as file:
        file.write(np.int32(len(PLAIN)).tobytes())
        for fmt in PLAIN:
            made, k = layout(fmt), 2 * max(fmt.block_size, 256)
            blocks, x, g = random_blocks(fmt, rows, k), activations(m, k), activations(m, rows, seed=1)
            exact = weights(fmt, blocks).double()
            sizes = np.array([made.table.size, made.units.size, len(made.terms), rows, k, m, fmt.row_bytes(k)], np.int32)
            numbers = (sizes, made.ints, made.floats, made.table, made.units, made.terms)
            for part in (*numbers, blocks.numpy(), damaged(fmt, rows, k, seed).numpy()):
                file.write(part.tobytes())
            results = (x, g, exact, x.double() @ exact.T, rounded_to_int8(x) @ exact.T, g.double() @ exact)
            for part in results:
                file.write(part.to(torch.float32).numpy().tobytes())


def build(folder: Path, compiler: str, flags: tuple[str, ...], isas: dict[str, tuple[str, ...]]) -> Path:
    """Compiles the kernels of some instruction sets with the test program."""
    defines = tuple(f"-DIQTORCH_HAVE_{name.upper()}" for name in isas if name != "scalar")
    objects = []
    for source, own in (
        (MAIN, ()),
        (SOURCES / "dispatch.cpp", ()),
        (SOURCES / "pack.cpp", ()),
        *((SOURCES / f"isa_{name}.cpp", own) for name, own in isas.items()),
    ):
        target = folder / f"{source.stem}.o"
        subprocess.run([compiler, *COMMON, *flags, *defines, *own, "-c", str(source), "-o", str(target)], check=True)
        objects.append(str(target))
    subprocess.run([compiler, *flags, *objects, "-o", str(folder / "kernels")], check=True)
    return folder / "kernels"


def run(command: list[str], cases: Path, seed: int = 7, rows: int = 21, m: int = 5) -> str:
    write_cases(cases, seed, rows, m)
    done = subprocess.run([*command, str(cases)], capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{len(PLAIN)} formats" in done.stdout and "0 failures" in done.stdout
    return done.stdout


@pytest.mark.skipif(
    not shutil.which("aarch64-linux-gnu-g++") or not shutil.which("qemu-aarch64"), reason="needs a cross compiler and qemu-user"
)
def test_neon_under_an_emulator(tmp_path: Path) -> None:
    isas = {"scalar": (), "neon": ("-march=armv8.2-a+dotprod",), "i8mm": ("-march=armv8.2-a+dotprod+i8mm",)}
    program = build(tmp_path, "aarch64-linux-gnu-g++", ("-O2", "-static"), isas)
    for m in (5, 6):
        everything = run(["qemu-aarch64", "-cpu", "max", str(program)], tmp_path / "cases", m=m)
        assert "neon: checked" in everything and "i8mm: checked" in everything
    # older cores: a path is refused, not run into an illegal instruction
    with_dot = run(["qemu-aarch64", "-cpu", "neoverse-n1", str(program)], tmp_path / "cases")
    assert "neon: checked" in with_dot and "i8mm: this CPU lacks the 8-bit matrix products" in with_dot
    without = run(["qemu-aarch64", "-cpu", "cortex-a72", str(program)], tmp_path / "cases")
    assert "neon: this CPU lacks the dot-product instructions" in without and "i8mm: this CPU lacks the dot-product" in without


@pytest.mark.skipif(platform.machine() != "x86_64", reason="needs an x86-64 CPU")
def test_amx_in_software(tmp_path: Path) -> None:
    if iqtorch.cpu.capabilities()["avx512bf16"] != "available":
        pytest.skip("needs AVX-512 with bfloat16")
    emulation = ("-O2", "-include", str(MAIN.with_name("amx_emulated.h")))
    program = build(tmp_path, "g++", emulation, {"scalar": (), "amx": AMX})
    for seed, rows, m in ((7, 21, 5), (8, 33, 34)):
        assert "amx: checked" in run([str(program)], tmp_path / "cases", seed, rows, m)


# One sanitizer at a time, by the compiler that is quicker at it, and traps instead of messages: else a file takes minutes to compile.
SANITIZERS = {
    "address": ("clang++", "-g1", "-fsanitize=address"),
    "undefined": ("g++", "-fsanitize=undefined", "-fsanitize-undefined-trap-on-error"),
}


@pytest.mark.skipif(platform.machine() != "x86_64", reason="needs an x86-64 CPU")
@pytest.mark.parametrize("sanitizer", SANITIZERS)
def test_sanitizers_on_random_bytes(sanitizer: str, tmp_path: Path) -> None:
    compiler, *flags = SANITIZERS[sanitizer]
    if not shutil.which(compiler):
        pytest.skip(f"needs {compiler}")
    isas = {
        "scalar": (),
        "avx2": AVX2,
        "avxvnni": (*AVX2, "-mavxvnni"),
        "avx512": AVX512,
        "avx512bf16": (*AVX512, "-mavx512bf16"),
        "amx": AMX,
    }
    program = str(build(tmp_path, compiler, ("-O1", *flags), isas))
    here = {name for name, state in iqtorch.cpu.capabilities().items() if name in isas and state == "available"}
    for seed, rows, m in ((0, 40, 2), (255, 16, 2), (7, 21, 5), (8, 101, 66)):  # the last takes all paths of many rows
        told = run([program], tmp_path / "cases", seed, rows, m)
        assert {line.split(":")[0] for line in told.splitlines() if line.endswith(": checked")} == here
