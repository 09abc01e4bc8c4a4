"""torch.func, forward-mode derivatives, and what else works on modules with packed weights as on plain ones."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vjp, vmap
from torch.nn.utils import parametrizations, parametrize
from torch.utils._pytree import tree_leaves

import iqtorch
from iqtorch import IQTensor, Recipe
from iqtorch.errors import UnsupportedOperationError


def net() -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(64, 256), nn.Linear(256, 512), nn.GELU(), nn.Linear(512, 64))
    return iqtorch.quantize_model(model, Recipe.pure("q8_0"), progress=False)


IDS = torch.tensor([[3, 1, 4], [1, 5, 9]])


def test_derivatives_and_batches(float_precision: None) -> None:
    """Gradients, forward and backward, and batches of torch.func are those of the dequantized weight; so are dual tensors."""
    w = iqtorch.quantize(torch.randn(64, 256, generator=torch.Generator().manual_seed(0)), "q8_0")
    dense, x, t = w.dequantize(), torch.randn(3, 256), torch.randn(3, 256)
    bias = torch.randn(64, requires_grad=True)
    for product in (lambda x, w: F.linear(x, w, bias), lambda x, w: x @ w.T, lambda x, w: x[:, :64] @ w if x.dim() > 1 else x[:64] @ w):

        def both(f: Callable[..., Any], product: Callable[..., Tensor] = product) -> None:
            got, want = (tree_leaves(f(lambda x, weight=weight: product(x, weight).tanh())) for weight in (w, dense))
            for a, b in zip(got, want, strict=True):  # products of many rows round activations to bfloat16
                assert a.shape == b.shape and (a - b).norm() <= 4e-3 * b.norm()

        both(lambda f: grad(lambda x: f(x).sum())(x))
        both(lambda f: vjp(f, x)[1](f(x)))
        both(lambda f: jvp(f, (x,), (t,)))
        both(lambda f: jacrev(f)(x))
        both(lambda f: jacfwd(f)(x))
        both(lambda f: vmap(f)(x))
        both(lambda f: vmap(jacrev(f), in_dims=1)(x.T))
        both(lambda f: hessian(lambda row: f(row[None]).sum())(x[0]))
        with forward_ad.dual_level(), torch.no_grad():
            both(lambda f: forward_ad.unpack_dual(f(forward_ad.make_dual(x, t))).tangent)


def test_gradients_of_each_sample(float_precision: None) -> None:
    base, adapter, x = net()[1], nn.Linear(256, 512), torch.randn(3, 256)

    def loss(values: dict[str, Tensor], rows: Tensor) -> Tensor:
        return (functional_call(adapter, values, rows) + base(rows)).tanh().sum()

    each = vmap(grad(loss), in_dims=(None, 0))(dict(adapter.named_parameters()), x)
    assert each["weight"].shape == (3, 512, 256)
    loss(dict(adapter.named_parameters()), x).backward()
    torch.testing.assert_close(each["weight"].sum(0), adapter.weight.grad, atol=2e-4, rtol=2e-4)


def test_functional_call_takes_packed_weights() -> None:
    model, other = net(), net()
    values = {name: iqtorch.quantize(p.dequantize() * 2, "q8_0") if isinstance(p, IQTensor) else p for name, p in model.named_parameters()}
    twice = functional_call(model, values, IDS)
    for name, p in values.items():
        other.get_parameter(name).data = p.data
    assert torch.equal(twice, other(IDS)) and not torch.equal(twice, model(IDS))


def test_forward_derivatives_of_experts_are_refused_not_wrong() -> None:
    w, x = iqtorch.quantize(torch.randn(2, 64, 256), "q8_0"), torch.randn(4, 256)
    with forward_ad.dual_level(), pytest.raises(RuntimeError, match="jvp"):
        iqtorch.tensor_ops.grouped_linear(forward_ad.make_dual(x, x), w, torch.tensor([2, 4]))


def test_parametrized_weights_are_dequantized_for_each_use() -> None:
    class Plus(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Parameter(torch.full((512, 1), 0.1))

        def forward(self, w: Tensor) -> Tensor:
            return w + self.a

    model = net()
    plain = model[1].weight.dequantize()
    parametrize.register_parametrization(model[1], "weight", Plus())
    assert torch.equal(model[1].weight, plain + 0.1)
    model(IDS).sum().backward()
    assert model[1].parametrizations.weight[0].a.grad is not None
    normed = net()
    wanted = normed(IDS)
    parametrizations.weight_norm(normed[1])
    torch.testing.assert_close(normed(IDS), wanted, atol=1e-2, rtol=1e-2)


def test_what_training_loops_do_with_all_parameters() -> None:
    model = net()
    before = model[1].weight.to_blocks().clone()
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.1)
    model(IDS).sum().backward()
    assert torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0).isfinite()
    optimizer.step()
    assert torch.equal(model[1].weight.to_blocks(), before) and len(optimizer.state) == 2  # two biases
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    model.zero_grad()
    with pytest.raises(UnsupportedOperationError, match="normal_"):
        nn.init.normal_(model[1].weight)


def test_to_the_meta_device_and_back() -> None:
    model = net()
    state, wanted = model.state_dict(), model(IDS)
    empty = copy.deepcopy(model).to("meta")
    assert empty[1].weight.is_meta and empty(IDS.to("meta")).shape == wanted.shape
    with pytest.raises(UnsupportedOperationError, match="to_empty"):
        empty.to("cpu")
    assigned = copy.deepcopy(empty)
    assigned.load_state_dict(state, assign=True)
    empty.to_empty(device="cpu").load_state_dict(state)
    assert torch.equal(empty(IDS), wanted) and torch.equal(assigned(IDS), wanted)
    held = io.BytesIO()
    torch.save(state, held)
    held.seek(0)
    assert torch.load(held, map_location="meta", weights_only=True)["1.weight"].is_meta


def test_one_row_and_one_expert_unpack_no_others(monkeypatch: pytest.MonkeyPatch) -> None:
    rows, experts = iqtorch.quantize(torch.randn(37, 256), "iq4_ks"), iqtorch.quantize(torch.randn(3, 37, 256), "iq4_ks")
    dense = rows.dequantize()
    one = [experts[e].dequantize() for e in range(3)]
    monkeypatch.setattr(IQTensor, "_stored_dense", lambda *args: pytest.fail("all of it was dequantized"))
    monkeypatch.setattr(IQTensor, "to_blocks", lambda *args: pytest.fail("all of it was unpacked"))
    assert torch.equal(rows[3], dense[3]) and torch.equal(rows[-1], dense[-1])
    with pytest.raises(IndexError, match="37"):
        rows[37]
    monkeypatch.undo()
    assert all(torch.equal(got.dequantize(), want) for got, want in zip(experts, one, strict=True))
    assert all(isinstance(w, IQTensor) for w in experts.unbind(0))


@pytest.mark.parametrize("name", ["q8_0", "iq2_kl", "iq4_ks", "iq2_xxs", "iq1_kt"])
def test_some_rows_are_the_rows(name: str) -> None:
    fmt = iqtorch.get_format(name)
    for lead, n in (((), 37), ((), 16), ((), 5), ((2,), 37)):
        blocks = torch.randint(0, 255, (*lead, n, fmt.row_bytes(512)), dtype=torch.uint8)
        w = IQTensor.from_blocks(blocks, name)
        for start, stop in ((0, n), (3, 4), (0, 16), (15, 17), (n - 2, n), (32, 36), (4, 4), (n, n), (-3, None), (5, 2)):
            part = w[..., start:stop, :] if lead else w[start:stop]
            assert torch.equal(part.to_blocks(), blocks[..., start:stop, :])
