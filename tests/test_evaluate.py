"""Perplexity and divergence: against plain float64 arithmetic, known distributions, and the embedded model's figure."""

from __future__ import annotations

import copy
import math
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from iqtorch import data, evaluate, hf
from iqtorch.errors import EvaluationError


class Bigram(nn.Module):
    """Predicts the next token from the current one alone, by a table of logits."""

    def __init__(self, logits: Tensor, bos: int | None = None) -> None:
        super().__init__()
        self.table = nn.Parameter(logits)
        self.config = SimpleNamespace(bos_token_id=bos, vocab_size=logits.shape[0], max_position_embeddings=64)
        self.dropout = nn.Dropout(0.9)

    def forward(self, ids: Tensor) -> SimpleNamespace:
        return SimpleNamespace(logits=self.dropout(self.table[ids]))


def random_model(seed: int, vocabulary: int = 11, bos: int | None = None) -> Bigram:
    return Bigram(torch.randn(vocabulary, vocabulary, generator=torch.Generator().manual_seed(seed)) * 2, bos)


def text(length: int, vocabulary: int = 11) -> Tensor:
    return torch.randint(0, vocabulary, (length,), generator=torch.Generator().manual_seed(3))


def expected(model: Bigram, base: Bigram, ids: list[int], window: int) -> tuple[float, float, float]:
    """Perplexity of `model`, mean KL from `base` and share of equal top tokens, one prediction at a time."""
    loss, kl, same = [], [], []
    for start in range(0, len(ids) - window + 1, window):
        for position in range(window // 2, window - 1):
            token, target = ids[start + position], ids[start + position + 1]
            p = base.table[token].detach().double().softmax(-1)
            q = model.table[token].detach().double().softmax(-1)
            loss.append(-math.log(q[target]))
            kl.append(sum(float(a) * math.log(a / b) for a, b in zip(p, q, strict=True)))
            same.append(int(p.argmax()) == int(q.argmax()))
    return math.exp(sum(loss) / len(loss)), sum(kl) / len(kl), sum(same) / len(same)


@pytest.mark.parametrize("window", [4, 5, 16])
@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_matches_plain_arithmetic(window: int, batch_size: int) -> None:
    model, base, ids = random_model(1), random_model(2), text(83)
    ppl, kl, same = expected(model, base, ids.tolist(), window)
    found = evaluate.perplexity(model, ids, window=window, batch_size=batch_size)
    assert found.perplexity == pytest.approx(ppl, rel=1e-6)
    assert found.tokens == 83 // window * (window - 1 - window // 2)
    divergence = evaluate.kl_divergence(model, base, ids.tolist(), window=window, batch_size=batch_size)
    assert divergence.mean_kl == pytest.approx(kl, rel=1e-5)
    assert divergence.same_top == pytest.approx(same)
    assert divergence.perplexity == found.perplexity
    assert divergence.base_perplexity == pytest.approx(expected(base, base, ids.tolist(), window)[0], rel=1e-6)
    assert divergence.tokens == found.tokens


def test_uniform_model_has_the_perplexity_of_its_vocabulary() -> None:
    found = evaluate.perplexity(Bigram(torch.zeros(11, 11)), text(64), window=16)
    assert found.perplexity == pytest.approx(11, rel=1e-6)
    assert found.stderr == pytest.approx(0, abs=1e-6)


def test_a_model_does_not_diverge_from_itself() -> None:
    model = random_model(1)
    found = evaluate.kl_divergence(copy.deepcopy(model), model, text(64), window=16)
    assert (found.mean_kl, found.same_top) == (0.0, 1.0)


def test_tokens_ruled_out_by_both_models_do_not_count() -> None:
    model, base = random_model(1, 12), random_model(2, 12)
    for m in (model, base):
        m.table.data[:, 11] = -torch.inf
    found = evaluate.kl_divergence(model, base, text(64), window=16)
    assert found.mean_kl == pytest.approx(expected_without_last(model, base, text(64)), rel=1e-5)


def expected_without_last(model: Bigram, base: Bigram, ids: Tensor) -> float:
    cut = [Bigram(m.table.data[:-1, :-1]) for m in (model, base)]
    return expected(cut[0], cut[1], ids.tolist(), 16)[1]


@pytest.mark.parametrize(("bos", "first"), [("config", 7), (2, 2), (None, None)])
def test_first_token_of_each_window(bos: int | str | None, first: int | None) -> None:
    seen: list[Tensor] = []

    class Spy(Bigram):
        def forward(self, ids: Tensor) -> SimpleNamespace:
            seen.append(ids)
            return super().forward(ids)

    ids = text(40)
    before = ids.clone()
    evaluate.perplexity(Spy(torch.zeros(11, 11), bos=7), ids, window=8, bos=bos)  # type: ignore[arg-type]
    rows, original = torch.cat(seen), before.view(5, 8)
    assert torch.equal(rows[:, 1:], original[:, 1:])
    assert torch.equal(rows[:, 0], original[:, 0] if first is None else torch.full((5,), first))
    assert torch.equal(ids, before)


def test_training_flags_are_restored() -> None:
    model = random_model(1).train()
    model.dropout.eval()
    evaluate.perplexity(model, text(32), window=16)
    assert model.training and not model.dropout.training
    model.dropout.train()  # dropout at 0.9 would change every logit
    assert evaluate.perplexity(model, text(32), window=16) == evaluate.perplexity(model.eval(), text(32), window=16)


def test_progress_reports_every_batch() -> None:
    calls: list[tuple[int, int]] = []
    evaluate.perplexity(random_model(1), text(70), window=10, batch_size=3, progress=lambda done, total: calls.append((done, total)))
    assert calls == [(3, 7), (6, 7), (7, 7)]


@pytest.mark.parametrize(
    ("ids", "arguments", "message"),
    [
        (text(15), {"window": 16}, "15 tokens.*longer text"),
        (text(32).view(2, 16), {"window": 16}, "1-D"),
        (text(32).float(), {"window": 16}, "float32"),
        (text(32), {"window": 2}, "at least 4"),
        (text(200), {"window": 128}, "64 positions.*window=64"),
        (text(32) + 1, {"window": 16}, "to 11.*tokenizer"),
        (-text(32), {"window": 16}, "tokenizer"),
    ],
)
def test_bad_input_is_refused(ids: Tensor, arguments: dict[str, int], message: str) -> None:
    with pytest.raises(EvaluationError, match=message):
        evaluate.perplexity(random_model(1), ids, **arguments)  # type: ignore[arg-type]


def test_output_that_is_not_finite_is_refused() -> None:
    model = random_model(1)
    ids = text(64)
    model.table.data[ids[60]] = torch.nan
    with pytest.raises(EvaluationError, match="window [0-3] is not finite"):
        evaluate.perplexity(model, ids, window=16)


def test_vocabularies_must_agree() -> None:
    with pytest.raises(EvaluationError, match="12 and 11"):
        evaluate.kl_divergence(random_model(1, 12), random_model(2, 11), text(32), window=16)


def test_embedded_model_scores_its_published_perplexity() -> None:
    """29.157: transformers in float32, measured apart from this code."""
    model, tokenizer = data.load_tiny_llama()
    found = evaluate.perplexity(model, hf.encode(tokenizer, data.heldout_text()))
    assert found.tokens == 25500
    assert found.perplexity == pytest.approx(29.157, abs=6e-4)
