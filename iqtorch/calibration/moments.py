"""The second moments of every layer's inputs.

Where importance is the mean square of each activation, `[K]`, calibration is the mean product of every two of them, `[K, K]`: it
tells which errors of a row cancel, and so lets the rounding of one weight make up for the others' (`iqtorch.encode.feedback`).
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import CalibrationError
from ..importance import observe_inputs
from .curvature import collect_curvature

__all__ = ["Calibration", "Moments", "calibrate"]

logger = logging.getLogger("iqtorch")

#: Token ids `[B, T]`, or a dictionary of arguments of the model.
Batch = Tensor | Mapping[str, Any]

#: Of the files that `Calibration.save` writes.
VERSION = 1
#: One activation in this many (of long texts, fewer) is kept aside, to check on it that rounding by the others did help.
HELD_OUT = 8
#: At most this many are kept per layer; beyond, every second one is dropped and half as many are taken from then on.
SAMPLE = 512
#: Nats above the loss of guessing at which a text is taken for another tokenizer's: untrained models are a little above it too.
UNLIKELY = 0.5
#: Columns of a moment matrix computed at a time, and up to how many columns it is summed in float64.
STRIPE = 4096
WIDE = 8192
#: An expert's own moments count as much as those of all experts together once it saw this many tokens per column.
TOKENS_PER_COLUMN = 1.0


@dataclass(frozen=True)
class Moments:
    """Second moments of the inputs of one linear layer, or of one expert.

    Attributes:
        matrix: float32 `[K, K]`, symmetric: mean product of each two activations; zero if no token was seen.
        tokens: activations behind the mean.
        sample: float32 `[S, K]`, other activations of the same layer, kept aside.
    """

    matrix: Tensor
    tokens: int
    sample: Tensor

    @property
    def importance(self) -> Tensor:
        """float32 `[K]`: the mean squares, which is what `Importance` holds."""
        return self.matrix.diagonal().contiguous()

    @property
    def dead(self) -> int:
        """Columns that were always zero."""
        return int((self.matrix.diagonal() == 0).sum())


class Calibration(Mapping[str, tuple[Moments, ...]]):
    """Mapping from parameter name to the moments of its inputs: one entry, or one per expert. Layers that share their input
    share the entry.

    Args:
        moments: by key.
        keys: parameter name -> key of its moments.
        curvatures: parameter name -> float32 `[N, N]`, the curvature of the loss in the layer's outputs, where it was asked for.
    """

    def __init__(
        self, moments: Mapping[str, tuple[Moments, ...]], keys: Mapping[str, str], curvatures: Mapping[str, Tensor] | None = None
    ) -> None:
        self._moments = dict(moments)
        self._keys = dict(keys)
        self._curvatures = dict(curvatures or {})

    def __getitem__(self, name: str) -> tuple[Moments, ...]:
        return self._moments[self._keys[name]]

    def __iter__(self) -> Iterator[str]:
        return iter(self._keys)

    def __len__(self) -> int:
        return len(self._keys)

    def __repr__(self) -> str:
        tokens = max((m.tokens for found in self._moments.values() for m in found), default=0)
        return f"Calibration({len(self)} weights, {len(self._moments)} inputs, {tokens} tokens)"

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        tensors = [t for found in self._moments.values() for m in found for t in (m.matrix, m.sample)]
        return sum(t.nbytes for t in (*tensors, *self._curvatures.values()))

    def curvature(self, name: str) -> Tensor | None:
        """float32 `[N, N]` with a mean diagonal of 1: the curvature of the loss in the outputs of a linear layer, if it is known."""
        return self._curvatures.get(name)

    def for_weight(self, name: str, shape: torch.Size | tuple[int, ...]) -> tuple[Moments, ...] | None:
        """The moments for a weight `[N, K]` (one) or `[E, N, K]` (one per expert); None if there are none.

        Raises:
            CalibrationError: they are of another shape: the calibration was made with another model.
        """
        if name not in self._keys:
            return None
        found = self[name]
        wanted = (1 if len(shape) == 2 else shape[0], shape[-1])
        if (len(found), found[0].matrix.shape[0]) != wanted:
            raise CalibrationError(
                f"calibration of {name!r} has {len(found)} matrices of {found[0].matrix.shape[0]} columns, the weight of shape "
                f"{tuple(shape)} needs {wanted[0]} of {wanted[1]}; it was made with another model: calibrate this one"
            )
        return found

    def save(self, path: str | Path) -> None:
        """Writes a safetensors file; `load` reads it memory-mapped."""
        from safetensors.torch import save_file

        tensors, tokens = {}, {}
        for key, found in self._moments.items():
            tokens[key] = [m.tokens for m in found]
            for i, m in enumerate(found):
                tensors[f"{key}/{i}/matrix"], tensors[f"{key}/{i}/sample"] = m.matrix.contiguous(), m.sample.contiguous()
        tensors |= {f"curvature/{name}": value.contiguous() for name, value in self._curvatures.items()}
        save_file(tensors, str(path), {"iqtorch.calibration": json.dumps({"version": VERSION, "tokens": tokens, "keys": self._keys})})

    @classmethod
    def load(cls, path: str | Path) -> Calibration:
        """Reads what `save` wrote.

        Raises:
            CalibrationError: no such file, or not of this kind.
        """
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(str(path), "pt") as file:
                facts = json.loads((file.metadata() or {})["iqtorch.calibration"])
                version, keys = facts["version"], facts["keys"]
                moments = {
                    key: tuple(
                        Moments(file.get_tensor(f"{key}/{i}/matrix"), n, file.get_tensor(f"{key}/{i}/sample")) for i, n in enumerate(counts)
                    )
                    for key, counts in facts["tokens"].items()
                }
                names = [name.removeprefix("curvature/") for name in file.keys() if name.startswith("curvature/")]  # noqa: SIM118 (no dict)
                curvatures = {name: file.get_tensor(f"curvature/{name}") for name in names}
        except (OSError, SafetensorError, KeyError, ValueError) as error:
            raise CalibrationError(f"{path} is no calibration file, or damaged ({error}); write one with Calibration.save") from error
        if version != VERSION:
            raise CalibrationError(f"{path} has version {version} of calibration files, this iqtorch reads {VERSION}; calibrate again")
        return cls(moments, keys, curvatures)


# -- collecting --------------------------------------------------------------------------------------------


def zero_products(rows: Tensor) -> Tensor:
    """`[K, K]` zeros to sum products of `rows` `[n, K]` in: float64 where that is affordable."""
    k = rows.shape[1]
    wide = torch.float64 if k <= WIDE and rows.device.type != "mps" else torch.float32
    return torch.zeros((k, k), dtype=wide, device=rows.device)


def add_products(total: Tensor, a: Tensor, b: Tensor) -> None:
    """Adds a^T b, a stripe at a time; in full precision also where the model runs within autocast."""
    with torch.autocast(total.device.type, enabled=False):
        for i in range(0, len(total), STRIPE):
            total[i : i + STRIPE] += a[:, i : i + STRIPE].T @ b


class _Recent:
    """The input seen last, and whose it was: the next layer often gets the same tensor."""

    x: Tensor | None = None
    owner: _Products | None = None


class _Products:
    """Running sums of products of one weight's inputs, per expert; or a note that another weight has the same inputs."""

    def __init__(self, name: str, experts: int | None, recent: _Recent) -> None:
        self.name, self.experts, self.recent = name, experts, recent
        self.source: _Products | None = None
        self.total: dict[int, Tensor] = {}
        self.count: dict[int, int] = {}
        self.sample: dict[int, list[Tensor]] = {}
        self.stride: dict[int, int] = {}

    def add(self, x: Tensor, expert: int = 0) -> None:
        shared = self.recent.x is x and self.recent.owner is not None and self.recent.owner.experts == self.experts
        if self.source is None:
            self.source = self.recent.owner if shared else self
        elif self.source is not self and not (shared and self.recent.owner is self.source):
            self.source = self  # shared so far, but not always: counts for itself from now on
        if self.source is self:
            self.recent.x, self.recent.owner = x, self
            self._add(x.detach().reshape(-1, x.shape[-1]).float(), expert)

    def _add(self, rows: Tensor, expert: int) -> None:
        if expert not in self.total:
            self.total[expert] = zero_products(rows)
            self.count[expert], self.sample[expert], self.stride[expert] = 0, [], HELD_OUT
        stride = self.stride[expert]
        aside = torch.zeros(len(rows), dtype=torch.bool, device=rows.device)
        aside[stride // 2 :: stride] = True
        self.sample[expert].append(rows[aside].cpu())
        while sum(map(len, self.sample[expert])) > SAMPLE:
            self.sample[expert] = [torch.cat(self.sample[expert])[::2]]
            self.stride[expert] *= 2
        rows = rows[~aside]
        add_products(self.total[expert], rows, rows)
        self.count[expert] += len(rows)

    def moments(self) -> tuple[Moments, ...]:
        """The means. An expert that saw few tokens leans on what all experts saw, the fewer the more."""
        wide = next(iter(self.total.values()))
        k = len(wide)
        found = []
        pooled = sum(self.total.values()) / max(1, sum(self.count.values())) if self.experts is not None else wide
        for e in range(self.experts or 1):
            total, tokens = self.total.get(e, torch.zeros_like(wide)), self.count.get(e, 0)
            if self.experts is not None:
                lean = k * TOKENS_PER_COLUMN
                mean = (total + lean * pooled) / (tokens + lean)
            else:
                mean = total / max(1, tokens)
            sample = torch.cat(self.sample[e]) if e in self.sample else torch.zeros(0, k, dtype=torch.float32, device="cpu")
            found.append(Moments(mean.float().cpu(), tokens, sample))
        return tuple(found)


class _Ignored:
    def add(self, x: Tensor, expert: int = 0) -> None:
        pass


def calibrate(model: nn.Module, batches: Iterable[Batch], *, only: Collection[str] | None = None, curvature: bool = False) -> Calibration:
    """Runs the model on some text and collects the second moments of the inputs of its linear layers and experts.

    A layer with K inputs takes `4 K^2` bytes (twice that while collecting); layers fed by the same tensor (query, key and
    value; gate and up) are counted once. Experts are counted by the tokens routed to them.

    Args:
        model: a model that is called with token ids, in any float dtype, on any device; its weights not yet packed.
        batches: int64 `[B, T]` token ids, or dictionaries of arguments. 100 000 tokens are plenty; fewer than K are too few.
        only: parameter names to watch, to bound the memory; None = all.
        curvature: for `rounding="yaqa"`: also the curvature of the loss in the outputs of linear layers, by a backward pass per batch;
            `4 N^2` bytes more for a layer with N outputs. Batches are kept.

    Returns:
        A `Calibration`, on the CPU.

    Raises:
        CalibrationError: no batches, token ids that the model does not have, or activations that are not finite.
    """
    recent = _Recent()

    def make(name: str, experts: int | None) -> _Products | _Ignored:
        return _Products(name, experts, recent) if only is None or name in only else _Ignored()

    if curvature:
        batches = list(batches)
    with _listening_for_another_tokenizer(model):
        found, _, _ = observe_inputs(model, checked_batches(model, batches), make)
    seen = {name: own for name, own in found.items() if isinstance(own, _Products) and own.source is not None}
    if not seen and (only is None or only):
        raise CalibrationError(
            "no activations were seen: the batches are empty, or no layer is of the names in `only`; pass token ids [B, T]"
        )
    moments = {}
    for name in [name for name, own in seen.items() if own.total]:
        moments[name] = seen[name].moments()
        seen[name].total.clear()
        _report(name, moments[name])
    curvatures: dict[str, Tensor] = {}
    if curvature:
        linear = {f"{path}.weight": module for path, module in model.named_modules() if isinstance(module, nn.Linear)}
        layers = {name: module for name, module in linear.items() if name in seen}
        curvatures = {name: value.cpu() for name, value in collect_curvature(model, layers, batches).items()}
    return Calibration(moments, {name: own.source.name for name, own in seen.items() if own.source is not None}, curvatures)


def checked_batches(model: nn.Module, batches: Iterable[Batch]) -> Iterator[Batch]:
    """The batches; raises CalibrationError for token ids that the model does not have."""
    vocabulary = getattr(getattr(model, "config", None), "vocab_size", None)
    for batch in batches:
        ids = batch.get("input_ids") if isinstance(batch, Mapping) else batch
        if isinstance(ids, Tensor) and isinstance(vocabulary, int) and ids.numel() and (int(ids.max()) >= vocabulary or int(ids.min()) < 0):
            low, high = int(ids.min()), int(ids.max())
            raise CalibrationError(
                f"token ids run from {low} to {high}, the model has 0 to {vocabulary - 1}; use the model's own tokenizer"
            )
        yield batch


@contextlib.contextmanager
def _listening_for_another_tokenizer(model: nn.Module) -> Iterator[None]:
    """Within the block, a causal model whose first text is less likely to it than random tokens are on average is warned of."""

    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        handle.remove()
        ids, logits = args[0] if args else kwargs.get("input_ids"), getattr(out, "logits", None)
        if not isinstance(ids, Tensor) or not isinstance(logits, Tensor) or logits.shape[:-1] != ids.shape or ids.shape[-1] < 2:
            return
        predicted, actual = logits[:, :-1].flatten(0, 1)[:SAMPLE].float(), ids[:, 1:].flatten()[:SAMPLE].to(logits.device)
        loss = float(nn.functional.cross_entropy(predicted, actual))
        guessing = math.log(logits.shape[-1])
        if loss > guessing + UNLIKELY:
            logger.warning(
                "the model expects this text less than random tokens (loss %.2f, of guessing %.2f); is it of the model's own tokenizer?",
                loss,
                guessing,
            )

    causal = getattr(model, "can_generate", None)
    handle = model.register_forward_hook(hook, with_kwargs=True)
    if causal is None or not causal():
        handle.remove()
    try:
        yield
    finally:
        handle.remove()


def _report(name: str, found: tuple[Moments, ...]) -> None:
    """Warns of what makes moments unreliable; raises CalibrationError for activations that are not finite."""
    for e, m in enumerate(found):
        if not bool(torch.isfinite(m.matrix.diagonal()).all()):
            where = f"expert {e} of {name!r}" if len(found) > 1 else repr(name)
            raise CalibrationError(f"the inputs of {where} are not finite; look for NaN or Inf in the model, or use float32")
    unseen = [e for e, m in enumerate(found) if not m.tokens]
    if unseen:
        logger.warning("experts %s of %r saw no token: rounded by the moments of all experts; use more text", unseen, name)
    warn_of_few(name, len(found[0].matrix), min((m.tokens for m in found if m.tokens), default=0), found[0].dead)


def warn_of_few(name: str, columns: int, tokens: int, dead: int) -> None:
    """Warns of moments of fewer tokens than columns (if any), and of columns that were always zero."""
    if 0 < tokens < columns:
        logger.warning("%r has %d columns and saw only %d tokens: its moments are damped; use more text", name, columns, tokens)
    if dead:
        logger.warning("%d of the %d inputs of %r were always zero", dead, columns, name)
