"""What only a card can show: results there, and the same from a captured graph. Skipped without one; benchmarks/gpu.py checks far more."""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest
import torch
from conftest import golden
from torch import Tensor

from iqtorch import kernels
from iqtorch.encode import encode, feedback
from iqtorch.encode.feedback import encode_with_feedback
from iqtorch.encode.metric import Metric
from iqtorch.formats import get_format, list_formats

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA or ROCm device"),
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter runs no graphs"),
]


@pytest.mark.parametrize("name", ["iq2_kl", "iq4_k", "q6_k", "iq3_s", "iq3_kt"])
def test_products_and_their_graphs(name: str) -> None:
    """Every operator: near the float64 product, the same bits again, and the same bits from a graph that sees new activations."""
    fmt, blocks = get_format(name), golden(name)["blocks"]
    w = (fmt.decode(blocks) * fmt.runtime_scale).double().cuda()
    rows, k = w.shape
    packed = kernels.pack(blocks.cuda(), fmt)
    assert torch.equal(packed.cpu(), kernels.pack(blocks, fmt)) and torch.equal(kernels.unpack(packed, fmt, rows, k).cpu(), blocks)
    experts = torch.stack([packed, packed])
    ids = torch.tensor([[0, 1]], device="cuda").expand(64, 2).contiguous()
    mix = torch.ones(64, 2, device="cuda")
    ends = torch.tensor([20, 64], dtype=torch.int32, device="cuda")
    cases: list[tuple[int, Callable[[Tensor], Tensor]]] = [
        *((m, lambda x: kernels.linear(x, packed, fmt, rows, None, 0)) for m in (1, 2, 3, 16, 64, 1030)),
        (64, lambda x: kernels.grouped_linear(x, experts, ends, fmt, rows, 0)),
        (4, lambda x: kernels.routed_linear(x, experts, ids[: len(x)], fmt, rows, 0)[:, 1]),
        (4, lambda x: kernels.routed_weighted(x[:, None].expand(-1, 2, -1), experts, ids[:4], mix[:4], fmt, rows, 0) / 2),
    ]
    for tokens, call in cases:
        x = torch.randn(tokens, k, device="cuda", dtype=torch.bfloat16)
        y = call(x)
        assert ((y.double() - x.double() @ w.T).abs() <= 0.01 * (x.double().abs() @ w.abs().T) + 1e-30).all()
        assert torch.equal(y, call(x))
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            from_graph = call(x)
        x.copy_(torch.randn_like(x))
        graph.replay()
        assert torch.equal(from_graph, call(x))


@pytest.mark.parametrize("name", [name for name in list_formats() if get_format(name).plain is None])
def test_encoder(name: str) -> None:
    """As good as on the CPU, and the same bytes again."""
    fmt = get_format(name)
    seeded = torch.Generator().manual_seed(3)
    weight, importance = torch.randn(32, 512, generator=seeded), torch.randn(512, generator=seeded).mul(1.5).exp()

    def error(blocks: Tensor) -> float:
        q = fmt.decode(blocks.cpu()).double() * fmt.runtime_scale
        return float((importance * (weight - q).square()).sum().sqrt())

    there, columns = weight.cuda(), importance.cuda()
    found = encode(there, fmt, columns, "rmse")
    assert torch.equal(found, encode(there, fmt, columns, "rmse"))
    assert error(found) == pytest.approx(error(encode(weight, fmt, importance, "rmse")), rel=5e-3)


@pytest.mark.parametrize("name", ["iq4_k", "q4_k", "iq3_s", "iq2_kt"])
def test_memory_of_the_encoder(name: str) -> None:
    """A chunk of 4 million weights and its scores, however large the matrix."""
    weight = torch.randn(8192, 4096, device="cuda")
    encode(weight[:1024], get_format(name), None, speed="fast")
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    blocks = encode(weight, get_format(name), None, speed="fast")
    assert torch.cuda.max_memory_allocated() - before <= 1.2e9 + blocks.nbytes


@pytest.mark.parametrize("name", ["iq4_ks", "iq2_ks", "q2_k", "q4_0", "iq4_kss", "iq2_kl", "mxfp4", "q6_k"])
def test_the_kernel_rounds_as_torch_does(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nearly the same bytes: sums of fused products decide close calls."""
    fmt, seeded = get_format(name), torch.Generator().manual_seed(3)
    weight = torch.randn(70, 768, generator=seeded).cuda()
    x = (torch.randn(2000, 768, generator=seeded) @ (torch.eye(768) + 0.03 * torch.randn(768, 768, generator=seeded))).cuda()
    metric = Metric(x.T @ x / len(x), fmt, 0.05)
    monkeypatch.setattr(feedback, "BY_KERNEL", True)
    ran = []
    by_kernel = feedback.Rounding._round_block_by_kernel
    monkeypatch.setattr(feedback.Rounding, "_round_block_by_kernel", lambda *a: (ran.append(a), by_kernel(*a))[1])
    found = encode_with_feedback(weight, fmt, metric)
    assert len(ran) == 3
    monkeypatch.setattr(feedback, "_has_kernel", lambda *a: False)
    plain = encode_with_feedback(weight, fmt, metric)

    def cost(blocks: Tensor) -> Tensor:
        e = (weight - fmt.decode(blocks) * fmt.runtime_scale).double()
        return ((e @ (x.T @ x).double()) * e).sum(1)

    assert (found == plain).float().mean() > 0.9
    torch.testing.assert_close(cost(found).mean(), cost(plain).mean(), rtol=0.005, atol=0)
    torch.testing.assert_close(cost(found), cost(plain), rtol=0.1, atol=0)
