"""How good a quantized model is: perplexity on a text, and its divergence from the original model.

The protocol is the one quantized language models are usually compared by (llama.cpp's perplexity program): the text is
cut into windows of 512 tokens, the first token of each is replaced by the beginning-of-sequence token, and the
predictions made in the second half of each window are scored, so that each has at least half a window of context.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .errors import EvaluationError

__all__ = ["Divergence", "Perplexity", "kl_divergence", "perplexity", "windows"]

#: Called with (windows done, windows in total) after each batch.
Progress = Callable[[int, int], object]
#: The token that opens each window: an id, None to keep the text's own token, or "config" for `model.config.bos_token_id`.
Bos = int | None | Literal["config"]


@dataclass(frozen=True)
class Perplexity:
    """Perplexity of a model on a text.

    Attributes:
        perplexity: exp of the mean negative log likelihood.
        stderr: standard error of `perplexity`, tokens taken as independent.
        tokens: number of predictions scored.
    """

    perplexity: float
    stderr: float
    tokens: int

    def __str__(self) -> str:
        return f"perplexity {self.perplexity:.3f} +- {self.stderr:.3f} ({self.tokens} tokens)"


@dataclass(frozen=True)
class Divergence:
    """How far the predictions of a model are from those of a base model.

    Attributes:
        mean_kl: mean Kullback-Leibler divergence of the model from the base, KL(base || model), in nats per token.
        stderr: standard error of `mean_kl`, tokens taken as independent.
        percentile_99: the divergence that 1 % of the tokens exceed.
        same_top: share of tokens (0 to 1) for which both models find the same next token most likely.
        perplexity: perplexity of the model on the text.
        base_perplexity: perplexity of the base model on the text.
        tokens: number of predictions scored.
    """

    mean_kl: float
    stderr: float
    percentile_99: float
    same_top: float
    perplexity: float
    base_perplexity: float
    tokens: int

    def __str__(self) -> str:
        return (
            f"mean KL {self.mean_kl:.5f} +- {self.stderr:.5f} nats, same top token {100 * self.same_top:.2f} %, "
            f"perplexity {self.perplexity:.3f} against {self.base_perplexity:.3f} ({self.tokens} tokens)"
        )


def perplexity(
    model: nn.Module,
    ids: Tensor | Sequence[int],
    *,
    window: int = 512,
    batch_size: int = 4,
    bos: Bos = "config",
    progress: Progress | None = None,
) -> Perplexity:
    """Perplexity of a causal language model on a text.

    Args:
        model: maps int64 `[B, T]` token ids to logits `[B, T, V]`, or to an object with `.logits`. It runs where it is,
            in evaluation mode; its training flags are restored.
        ids: token ids of the text, 1-D, without special tokens. Tokens after the last whole window are not used.
        window: tokens per window.
        batch_size: windows per forward pass; the logits take `batch_size * window * V` numbers.
        bos: what the first token of each window is replaced by (see `Bos`).
        progress: called with (windows done, windows in total).

    Raises:
        EvaluationError: the text is shorter than a window, a token id or the window is out of the model's range, or the
            model's output is not finite.
    """
    loss = []
    rows = windows(model, ids, window, bos)
    with _evaluating(model):
        for first in range(0, len(rows), batch_size):
            batch = rows[first : first + batch_size]
            for i, row in enumerate(_log_probabilities(model, batch)):
                loss.append(_loss(row, batch[i], first + i))
            if progress:
                progress(first + len(batch), len(rows))
    return Perplexity(*_exp_mean(torch.cat(loss)), tokens=sum(map(len, loss)))


def kl_divergence(
    model: nn.Module,
    base: nn.Module,
    ids: Tensor | Sequence[int],
    *,
    window: int = 512,
    batch_size: int = 4,
    bos: Bos = "config",
    progress: Progress | None = None,
) -> Divergence:
    """Divergence of `model` from `base` (usually the model before quantization) on a text, and both perplexities.

    Both models run over the text together, each on its own device. Arguments as in `perplexity`; `bos="config"` reads
    the configuration of `base`.

    Raises:
        EvaluationError: as in `perplexity`; also if the vocabularies differ.
    """
    loss, base_loss, divergence, same = [], [], [], []
    rows = windows(base, ids, window, bos)
    with _evaluating(model, base):
        for first in range(0, len(rows), batch_size):
            batch = rows[first : first + batch_size]
            pairs = zip(_log_probabilities(model, batch), _log_probabilities(base, batch), strict=True)
            for i, (ours, theirs) in enumerate(pairs):
                if ours.shape != theirs.shape:
                    raise EvaluationError(f"the models' vocabularies differ: {ours.shape[-1]} and {theirs.shape[-1]} tokens")
                loss.append(_loss(ours, batch[i], first + i))
                base_loss.append(_loss(theirs, batch[i], first + i))
                ours = ours.to(theirs.device)
                # Tokens the base rules out (log probability -inf) contribute nothing, whatever the model says.
                terms = torch.where(theirs.isneginf(), 0.0, theirs.exp() * (theirs - ours))
                divergence.append(terms.sum(-1).cpu().double())
                same.append((ours.argmax(-1) == theirs.argmax(-1)).cpu())
            if progress:
                progress(first + len(batch), len(rows))
    kl = torch.cat(divergence)
    return Divergence(
        mean_kl=kl.mean().item(),
        stderr=_stderr(kl),
        percentile_99=kl.kthvalue(math.ceil(0.99 * len(kl))).values.item(),
        same_top=torch.cat(same).double().mean().item(),
        perplexity=_exp_mean(torch.cat(loss))[0],
        base_perplexity=_exp_mean(torch.cat(base_loss))[0],
        tokens=len(kl),
    )


def windows(model: nn.Module, ids: Tensor | Sequence[int], window: int = 512, bos: Bos = "config") -> Tensor:
    """The text as int64 `[windows, window]` on the CPU, each row starting with `bos`. Arguments and errors as in `perplexity`."""
    text = torch.as_tensor(ids, device="cpu")
    if text.ndim != 1 or text.is_floating_point():
        raise EvaluationError(f"ids must be a 1-D sequence of token ids, got shape {tuple(text.shape)} of {text.dtype}; pass one text")
    if window < 4:
        raise EvaluationError(f"a window needs at least 4 tokens, got window={window}")
    config: Any = getattr(model, "config", None)
    positions = getattr(config, "max_position_embeddings", None)
    if isinstance(positions, int) and window > positions:
        raise EvaluationError(f"the model has {positions} positions, windows have {window}; pass window={positions} or less")
    count = len(text) // window
    if count == 0:
        raise EvaluationError(f"the text has {len(text)} tokens, a window {window}; pass a longer text or a smaller window=")
    rows = text[: count * window].view(count, window).to(torch.int64, copy=True)
    first = getattr(config, "bos_token_id", None) if bos == "config" else bos
    if isinstance(first, int):
        rows[:, 0] = first
    vocabulary = getattr(config, "vocab_size", None)
    low, high = int(rows.min()), int(rows.max())
    if low < 0 or (isinstance(vocabulary, int) and high >= vocabulary):
        raise EvaluationError(f"token ids run from {low} to {high}, the model has 0 to {vocabulary}; use the model's own tokenizer")
    return rows


def _log_probabilities(model: nn.Module, batch: Tensor) -> Iterator[Tensor]:
    """For each window, float32 `[window // 2 - 1, V]` (one more if odd): the predictions made in its second half."""
    out = model(batch.to(_device(model)))
    logits: Tensor = out.logits if hasattr(out, "logits") else out
    scored = logits[:, batch.shape[1] // 2 : -1]
    for row in scored:  # one window at a time: float32 copies of all logits of a batch may not fit
        yield torch.log_softmax(row.float(), -1)


def _loss(log_probabilities: Tensor, window: Tensor, index: int) -> Tensor:
    """float64 `[scored]` on the CPU: negative log likelihood of each scored token of one window."""
    target = window[len(window) // 2 + 1 :].to(log_probabilities.device)
    loss = -log_probabilities.gather(-1, target[:, None])[:, 0].cpu().double()
    if not loss.isfinite().all():
        raise EvaluationError(f"the model's output for window {index} is not finite; look for NaN or Inf in its weights or activations")
    return loss


def _exp_mean(loss: Tensor) -> tuple[float, float]:
    """exp of the mean, and its standard error."""
    value = loss.mean().exp().item()
    return value, value * _stderr(loss)


def _stderr(values: Tensor) -> float:
    return (values.std() / math.sqrt(len(values))).item()


def _device(model: nn.Module) -> torch.device:
    parameter = next(model.parameters(), None)
    return torch.device("cpu") if parameter is None else parameter.device


@contextmanager
def _evaluating(*models: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; training flags are restored."""
    with ExitStack() as stack:
        for model in models:
            for module in [m for m in model.modules() if m.training]:
                stack.callback(setattr, module, "training", True)
            model.eval()
        stack.enter_context(torch.no_grad())
        yield
