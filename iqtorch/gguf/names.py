"""Tensor names: Hugging Face parameter names <-> GGUF tensor names, by the tables of the `gguf` package."""

from __future__ import annotations

import re
from functools import lru_cache
from typing import Any

from ..errors import MissingDependencyError

__all__ = ["gguf_name", "gguf_package"]

_SUFFIXES = (".weight", ".bias")
_LAYER = re.compile(r"(?<=\.)\d+(?=\.)")


def gguf_package() -> Any:
    """The `gguf` package.

    Raises:
        MissingDependencyError: it is not installed.
    """
    try:
        import gguf
    except ModuleNotFoundError as error:
        if error.name != "gguf":
            raise
        raise MissingDependencyError("the gguf package is needed for GGUF names and files: pip install 'iqtorch[gguf]'") from error
    return gguf


@lru_cache(maxsize=1)
def _patterns() -> dict[str, str]:
    """Name patterns of all architectures -> GGUF name patterns, `{bid}` for the layer number.

    The few patterns that mean different tensors in different architectures take the meaning they have in Llama.
    """
    gguf = gguf_package()
    tables = gguf.TensorNameMap
    common = gguf.MODEL_TENSORS[gguf.MODEL_ARCH.LLAMA]
    found: dict[str, Any] = {}
    for config in (tables.mappings_cfg, tables.block_mappings_cfg):
        for tensor, patterns in config.items():
            for pattern in (*patterns, gguf.TENSOR_NAMES[tensor]):
                if pattern not in found or tensor in common:
                    found[pattern] = tensor
    return {pattern: gguf.TENSOR_NAMES[tensor] for pattern, tensor in found.items()}


def table_spelling(name: str) -> str:
    """A parameter's name without the levels that the package's tables lack: a text model's in a larger one, those of `as_stored`."""
    name = re.sub(
        r"\.kv_b_proj(?=\.[kv]_b_proj\.)|\.in_proj_qkvz(?=\.in_proj_)|(?<=out_proj)\.tiled", "", name.replace("language_model.", "")
    )
    return name.replace("linear_attn.dt_bias", "linear_attn.dt_proj.bias")


@lru_cache(maxsize=1 << 16)
def gguf_name(name: str) -> str | None:
    """The GGUF name of a Hugging Face parameter (a GGUF name is its own), or None if no architecture has it.

    Arrays of experts have no suffix in Hugging Face models: `...mlp.experts.down_proj` is `blk.N.ffn_down_exps.weight`.

    Raises:
        MissingDependencyError: the gguf package is not installed.
    """
    suffix = next((s for s in _SUFFIXES if name.endswith(s)), "")
    stem = table_spelling(name).removesuffix(suffix)
    if (layer := _LAYER.search(stem + ".")) is not None:
        stem = f"{stem[: layer.start()]}{{bid}}{stem[layer.end() :]}"
    found = _patterns().get(stem)
    if found is None:
        return None
    if not suffix and "exps" in found:
        suffix = ".weight"
    return (found.format(bid=layer.group()) if layer else found) + suffix
