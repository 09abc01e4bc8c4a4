"""Tests of the Triton kernels' values; `test_triton_interpreter.py` runs them in a process with TRITON_INTERPRET=1."""

from __future__ import annotations

import dataclasses
import mmap
from typing import Any

import pytest
import torch
from conftest import golden
from torch import Tensor

from iqtorch.encode.nearest import GridNearest
from iqtorch.errors import BlockSizeError, ShapeError, UnsupportedOperationError
from iqtorch.formats import Format, get_format, list_formats
from iqtorch.kernels.scores import best_entries
from iqtorch.tensor import IQTensor

launch = pytest.importorskip("iqtorch.kernels.launch")
kernels = pytest.importorskip("iqtorch.kernels")
OPS = torch.ops.iqtorch_triton

FORMATS = [n for n in list_formats() if get_format(n).interleave == 1]
EPS = {torch.float32: 2.0**-23, torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7}
#: One format of every family and scale layout, for tests that need not see all.
SOME = ["iq2_kl", "iq3_k", "iq4_kss", "q4_k", "iq2_xxs", "iq4_kt", "mxfp4"]


def matrix(name: str, rows: int = 0) -> tuple[Format, Tensor, Tensor, Tensor]:
    """Format, canonical bytes (encoded and random), packed bytes, float32 weights with the runtime scale."""
    fmt, files = get_format(name), golden(name)
    blocks = torch.cat([files["blocks"], files["blocks_random"]])
    if rows:
        blocks = blocks.repeat(-(-rows // blocks.shape[0]), 1)[:rows]
    return fmt, blocks, kernels.pack(blocks, fmt), fmt.decode(blocks) * fmt.runtime_scale


def magnitude(fmt: Format, blocks: Tensor) -> Tensor:
    """Bound of the terms a weight is made of: |scale * value| + |minimum|, float64."""
    parts = fmt.unpack(blocks)
    w = fmt.weights(parts).double().abs() * fmt.runtime_scale
    low = fmt.scales(parts)[1]
    if low is not None:
        low = low.double().abs()
        w = w + 2 * low.repeat_interleave(w.shape[1] // low.shape[1], 1)
    return w


def check(y: Tensor, x: Tensor, w: Tensor, size: Tensor, digits: int, run: int, bias: Tensor | None = None) -> None:
    """`y` against the float64 product, within the error of rounding x to `digits` int8 digits (0: float16 operands).

    Errors: half a step of x per element; float16 operands: three roundings of a weight; float32 accumulation; the result's.
    """
    exact = x.double() @ w.double().T
    if digits:
        top = {1: 127, 2: 32767, 3: 8388544}[digits]
        step = x.double().abs().unflatten(1, (-1, run)).amax(-1) / top
        error = 0.505 * step.repeat_interleave(run, 1) @ w.double().abs().T
    else:
        error = x.double().abs() @ size.T * 1.5 * 2.0**-10
    error += x.double().abs() @ size.T * 2.0**-20 + 1e-30
    if bias is not None:
        exact = exact + bias.double()
    error += EPS[y.dtype] * exact.abs()
    # random bytes hold weights whose products are beyond float16: those must be infinite, nothing else may be
    inside = exact.abs() + error < torch.finfo(y.dtype).max
    assert torch.isfinite(y[inside]).all() and inside.double().mean() > 0.5
    assert ((y.double() - exact).abs() <= error)[inside].all(), ((y.double() - exact).abs() / error)[inside].max()


def activations(tokens: int, k: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    return torch.randn(tokens, k, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("name", FORMATS)
def test_dequantize_is_exact(name: str) -> None:
    fmt, _blocks, packed, w = matrix(name)
    rows, k = w.shape
    both = torch.stack([packed, packed])
    assert torch.equal(kernels.dequantize(both, fmt, rows, k, torch.float32), torch.stack([w, w]))
    # (the interpreter truncates bfloat16, so the rounding of a result is seen in float16)
    assert torch.equal(kernels.dequantize(packed, fmt, rows, k, torch.float16), w.half())


@pytest.mark.parametrize("name", FORMATS)
def test_repacking_kernel_equals_plain_torch(name: str) -> None:
    """Both ways, several matrices, random bytes, and rows that are no multiple of 256 weights where the format allows them."""
    from iqtorch.kernels import repack

    fmt, blocks, _, _ = matrix(name)
    rows, plan = blocks.shape[0], launch.layout(fmt)
    for k in (512, 96 if fmt.block_size == 32 else 256):
        some = blocks[:, : fmt.row_bytes(k)]
        both = torch.stack([some, some.flip(0)])
        packed = plan.pack(both)
        assert torch.equal(repack.pack(both, name), packed)
        assert torch.equal(repack.unpack(packed, name, rows, k), both)


@pytest.mark.parametrize("name", FORMATS)
def test_linear(name: str) -> None:
    fmt, blocks, packed, w = matrix(name)
    rows, k = w.shape
    run, size = launch.layout(fmt).scheme.run, magnitude(fmt, blocks)
    for tokens, dtype, precision in (
        (1, torch.float32, 0),
        (2, torch.bfloat16, 0),
        (2, torch.float16, 1),
        (3, torch.float32, 1),
        (7, torch.bfloat16, 1),
        (7, torch.float32, 1),
        (17, torch.float16, 0),
    ):
        x = activations(tokens, k, dtype, tokens)
        y = OPS.linear(x, packed, fmt.ggml_type, rows, None, precision)
        assert y.dtype == dtype and y.shape == (tokens, rows)
        exact = dtype == torch.float32 and tokens > launch.GEMV_TOKENS
        digits = 3 if exact else 0 if tokens > launch.vector_tokens(dtype) else launch._digits(dtype, precision)
        check(y, x, w, size, digits, run)


@pytest.mark.parametrize("name", FORMATS)
def test_ptx_equals_its_twin(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernels as compiled for NVIDIA cards, on a model of the assembly, give the bits of the plain kernels."""
    import ptx_model

    fmt, _, packed, w = matrix(name)
    rows, k = w.shape

    def results() -> list[Tensor]:
        out = [kernels.dequantize(packed, fmt, rows, k, dtype) for dtype in (torch.float32, torch.float16)]
        for tokens, dtype, precision in ((1, torch.bfloat16, 1), (2, torch.float16, 0), (1, torch.float32, 0), (5, torch.float16, 0)):
            out.append(OPS.linear(activations(tokens, k, dtype), packed, fmt.ggml_type, rows, None, precision))
        return out

    plain = results()
    ptx_model.install(monkeypatch)
    monkeypatch.setattr(launch, "device_facts", lambda device: launch.Device(1, True))
    for a, b in zip(plain, results(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("rows", [1, 37, 70])
@pytest.mark.parametrize("tokens", [1, 4, 5, 33])
def test_odd_shapes(rows: int, tokens: int) -> None:
    for name in ("iq2_kl", "q5_1"):
        fmt, blocks, _, _ = matrix(name, rows)
        # 32-weight blocks: rows that fill no whole tile
        blocks = blocks[:, : fmt.row_bytes(96)] if fmt.block_size == 32 else blocks
        packed, w = kernels.pack(blocks, fmt), fmt.decode(blocks)
        bias = activations(1, rows, torch.float32)[0]
        x = activations(tokens, w.shape[1], torch.bfloat16)
        y = OPS.linear(x, packed, fmt.ggml_type, rows, bias, 0)
        digits = 2 if tokens <= launch.vector_tokens(x.dtype) else 0
        check(y, x, w, magnitude(fmt, blocks), digits, launch.layout(fmt).scheme.run, bias)


def test_strided_three_dimensional_and_empty_activations() -> None:
    fmt, _, packed, w = matrix("iq2_kl")
    x = activations(12, 2 * w.shape[1], torch.float32).reshape(2, 6, -1)[:, ::3, ::2]
    y = OPS.linear(x, packed, fmt.ggml_type, w.shape[0], None, 0)
    assert torch.allclose(y.double(), x.double() @ w.double().T, rtol=1e-5, atol=1e-5 * float(w.abs().max()))
    assert OPS.linear(x[:0], packed, fmt.ggml_type, w.shape[0], None, 0).shape == (0, 2, w.shape[0])
    wide = OPS.linear(x.double(), packed, fmt.ggml_type, w.shape[0], None, 0)
    assert wide.dtype == torch.float64 and torch.allclose(wide, x.double() @ w.double().T)


def test_split_sum_is_the_whole_sum(monkeypatch: pytest.MonkeyPatch) -> None:
    fmt, blocks, packed, w = matrix("iq4_k")
    x, bias = activations(6, w.shape[1], torch.float16), activations(1, w.shape[0], torch.float16)[0]
    tile = launch.gemm_tile
    monkeypatch.setattr(launch, "gemm_tile", lambda *a: dataclasses.replace(tile(*a), split=3))
    y = OPS.linear(x, packed, fmt.ggml_type, w.shape[0], bias, 0)
    check(y, x, w, magnitude(fmt, blocks), 0, 32, bias)
    assert torch.equal(y, OPS.linear(x, packed, fmt.ggml_type, w.shape[0], bias, 0))


def test_large_products_in_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    fmt, _, packed, w = matrix("iq3_s")
    rows, k = w.shape
    monkeypatch.setattr(launch, "LARGE_SLICE", 5 * k)
    x = activations(9, k, torch.float32)
    y = OPS.linear(x, packed, fmt.ggml_type, rows, x[0, :rows], 0)
    assert torch.allclose(y, x @ w.T + x[0, :rows], rtol=1e-4, atol=1e-4 * float(w.abs().max()))
    back = OPS.linear_transposed(y, packed, fmt.ggml_type, k)
    assert torch.allclose(back, y @ w, rtol=1e-4, atol=1e-5 * float((y @ w).abs().max()))


@pytest.mark.parametrize("name", SOME)
def test_embedding_and_transposed(name: str) -> None:
    fmt, _, packed, w = matrix(name)
    rows, k = w.shape
    ids = torch.tensor([[0, rows - 1, 3], [2, 2, 1]])
    assert torch.equal(kernels.embedding(ids, packed, fmt, rows, k, torch.float16), w[ids].half())
    assert kernels.embedding(ids[:0], packed, fmt, rows, k, torch.float32).shape == (0, 3, k)
    with pytest.raises(IndexError, match=f"0 .. {rows - 1}"):
        kernels.embedding(torch.tensor([rows]), packed, fmt, rows, k, torch.float32)
    g = activations(2, rows, torch.float32)
    back = kernels.linear_transposed(g, packed, fmt, k)
    exact = g.double() @ w.double()
    assert ((back.double() - exact).abs() <= 1e-5 * (g.double().abs() @ w.double().abs()) + 1e-30).all()


@pytest.mark.parametrize("name", ["iq2_kl", "q4_k", "iq2_kt"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_experts(name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    fmt, blocks, _, w = matrix(name)
    experts = torch.stack([blocks, blocks.flip(0), blocks.roll(1, 0)])
    packed = kernels.pack(experts, fmt)
    weights = torch.stack([w, w.flip(0), w.roll(1, 0)])
    rows, k = w.shape
    ends = torch.tensor([2, 2, 9], dtype=torch.int32)
    x = activations(11, k, dtype)
    sizes = [magnitude(fmt, b) for b in experts]
    monkeypatch.setattr(launch, "MOST_PROGRAMS", 3)  # grids of several layers
    for limit in (64, 0):  # vector kernel, then matrix kernel
        monkeypatch.setattr(launch, "GEMV_TOKENS", limit)
        y = kernels.grouped_linear(x, packed, ends, fmt, rows, 1)
        assert (y[9:] == 0).all()
        for e, part in ((0, slice(0, 2)), (2, slice(2, 9))):
            digits = 0 if limit == 0 and dtype != torch.float32 else 1
            check(y[part], x[part], weights[e], sizes[e], digits, launch.layout(fmt).scheme.run)
    ids = torch.tensor([[0, 2], [1, 1], [2, 3]])
    routed = kernels.routed_linear(x[:3], packed, ids, fmt, rows, 1)
    assert routed.shape == (3, 2, rows) and (routed[2, 1] == 0).all()
    for t, s in ((0, 0), (0, 1), (1, 0), (1, 1), (2, 0)):
        e = int(ids[t, s])
        check(routed[t, s][None], x[t][None], weights[e], sizes[e], 1, launch.layout(fmt).scheme.run)


@pytest.mark.parametrize("name", ["iq2_kl", "q4_k", "iq4_kt"])
def test_fused_experts(name: str) -> None:
    """Gate, up and activation in one kernel, down and routing weights in another, against float64."""
    fmt, blocks, _, w = matrix(name, 14)
    stack = torch.stack([blocks, blocks.flip(0), blocks.roll(1, 0)])
    packed, weights = kernels.pack(stack, fmt), torch.stack([w, w.flip(0), w.roll(1, 0)]).double()
    unit = 1.0 / weights.abs().mean()  # so that the activation function matters
    ids = torch.tensor([[0, 2], [1, 1], [2, 3], [-1, 0]])
    known = ids.clamp(0, 2)
    valid = ((ids >= 0) & (ids < 3)).double()[..., None]
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.float16, 2e-3)):
        x = (activations(4, w.shape[1], torch.float32) * float(unit) / w.shape[1] ** 0.5).to(dtype)
        y = torch.einsum("tk,tsnk->tsn", x.double(), weights[known])
        size = torch.einsum("tk,tsnk->tsn", x.double().abs(), weights[known].abs()).amax()
        gate, up = y.chunk(2, -1)
        for activation, function in (
            ("silu", torch.nn.functional.silu),
            ("gelu", torch.nn.functional.gelu),
            ("gelu_tanh", lambda v: torch.nn.functional.gelu(v, approximate="tanh")),
            ("relu", torch.nn.functional.relu),
        ):
            if name != "iq2_kl" and activation != "silu":
                continue  # the same code for every format
            got = kernels.routed_gated(x, packed, ids, fmt, 14, activation, 0)
            exact = function(gate) * up * valid
            assert got.dtype == dtype and got.shape == (4, 2, 7)
            assert ((got.double() - exact).abs() <= tolerance * (exact.abs() + size * (1 + up.abs()))).all(), activation
        h = activations(8, w.shape[1], dtype).reshape(4, 2, -1)
        mix = torch.rand(4, 2, generator=torch.Generator().manual_seed(1))
        got = kernels.routed_weighted(h, packed, ids, mix, fmt, 14, 0)
        each = torch.einsum("tsk,tsnk->tsn", h.double(), weights[known]) * valid * mix.double()[..., None]
        bound = torch.einsum("tsk,tsnk->tn", h.double().abs(), weights[known].abs())
        assert ((got.double() - each.sum(1)).abs() <= tolerance * bound).all()
    with pytest.raises(UnsupportedOperationError, match="no kernel for the activation"):
        kernels.routed_gated(x, packed, ids, fmt, 14, "tanh", 0)
    with pytest.raises(ShapeError, match="do not fit together"):
        kernels.routed_weighted(h[0], packed, ids, mix, fmt, 14, 0)


def test_experts_beyond_two_to_the_31_bytes() -> None:
    """The last of so many experts that its matrix starts beyond 2^31 bytes, in memory that is mapped only where it is touched."""
    fmt, blocks, packed, w = matrix("iq2_kl", 16)
    size = packed.numel()
    count = (1 << 31) // size + 10
    last = count - 1
    assert last * size > 1 << 31 and count * w.numel() > 1 << 31
    with mmap.mmap(-1, count * size) as memory:
        experts = torch.frombuffer(memory, dtype=torch.uint8).view(count, size)
        experts[last] = packed
        x = activations(2, w.shape[1], torch.float32)
        y = kernels.routed_linear(x, experts, torch.tensor([[last], [0]]), fmt, 16, 0)
        check(y[0], x[:1], w, magnitude(fmt, blocks), 3, 64)
        assert (y[1] == 0).all()
        h = kernels.routed_gated(x, experts, torch.tensor([[last], [0]]), fmt, 16, "relu", 0)
        gate, up = (x[:1].double() @ w.double().T).chunk(2, -1)
        assert torch.allclose(h[0].double(), gate.relu() * up, rtol=1e-3, atol=1e-3 * float((gate * up).abs().max()))
        y = kernels.routed_weighted(x[:, None], experts, torch.tensor([[last], [last]]), torch.ones(2, 1), fmt, 16, 0)
        check(y, x, w, magnitude(fmt, blocks), 3, 64)
        del experts


def test_experts_of_a_transformers_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    """The fused kernels serve few tokens, the grouped ones many; both give the layer's own results."""
    from transformers.models.qwen3_moe import Qwen3MoeConfig
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

    import iqtorch
    from iqtorch import experts as module

    torch.manual_seed(0)
    layer = Qwen3MoeExperts(Qwen3MoeConfig(hidden_size=64, moe_intermediate_size=32, num_experts=5, hidden_act="silu"))
    layer.config._experts_implementation = "eager"
    for name, shape in (("gate_up_proj", (5, 64, 64)), ("down_proj", (5, 64, 32))):
        packed = iqtorch.quantize(torch.randn(shape) / 8, "iq4_nl")
        fmt, blocks = get_format("iq4_nl"), packed.to_blocks()
        here = iqtorch.IQTensor(kernels.pack(blocks, fmt), fmt, "triton", shape, torch.float32)
        getattr(layer, name).data = packed.dequantize()
        monkeypatch.setitem(layer.__dict__, f"packed_{name}", here)
    calls: list[str] = []
    real = kernels.routed_gated
    monkeypatch.setattr(kernels, "routed_gated", lambda *a: calls.append("fused") or real(*a))
    x, index, weights = torch.randn(6, 64), torch.rand(6, 5).argsort(1)[:, :2], torch.rand(6, 2)
    want = layer(x, index, weights)
    for name in ("gate_up_proj", "down_proj"):
        del layer._parameters[name]
        setattr(layer, name, layer.__dict__[f"packed_{name}"])
    iqtorch.set_activation_precision("float")
    try:
        for limit, expected in ((64, ["fused"]), (0, [])):
            monkeypatch.setattr(module, "FUSED_PAIRS", limit)
            with torch.no_grad():
                got = module.experts_forward(layer, x, index, weights)
            assert calls == expected and (got - want).norm() <= 1e-4 * want.norm()
            calls.clear()
    finally:
        iqtorch.set_activation_precision("int8")


def test_non_finite_and_huge_activations() -> None:
    fmt, _, packed, w = matrix("iq4_k")
    rows, k = w.shape
    for tokens in (1, 6):
        x = activations(tokens, k, torch.float16)
        x[0, 5] = 6e4
        assert torch.isfinite(OPS.linear(x.float().bfloat16(), packed, fmt.ggml_type, rows, None, 1)).all()
        x[0, 7] = float("nan")
        y = OPS.linear(x, packed, fmt.ggml_type, rows, None, 0)
        assert y[0].isnan().all() and torch.isfinite(y[1:]).all()


def test_refusals() -> None:
    fmt, _, packed, w = matrix("iq2_kl")
    with pytest.raises(BlockSizeError, match="bytes on the GPU"):
        OPS.linear(torch.zeros(1, 2 * w.shape[1]), packed, fmt.ggml_type, w.shape[0], None, 0)
    with pytest.raises(UnsupportedOperationError, match="float32, bfloat16"):
        OPS.linear(torch.zeros(1, w.shape[1], dtype=torch.int32), packed, fmt.ggml_type, w.shape[0], None, 0)
    with pytest.raises(UnsupportedOperationError, match="meta"):
        launch.linear(torch.zeros(1, w.shape[1], device="meta"), packed, fmt.ggml_type, w.shape[0], None, 0)
    assert "merges 4 rows" in str(kernels.supports(get_format("iq4_k_r4"), 4, 256))


@pytest.mark.parametrize(
    "operator",
    ["linear", "linear_transposed", "dequantize", "embedding", "grouped_linear", "routed_linear", "routed_gated", "routed_weighted"],
)
def test_opcheck(operator: str) -> None:
    fmt, _, packed, w = matrix("iq2_kl")
    rows, k, kind = *w.shape, fmt.ggml_type
    x, experts = activations(3, k, torch.float32), packed[None]
    arguments: dict[str, tuple[Any, ...]] = {
        "linear": (x, packed, kind, rows, x[0, :rows].clone(), 1),
        "linear_transposed": (x[:, :rows].clone(), packed, kind, k),
        "dequantize": (packed, kind, rows, k, 1),
        "embedding": (torch.tensor([1, 0]), packed, kind, rows, k, 0),
        "grouped_linear": (x, experts, torch.tensor([3], dtype=torch.int32), kind, rows, 1),
        "routed_linear": (x, experts, torch.zeros(3, 2, dtype=torch.int64), kind, rows, 1),
        "routed_gated": (x, experts, torch.zeros(3, 2, dtype=torch.int64), kind, rows, "silu", 1),
        "routed_weighted": (x[:, None], experts, torch.zeros(3, 1, dtype=torch.int64), x[:, :1].clone(), kind, rows, 1),
    }
    torch.library.opcheck(getattr(OPS, operator).default, arguments[operator])


def packed_tensor(name: str, leading: tuple[int, ...] = ()) -> tuple[IQTensor, Tensor]:
    """An `IQTensor` of the triton backend, and its weights."""
    fmt, blocks, _, w = matrix(name)
    blocks, w = blocks.expand(*leading, *blocks.shape).contiguous(), w.expand(*leading, *w.shape).clone()
    return IQTensor(kernels.pack(blocks, fmt), fmt, "triton", tuple(w.shape), torch.float32), w


def test_gradients_pass_through_packed_weights() -> None:
    """Autograd of products, with and without a bias, transposed and not, and of grouped products."""
    packed, w = packed_tensor("iq4_k")
    for weight, dense in ((packed, w), (packed.T, w.T)):
        results = []
        for one in (weight, dense):
            x = activations(3, dense.shape[1], torch.float32).requires_grad_()
            bias = torch.zeros(dense.shape[0], requires_grad=True)
            y = torch.nn.functional.linear(x, one, bias)
            y.square().sum().backward()
            results.append((y.detach(), x.grad, bias.grad))
        for got, want in zip(*results, strict=True):
            assert got is not None and want is not None and (got - want).norm() <= 1e-4 * want.norm()


@pytest.mark.parametrize("name", ["iq2_kl", "q4_k"])
def test_grouped_mm_of_torch(name: str) -> None:
    """`F.grouped_mm`, which calls `aten._grouped_mm`, on packed experts; and its gradient."""
    packed, w = packed_tensor(name, (3,))
    ends = torch.tensor([2, 2, 7], dtype=torch.int32)
    x = activations(7, w.shape[2], torch.float32).requires_grad_()
    y = torch.nn.functional.grouped_mm(x, packed.transpose(-2, -1), offs=ends)
    want = torch.cat([x[:2] @ w[0].T, x[2:] @ w[2].T])
    assert (y - want).norm() <= 1e-4 * want.norm()
    (got,) = torch.autograd.grad(y.sum(), x)
    assert (got - torch.autograd.grad(want.sum(), x)[0]).norm() <= 1e-4 * got.norm()
    with torch.no_grad():
        again = torch.ops.aten._grouped_mm(x.bfloat16(), packed.transpose(-2, -1), ends)
    assert again.dtype == torch.bfloat16 and (again - want).norm() <= 2e-2 * want.norm()


def test_misaligned_activations_are_copied_and_weights_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """The model of the assembly refuses loads that a card would refuse."""
    import ptx_model

    fmt, _, packed, w = matrix("iq2_kl")
    rows, k = w.shape
    want = OPS.linear(activations(2, k, torch.float16), packed, fmt.ggml_type, rows, None, 0)
    ptx_model.install(monkeypatch)
    monkeypatch.setattr(launch, "device_facts", lambda device: launch.Device(1, True))
    for offset, stride in ((1, k), (0, k + 1), (3, k + 5)):
        memory = torch.full((offset + 2 * stride,), float("nan"), dtype=torch.float16)
        x = memory[offset:].as_strided((2, k), (stride, 1))
        x.copy_(activations(2, k, torch.float16))
        assert torch.equal(OPS.linear(x, packed, fmt.ggml_type, rows, None, 0), want)
    shifted = torch.cat([packed.new_zeros(1), packed])[1:]
    for call in (
        lambda: OPS.linear(x, shifted, fmt.ggml_type, rows, None, 0),
        lambda: kernels.dequantize(shifted, fmt, rows, k, torch.float32),
        lambda: kernels.embedding(torch.tensor([0]), shifted, fmt, rows, k, torch.float32),
    ):
        with pytest.raises(UnsupportedOperationError, match=r"multiple of 16 bytes; copy it with \.clone"):
            call()


def test_no_tokens() -> None:
    fmt, _, packed, w = matrix("iq2_kl")
    rows, k = w.shape
    experts, x = packed[None], torch.zeros(0, k)
    none = torch.zeros(0, 2, dtype=torch.int64)
    assert kernels.linear(x, packed, fmt, rows, None, 1).shape == (0, rows)
    assert kernels.linear_transposed(torch.zeros(0, rows), packed, fmt, k).shape == (0, k)
    assert kernels.grouped_linear(x, experts, torch.tensor([0], dtype=torch.int32), fmt, rows, 1).shape == (0, rows)
    assert kernels.routed_linear(x, experts, none, fmt, rows, 1).shape == (0, 2, rows)
    assert kernels.routed_gated(x, experts, none, fmt, rows, "silu", 1).shape == (0, 2, rows // 2)
    assert kernels.routed_weighted(x[:, None].expand(0, 2, k), experts, none, torch.zeros(0, 2), fmt, rows, 1).shape == (0, rows)


@pytest.mark.parametrize("rows", [1, 2, 3])
def test_packing_few_rows_and_within_a_larger_tensor(rows: int) -> None:
    """Rows at the ends of a tensor, and a matrix that begins at an odd byte of its memory."""
    from iqtorch.kernels import repack

    for name in ("iq2_kl", "mxfp4", "iq4_kss"):
        fmt, blocks, _, _ = matrix(name)
        some = torch.cat([blocks.new_zeros(1), blocks[:rows].flatten()])[1:].view(rows, -1)
        packed = launch.layout(fmt).pack(some)
        assert torch.equal(repack.pack(some, name), packed)
        assert torch.equal(repack.unpack(packed, name, rows, 512), some)


@pytest.mark.parametrize("name", FORMATS)
def test_packing_reads_one_word_around_a_row(name: str) -> None:
    """Not more than `repack.pack` provides; unpacking no word behind the last, and none before the first."""
    from iqtorch.kernels import repack

    fmt = get_format(name)
    for region in repack.packing(name):
        table = iter(region.table.tolist())
        for place in region.move.places:
            for stream in place.streams:
                starts = next(table)
                next(table) if stream == repack.OWN else None
                assert min(starts) >= 0 and min(stream.words) == 0
                assert place.origin + 32 * (max(starts) // 32 + max(stream.words)) < 8 * fmt.block_bytes
    for region in repack.unpacking(name):
        assert all(place.aligned or region.move.clamped for place in region.move.places)


@pytest.mark.parametrize(("name", "queries"), [("iq1_kt", 5), ("iq3_s", 130)])
def test_nearest_entries_of_a_codebook(name: str, queries: int) -> None:
    """The kernel that scores codebooks finds what a full search does."""
    fmt = get_format(name)
    near = GridNearest(fmt, torch.device("cpu"))
    x = torch.randn(queries, fmt.group_size, generator=torch.Generator().manual_seed(1))[:, : fmt.vec]
    w, s = x.square() + 0.1, 0.02 + 0.03 * torch.rand(queries, generator=torch.Generator().manual_seed(2))
    code, value = near.codes(x, w, s, fmt.codebook.variants - 1)
    near.fused = True
    fused_code, fused_value = near.codes(x, w, s, fmt.codebook.variants - 1)
    error, fused = ((w * (x - s[:, None] * v).square()).sum(1) for v in (value, fused_value))
    assert (code == fused_code).float().mean() > 0.99
    torch.testing.assert_close(fused, error, rtol=1e-5, atol=0)
    assert best_entries(torch.zeros(0, 2 * fmt.vec), near.matrices[0]).shape == (0,)


@pytest.mark.parametrize("name", ["iq4_ks", "iq2_ks", "q2_k", "q4_0", "iq4_kss", "iq2_kl", "mxfp4", "q6_k"])
def test_rounding_with_error_feedback(name: str) -> None:
    """The kernel rounds some groups as the version in torch does, for rows that do not fill a program."""
    from iqtorch.encode.feedback import Feedback, Rounding
    from iqtorch.encode.metric import Metric
    from iqtorch.kernels.feedback import feedback

    fmt, stop, seeded = get_format(name).for_encoding, 64, torch.Generator().manual_seed(0)
    x = torch.randn(600, 256, generator=seeded) @ (torch.eye(256) + 0.05 * torch.randn(256, 256, generator=seeded))
    metric = Metric(x.T @ x / len(x), fmt, 0.05)
    weight = torch.randn(9, 256, generator=seeded)
    weight[3] = 0
    plain, own = (Rounding(weight, fmt, metric, Feedback(reach=1, min_reach=1)) for _ in range(2))
    errors = torch.empty(2, stop, len(weight))
    plain._round_block(0, stop, errors[0])
    own._round_columns(feedback, 0, stop, errors[1])
    torch.testing.assert_close(errors[1], errors[0], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(own.rest[:stop], plain.rest[:stop], rtol=1e-4, atol=1e-6)
    groups, steps = stop // fmt.group_size, stop // fmt.vec
    assert torch.equal(own.code[:steps], plain.code[:steps]) and torch.equal(own.value[:stop], plain.value[:stop])
    assert torch.equal(own.kind[:groups], plain.kind[:groups])
    for a, b in zip(own._both(), plain._both(), strict=True):
        assert torch.equal(a.rank[:groups], b.rank[:groups])
