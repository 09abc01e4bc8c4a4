"""IQTensor as a PyTorch tensor: products, gradients, copies, storage, compilation."""

from __future__ import annotations

import copy
import io
import pickle
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import golden
from torch import Tensor, nn

import iqtorch
from iqtorch import IQTensor, get_format, list_formats
from iqtorch.encode import compiled
from iqtorch.errors import BlockSizeError, IQTorchError, ShapeError, UnknownFormatError, UnsupportedOperationError, WeightError

FORMATS = ["iq2_kl", "iq4_k", "iq2_kt"]  # a row header of 2, 0 and 4 bytes; pairs, single values, a runtime scale


def packed(name: str = "iq2_kl", rows: int = 8, dtype: torch.dtype = torch.float32) -> IQTensor:
    blocks = golden(name)["blocks"]
    return IQTensor.from_blocks(blocks.repeat(-(-rows // 8), 1)[:rows], name, dtype)


def experts(count: int = 3, name: str = "iq2_kl", rows: int = 8) -> IQTensor:
    blocks = golden(name)["blocks"][:rows]
    return IQTensor.from_blocks(torch.stack([blocks.roll(i, 0) for i in range(count)]), name, torch.float32)


def product_error(got: Tensor, x: Tensor, w: Tensor, want: Tensor) -> float:
    """Root-mean-square error of a product, relative to what products of vectors of these norms come to on average."""
    expected = x.double().norm(dim=-1, keepdim=True) * w.double().norm(dim=-1) / w.shape[-1] ** 0.5
    error = (got.double() - want).abs() / (expected + want.abs()).clamp_min(1e-30)  # |want|: a bias may outweigh the product
    return float(error.square().mean().sqrt())


def same(got: Tensor, want: Tensor, tolerance: float = 1e-4) -> None:
    """Relative root-mean-square difference within a tolerance, for products with float activations."""
    assert got.shape == want.shape and got.isfinite().all() and want.numel()
    scale = want.double().square().mean().sqrt().clamp_min(1e-30)
    assert (got.double() - want.double()).square().mean().sqrt() / scale <= tolerance


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(512,), (0, 512), (1, 512), (3, 512), (2, 3, 512), (2, 1, 3, 512)])
def test_linear_matches_dequantized(name: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    w = packed(name, rows=7)
    x = torch.randn(shape).to(dtype)
    bias = torch.randn(7).to(dtype)
    got = F.linear(x, w, bias)
    assert got.dtype == dtype and got.shape == (*shape[:-1], 7)
    if got.numel():
        dense = w.dequantize(torch.float64)
        largest = torch.finfo(dtype).max
        want = F.linear(x.double(), dense, bias.double()).clamp(-largest, largest)
        assert product_error(got.clamp(-largest, largest), x, dense, want) <= 1e-2  # the promise for int8 activations


@pytest.mark.parametrize("name", FORMATS)
def test_float_precision_and_float64(name: str, float_precision: None) -> None:
    w = packed(name)
    dense = w.dequantize(torch.float64)
    x = torch.randn(5, 512, dtype=torch.float64)
    want = x @ dense.T
    assert (F.linear(x, w) - want).abs().max() <= 1e-12 * want.abs().max()
    assert product_error(F.linear(x.float(), w), x, dense, want) <= 1e-5
    assert product_error(F.linear(x.bfloat16(), w), x, dense, want) <= 5e-3
    assert w.double().dequantize().dtype == torch.float64


def test_matmul_forms_agree(float_precision: None) -> None:
    w = packed()
    x = torch.randn(3, 512)
    want = x @ w.dequantize().T
    for got in (x @ w.T, torch.matmul(x, w.t()), torch.mm(x, w.mT), torch.addmm(torch.zeros(8), x, w.transpose(0, 1))):
        same(got, want, 1e-5)
    g = torch.randn(3, 8)
    same(g @ w, g @ w.dequantize(), 1e-5)
    same(torch.randn(2, 3, 8) @ w * 0 + g @ w, g.expand(2, 3, 8) @ w.dequantize(), 1e-5)


def test_transposed_view_is_a_view() -> None:
    w = packed()
    assert w.view(8, -1).shape == w.shape and w.view(-1).shape == w.flatten().shape == (8 * 512,)
    assert w.T.shape == (512, 8) and w.T.T.shape == w.shape
    assert torch.equal(w.T.dequantize(), w.dequantize().T)
    assert w.T.packed.data_ptr() == w.packed.data_ptr()


def test_products_into_a_tensor_that_is_there(float_precision: None) -> None:
    """What losses computed in pieces do: products with some rows of the head at a time."""
    w, x, before = packed(), torch.randn(5, 512), torch.randn(5, 3)
    rows, dense = w[2:5], w.dequantize()[2:5]
    assert type(rows) is IQTensor and rows.backend == w.backend and torch.equal(rows.to_blocks(), w.to_blocks()[2:5])
    iqtorch.set_fallback("error")
    try:
        for product in (torch.mm, torch.matmul):
            out = torch.empty(5, 3)
            assert product(x, rows.to(torch.float32).t(), out=out) is out
            same(out, x @ dense.T)
        same(torch.addmm(before, x, rows.T, out=torch.empty(0)), before + x @ dense.T)
        same(before.clone().addmm_(x, rows.T, beta=0.5, alpha=2.0), 0.5 * before + 2 * x @ dense.T)
        same(torch.zeros(5, 512).addmm_(before, rows), before @ dense)
        with pytest.raises(RuntimeError, match="out tensor to have dtype"):
            torch.mm(x, rows.t(), out=torch.empty(5, 3, dtype=torch.bfloat16))
        with pytest.raises(UnsupportedOperationError, match="out="):
            torch.mm(x, rows.t(), out=packed())
    finally:
        iqtorch.set_fallback("warn")


def test_addmm_in_place_looks_before_it_writes(float_precision: None) -> None:
    w, x = packed(), torch.randn(5, 512)
    want = x @ w.dequantize().T
    same(torch.full((5, 8), torch.nan).addmm_(x, w.T, beta=0, alpha=2), 2 * want)
    for target, a in (
        (torch.ones(4, 8), x),
        (torch.ones(5, 8), x[:1]),
        (torch.ones(5, 8), x.bfloat16()),
        (torch.ones(5, 8), x[:, :256]),
    ):
        with pytest.raises((RuntimeError, ShapeError)):
            target.addmm_(a, w.T, beta=0.5)
        assert torch.equal(target, torch.ones_like(target))
    with torch.autocast("cpu", torch.bfloat16):
        same(torch.ones(5, 8).addmm_(x, w.T), 1 + want)


def test_products_with_a_target_refuse_and_cast_as_those_of_plain_tensors(float_precision: None) -> None:
    w, x, ones = packed(), torch.randn(5, 512), torch.ones(5, 8)
    dense = w.dequantize()
    want = x @ dense.T
    same(torch.mm(x, mat2=w.T), want)
    for weight in (w, dense):
        for refused in (
            lambda w: torch.mm(x.clone().requires_grad_(), w.T, out=torch.empty(5, 8)),
            lambda w: torch.mm(x, w.T, out=torch.empty(5, 8, requires_grad=True)),
            lambda w: torch.mm(x, w.T, out=torch.empty(5, 8, device="meta")),
            lambda w: torch.addmm(ones, x[:1], w.T),
            lambda w: torch.addmm(ones, x.bfloat16(), w.bfloat16().T),
            lambda w: torch.addmm(ones[0], x.bfloat16(), w.bfloat16().T),
            lambda w: torch.addmm(ones[0].bfloat16(), x, w.T),
        ):
            with pytest.raises(RuntimeError):
                refused(weight)
        with torch.no_grad():
            assert not torch.mm(x.clone().requires_grad_(), weight.T, out=torch.empty(5, 8)).requires_grad
        with torch.autocast("cpu", torch.bfloat16):
            for product in (torch.mm, torch.matmul, lambda *args, out: torch.addmm(torch.zeros(5, 8), *args, out=out)):
                same(product(x, weight.T, out=torch.empty(5, 8)), want)
            for bias in (ones, ones[0]):
                assert torch.addmm(bias, x, weight.T).dtype == torch.bfloat16


def test_some_rows_hold_only_their_bytes() -> None:
    w = packed(rows=64)
    if w.backend == "torch":
        pytest.skip("without kernels they are views, which may be written to")
    rows, held = w[5:9], io.BytesIO()
    torch.save(rows, held)
    assert rows.to_blocks().untyped_storage().nbytes() == rows.nbytes and len(held.getvalue()) < w.nbytes
    assert torch.equal(w[:].to_blocks(), w.to_blocks())
    with pytest.raises(UnsupportedOperationError, match="copy_ into some rows"):
        rows.copy_(w[:4])
    nn.Parameter(rows, requires_grad=False).copy_(w[:4])  # a weight of its own
    iqtorch.set_backend("cpu")
    try:
        assert w[5:5].shape == (0, 512)
    finally:
        iqtorch.set_backend(None)


def test_every_device_without_kernels_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(iqtorch.ops, "_fallbacks", {})
    for device in ("mps", "xpu", "xpu"):
        assert iqtorch.ops.choose_backend(get_format("iq2_kl"), 64, 512, torch.device(device)) == "torch"
    assert [entry["backend"] for entry in iqtorch.kernel_info()["fallbacks"]] == ["mps", "xpu"]


def test_noncontiguous_activations() -> None:
    w = packed()
    x = torch.randn(512, 6).t()[::2]
    assert torch.equal(F.linear(x, w), F.linear(x.contiguous(), w))


@pytest.mark.parametrize("name", FORMATS)
def test_gradients_equal_those_of_dequantized(name: str) -> None:
    w = packed(name)
    x = torch.randn(5, 512, requires_grad=True)
    bias = torch.randn(8, requires_grad=True)
    F.linear(x, w, bias).square().sum().backward()
    x2, bias2 = x.detach().clone().requires_grad_(), bias.detach().clone().requires_grad_()
    F.linear(x2, w.dequantize(), bias2).square().sum().backward()
    assert x.grad is not None and bias.grad is not None and x2.grad is not None and bias2.grad is not None
    same(x.grad, x2.grad)
    same(bias.grad, bias2.grad)


def test_gradient_of_bias_alone_and_of_transposed() -> None:
    w = packed()
    bias = torch.zeros(8, requires_grad=True)
    F.linear(torch.randn(4, 512), w, bias).sum().backward()
    assert torch.equal(bias.grad, torch.full((8,), 4.0))
    g = torch.randn(4, 8, requires_grad=True)
    (g @ w).sum().backward()
    same(g.grad, w.dequantize().sum(1).expand(4, 8))


def test_gradcheck_and_double_backward(float_precision: None) -> None:
    # a constant row with ordinary scale: float32 kernels need inputs that make finite differences meaningful
    w = IQTensor.from_blocks(golden("iq4_k")["blocks"][:1], "iq4_k", torch.float32)
    x = torch.randn(2, 512, requires_grad=True)
    (grad,) = torch.autograd.grad(F.linear(x, w).pow(2).sum(), x, create_graph=True)
    grad.sum().backward()
    dense = w.dequantize()
    same(x.grad, 2 * (dense.sum() * dense).expand(2, 512), 1e-4)


def test_embedding(float_precision: None) -> None:
    w = packed(dtype=torch.bfloat16)
    ids = torch.tensor([[0, 7], [3, 3]])
    assert torch.equal(F.embedding(ids, w), w.dequantize()[ids])
    assert torch.equal(w[ids], w.dequantize()[ids])
    assert torch.equal(w[-ids], w.dequantize()[-ids])
    assert F.embedding(torch.empty(0, 2, dtype=torch.long), w).shape == (0, 2, 512)
    with pytest.raises(IndexError, match="0 .. 7"):
        F.embedding(torch.tensor([8]), w)
    with pytest.raises(UnsupportedOperationError, match="max_norm"):
        F.embedding(ids, w, max_norm=1.0)


def test_experts_select_and_grouped_mm() -> None:
    w = experts()
    assert w.shape == (3, 8, 512) and type(w[1]) is IQTensor and w[1].shape == (8, 512)
    assert torch.equal(w[torch.tensor(2)].dequantize(), w.dequantize()[2])
    x = torch.randn(10, 512, requires_grad=True)
    offs = torch.tensor([4, 4, 10], dtype=torch.int32)
    y = F.grouped_mm(x, w.transpose(-2, -1), offs=offs)
    want = torch.cat([x[:4] @ w.dequantize()[0].T, x[4:] @ w.dequantize()[2].T])
    same(y, want)
    y.sum().backward()
    same(x.grad, torch.cat([w.dequantize()[0].sum(0).expand(4, 512), w.dequantize()[2].sum(0).expand(6, 512)]))
    with pytest.raises(IndexError):
        w[3]


@pytest.mark.parametrize("name", ["iq2_k_r4", "iq3_k_r4", "iq4_k_r4", "iq5_k_r4", "iq4_ks_r4", "iq5_ks_r4"])
def test_interleaved_blocks_become_plain_and_back(name: str) -> None:
    blocks = golden(name)["blocks_random"]
    w = IQTensor.from_blocks(blocks, name)
    assert w.format.name == name.removesuffix("_r4")
    assert torch.equal(w.to_blocks(name), blocks)
    with pytest.raises(ShapeError, match="multiple of 4"):
        IQTensor.from_blocks(w.to_blocks()[:3], w.format).to_blocks(name)


@pytest.mark.parametrize("name", list_formats())
def test_blocks_survive_every_backend(name: str) -> None:
    fmt = get_format(name)
    blocks = golden(name)["blocks_random"]
    w = IQTensor.from_blocks(blocks, name, torch.float32)
    assert torch.equal(w.to_blocks(name if fmt.plain else None), blocks)
    assert w.nbytes == w.packed.nbytes
    # a kernel's layout may pad to 16 rows and align the row headers: nothing beside a matrix of ordinary size
    many = IQTensor.from_blocks(blocks.repeat(256, 1), name, torch.float32)
    assert many.nbytes <= 1.03 * 256 * blocks.numel()


def test_copies_and_moves() -> None:
    w = packed()
    for other in (copy.deepcopy(w), copy.copy(w), w.clone(), w.detach(), w.cpu(), w.contiguous(), w.to("cpu"), w.data):
        assert type(other) is IQTensor and torch.equal(other.to_blocks(), w.to_blocks()) and other.dtype == w.dtype
    assert copy.deepcopy(w).packed.data_ptr() != w.packed.data_ptr()
    for dtype in (torch.float16, torch.bfloat16):
        assert w.to(dtype).dtype == dtype and torch.equal(w.to(dtype).to_blocks(), w.to_blocks())
    assert w.half().dequantize().dtype == torch.float16
    meta = w.to("meta")
    assert meta.device.type == "meta" and meta.shape == w.shape
    assert F.linear(torch.empty(3, w.shape[1], device="meta"), meta).shape == (3, w.shape[0])
    assert torch.empty_like(w).shape == w.shape


def test_module_conversions() -> None:
    layer = nn.Linear(512, 8)
    layer.weight = nn.Parameter(packed(), requires_grad=False)
    blocks = layer.weight.to_blocks()
    for change in (
        lambda m: m.half(),
        lambda m: m.bfloat16(),
        lambda m: m.float(),
        lambda m: m.to("cpu"),
        lambda m: m.cpu(),
        copy.deepcopy,
    ):
        layer = change(layer)
        assert isinstance(layer.weight, nn.Parameter) and isinstance(layer.weight, IQTensor)
        assert torch.equal(layer.weight.to_blocks(), blocks)
    assert layer.to(torch.bfloat16)(torch.randn(2, 512, dtype=torch.bfloat16)).dtype == torch.bfloat16
    layer.eval().requires_grad_(False)
    moved = copy.deepcopy(layer).to("meta").to_empty(device="cpu")
    assert type(moved.weight) is IQTensor and moved.weight.shape == (8, 512)


def test_pin_memory_without_accelerator_says_so_or_works() -> None:
    w = packed()
    assert w.is_pinned() is False
    if torch.cuda.is_available():
        assert w.pin_memory().is_pinned()
    else:
        with pytest.raises(RuntimeError):
            w.pin_memory()


@pytest.mark.parametrize("weights_only", [True, False])
def test_pickle_holds_canonical_bytes(weights_only: bool) -> None:
    layer = nn.Linear(512, 8)
    layer.weight = nn.Parameter(packed(), requires_grad=False)
    file = io.BytesIO()
    torch.save({"w": packed("iq4_k"), "sd": layer.state_dict(), "view": packed().T}, file)
    file.seek(0)
    back = torch.load(file, weights_only=weights_only)
    assert torch.equal(back["w"].to_blocks(), packed("iq4_k").to_blocks()) and back["w"].dtype == torch.float32
    assert torch.equal(back["sd"]["weight"].to_blocks(), packed().to_blocks())
    assert back["view"].shape == (512, 8)
    file.seek(0)
    assert torch.load(file, weights_only=weights_only, map_location="meta")["w"].device.type == "meta"
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    again = torch.load(file, weights_only=False)
    assert isinstance(again.weight, nn.Parameter) and torch.equal(again.weight.to_blocks(), layer.weight.to_blocks())


@pytest.mark.parametrize("assign", [False, True])
def test_state_dict_round_trip(assign: bool) -> None:
    source, target = nn.Linear(512, 8), nn.Linear(512, 8)
    source.weight = nn.Parameter(packed(), requires_grad=False)
    target.weight = nn.Parameter(IQTensor.from_blocks(packed().to_blocks().flip(0), "iq2_kl", torch.float32), requires_grad=False)
    target.load_state_dict(source.state_dict(), strict=True, assign=assign)
    assert torch.equal(target.weight.to_blocks(), source.weight.to_blocks()) and isinstance(target.weight, nn.Parameter)
    fresh = nn.Linear(512, 8).requires_grad_(False)
    fresh.load_state_dict(source.state_dict(), assign=assign)
    if assign:
        assert type(fresh.weight) is IQTensor
    else:
        assert torch.equal(fresh.weight, source.weight.dequantize())
    other = nn.Linear(512, 8)
    other.weight = nn.Parameter(packed("iq4_k"), requires_grad=False)
    with pytest.raises(RuntimeError, match="assign=True"):
        other.load_state_dict(source.state_dict())
    with pytest.raises(RuntimeError, match="quantize it first"):
        target.load_state_dict(nn.Linear(512, 8).state_dict())


def test_equal() -> None:
    assert torch.equal(packed(), packed()) and not torch.equal(
        packed(), IQTensor.from_blocks(packed().to_blocks().flip(0), "iq2_kl", torch.float32)
    )


def test_inference_mode_no_grad_and_autocast(float_precision: None) -> None:
    w = packed()
    x = torch.randn(2, 512)
    with torch.inference_mode():
        same(F.linear(x, w), x @ w.dequantize().T)
        assert type(packed()) is IQTensor
    with torch.no_grad():
        assert not F.linear(x.clone().requires_grad_(), w).requires_grad
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert F.linear(x, w).dtype == torch.bfloat16


def test_threads() -> None:
    w = packed("iq4_k", rows=64)
    x = torch.randn(4, 512)
    want = F.linear(x, w)
    results: list[Tensor] = []
    threads = [threading.Thread(target=lambda: results.append(F.linear(x, w))) for _ in range(8)]
    [t.start() for t in threads]
    [t.join() for t in threads]
    assert len(results) == 8 and all(torch.equal(r, want) for r in results)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(512, 512)
        self.a.weight = nn.Parameter(packed(rows=512), requires_grad=False)
        self.b = nn.Linear(512, 8)
        self.b.weight = nn.Parameter(packed("iq4_k"), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.relu(self.a(x)))


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compile_fullgraph_dynamic_batch(backend: str, float_precision: None) -> None:
    net = Net()
    torch._dynamo.reset()
    compiled = torch.compile(net, fullgraph=True, dynamic=True, backend=backend)
    counter = torch._dynamo.utils.counters
    counter.clear()
    with torch.no_grad():
        for batch in (3, 7, 12, 2):
            x = torch.randn(batch, 512)
            same(compiled(x), net(x), 1e-5)
    assert counter["stats"]["unique_graphs"] == 1
    x = torch.randn(3, 512, requires_grad=True)
    compiled(x).sum().backward()
    y = x.detach().clone().requires_grad_()
    net(y).sum().backward()
    same(x.grad, y.grad, 1e-5)


def test_export_with_dynamic_batch(float_precision: None) -> None:
    net = Net().eval()
    batch = torch.export.Dim("batch", min=1, max=64)
    exported = torch.export.export(net, (torch.randn(3, 512),), dynamic_shapes={"x": {0: batch}})
    x = torch.randn(11, 512)
    same(exported.module()(x), net(x), 1e-4)


def test_opcheck_of_the_torch_backend() -> None:
    blocks = golden("iq2_kl")["blocks"]
    op = torch.ops.iqtorch
    fmt = get_format("iq2_kl").ggml_type
    x = torch.randn(3, 512)
    torch.library.opcheck(op.linear.default, (x, blocks, fmt, 8, None))
    torch.library.opcheck(op.linear.default, (x, blocks, fmt, 8, torch.randn(8)))
    torch.library.opcheck(op.linear_transposed.default, (torch.randn(3, 8), blocks, fmt, 512))
    torch.library.opcheck(op.dequantize.default, (blocks, fmt, 8, 512, 1))
    torch.library.opcheck(op.embedding.default, (torch.tensor([1, 2]), blocks, fmt, 512, 0))
    offs = torch.tensor([1, 3], dtype=torch.int32)
    torch.library.opcheck(op.grouped_linear.default, (x, torch.stack([blocks, blocks]), offs, fmt, 8))


# -- refusals ---------------------------------------------------------------------------------------------------


def test_refusals_name_the_operation_and_the_remedy() -> None:
    w = packed()
    for action in (lambda: w.add_(1), lambda: w.zero_(), lambda: w.mul_(2), lambda: w.copy_(torch.zeros(8, 512)), lambda: w.normal_()):
        with pytest.raises(UnsupportedOperationError, match="quantize"):
            action()
    for index in (0, slice(2, 4), (slice(None), 3), torch.tensor([1, 2])):  # not into a dequantized copy, which would be lost
        with pytest.raises(UnsupportedOperationError, match=r"w\[...\] = values.*quantize"):
            w[index] = 0
    plain = torch.zeros(8, 512)
    plain[:] = w
    assert torch.equal(plain, w.dequantize())
    with pytest.raises(TypeError, match=r"Linear takes a packed weight, got int.*from_float"):
        iqtorch.Linear(512, 8)
    with pytest.raises(ShapeError, match="2 dimensions"):
        iqtorch.Linear(experts())
    for read in (lambda: w.numpy(), lambda: np.asarray(w)):
        with pytest.raises(UnsupportedOperationError, match=r"numpy.*dequantize\(\)\.numpy"):
            read()
    with pytest.raises(UnsupportedOperationError, match="share_memory_.*to_blocks"):
        w.share_memory_()
    for action in (lambda: w.requires_grad_(), lambda: nn.Parameter(w), lambda: setattr(w, "requires_grad", True)):
        with pytest.raises(UnsupportedOperationError, match="frozen.*LoRA"):
            action()
    assert w.requires_grad_(False) is w
    with pytest.raises(ShapeError, match="last dimension must be 512"):
        F.linear(torch.randn(2, 256), w)
    with pytest.raises(ShapeError, match=r"bias of shape \(3,\).*8 columns"):
        F.linear(torch.randn(2, 512), w, torch.zeros(3))
    with pytest.raises(UnsupportedOperationError, match="floating"):
        F.linear(torch.ones(2, 512, dtype=torch.long), w)
    assert torch.equal(w.to_blocks(), packed().to_blocks())


def test_other_operations_run_on_a_dequantized_copy_and_say_so() -> None:
    w = packed()
    iqtorch.tensor_ops._warned.clear()
    with pytest.warns(UserWarning, match="aten::add.Tensor has no packed form"):
        assert torch.equal(w + 1, w.dequantize() + 1)
    iqtorch.set_fallback("error")
    try:
        with pytest.raises(UnsupportedOperationError, match="aten::mul.*dequantize"):
            w * 2
    finally:
        iqtorch.set_fallback("warn")
    with pytest.raises(ValueError, match="'warn'"):
        iqtorch.set_fallback("maybe")


def test_bad_blocks() -> None:
    blocks = golden("iq2_kl")["blocks"]
    with pytest.raises(UnknownFormatError, match="iq2_kl"):
        IQTensor.from_blocks(blocks, "iq2_k1")
    with pytest.raises(BlockSizeError, match="uint8"):
        IQTensor.from_blocks(blocks.int(), "iq2_kl")
    with pytest.raises(BlockSizeError, match="bytes are no row"):
        IQTensor.from_blocks(blocks[:, :-1], "iq2_kl")
    with pytest.raises(BlockSizeError, match="row_bytes"):
        IQTensor.from_blocks(blocks[0], "iq2_kl")
    with pytest.raises(WeightError, match="floating"):
        IQTensor.from_blocks(blocks, "iq2_kl", torch.int32)
    with pytest.raises(ShapeError, match="no q4_0 bytes|no iq4_k bytes"):
        packed().to_blocks("iq4_k")
    assert issubclass(UnknownFormatError, IQTorchError) and issubclass(UnknownFormatError, ValueError)


def test_copy_constructor_used_by_accelerate() -> None:
    w = packed()
    again = IQTensor(w, requires_grad=False)
    assert type(again) is IQTensor and torch.equal(again.to_blocks(), w.to_blocks())


def test_repr_and_sizes() -> None:
    w = packed()
    assert "iq2_kl" in repr(w) and "bpw" in repr(w)
    assert w.bits_per_weight == pytest.approx(8 * (2 + 2 * 86) / 512)


def test_deferred_packing_happens_at_the_first_use() -> None:
    blocks = iqtorch.quantize(torch.randn(48, 256), "iq4_ks").to_blocks()
    want = IQTensor.from_blocks(blocks, "iq4_ks", torch.float32)
    if want.backend == "torch":
        pytest.skip("nothing to pack without compiled kernels")

    def make() -> IQTensor:
        w = IQTensor.from_blocks(blocks, "iq4_ks", torch.float32, defer=True)
        assert w._deferred() is not None and w.backend == want.backend and w.nbytes == blocks.nbytes
        return w

    x = torch.randn(3, 256)
    w = nn.Parameter(make(), requires_grad=False)
    assert type(w) is IQTensor and w.detach()._deferred() is not None and IQTensor(w)._deferred() is not None
    assert w.to_blocks().data_ptr() == blocks.data_ptr() and w._deferred() is not None  # saving does not pack
    assert torch.equal(F.linear(x, w), F.linear(x, want)) and w._deferred() is None
    assert torch.equal(w.packed, want.packed) and torch.equal(w.to_blocks(), blocks)
    uses = [
        lambda w: F.embedding(torch.tensor([1, 5]), w), lambda w: x @ w.T, lambda w: w.dequantize(),
        lambda w: copy.deepcopy(w).dequantize(),
        lambda w: w.to(torch.bfloat16).dequantize(), lambda w: w.clone().dequantize(), lambda w: pickle.loads(pickle.dumps(w)).dequantize(),
    ]  # fmt: skip
    for use in uses:
        assert torch.equal(use(make()), use(want))
    target = make()
    target.data = want
    assert torch.equal(target.dequantize(), want.dequantize())
    with torch.inference_mode():
        F.linear(x, evaluated := make())
    F.linear(x.clone().requires_grad_(), evaluated).sum().backward()  # trained on after an evaluation
    fresh = make()
    with ThreadPoolExecutor(8) as pool:  # packed once, whoever comes first
        assert len({p.data_ptr() for p in pool.map(lambda _: fresh.packed, range(16))}) == 1


@pytest.mark.parametrize("name", list_formats())
def test_a_default_device_changes_nothing_for_weights_elsewhere(name: str) -> None:
    """Scripts that call `torch.set_default_device("cuda")` quantize, pack and multiply on the CPU as others do."""
    seeded = torch.Generator().manual_seed(0)
    weight, x = torch.randn(8, 512, generator=seeded), torch.randn(3, 512, generator=seeded)
    importance, ids = torch.rand(512, generator=seeded), torch.tensor([1, 5])

    def run() -> tuple[Tensor, ...]:
        for table in (compiled.value_table, compiled._prepared, compiled._plan, compiled._products, compiled._book):
            table.cache_clear()
        q = iqtorch.quantize(weight, name, importance=importance, speed="fast")
        again = IQTensor.from_blocks(q.to_blocks(name), name)
        y = torch.nn.functional.linear(x, again)
        return q.to_blocks(), y, again.dequantize(), y @ again, torch.nn.functional.embedding(ids, again), again[2:5].dequantize()

    want = run()
    with torch.device("meta"):
        assert torch.empty(1).is_meta
        got = run()
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
