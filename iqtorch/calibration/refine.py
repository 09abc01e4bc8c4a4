"""`refine`: a short distillation of what a packed model can still change: the scales of its rows and super-blocks, its norms and
biases, and, if asked for, its codes. The original model's predictions are the target; the bytes stay those of the format.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ..encode.nearest import Nearest, nearest
from ..errors import CalibrationError
from ..formats.base import bits_to_float, float_to_bits
from ..linear import set_weight
from ..tensor import IQTensor
from .curvature import call
from .moments import Batch, checked_batches
from .own_text import own_text as write

__all__ = ["Refinement", "refine"]

logger = logging.getLogger("iqtorch")

M = TypeVar("M", bound=nn.Module)

#: One batch in this many (and at least one) is kept aside to judge by.
HELD_OUT = 8
#: Adam's step of scales (relative) and of norms and biases (relative to their root mean square), at its largest.
SCALE_STEP = 5e-3
NORM_STEP = 5e-3
#: Adam's step of a weight whose code may change, relative to the distance between neighbouring codes.
CODE_STEP = 0.05
#: .. and how far it may go in all, so that a long training does not jump about.
CODE_TRAVEL = 1.5
#: Cells searched for the codes of large codebooks.
PROBES = 8


@dataclass(frozen=True)
class Refinement:
    """What `refine` did.

    Attributes:
        before, after: mean KL divergence from the base on the batches kept aside, in nats per token; after the best epoch.
        kept: whether the model was changed: not if that would not have lowered the divergence.
        steps: steps of training.
        scales: number of scales that were free.
        codes: share of the codes that changed.
    """

    before: float
    after: float
    kept: bool
    steps: int
    scales: int
    codes: float

    def __str__(self) -> str:
        what = f"KL {self.before:.5f} -> {self.after:.5f} on held-out batches, {self.steps} steps, {self.scales} scales"
        return what + (f", {100 * self.codes:.1f} % of codes" if self.codes else "") + ("" if self.kept else "; model left as it was")


def refine(
    model: nn.Module,
    base: nn.Module,
    batches: Iterable[Batch],
    *,
    epochs: int = 3,
    codes: bool = False,
    own_text: bool = False,
) -> Refinement:
    """Trains the continuous parameters of a packed model towards the predictions of the original, in place.

    Free are, per weight of a linear layer, the super-block scales (or row scales) and the minima of affine formats, as far as the
    format can store them, and all norms and biases. With `codes=True` codes may change too (straight-through estimate, scales of groups
    fixed). Needs the memory of training the model without optimizer states for its weights: one dense copy of them, and of their gradients;
    with `codes` three more.

    Args:
        model: packed by `quantize_model`; called with token ids, giving `.logits` or a tensor of them.
        base: the original, of the same vocabulary.
        batches: int64 `[B, T]` token ids, or dictionaries of arguments; two at least, of which every eighth is kept aside.
        epochs: passes over the batches.
        codes: whether codes may change.
        own_text: in each epoch, in place of half of the batches, text that `base` writes anew, a transformers model that can generate.
            With little text this keeps the training from learning what is peculiar to it.

    Returns:
        What was done. The model becomes what it was after the epoch with the least divergence on the batches kept aside, and is left
        as it was if that does not fall.

    Raises:
        CalibrationError: fewer than two batches, token ids that the model does not have, no packed linear layer, a divergence that is
            not finite, or `own_text` of a model that cannot generate.
    """
    texts = list(checked_batches(base, batches))
    if len(texts) < 2:
        raise CalibrationError(f"refine needs two batches or more, one to train on and one to judge by; got {len(texts)}")
    aside = texts[HELD_OUT - 1 :: HELD_OUT] or texts[-1:]
    used = [t for t in texts if not any(t is a for a in aside)]
    packed = _packed_weights(model, codes)
    if not packed:
        raise CalibrationError("refine found no packed linear layer; call quantize_model first")
    free = {name: p for name, p in model.named_parameters() if not isinstance(p, IQTensor) and p.ndim == 1 and p.is_floating_point()}
    dense = {name: p.detach().float().clone().requires_grad_() for name, p in free.items()}
    student = _Student(model, packed, dense)
    training = [module for both in (model, base) for module in both.modules() if module.training]
    model.eval()
    base.eval()
    try:
        before = best = after = student.divergence(base, aside)
        found: list[IQTensor] | None = None
        changed = 0.0
        for _ in _train(student, base, [_with_own_text(base, used, i) if own_text else used for i in range(epochs)]):
            student.store()
            after = student.divergence(base, aside)
            if after < best:
                best, found = after, [weight.packed() for weight in packed]
                values = {name: value.detach().clone() for name, value in dense.items()}
                changed = sum(w.changed() for w in packed) / sum(w.code.numel() for w in packed)
    finally:
        for module in training:
            module.training = True
    if not math.isfinite(before):
        raise CalibrationError(f"the divergence from the base is {before}; look for NaN or Inf in the models, or use float32")
    if found is not None:
        for weight, value in zip(packed, found, strict=True):
            set_weight(weight.module, weight.attribute, value)
        for name, parameter in free.items():
            parameter.data.copy_(values[name])
    scales = sum(w.factors.numel() for w in packed)
    result = Refinement(before, after if found is None else best, found is not None, epochs * len(used), scales, changed)
    logger.info("refine: %s", result)
    return result


class _Weight:
    """A packed weight with free scales: `w = a * factor - b * factor'`, one factor per stored scale (and minimum)."""

    def __init__(self, name: str, module: nn.Module, attribute: str, value: IQTensor, codes: bool) -> None:
        self.name, self.module, self.attribute, self.fmt = name, module, attribute, value.format
        self.shape, self.dtype = value.shape, value.dtype
        self.parts = self.fmt.unpack(value.to_blocks().flatten(0, -2))
        self.scale, low = self.fmt.scales(self.parts)  # [R, groups]
        self.scale = self.scale * self.fmt.runtime_scale
        self.low = None if low is None else low * self.fmt.runtime_scale
        self.value = self.fmt.values(self.parts)  # [R, K]
        self.code = self.parts["code"]
        units = self.parts["d"].shape
        self.factors = torch.ones((1 if low is None else 2, *units), dtype=torch.float32, device=self.value.device, requires_grad=True)
        self.latent: Tensor | None = None
        self.search: Nearest | None = None
        if codes:
            self.latent = self.value.clone().requires_grad_()  # in units of the group's scale
            self.search = nearest(self.fmt.for_encoding, self.value.device, PROBES)

    def parameters(self) -> list[Tensor]:
        return [self.factors] if self.latent is None else [self.factors, self.latent]

    def dense(self) -> Tensor:
        """float32 of the weight's shape, differentiable."""
        k = self.value.shape[1]
        value = self.value if self.latent is None else self.value + (self.latent - self.latent.detach())
        w = _times(_times(value, self.scale), self.factors[0])
        if self.low is not None:
            w = w - _times(self.low, self.factors[1]).repeat_interleave(k // self.low.shape[1], 1)
        return w.view(self.shape)

    def spacing(self) -> float:
        """About the distance between neighbouring values that a weight may take: that of as many evenly spaced ones."""
        levels = self.fmt.codebook.entries ** (1 / self.fmt.vec) * (2 if "sign" in self.fmt.fields else 1)
        return float(self.value.std()) * 12**0.5 / levels

    @torch.no_grad()
    def assign(self) -> None:
        """Codes nearest to the latent weights."""
        if self.latent is None or self.search is None:
            return
        fmt, rows = self.fmt, len(self.value)
        n = fmt.group_size
        x = self.latent.reshape(-1, n)
        groups = torch.ones(len(x), dtype=torch.float32, device=x.device)
        kind = self.parts["variant"].reshape(-1) if "variant" in self.parts and fmt.variant_size == n else torch.zeros_like(groups).int()
        code, value = self.search.codes(x, torch.ones_like(x), groups, kind)
        self.value = value.view(rows, -1)
        self.code = code.view(rows, -1)

    def changed(self) -> int:
        own = self.code
        if "variant" in self.parts and self.fmt.variant_size == self.fmt.vec:
            own = own % self.fmt.codebook.entries
        return int((own != self.parts["code"]).sum())

    @torch.no_grad()
    def store(self) -> None:
        """Rounds the factors to what the format stores."""
        for i, name in enumerate(("d", "dmin")[: len(self.factors)]):
            old = bits_to_float(self.parts[name], self.fmt.d_kind)
            new = bits_to_float(float_to_bits(old * self.factors[i], self.fmt.d_kind), self.fmt.d_kind)
            self.factors[i].copy_(torch.where(old == 0, 1.0, new / torch.where(old == 0, 1.0, old)))

    def packed(self) -> IQTensor:
        parts, fmt = dict(self.parts), self.fmt
        for i, name in enumerate(("d", "dmin")[: len(self.factors)]):
            parts[name] = float_to_bits(bits_to_float(parts[name], fmt.d_kind) * self.factors[i].detach(), fmt.d_kind)
        if self.latent is not None:
            code = self.code
            if "variant" in fmt.fields and fmt.variant_size == fmt.vec:
                parts["variant"], code = code // fmt.codebook.entries, code % fmt.codebook.entries
            parts["code"] = code
            if "sign" in fmt.fields:
                parts["sign"] = fmt.fold_signs(torch.signbit(self.value))
        return IQTensor.from_blocks(fmt.pack(parts).view(*self.shape[:-1], -1), fmt, self.dtype)


def _times(a: Tensor, b: Tensor) -> Tensor:
    """`[R, n]` times `[R, m]`, each factor for n / m neighbours."""
    return (a.unflatten(1, (b.shape[1], -1)) * b[..., None]).flatten(1)


class _Student:
    """A packed model called with dense weights in place of its packed ones."""

    def __init__(self, model: nn.Module, packed: Sequence[_Weight], free: dict[str, Tensor]) -> None:
        self.model, self.packed, self.free = model, packed, free
        self.dtypes = {name: p.dtype for name, p in model.named_parameters()}

    def log_probs(self, batch: Batch) -> Tensor:
        values = {name: p.to(self.dtypes[name]) for name, p in self.free.items()}
        values |= {w.name: w.dense().to(w.dtype) for w in self.packed}
        return _log_probs(_Swapped(self.model, values), batch)

    @torch.no_grad()
    def divergence(self, base: nn.Module, texts: Sequence[Batch]) -> float:
        return sum(float(_divergence(self.log_probs(t), _log_probs(base, t))) for t in texts) / len(texts)

    def store(self) -> None:
        for weight in self.packed:
            weight.assign()
            weight.store()


class _Swapped(nn.Module):
    """A model called with other values of some parameters."""

    def __init__(self, model: nn.Module, values: dict[str, Tensor]) -> None:
        super().__init__()
        self.model, self.values = model, values

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return torch.func.functional_call(self.model, self.values, args, kwargs)


def _log_probs(model: nn.Module, batch: Batch) -> Tensor:
    out = call(model, batch)
    return torch.log_softmax(getattr(out, "logits", out).float(), -1)


def _divergence(ours: Tensor, base: Tensor) -> Tensor:
    """Mean KL(base || ours) per token."""
    return (base.exp() * (base - ours)).sum(-1).mean()


def _with_own_text(base: nn.Module, texts: Sequence[Batch], seed: int) -> list[Batch]:
    """Half of some texts, drawn at random, and in place of the others as much that the model writes."""
    order = torch.randperm(len(texts), generator=torch.Generator().manual_seed(seed), device="cpu").tolist()
    half = (len(texts) + 1) // 2
    return [*(texts[i] for i in order[:half]), *write(base, [texts[i] for i in order[half:]], seed)]


def _train(student: _Student, base: nn.Module, epochs: Sequence[Sequence[Batch]]) -> Iterator[None]:
    """Yields after each epoch."""
    steps = sum(map(len, epochs))
    code_step = min(CODE_STEP, 2 * CODE_TRAVEL / steps)  # the rate is half its largest on average
    groups: list[dict[str, Any]] = [{"params": [w.factors for w in student.packed], "lr": SCALE_STEP}]
    groups += [{"params": [p], "lr": NORM_STEP * max(float(p.detach().square().mean().sqrt()), 1e-3)} for p in student.free.values()]
    for w in student.packed:
        if w.latent is not None:
            groups.append({"params": [w.latent], "lr": code_step * w.spacing()})
    adam = torch.optim.Adam(groups, betas=(0.9, 0.99))
    rates = [group["lr"] for group in groups]
    order = torch.Generator().manual_seed(0)
    step = 0
    for texts in epochs:
        for i in torch.randperm(len(texts), generator=order, device="cpu").tolist():
            with torch.no_grad():
                target = _log_probs(base, texts[i])
            # Warm up for a tenth of the steps, then fall to zero on a cosine.
            share = min(1.0, 10 * (step + 1) / steps) * 0.5 * (1 + math.cos(math.pi * step / steps))
            for group, rate in zip(adam.param_groups, rates, strict=True):
                group["lr"] = rate * share
            for weight in student.packed:
                weight.assign()
            adam.zero_grad()
            with torch.enable_grad():
                loss = _divergence(student.log_probs(texts[i]), target)
            loss.backward()
            adam.step()
            step += 1
        yield


def _packed_weights(model: nn.Module, codes: bool) -> list[_Weight]:
    """Packed weights of linear layers that no other module shares."""
    holders: dict[int, int] = {}
    for module in model.modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                holders[id(parameter)] = holders.get(id(parameter), 0) + 1
    found = []
    for path, module in model.named_modules():
        if isinstance(module, nn.Linear) and isinstance(module.weight, IQTensor) and holders[id(module.weight)] == 1:
            found.append(_Weight(f"{path}.weight" if path else "weight", module, "weight", module.weight, codes))
    return found
