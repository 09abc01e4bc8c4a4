"""Hugging Face: the only package of iqtorch that imports transformers, and only when something of it is used.

hook        registers the quantizer whenever transformers' registry is imported
config      `IQConfig`, and what a checkpoint's config.json says
quantizer   `from_pretrained` and `save_pretrained`
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..errors import MissingDependencyError
from ..model import WHEN_PACKED
from ..recipe import Recipe

if TYPE_CHECKING:
    from .config import IQConfig

__all__ = ["IQConfig", "adopt", "encode", "load_causal_lm", "transformers"]


def __getattr__(name: str) -> Any:
    if name != "IQConfig":
        raise AttributeError(f"module 'iqtorch.hf' has no attribute {name!r}")
    transformers()
    from .config import IQConfig

    return IQConfig


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


def adopt(model: nn.Module, recipe: Recipe) -> None:
    """Makes a model whose weights were packed by `recipe`, or the transformers models inside it, such that transformers can save them."""
    modeling = sys.modules.get("transformers.modeling_utils")
    if modeling is None:
        return  # not imported: no model of transformers
    if isinstance(model, modeling.PreTrainedModel):
        from . import quantizer
        from .config import IQConfig

        quantizer.adopt(model, IQConfig(recipe=recipe))
        return
    for child in model.children():  # a sentence transformer, for example
        adopt(child, recipe)


WHEN_PACKED.append(adopt)


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
