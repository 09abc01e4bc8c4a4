"""The only module that imports transformers, and only when one of its functions is called."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from .errors import MissingDependencyError

__all__ = ["encode", "load_causal_lm", "transformers"]


def transformers() -> Any:
    """The transformers package.

    Raises:
        MissingDependencyError: it is not installed.
    """
    try:
        import transformers
    except ModuleNotFoundError as error:
        if error.name != "transformers":
            raise
        raise MissingDependencyError(
            "transformers is needed for Hugging Face models and not installed: pip install 'iqtorch[hf]'"
        ) from error
    return transformers


def load_causal_lm(path: str | Path, dtype: torch.dtype | str = "auto") -> tuple[nn.Module, Any]:
    """A causal language model in evaluation mode, and its tokenizer, from a folder or hub name.

    Raises:
        MissingDependencyError: transformers is not installed.
    """
    package = transformers()
    model: nn.Module = package.AutoModelForCausalLM.from_pretrained(path, dtype=dtype)
    return model.eval(), package.AutoTokenizer.from_pretrained(path)


def encode(tokenizer: Any, text: str) -> torch.Tensor:
    """int64 `[n]`: the token ids of a text of any length, without special tokens."""
    return torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False).input_ids, dtype=torch.int64)
