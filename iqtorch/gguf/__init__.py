"""GGUF files: reading, writing, and whole models both ways. Nothing outside this package knows the container."""

from __future__ import annotations

from .errors import (
    GGUFArchitectureError,
    GGUFError,
    GGUFLimitError,
    GGUFMagicError,
    GGUFMetadataError,
    GGUFNameError,
    GGUFSplitError,
    GGUFTensorError,
    GGUFTokenizerError,
    GGUFTruncatedError,
    GGUFTypeError,
    GGUFVersionError,
)
from .load import load_gguf
from .names import gguf_name
from .reader import GGUFFile, TensorInfo
from .rules import custom_q
from .save import save_gguf
from .tensors import use_file_order
from .tokenizer import load_tokenizer
from .writer import TensorSource, write_gguf

__all__ = [
    "GGUFArchitectureError",
    "GGUFError",
    "GGUFFile",
    "GGUFLimitError",
    "GGUFMagicError",
    "GGUFMetadataError",
    "GGUFNameError",
    "GGUFSplitError",
    "GGUFTensorError",
    "GGUFTokenizerError",
    "GGUFTruncatedError",
    "GGUFTypeError",
    "GGUFVersionError",
    "TensorInfo",
    "TensorSource",
    "custom_q",
    "gguf_name",
    "load_gguf",
    "load_tokenizer",
    "save_gguf",
    "use_file_order",
    "write_gguf",
]
