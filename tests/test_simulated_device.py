"""What needs GPUs, on two devices that `simulated_device` makes of host memory: in a process of its own, for they stay registered."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parent


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="maps memory as Linux does")
def test_everything_that_moves_between_devices() -> None:
    pytest.importorskip("accelerate")
    paths = os.pathsep.join([str(TESTS), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-m", "pytest", "-q", "-p", "simulated_device", "-p", "no:cacheprovider"]
    files = [str(TESTS / name) for name in ("test_hf_gpu.py", "test_hf_placement.py", "test_rounding_gpu.py")]
    env = {**os.environ, "PYTHONPATH": paths, "CUDA_VISIBLE_DEVICES": "", "HIP_VISIBLE_DEVICES": ""}
    # the limit is for a lock that a killed compilation left in the temporary folder: PyTorch waits for it without one
    done = subprocess.run([*command, *files], env=env, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert "skipped" not in done.stdout
