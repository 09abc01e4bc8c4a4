"""A small trained Llama and two texts that come with the package, so that demos and quality tests need no download.

The model (3.7 M parameters: hidden size 256, 4 layers, tied embeddings, vocabulary of 2048, context 512) was trained from
scratch for iqtorch on classic books in the public domain; the held-out text is from eight other such books. Its
perplexity on the held-out text is 29.157 by the protocol of `iqtorch.evaluate`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..hf import load_causal_lm

__all__ = ["TINY_LLAMA", "TINY_LLAMA_IMPORTANCE", "calibration_text", "heldout_text", "load_tiny_llama"]

_FOLDER = Path(__file__).parent
#: Folder of the model, as `transformers.AutoModelForCausalLM.from_pretrained` reads it.
TINY_LLAMA = _FOLDER / "tiny-llama"
#: Importance of the model's columns on `calibration_text()`, as a legacy imatrix file.
TINY_LLAMA_IMPORTANCE = TINY_LLAMA / "imatrix.dat"


def load_tiny_llama(dtype: torch.dtype = torch.float32) -> tuple[nn.Module, Any]:
    """The embedded model in evaluation mode, and its tokenizer.

    Raises:
        MissingDependencyError: transformers is not installed.
    """
    return load_causal_lm(TINY_LLAMA, dtype)


def heldout_text() -> str:
    """Text for evaluation (160 kB), which the model was not trained on."""
    return (_FOLDER / "heldout.txt").read_text(encoding="utf-8")


def calibration_text() -> str:
    """Text for importance and calibration (368 kB), from the model's training text."""
    return (_FOLDER / "calibration.txt").read_text(encoding="utf-8")
