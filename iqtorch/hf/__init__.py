"""Hugging Face: the only package of iqtorch that imports transformers and diffusers, and only when something of them is used.

config      `IQConfig`, and what a checkpoint's config.json says
quantizer   `from_pretrained` and `save_pretrained` of transformers; registered by iqtorch/hook.py
diffusers   those of diffusers
"""

from __future__ import annotations

import importlib
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


#: Modules with a base class of models that can be saved, and ours that sees to it.
_SAVED = (
    ("transformers.modeling_utils", "PreTrainedModel", ".quantizer"),
    ("diffusers.models.modeling_utils", "ModelMixin", ".diffusers"),
)


def adopt(model: nn.Module, recipe: Recipe) -> None:
    """Makes a model whose weights were packed by `recipe`, or the models inside it, such that transformers or diffusers can save them."""
    for module, base, ours in _SAVED:
        if module in sys.modules and isinstance(model, getattr(sys.modules[module], base)):  # if not imported: no model of it
            from .config import IQConfig

            importlib.import_module(ours, __name__).adopt(model, IQConfig(recipe=recipe))
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
