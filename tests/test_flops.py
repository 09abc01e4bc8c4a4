"""`FlopCounterMode` counts products with packed weights as it counts those with plain ones."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch

import iqtorch
from iqtorch import Recipe
from iqtorch.tensor_ops import grouped_linear

pytest.importorskip("transformers")

from test_model import dequantized
from tiny_models import tiny_model
from torch.utils.flop_counter import FlopCounterMode, flop_registry

IDS = torch.arange(3, 11)[None]


@pytest.fixture(autouse=True, params=["torch", None], ids=["torch", "kernels"])
def backend(request: pytest.FixtureRequest) -> Iterator[None]:
    iqtorch.set_backend(request.param)
    yield
    iqtorch.set_backend(None)


def flops(model: torch.nn.Module, train: bool) -> int:
    with FlopCounterMode(display=False) as counter, torch.set_grad_enabled(train):
        loss = model(inputs_embeds=torch.ones(1, 8, 256, requires_grad=train)).logits.sum()
        if train:
            loss.backward()
    return counter.get_total_flops()


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_counts_are_those_of_the_dequantized_model(kind: str, train: bool) -> None:
    model = iqtorch.quantize_model(tiny_model(kind), Recipe.pure("q8_0"), skip=["wpe"], progress=False).requires_grad_(False)
    want = flops(dequantized(model), train)
    assert flops(model, train) == want > 1e6
    iqtorch.fuse(model)
    assert flops(model, train) == want


def test_counts_of_experts() -> None:
    weight = iqtorch.quantize(torch.randn(3, 40, 64), "q8_0")
    with FlopCounterMode(display=False) as counter:
        grouped_linear(torch.randn(7, 64), weight, torch.tensor([2, 2, 7]))
    assert counter.get_total_flops() == 2 * 7 * 64 * 40


def test_every_product_has_a_formula() -> None:
    """Also those of the GPU's kernels, whose shapes are asked on the meta device."""
    from iqtorch.kernels import library

    known = {str(target) for target in flop_registry}
    for name in set(library._OPERATORS) - {"dequantize", "embedding"}:
        assert f"iqtorch_triton.{name}" in known
    x, data, ids, weights = (torch.empty(*shape, device="meta") for shape in ((5, 64), (3, 999), (5, 2), (5, 2)))
    triton = torch.ops.iqtorch_triton
    with FlopCounterMode(display=False) as counter:
        h = triton.routed_gated(x, data, ids, 8, 80, "silu", 0)
        triton.routed_weighted(h, data, ids, weights, 8, 64, 0)
    assert h.shape == (5, 2, 40) and counter.get_total_flops() == 2 * 5 * 2 * (64 * 80 + 40 * 64)


@pytest.mark.parametrize("order", ["import iqtorch, torch.utils.flop_counter as f", "import torch.utils.flop_counter as f, iqtorch"])
def test_whichever_is_imported_first(order: str) -> None:
    program = f"{order}; assert any('iqtorch' in str(target) for target in f.flop_registry)"
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)
