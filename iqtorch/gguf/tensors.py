"""Which tensors of a file make which parameter of a model, and what is done to their rows on the way.

All of it works on rows, so that packed weights stay packed: rows are reordered (q and k of Llama), or the rows of several tensors
follow each other (experts' gate and up). The bytes of a row are never touched.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..halves import split_halves
from .errors import GGUFNameError
from .family import Family
from .names import gguf_package, table_spelling
from .reader import GGUFFile
from .rope import ROPE_TENSORS

__all__ = ["Binding", "bind", "check_names", "merge_heads", "merged_halves", "parameter_names", "use_halves"]

_SUFFIXES = (".weight", ".bias")
#: The halves of `attn_kv_b`.
KEYS, VALUES = "attn_k_b", "attn_v_b"
#: Parameters of experts that the package's tables lack, or have only for some architectures: merged ones, their halves, and biases.
_EXPERTS = re.compile(r"^(?:.*\.)?layers\.(?P<layer>\d+)\..*experts\.(?P<part>(?:gate_up|gate|up)_proj|(?:gate_up|down)_proj_bias)$")
_KV = re.compile(r"(?:^|.*\.)layers\.(?P<layer>\d+)\..*kv_b_proj$")
_CORRECTION = re.compile(r"^.*layers\.(?P<layer>\d+)\.mlp\.(gate\.)?(moe_statics\.)?e_score_correction_bias$")


@dataclass(frozen=True)
class Binding:
    """One parameter and the tensors of a file that it is made of.

    Attributes:
        name: parameter (or buffer) of the model.
        tensors: of the file; several are parts of its rows, one after the other.
        heads: rows are permuted within this many heads; 0 = not at all.
        shift: the file's values are larger by this.
        alternating: rows of the tensors alternate instead.
        merged: the tensors are `attn_k_b`, transposed within each head, and `attn_v_b`, both not quantized: one `kv_b_proj`.
        transposed: the tensor is the parameter with its last two dimensions exchanged (`attn_k_b`).
    """

    name: str
    tensors: tuple[str, ...]
    heads: int = 0
    shift: float = 0.0
    alternating: bool = False
    merged: bool = False
    transposed: bool = False

    @property
    def per_head(self) -> bool:
        """Whether files may hold the heads one below the other, or in a dimension of their own."""
        return self.tensors[0].endswith((f"{KEYS}.weight", f"{VALUES}.weight"))

    def stored_shape(self, value: Tensor) -> tuple[int, ...]:
        """The shape that the parameter's values have in a file."""
        shape = tuple(value.shape)
        return (*shape[:-2], shape[-1], shape[-2]) if self.transposed else shape

    def rows_at(self, ndim: int) -> int:
        """The dimension of rows in a tensor of the file; biases (of experts: one below the other) have nothing else."""
        return ndim - 1 if self.tensors[0].endswith(".bias") else max(ndim - 2, 0)

    def to_model(self, parts: list[Tensor], rows_at: int) -> Tensor:
        """Rows (in dimension `rows_at`) as the model has them, from those of the tensors."""
        if len(parts) == 1:
            rows = parts[0]
        elif self.alternating:
            rows = torch.stack(parts, rows_at + 1).flatten(rows_at, rows_at + 1)
        else:
            rows = torch.cat(parts, rows_at)
        if self.heads:
            rows = rows.index_select(rows_at, torch.argsort(_interleaved(rows.shape[rows_at], self.heads)))
        return rows - self.shift if self.shift else rows

    def to_file(self, rows: Tensor, rows_at: int) -> list[Tensor]:
        """Rows of each tensor, from those of the model; inverse of `to_model`."""
        if self.heads:
            rows = rows.index_select(rows_at, _interleaved(rows.shape[rows_at], self.heads).to(rows.device))
        if self.shift:
            rows = rows + self.shift
        n = len(self.tensors)
        if self.alternating:
            pairs = rows.unflatten(rows_at, (-1, n))
            return [pairs.select(rows_at + 1, i).contiguous() for i in range(n)]
        return [part.contiguous() for part in rows.chunk(n, rows_at)]


def _interleaved(rows: int, heads: int) -> Tensor:
    """Position in transformers' order (two halves per head) of each row in llama.cpp's order (pairs side by side)."""
    return torch.arange(rows).view(heads, 2, -1).transpose(1, 2).flatten()


def parameter_names(model: torch.nn.Module) -> dict[str, Tensor]:
    """Parameters and saved buffers of a model, each once: the tied output layer is left out."""
    saved = model.state_dict(keep_vars=True)
    seen: set[int] = set()
    return {name: value for name, value in saved.items() if id(value) not in seen and not seen.add(id(value))}  # type: ignore[func-returns-value]


def bind(names: Iterable[str], arch: str, family: Family | None, config: Any) -> list[Binding]:
    """Bindings of parameter names.

    Raises:
        GGUFNameError: parameters that have no name in files of this architecture, all listed.
    """
    gguf = gguf_package()
    archs = {name: key for key, name in gguf.MODEL_ARCH_NAMES.items()}
    if arch not in archs:
        raise GGUFNameError(f"architecture {arch!r} is unknown to the installed gguf package; update it: pip install -U gguf")
    table = gguf.get_tensor_name_map(archs[arch], config.num_hidden_layers)
    bindings, unknown = [], []
    for name in names:
        tensors = _tensor_names(name, table)
        if not tensors:
            unknown.append(name)
            continue
        heads = 0
        if family is not None and family.rotated and (match := re.search(r"\.attn_([qk])\.", tensors[0])):
            heads = config.num_attention_heads if match[1] == "q" else config.num_key_value_heads
        shift = family.norm_shift if family is not None and tensors[0].endswith("norm.weight") else 0.0
        columns = family is not None and family.columns and "_exps." in tensors[0]
        transposed = tensors[0].endswith(f"{KEYS}.weight") or (columns and tensors[0].endswith(".weight"))
        bindings.append(Binding(name, tensors, heads, shift, alternating=columns and len(tensors) > 1, transposed=transposed))
    if unknown:
        raise GGUFNameError(f"{len(unknown)} parameters have no name in {arch!r} files: {_listed(unknown)}")
    return bindings


def _tensor_names(name: str, table: Any) -> tuple[str, ...]:
    name = table_spelling(name)
    if match := _CORRECTION.match(name):
        return (f"blk.{match['layer']}.exp_probs_b.bias",)
    if match := _EXPERTS.match(name):
        kind = "bias" if match["part"].endswith("_bias") else "weight"
        parts = match["part"].partition("_proj")[0].split("_")
        return tuple(f"blk.{match['layer']}.ffn_{part}_exps.{kind}" for part in parts)
    suffix = next((s for s in _SUFFIXES if name.endswith(s)), "")
    found = table.get_name(name.removesuffix(suffix))
    if found is None:
        return ()
    return (found + (suffix or ".weight"),)


def use_halves(model: torch.nn.Module, file: GGUFFile) -> None:
    """Makes room in a model for packed halves, where a file has no whole `attn_kv_b`, or gate and up experts of different types."""
    names = []
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and (match := _KV.match(name)):
            halves = [file.tensors.get(f"blk.{match['layer']}.{half}.weight") for half in (KEYS, VALUES)]
            whole = f"blk.{match['layer']}.attn_kv_b.weight" in file.tensors
            if not whole and any(half is not None and half.format is not None for half in halves):
                names.append(f"{name}.k_b_proj.weight")
        elif getattr(module, "has_gate", False) and (match := _EXPERTS.match(f"{name}.gate_up_proj")):
            parts = [file.tensors.get(f"blk.{match['layer']}.ffn_{part}_exps.weight") for part in ("gate", "up")]
            if len({part.format and (part.format.plain or part.format.name) for part in parts if part is not None}) > 1:
                names.append(f"{name}.gate_proj")
    split_halves(model, names)


def merged_halves(bindings: Iterable[Binding], present: Mapping[str, Any], config: Any) -> list[Binding]:
    """Bindings for files that hold MLA's `attn_kv_b` only as two halves that are not quantized."""
    out = []
    for binding in bindings:
        whole = binding.tensors[0]
        halves = tuple(whole.replace("attn_kv_b", half) for half in (KEYS, VALUES))
        if whole.endswith("attn_kv_b.weight") and whole not in present and all(half in present for half in halves):
            binding = Binding(binding.name, halves, heads=config.num_attention_heads, merged=True)
        out.append(binding)
    return out


def merge_heads(k: Tensor, v: Tensor, heads: int) -> Tensor:
    """`kv_b_proj` `[heads * (nope + value), lora]` from `attn_k_b` `[heads, lora, nope]` and `attn_v_b` `[heads, value, lora]`."""
    lora = v.shape[-1]
    return torch.cat([k.reshape(heads, lora, -1).mT, v.reshape(heads, -1, lora)], 1).reshape(-1, lora)


def check_names(path: Any, bindings: Iterable[Binding], present: Mapping[str, Any]) -> None:
    """Refuses a file that lacks tensors or has some that no parameter takes.

    Raises:
        GGUFNameError: lists both.
    """
    wanted = {tensor for binding in bindings for tensor in binding.tensors}
    missing = sorted(wanted - set(present))
    unused = sorted(name for name in set(present) - wanted if not _derived(name, wanted))
    if missing or unused:
        said = [
            f"{len(names)} tensors {what}: {_listed(names)}"
            for names, what in ((missing, "missing"), (unused, "without a parameter"))
            if names
        ]
        raise GGUFNameError(f"{path}: {'; '.join(said)}. Is this the file of another model or another configuration?")


def _derived(name: str, wanted: set[str]) -> bool:
    """Whether a tensor only repeats what others, or the metadata, say."""
    if name in ROPE_TENSORS or name.endswith("attn_rot_embd.weight"):
        return True
    return any(name.endswith(f"{half}.weight") and name.replace(half, "attn_kv_b") in wanted for half in (KEYS, VALUES))


def _listed(names: list[str], most: int = 20) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
