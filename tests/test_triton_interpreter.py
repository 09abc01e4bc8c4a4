"""Values of the Triton kernels, without a GPU: `triton_cases.py` in a process of its own.

Triton decides when it is imported whether kernels are interpreted, and other tests of this session may import it too.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")


HERE = Path(__file__).parent


def interpreted(*command: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([str(HERE.parent), str(HERE), environment.get("PYTHONPATH", "")])
    return subprocess.run([sys.executable, *command], env=environment, cwd=HERE.parent, capture_output=True, text=True)


@pytest.mark.slow
def test_rehearsal_of_the_benchmark(tmp_path: Path) -> None:
    """benchmarks/gpu.py from its checks to its table of aims, in tiny sizes on the CPU."""
    done = interpreted("benchmarks/gpu.py", "--rehearse", "--out", str(tmp_path))
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    for part in ("correctness", "linear", "trees", "experts", "pack", "model", "tiles", "aims"):
        lines = (tmp_path / f"{part}.csv").read_text().splitlines()
        assert "REHEARSAL" in lines[2] and len([line for line in lines if line[0] != "#"]) > 1, part
    assert not (tmp_path / "failures.txt").exists()


def test_kernels_in_the_interpreter() -> None:
    done = interpreted("-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-m", "", str(HERE / "triton_cases.py"))
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert " passed" in done.stdout and "failed" not in done.stdout and "skipped" not in done.stdout
