"""Activations, moments, texts and a small model for the tests of calibration."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from iqtorch.calibration import Moments

transformers = pytest.importorskip("transformers")


def correlated(k: int, tokens: int, seed: int = 0) -> Tensor:
    """Activations `[tokens, k]` with correlated columns of different sizes."""
    g = torch.Generator().manual_seed(seed)
    mix = torch.eye(k) + 0.7 / k**0.5 * torch.randn(k, k, generator=g)
    return torch.randn(tokens, k, generator=g) @ mix * (0.3 + torch.rand(k, generator=g))


def moments_of(x: Tensor, sample: Tensor | None = None) -> Moments:
    return Moments(x.T @ x / len(x), len(x), x[:64] if sample is None else sample)


def llama(**changes: object) -> nn.Module:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        **{
            "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
            "vocab_size": 64, "tie_word_embeddings": False, **changes,
        }
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


def tokens(vocabulary: int = 64, batches: int = 3, shape: tuple[int, int] = (4, 48)) -> list[Tensor]:
    g = torch.Generator().manual_seed(1)
    return [torch.randint(vocabulary, shape, generator=g) for _ in range(batches)]


def output_error(model: nn.Module, base: nn.Module, batches: list[Tensor]) -> float:
    with torch.no_grad():
        return float(sum((model(b).logits - base(b).logits).square().mean() for b in batches))
