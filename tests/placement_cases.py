"""Models, comparisons and devices that the tests of placement share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import tiny_model
from torch import Tensor, nn

import iqtorch
from iqtorch import Recipe

IDS = torch.arange(3, 11)[None]
#: A GPU, or the device that was registered in its place (see `simulated_device`).
GPU = "cuda" if torch.cuda.is_available() or not hasattr(torch, "musa") else "musa"
gpu = getattr(torch, GPU)
needs_gpu = pytest.mark.skipif(not gpu.is_available(), reason="needs a GPU")
needs_two_gpus = pytest.mark.skipif(gpu.device_count() < 2, reason="needs two GPUs")


@pytest.fixture(autouse=True)
def no_dequantizing() -> Iterator[None]:
    """No operation may run on a dequantized copy. Beside a GPU nothing is rounded: other roundings can choose another token or expert."""
    iqtorch.set_fallback("error")
    iqtorch.set_activation_precision("float" if gpu.is_available() else "int8")
    yield
    iqtorch.set_activation_precision("int8")
    iqtorch.set_fallback("warn")


def packed(kind: str = "llama", **changes: Any) -> nn.Module:
    return iqtorch.quantize_model(tiny_model(kind, **changes), Recipe.pure("q8_0"), progress=False)


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(IDS if model.device.type == "meta" else IDS.to(model.device)).logits.cpu()


def tokens(model: nn.Module, device: Any = "cpu") -> Tensor:
    return model.generate(IDS.to(device), max_new_tokens=3, do_sample=False, pad_token_id=0).cpu()


def same_files(first: Path, second: Path) -> bool:
    a, b = (load_file(folder / "model.safetensors") for folder in (first, second))
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def near(got: Tensor, want: Tensor) -> bool:
    """Equal but for how the kernels of another device round activations."""
    return bool((got - want).norm() <= 0.02 * want.norm())
