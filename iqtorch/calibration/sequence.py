"""Rounding a model layer by layer, each layer seeing what the packed layers before it make of the text.

Two copies of the hidden states run through the model side by side: `x`, what the original layers make of the text, and `y`, what
the packed ones do. A layer that is handed y and not x should still give W x. The best weight for that, before rounding, is

    W' = W (I + C (H + damping)^-1)        with  H = mean(y y^T),  C = mean((x - y) y^T)

and W' is then rounded with H as the metric. (The asymmetric calibration of GPTAQ, arXiv 2504.02692.)

Only one block of the model is copied at a time, and only its statistics are held; the model itself is not touched.
"""

from __future__ import annotations

import contextlib
import copy
import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from ..encode.encoder import Objective, Speed
from ..encode.metric import Metric
from ..errors import CalibrationError
from ..formats import Format, get_format
from ..linear import is_conv1d
from ..tensor import IQTensor
from .checkpoint import Checkpoint
from .curvature import Curvatures, block_gradients, frozen
from .moments import HELD_OUT, SAMPLE, Batch, Calibration, add_products, calibrate, checked_batches, warn_of_few, zero_products
from .rounding import DAMPING, best_of, quantize_calibrated, shrunk

logger = logging.getLogger("iqtorch")


@dataclass(frozen=True)
class Target:
    """A weight to be rounded: its parameter name, the matrix `[.., N, K]`, and the format."""

    name: str
    matrix: Tensor
    format: Format


@dataclass
class _Block:
    """A block of the model and, for each batch, the arguments it gets besides the hidden states."""

    name: str
    module: nn.Module
    rest: list[tuple[tuple[Any, ...], dict[str, Any]]] = field(default_factory=list)

    def call(self, module: nn.Module, i: int, hidden: Tensor) -> Tensor:
        args, kwargs = self.rest[i]
        out = module(hidden, *args, **kwargs)
        return out if isinstance(out, Tensor) else out[0]

    def run(self, module: nn.Module, i: int, hidden: Tensor) -> Tensor:
        with torch.no_grad():
            return self.call(module, i, hidden)

    def on(self, device: torch.device | None) -> _Block:
        """The same block, or a copy of it and of its arguments on another device."""
        if device is None:
            return self
        return _Block(self.name, copy.deepcopy(self.module).to(device), _moved(self.rest, device))


def _moved(value: Any, device: torch.device) -> Any:
    """A structure with its tensors on a device."""
    return tree_map_only(Tensor, lambda t: t.to(device), value)


class _Enough(Exception):
    """Everything that was wanted of a forward pass has been seen."""


def quantize_in_sequence(
    model: nn.Module,
    targets: Sequence[Target],
    batches: Iterable[Batch],
    objective: Objective = "model",
    curvature: bool = False,
    checkpoint: str | Path | None = None,
    speed: Speed = "default",
    device: torch.device | None = None,
) -> Iterator[tuple[str, IQTensor, str]]:
    """Rounds the weights of a model with error feedback, in the order in which the text meets them.

    Linear layers of the model's chain of blocks see the packed layers before them. Everything else that has inputs to be seen
    (experts, the output layer) is rounded by the moments of the original model.

    Args:
        model: a model that is called with token ids; not changed.
        targets: the weights, as `[N, K]` or `[E, N, K]`.
        batches: int64 `[B, T]` token ids, or dictionaries of arguments.
        curvature: whether rows make up for each other too, by the curvature of the loss in the outputs (backward passes).
        checkpoint: a folder for finished blocks: what is there already is not rounded again.
        speed: how hard to search.
        device: where blocks run and are rounded, one at a time, if not where the model is. Experts are rounded where the model is.

    Yields:
        Name, packed weight and a note, for each target that saw any input.

    Raises:
        CalibrationError: no batches, token ids that the model does not have, or activations that are not finite.
    """
    if curvature and device is not None:
        raise CalibrationError("rounding='yaqa' runs backward through the whole model: move the model to the device, or use 'ldlq'")
    texts = list(checked_batches(model, batches))
    if not texts:
        raise CalibrationError("no batches to calibrate with; pass token ids [B, T]")
    chain = _find_chain(model)
    linears = _linears(chain, targets)
    others = [t for t in targets if t.name not in linears]
    saved = Checkpoint(checkpoint, (objective, curvature, speed), texts) if checkpoint is not None else None
    finished = _finished(saved, "others", others)
    with _lent([block for block in chain if not any(t.name.startswith(block.name + ".") for t in others)], device):
        hidden, moments = _first_pass(model, chain, texts, [t.name for t in others] if finished is None else [])
    if finished is None:
        finished = {}
        for target in others:
            own = moments.for_weight(target.name, target.matrix.shape)
            if own is not None:
                finished[target.name] = quantize_calibrated(target.matrix, target.format, own, objective, speed=speed)
        if saved is not None:
            saved.save("others", _originals(others), finished)
    for name, (weight, note) in finished.items():
        yield name, weight, note
    full = hidden if device is None else _moved(hidden, device)
    packed = list(full)
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with _without_cache(model):
            gradients = block_gradients(model, [block.module for block in chain], texts) if curvature and chain else []
        for b, whole in enumerate(chain):
            block = whole.on(device)
            mine = {t.name: t for t in targets if t.name in linears and linears[t.name][0] is whole}
            paths = {name: linears[name][1] for name in mine}
            twin = copy.deepcopy(block.module)
            finished = _finished(saved, block.name, mine.values())
            stages = _stages(block, list(paths.items()), full[0]) if finished is None else []
            watched = Curvatures({name: block.module.get_submodule(path) for name, path in paths.items()} if curvature else {})
            original = _Originals(block, [paths[names[0]] for names, _ in stages], watched)
            for i in range(len(texts)):
                full[i] = original.run(i, full[i], gradients[b][i] if curvature and finished is None else None)
            for name, (weight, note) in (finished or {}).items():
                _put(twin.get_submodule(paths[name]), weight)
                yield name, weight, note
            found: dict[str, tuple[IQTensor, str]] = {}
            for names, calls in stages:
                path = paths[names[0]]
                seen = _Pairs()
                weights = original.weights(path, names)
                for i in range(len(texts)):
                    seen.add(original.inputs(path, i), _inputs(block, twin, path, calls, i, packed[i]), weights[i])
                statistics = seen.finish(names[0], sum(len(mine[name].matrix) for name in names))
                for together in _rounded_together([mine[name] for name in names], alone=curvature):
                    matrices = [t.matrix if device is None else t.matrix.to(device) for t in together]
                    rounded = statistics.round(matrices, together[0].format, objective, watched.mean(together[0].name), speed)
                    for target, (weight, note) in zip(together, rounded, strict=True):
                        _put(twin.get_submodule(paths[target.name]), weight)
                        found[target.name] = cast(IQTensor, weight.to(target.matrix.device)), note
                        yield target.name, *found[target.name]
                del seen, statistics  # before the next input's are collected
            if saved is not None and finished is None:
                saved.save(block.name, _originals(mine.values()), found)
            for i in range(len(texts)):
                packed[i] = block.run(twin, i, packed[i])
    finally:
        for module in training:
            module.training = True


@contextlib.contextmanager
def _lent(chain: list[_Block], device: torch.device | None) -> Iterator[None]:
    """Within the context the blocks of a model compute on another device, a copy of one at a time; tensors come and go where they were."""

    if device is None:
        yield
        return

    def forward(module: nn.Module) -> Any:
        def run(*args: Any, **kwargs: Any) -> Any:
            home = next(t.device for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor))
            there = copy.deepcopy(module).to(device)
            del there.forward
            args, kwargs = _moved((args, kwargs), device)
            return _moved(there.forward(*args, **kwargs), home)

        return run

    for block in chain:
        block.module.forward = forward(block.module)
    try:
        yield
    finally:
        for block in chain:
            del block.module.forward


def _rounded_together(targets: list[Target], alone: bool) -> list[list[Target]]:
    """Targets with the same input by format, unless each has a curvature of its own."""
    found: dict[str, list[Target]] = {}
    for target in targets:
        found.setdefault(target.name if alone else target.format.name, []).append(target)
    return list(found.values())


def _put(layer: Any, weight: IQTensor) -> None:
    """Gives a layer the decoded weight."""
    decoded = weight.dequantize(torch.float32).to(layer.weight)
    layer.weight = nn.Parameter(decoded.T if is_conv1d(layer) else decoded, requires_grad=False)


def _originals(targets: Iterable[Target]) -> dict[str, tuple[Tensor, str]]:
    return {t.name: (t.matrix, t.format.name) for t in targets}


def _finished(saved: Checkpoint | None, part: str, targets: Iterable[Target]) -> dict[str, tuple[IQTensor, str]] | None:
    return None if saved is None else saved.load(part, _originals(targets))


# -- the model as a chain of blocks ------------------------------------------------------------------------


def _find_chain(model: nn.Module) -> list[_Block]:
    """The blocks of the `nn.ModuleList` with the most parameters."""
    lists = [(name, m) for name, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m)]
    if not lists:
        return []
    name, blocks = max(lists, key=lambda item: sum(p.numel() for p in item[1].parameters()))
    return [_Block(f"{name}.{i}", block) for i, block in enumerate(blocks)]


def _linears(chain: list[_Block], targets: Sequence[Target]) -> dict[str, tuple[_Block, str]]:
    """Target -> its block and the path of its linear layer in there; experts, routed by token, are left out."""
    found = {}
    for target in targets:
        path = target.name.removesuffix(".weight")
        for block in chain:
            inside = path.removeprefix(block.name + ".")
            if inside != path and target.matrix.dim() == 2 and "expert" not in inside:
                found[target.name] = (block, inside)
    return found


def _first_pass(model: nn.Module, chain: list[_Block], texts: list[Batch], others: list[str]) -> tuple[list[Tensor], Calibration]:
    """Runs the whole model once: the hidden states that enter the chain, each block's other arguments, moments of other weights.

    Raises:
        CalibrationError: the blocks are no chain.
    """
    hidden: list[Tensor] = []
    last: list[Any] = [None]

    def enter(i: int) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            kwargs = dict(kwargs)
            x = args[0] if args else kwargs.pop("hidden_states", None)
            if not isinstance(x, Tensor) or (i and x is not last[0]):
                raise _no_chain(f"block {chain[i].name!r} does not get the output of the block before it")
            if i == 0:
                hidden.append(x.detach())
            chain[i].rest.append((args[1:], kwargs))

        return hook

    def leave(_: nn.Module, __: Any, out: Any) -> None:
        last[0] = out if isinstance(out, Tensor) else out[0]

    hooks = [block.module.register_forward_pre_hook(enter(i), with_kwargs=True) for i, block in enumerate(chain)]
    hooks += [block.module.register_forward_hook(leave) for block in chain]
    try:
        with _without_cache(model):
            moments = calibrate(model, texts, only=others)
    finally:
        for hook in hooks:
            hook.remove()
    if any(len(block.rest) != len(texts) for block in chain):
        raise _no_chain("its blocks do not run once for each batch")
    return hidden, moments


def _no_chain(why: str) -> CalibrationError:
    return CalibrationError(f"this model cannot be rounded layer by layer: {why}; pass calibration=iqtorch.calibrate(model, batches)")


class _without_cache:
    """Within the block, a transformers model keeps no keys and values: the same block runs more than once."""

    def __init__(self, model: nn.Module) -> None:
        self.config: Any = getattr(model, "config", None)
        self.before = getattr(self.config, "use_cache", None)

    def __enter__(self) -> None:
        if self.before is not None:
            self.config.use_cache = False

    def __exit__(self, *_: object) -> None:
        if self.before is not None:
            self.config.use_cache = self.before


def _stages(block: _Block, layers: list[tuple[str, str]], hidden: Tensor) -> list[tuple[list[str], int]]:
    """The linear layers of a block in the order of their calls, those with the same input together, and calls per pass."""
    calls: list[tuple[str, Tensor]] = []

    def note(name: str) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            calls.append((name, args[0] if args else kwargs["input"]))

        return hook

    hooks = [block.module.get_submodule(path).register_forward_pre_hook(note(name), with_kwargs=True) for name, path in layers]
    try:
        block.run(block.module, 0, hidden)
    finally:
        for hook in hooks:
            hook.remove()
    inputs: dict[str, list[Tensor]] = {}
    for name, x in calls:
        inputs.setdefault(name, []).append(x)
    stages: list[tuple[list[str], int]] = []
    for name, own in inputs.items():
        for names, _ in stages:
            if len(own) == len(inputs[names[0]]) and all(a is b for a, b in zip(own, inputs[names[0]], strict=True)):
                names.append(name)
                break
        else:
            stages.append(([name], len(own)))
    return stages


class _Originals:
    """One pass of the texts through an original block: the inputs of some of its layers, its outputs, and, where gradients in its outputs
    are given, those of its layers."""

    def __init__(self, block: _Block, paths: list[str], watched: Curvatures) -> None:
        self.block, self.watched = block, watched
        self.found: dict[str, list[list[Tensor]]] = {path: [] for path in paths}

    def run(self, i: int, hidden: Tensor, gradient: Tensor | None) -> Tensor:
        module = self.block.module
        hooks = []
        for path, found in self.found.items():
            found.append([])
            hooks.append(module.get_submodule(path).register_forward_pre_hook(self._hook(found[-1]), with_kwargs=True))
        try:
            if gradient is None:
                return self.block.run(module, i, hidden)
            with frozen(module), torch.enable_grad(), self.watched.watching():
                out = self.block.call(module, i, hidden.detach().requires_grad_())
                out.backward(gradient.to(out))
                return out.detach()
        finally:
            for hook in hooks:
                hook.remove()

    @staticmethod
    def _hook(found: list[Tensor]) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = args[0] if args else kwargs["input"]
            found.append(x.detach().reshape(-1, x.shape[-1]))

        return hook

    def weights(self, path: str, names: list[str]) -> list[Tensor | None]:
        """For each text, how much the inputs at `path` count, which some layers share: half alike, half by the squared gradients in the
        outputs of these, which is the step of YAQA's power iteration that starts from equal outputs. Half, because few tokens would count
        for most otherwise."""
        tokens = [sum(map(len, calls)) for calls in self.found[path]]
        energy = [self.watched.energy.pop(name) for name in names if name in self.watched.energy]
        energy = [own for own in energy if list(map(len, own)) == tokens]  # not of layers that gradients reached now and then
        if not energy:
            return [None] * len(tokens)
        total = [torch.stack(parts).sum(0) for parts in zip(*energy, strict=True)]
        mean = torch.cat(total).mean().clamp(min=1e-30)
        return [0.5 + 0.5 * own / mean for own in total]

    def inputs(self, path: str, i: int) -> Tensor:
        """float32 `[tokens, K]`; can be asked for once."""
        found, self.found[path][i] = self.found[path][i], []
        return torch.cat(found).float()


def _inputs(block: _Block, module: nn.Module, path: str, calls: int, i: int, hidden: Tensor) -> Tensor:
    """What a linear layer gets in batch `i`: float32 `[tokens, K]`."""
    seen: list[Tensor] = []

    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = args[0] if args else kwargs["input"]
        seen.append(x.detach().reshape(-1, x.shape[-1]).float())
        if len(seen) == calls:
            raise _Enough

    handle = module.get_submodule(path).register_forward_pre_hook(hook, with_kwargs=True)
    try:
        block.run(module, i, hidden)
    except _Enough:
        pass
    finally:
        handle.remove()
    return torch.cat(seen)


# -- the statistics of one input -------------------------------------------------------------------------------


class _Pairs:
    """Sums over pairs of original inputs x and inputs y after packed layers."""

    def __init__(self) -> None:
        self.products: Tensor | None = None
        self.cross: Tensor | None = None
        self.count = 0
        self.sample: list[tuple[Tensor, Tensor]] = []
        self.stride = HELD_OUT

    def add(self, x: Tensor, y: Tensor, weight: Tensor | None = None) -> None:
        aside = torch.zeros(len(x), dtype=torch.bool, device=x.device)
        aside[self.stride // 2 :: self.stride] = True
        self.sample.append((x[aside], y[aside]))
        while sum(len(a) for a, _ in self.sample) > SAMPLE:
            x_all, y_all = (torch.cat(t) for t in zip(*self.sample, strict=True))
            self.sample = [(x_all[::2], y_all[::2])]
            self.stride *= 2
        x, y = x[~aside], y[~aside]
        if weight is not None:
            root = weight[~aside].sqrt()[:, None]
            x, y = x * root, y * root
        if self.products is None or self.cross is None:
            self.products, self.cross = zero_products(y), zero_products(y)
        add_products(self.products, y, y)
        add_products(self.cross, y, x - y)
        self.count += len(y)

    def finish(self, name: str, rows: int) -> _Statistics:
        if self.products is None or self.cross is None or not self.count:
            raise CalibrationError(f"{name!r} saw no activations; pass longer batches")
        if not bool(torch.isfinite(self.products.diagonal()).all()):
            raise CalibrationError(f"the inputs of {name!r} are not finite; look for NaN or Inf in the model, or use float32")
        k = len(self.products)
        warn_of_few(name, k, self.count, int((self.products.diagonal() == 0).sum()))
        moments = shrunk(self.products / self.count, self.count).float()
        cross = (self.cross / (self.count + k)).float()
        x, y = (torch.cat(t) for t in zip(*self.sample, strict=True))
        return _Statistics(moments, cross, x, y, rows)


@dataclass(frozen=True)
class _Statistics:
    """Moments of y, those of y with x - y, pairs kept aside, rows of all weights with this input, and metrics by format."""

    moments: Tensor
    cross: Tensor
    x: Tensor
    y: Tensor
    rows: int
    metrics: dict[str, Metric] = field(default_factory=dict)

    def round(
        self, weights: Sequence[Tensor], fmt: Format, objective: Objective, curvature: Tensor | None = None, speed: Speed = "default"
    ) -> list[tuple[IQTensor, str]]:
        """For each weight (one only, with curvature) the best of: W' with feedback, and W to nearest, by the outputs for the pairs kept
        aside."""
        device = weights[0].device
        fmt = get_format(fmt.plain) if fmt.plain else fmt

        def metric() -> Metric:
            if fmt.name not in self.metrics:
                self.metrics[fmt.name] = Metric(self.moments.to(device), fmt, DAMPING, self.cross.to(device), self.rows)
            return self.metrics[fmt.name]

        importance = self.moments.diagonal().contiguous().to(device)
        x, y = self.x.to(device), self.y.to(device)
        with torch.autocast(device.type, enabled=False):
            found = best_of([w.float() for w in weights], fmt, importance, metric, objective, x, y, curvature, speed)
        dtypes = [w.dtype if w.dtype != torch.float64 else torch.float32 for w in weights]
        return [(IQTensor.from_blocks(blocks, fmt, dtype), note) for (blocks, note), dtype in zip(found, dtypes, strict=True)]
