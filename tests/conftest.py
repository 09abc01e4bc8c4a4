"""Shared fixtures: golden files, and poisoned memory for everything iqtorch allocates."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import iqtorch

# Without it cuBLAS refuses to work under deterministic algorithms, which the poison below needs; read when CUDA starts.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
GOLDEN = Path(__file__).parent / "golden"


def golden(name: str) -> dict[str, Tensor]:
    """Reference bytes and weights of a format (see tests/golden)."""
    return load_file(GOLDEN / f"{name}.safetensors")


@pytest.fixture(autouse=True)
def poisoned_memory() -> object:
    """`torch.empty` fills with NaN / the largest integer, so that an element nobody wrote shows."""
    torch.use_deterministic_algorithms(True, warn_only=torch.cuda.is_available())  # of models, too, which may use others there
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def float_precision() -> object:
    """No rounding of activations."""
    iqtorch.set_activation_precision("float")
    yield
    iqtorch.set_activation_precision("int8")
