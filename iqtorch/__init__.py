"""iqtorch: the IQ weight formats of ik_llama.cpp, packed, as PyTorch tensors.

    import iqtorch
    iqtorch.quantize_model(model, "iq2_kl")

Importing this package does not import Triton or transformers and builds nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from . import sharding  # noqa: F401 (what DTensor, FSDP2 and DistributedDataParallel ask of a packed weight)
from .formats import Format, format_by_ggml_type, get_format, list_formats
from .fuse import fuse, unfuse
from .hook import install as install_hook
from .linear import Conv1d, Embedding, Linear
from .model import quantize_model
from .ops import kernel_info, set_activation_precision, set_backend
from .quantize import quantize
from .recipe import Recipe
from .report import report
from .tensor import IQTensor
from .tensor_ops import set_fallback

__version__ = "0.1.0"

__all__ = [
    "Conv1d",
    "Embedding",
    "Format",
    "IQTensor",
    "Linear",
    "Recipe",
    "format_by_ggml_type",
    "fuse",
    "get_format",
    "kernel_info",
    "list_formats",
    "quantize",
    "quantize_model",
    "report",
    "set_activation_precision",
    "set_backend",
    "set_fallback",
    "unfuse",
]

#: Loaded on first use: name -> module and attribute ("" = the module itself).
_LAZY = {
    "data": ("data", ""),
    "errors": ("errors", ""),
    "gguf": ("gguf", ""),
    "Calibration": ("calibration", "Calibration"),
    "IQConfig": ("hf", "IQConfig"),
    "merge_adapter": ("hf.adapters", "merge_adapter"),
    "place": ("hf.placement", "place"),
    "Importance": ("importance", "Importance"),
    "calibrate": ("calibration", "calibrate"),
    "collect_importance": ("importance", "collect_importance"),
    "refine": ("calibration.refine", "refine"),
    "cpu": ("cpu_ext", ""),
    "convert_checkpoint": ("checkpoint", "convert_checkpoint"),
    "evaluate": ("evaluate", ""),
    "load_gguf": ("gguf", "load_gguf"),
    "quantize_checkpoint": ("checkpoint", "quantize_checkpoint"),
    "save_gguf": ("gguf", "save_gguf"),
}

if TYPE_CHECKING:
    from . import cpu_ext as cpu  # noqa: F401 (what iqtorch.cpu is)
    from . import data as data
    from . import errors as errors
    from . import evaluate as evaluate
    from . import gguf as gguf
    from .calibration import Calibration as Calibration
    from .calibration import calibrate as calibrate
    from .calibration.refine import refine as refine
    from .checkpoint import convert_checkpoint as convert_checkpoint
    from .checkpoint import quantize_checkpoint as quantize_checkpoint
    from .gguf import load_gguf as load_gguf
    from .gguf import save_gguf as save_gguf
    from .hf import IQConfig as IQConfig
    from .hf.adapters import merge_adapter as merge_adapter
    from .hf.placement import place as place
    from .importance import Importance as Importance
    from .importance import collect_importance as collect_importance

# Saved models load through transformers whatever the order of imports.
install_hook()


def _lazy(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'iqtorch' has no attribute {name!r}")
    module, attribute = _LAZY[name]
    loaded = importlib.import_module(f"iqtorch.{module}")
    return getattr(loaded, attribute) if attribute else loaded


if not TYPE_CHECKING:  # a type checker would take any name for one of ours
    __getattr__ = _lazy


def __dir__() -> list[str]:
    return sorted({*__all__, *_LAZY, *(name for name in globals() if name.startswith("__"))})
