"""Text that a model writes itself: what it would say is what a packed copy of it should say too, and there is no end of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import CalibrationError
from .curvature import SEED

#: Texts written at a time.
TOGETHER = 64


def own_text(model: nn.Module, batches: Sequence[Tensor | Mapping[str, Any]], seed: int = SEED) -> list[Tensor]:
    """Token ids of the same shapes as `batches`, drawn from the predictions of the model after the first token of each text.

    Args:
        model: a transformers model that can generate.
        batches: int64 `[B, T]` token ids, or dictionaries with `input_ids`.
        seed: of the random numbers; the caller's are left as they were.

    Returns:
        As many batches; the same ones again for the same model and seed.

    Raises:
        CalibrationError: a model that cannot generate, or batches without token ids.
    """
    generator: Any = model
    if not (hasattr(model, "generate") and getattr(model, "can_generate", lambda: False)()):
        raise CalibrationError("own_text needs a transformers model that can generate; pass more text instead")
    from transformers import GenerationConfig

    texts: list[Tensor] = []
    for batch in batches:
        text = batch.get("input_ids") if isinstance(batch, Mapping) else batch
        if not isinstance(text, Tensor) or text.dim() != 2 or text.shape[1] < 2:
            raise CalibrationError("own_text needs batches of token ids [B, T], T of 2 at least, or with `input_ids` of that shape")
        texts.append(text)
    found: list[Tensor] = []
    device = next(model.parameters()).device
    habits = generator.generation_config
    try:
        with torch.no_grad(), torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.manual_seed(seed)
            for length in dict.fromkeys(text.shape[1] for text in texts):
                # as it predicts, without the penalties and limits that it is used with
                generator.generation_config = GenerationConfig(
                    do_sample=True, temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=length - 1, pad_token_id=0
                )
                starts = torch.cat([text[:, :1] for text in texts if text.shape[1] == length]).to(device)
                written = [generator.generate(part, attention_mask=torch.ones_like(part)) for part in starts.split(TOGETHER)]
                found.append(torch.cat(written))
    finally:
        generator.generation_config = habits
    lengths = [text.shape[1] for text in texts]
    places = dict(zip(dict.fromkeys(lengths), [iter(rows) for rows in found], strict=True))
    return [torch.stack([next(places[text.shape[1]]) for _ in range(len(text))]) for text in texts]
