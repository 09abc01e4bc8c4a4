"""iqtorch: the IQ weight formats of ik_llama.cpp, packed, as PyTorch tensors.

    import iqtorch
    iqtorch.quantize_model(model, "iq2_kl")

Importing this package does not import Triton or transformers and builds nothing.
"""

from __future__ import annotations

from .formats import Format, format_by_ggml_type, get_format, list_formats
from .ops import kernel_info, set_activation_precision, set_backend
from .tensor import IQTensor, set_fallback

__version__ = "0.1.0"

__all__ = [
    "Format",
    "IQTensor",
    "format_by_ggml_type",
    "get_format",
    "kernel_info",
    "list_formats",
    "set_activation_precision",
    "set_backend",
    "set_fallback",
]
