"""The output side of the loss curvature: how much the model's predictions mind an error of each output of a layer.

The Fisher information of a weight is the mean of `vec(g x^T) vec(g x^T)^T` over tokens whose label is drawn from the model's own
predictions, with x the layer's inputs and g the gradient of -log p(label) in its outputs. Its Kronecker approximation is
O (x) H with O = mean(g g^T) and H = mean(x x^T). (YAQA, arXiv 2505.22988; here the first step of its power iteration.)

One backward pass through the whole model leaves the gradients in the outputs of its blocks; those in a layer's outputs follow block
by block, so that no more than one block's statistics are held.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import CalibrationError

#: Labels are drawn with this seed.
SEED = 0


class Curvatures:
    """Sums of g g^T for some layers, while their hooks are in place."""

    def __init__(self, layers: Mapping[str, nn.Module]) -> None:
        self.layers = dict(layers)
        self.total: dict[str, Tensor] = {}
        #: squared length of each gradient, `[tokens]` per block of `watching`, call after call
        self.energy: dict[str, list[Tensor]] = {}
        self._calls: dict[str, list[Tensor]] = {}

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        hooks = [layer.register_forward_hook(self._hook(name)) for name, layer in self.layers.items()]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
            for name, calls in self._calls.items():
                self.energy.setdefault(name, []).append(torch.cat(calls))
            self._calls = {}

    def _hook(self, name: str) -> Callable[..., None]:
        def backward(gradient: Tensor, at: int) -> None:
            g = gradient.detach().reshape(-1, gradient.shape[-1]).float()
            if name not in self.total:
                self.total[name] = torch.zeros(g.shape[1], g.shape[1], dtype=torch.float32, device=g.device)
            self.total[name].addmm_(g.T, g)
            self._calls[name][at] = g.square().sum(1)

        def forward(_: nn.Module, __: Any, out: Tensor) -> None:
            if out.requires_grad:
                calls = self._calls.setdefault(name, [])
                calls.append(out.new_empty(0, dtype=torch.float32))  # gradients come in another order than calls, or not at all
                out.register_hook(partial(backward, at=len(calls) - 1))

        return forward

    def mean(self, name: str) -> Tensor | None:
        """float32 `[N, N]` with a mean diagonal of 1; None if no gradient came, or none but zero.

        Raises:
            CalibrationError: gradients that are not finite.
        """
        if name not in self.total:
            return None
        found = self.total.pop(name)
        size = found.diagonal().mean()
        if not bool(torch.isfinite(size)):
            raise CalibrationError(f"the gradients in the outputs of {name!r} are not finite; use float32, or rounding='ldlq'")
        return found / size if float(size) > 0 else None


@contextlib.contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Within the block no parameter wants a gradient: backward passes go through activations only."""
    wanting = [p for p in model.parameters() if p.requires_grad]
    for p in wanting:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p in wanting:
            p.requires_grad_(True)


def pull_back(out: Any, generator: torch.Generator) -> None:
    """Backward pass of -log p of labels drawn from the predictions; without logits, of random directions of the output."""
    logits = getattr(out, "logits", None)
    if logits is None:
        hidden = out if isinstance(out, Tensor) else out[0]
        hidden.backward(torch.randn(hidden.shape, generator=generator, dtype=torch.float32, device="cpu").to(hidden))
        return
    with torch.no_grad():
        gradient = torch.softmax(logits.detach().float(), -1).flatten(0, -2)
        label = torch.multinomial(gradient.cpu(), 1, generator=generator).to(gradient.device)
        gradient.scatter_add_(1, label, torch.full_like(label, -1, dtype=gradient.dtype))
    logits.backward(gradient.view(logits.shape).to(logits.dtype))


def call(model: nn.Module, batch: Tensor | Mapping[str, Any]) -> Any:
    """The model's answer to a batch, on the model's device."""
    device = next((p.device for p in model.parameters() if p.device.type != "meta"), torch.device("cpu"))
    if isinstance(batch, Tensor):
        return model(batch.to(device))
    return model(**{k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()})


def block_gradients(model: nn.Module, blocks: Sequence[nn.Module], batches: Iterable[Tensor | Mapping[str, Any]]) -> list[list[Tensor]]:
    """For each block and batch the gradient in the block's output, on the CPU."""
    found: list[list[Tensor]] = [[] for _ in blocks]
    generator = torch.Generator().manual_seed(SEED)

    def enter(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if args:
            return (args[0].detach().requires_grad_(), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": kwargs["hidden_states"].detach().requires_grad_()}

    def leave(i: int) -> Callable[..., None]:
        def hook(_: nn.Module, __: Any, out: Any) -> None:
            (out if isinstance(out, Tensor) else out[0]).register_hook(lambda g: found[i].append(g.detach().cpu()))

        return hook

    hooks = [blocks[0].register_forward_pre_hook(enter, with_kwargs=True)]
    hooks += [block.register_forward_hook(leave(i)) for i, block in enumerate(blocks)]
    try:
        with frozen(model), torch.enable_grad():
            for batch in batches:
                pull_back(call(model, batch), generator)
    finally:
        for hook in hooks:
            hook.remove()
    return found


def collect_curvature(
    model: nn.Module, layers: Mapping[str, nn.Module], batches: Iterable[Tensor | Mapping[str, Any]]
) -> dict[str, Tensor]:
    """float32 `[N, N]` for each layer that gradients reach, by one backward pass through the whole model per batch."""
    sums = Curvatures(layers)
    generator = torch.Generator().manual_seed(SEED)
    embedded = [m for m in model.modules() if isinstance(m, nn.Embedding)]
    hooks = [m.register_forward_hook(lambda _, __, out: out.requires_grad_()) for m in embedded]
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with frozen(model), torch.enable_grad(), sums.watching():
            for batch in batches:
                if not embedded and isinstance(batch, Tensor):
                    batch = batch.detach().requires_grad_()
                pull_back(call(model, batch), generator)
    finally:
        for hook in hooks:
            hook.remove()
        for module in training:
            module.training = True
    found = {name: sums.mean(name) for name in list(sums.total)}
    return {name: value for name, value in found.items() if value is not None}
