"""Checkpoints from file to file, without holding a model in memory.

shards    safetensors folders: what they hold, and the layout of the files to write
job       writing large files piece by piece: parallel, resumable
stream    `quantize_checkpoint` and `convert_checkpoint`
"""

from __future__ import annotations

from .stream import convert_checkpoint, parameter_names, quantize_checkpoint

__all__ = ["convert_checkpoint", "parameter_names", "quantize_checkpoint"]
