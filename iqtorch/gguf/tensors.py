"""Which tensors of a file make which parameter of a model, and what is done to their rows on the way.

All of it works on rows, so that packed weights stay packed: rows are reordered (q and k of Llama), or the rows of several tensors
follow each other (experts' gate and up). The bytes of a row are never touched.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Container, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..as_stored import keep_as_stored
from ..linear import is_conv1d, packable
from ..model import replace_module
from ..tensor import IQTensor
from .errors import GGUFNameError
from .family import Family
from .family_table import qkvz_rows
from .names import gguf_package, table_spelling
from .reader import GGUFFile
from .rope import ROPE_TENSORS

__all__ = [
    "Binding",
    "bind",
    "check_names",
    "conv1d_weights",
    "make_room",
    "merge_heads",
    "merged_halves",
    "parameter_names",
    "use_file_order",
]

_SUFFIXES = (".weight", ".bias")
#: Tensors without a suffix, and convolutions whose dimension of 1 files leave out.
_BARE, _CONVOLUTIONS = (".ssm_a", ".ssm_d"), ("ssm_conv1d.weight", "shortconv.conv.weight")
_QKVZ = ".ssm_in.weight"
#: The halves of `attn_kv_b`.
KEYS, VALUES = "attn_k_b", "attn_v_b"
#: Parameters of experts that the package's tables lack, or have only for some architectures: merged ones, their halves, and biases.
_EXPERTS = re.compile(r"^(?:.*\.)?layers\.(?P<layer>\d+)\..*experts\.(?P<part>(?:gate_up|gate|up)_proj|(?:gate_up|down)_proj_bias)$")
_ROUTER_SCALES = re.compile(r"^(?:.*\.)?layers\.(?P<layer>\d+)\.router\.(?P<part>scale|per_expert_scale)$")
_KV = re.compile(r"(?:^|.*\.)layers\.(?P<layer>\d+)\..*kv_b_proj$")
_CORRECTION = re.compile(r"^.*layers\.(?P<layer>\d+)\.mlp\.(gate\.)?(moe_statics\.)?e_score_correction_bias$")


@dataclass(frozen=True)
class Binding:
    """One parameter and the tensors of a file that it is made of.

    Attributes:
        name: parameter (or buffer) of the model.
        tensors: of the file; several are parts of its rows, one after the other.
        order: rows of the file have another order: for each, its place in the model, given their number.
        columns: the same of columns.
        shift: the file's values are larger by this.
        decay: the file's values are minus the exponentials of the model's.
        alternating: rows of the tensors alternate instead.
        heads: the tensors are `attn_k_b`, transposed within each of so many heads, and `attn_v_b`, both not quantized: one `kv_b_proj`.
        transposed: the tensor is the parameter with its last two dimensions exchanged (`attn_k_b`).
    """

    name: str
    tensors: tuple[str, ...]
    order: Callable[[int], Tensor] | None = None
    columns: Callable[[int], Tensor] | None = None
    shift: float = 0.0
    decay: bool = False
    alternating: bool = False
    heads: int = 0
    transposed: bool = False

    @property
    def per_head(self) -> bool:
        """Whether files may hold the heads one below the other, or in a dimension of their own."""
        return self.tensors[0].endswith((f"{KEYS}.weight", f"{VALUES}.weight"))

    def stored_shape(self, value: Tensor) -> tuple[int, ...]:
        """The shape that the parameter's values have in a file."""
        shape = tuple(value.shape)
        if self.tensors[0].endswith(_CONVOLUTIONS):
            return (shape[0], shape[-1])
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
        if self.order is not None:
            rows = rows.index_select(rows_at, torch.argsort(self.order(rows.shape[rows_at])))
        if self.columns is not None:
            rows = rows.index_select(rows.ndim - 1, torch.argsort(self.columns(rows.shape[-1])))
        if self.decay:
            rows = (-rows).log()
        return rows - self.shift if self.shift else rows

    def to_file(self, rows: Tensor, rows_at: int) -> list[Tensor]:
        """Rows of each tensor, from those of the model; inverse of `to_model`."""
        if self.order is not None:
            rows = rows.index_select(rows_at, self.order(rows.shape[rows_at]).to(rows.device))
        if self.columns is not None:
            rows = rows.index_select(rows.ndim - 1, self.columns(rows.shape[-1]).to(rows.device))
        if self.decay:
            rows = -rows.exp()
        if self.shift:
            rows = rows + self.shift
        n = len(self.tensors)
        if self.alternating:
            pairs = rows.unflatten(rows_at, (-1, n))
            return [pairs.select(rows_at + 1, i).contiguous() for i in range(n)]
        return [part.contiguous() for part in rows.chunk(n, rows_at)]


def parameter_names(model: torch.nn.Module) -> dict[str, Tensor]:
    """Parameters and saved buffers of a model, each once: the tied output layer is left out."""
    saved = model.state_dict(keep_vars=True)
    seen: set[int] = set()
    return {name: value for name, value in saved.items() if id(value) not in seen and not seen.add(id(value))}  # type: ignore[func-returns-value]


def conv1d_weights(model: torch.nn.Module) -> set[str]:
    """Names of weights that lie transposed in a model: those of GPT-2's `Conv1D`."""
    return {f"{name}.weight" for name, module in model.named_modules() if is_conv1d(module)}


def bind(parameters: Mapping[str, Tensor], arch: str, family: Family | None, config: Any, transposed: Container[str] = ()) -> list[Binding]:
    """Bindings of parameters; `transposed`: those of matrices that lie so in the model.

    Raises:
        GGUFNameError: parameters that have no name in files of this architecture, all listed.
    """
    gguf = gguf_package()
    archs = {name: key for key, name in gguf.MODEL_ARCH_NAMES.items()}
    if arch not in archs:
        raise GGUFNameError(f"architecture {arch!r} is unknown to the installed gguf package; update it: pip install -U gguf")
    table = gguf.get_tensor_name_map(archs[arch], config.num_hidden_layers)
    bindings, unknown = [], []
    for name in parameters:
        tensors = _tensor_names(name, table)
        if not tensors:
            unknown.append(name)
            continue
        stem = tensors[0].split(".")[2] if tensors[0].startswith("blk.") else ""
        if family is not None and family.merged and len(tensors) == 2:
            tensors = (tensors[0].replace("ffn_gate_exps", "ffn_gate_up_exps"),)
        binding = Binding(
            name, tensors, decay=stem == "ssm_a", transposed=tensors[0].endswith(f"{KEYS}.weight") or name in transposed
        )  # fmt: skip
        if family is not None:
            turned = family.turned and "_exps." in tensors[0]
            binding = replace(
                binding,
                order=partial(family.rows[stem], config) if stem in family.rows else None,
                columns=_columns(family, stem, name, config),
                shift=family.norm_shift if tensors[0].endswith("norm.weight") and stem != "ssm_norm" else 0.0,
                alternating=turned and len(tensors) > 1,
                transposed=binding.transposed or (turned and tensors[0].endswith(".weight")),
            )
        bindings.append(binding)
    if unknown:
        raise GGUFNameError(f"{len(unknown)} parameters have no name in {arch!r} files: {_listed(unknown)}")
    return bindings


def _columns(family: Family, stem: str, name: str, config: Any) -> Callable[[int], Tensor] | None:
    """Where the columns of a matrix lie in the model; None if there, or if the layer takes them as files have them."""
    if stem not in family.columns or name.endswith((".bias", ".tiled.weight")):
        return None
    return family.columns[stem](config)


def _tensor_names(name: str, table: Any) -> tuple[str, ...]:
    name = table_spelling(name)
    if match := _CORRECTION.match(name):
        return (f"blk.{match['layer']}.exp_probs_b.bias",)
    if match := _ROUTER_SCALES.match(name):
        return (f"blk.{match['layer']}.{'ffn_gate_inp' if match['part'] == 'scale' else 'ffn_down_exps'}.scale",)
    if match := _EXPERTS.match(name):
        kind = "bias" if match["part"].endswith("_bias") else "weight"
        parts = match["part"].partition("_proj")[0].split("_")
        return tuple(f"blk.{match['layer']}.ffn_{part}_exps.{kind}" for part in parts)
    suffix = next((s for s in _SUFFIXES if name.endswith(s)), "")
    stem = name.removesuffix(suffix)
    found = table.get_name(stem) or table.get_name(stem.removeprefix("transformer."))
    if found is None:
        return ()
    return (found if found.endswith(_BARE) else found + (suffix or ".weight"),)


def use_file_order(model: torch.nn.Module) -> None:
    """Puts the columns of a model's weights in the order that GGUF files have them in, in place, where that is another one.

    So it is with the linear attention of Qwen3.5 (`out_proj`). Weights that are not quantized are reordered when they are written; packed
    ones cannot be, so a model that is to be saved as a GGUF file is quantized after this. Its results stay the same.

    Raises:
        GGUFArchitectureError: the architecture has no GGUF form.
    """
    from .families import family_of_config

    config = model.config.get_text_config()  # type: ignore[union-attr,operator]
    family = family_of_config(config)
    parameters = parameter_names(model)
    moved = [b for b in bind(parameters, family.arch, family, config, conv1d_weights(model)) if b.columns is not None]
    moved = [b for b in moved if not isinstance(parameters[b.name], IQTensor)]
    keep_as_stored(model, [f"{b.name.removesuffix('.weight')}.tiled.weight" for b in moved])
    for binding in moved:
        layer: Any = model.get_submodule(binding.name.removesuffix(".weight"))
        value = parameters[binding.name]
        layer.tiled.weight = torch.nn.Parameter(binding.to_file(value.detach(), 0)[0], requires_grad=value.requires_grad)


def make_room(model: torch.nn.Module, file: GGUFFile, bindings: Iterable[Binding]) -> bool:
    """Gives a model layers for packed tensors that it would hold in another way (`as_stored`); whether there are any."""
    names = []
    for binding in bindings:
        infos = [info for info in map(file.tensors.get, binding.tensors) if info is not None]
        packed = {info.format.plain or info.format.name for info in infos if info.format is not None}
        path, _, attribute = binding.name.rpartition(".")
        module = model.get_submodule(path)
        if packed and is_conv1d(module) and attribute == "weight":
            replace_module(model, module, packable(module))
            names.append(binding.name)
        elif packed and binding.columns is not None:
            names.append(f"{path}.tiled.weight")
        elif attribute == "gate_up_proj" and len(packed | {"" for info in infos if info.format is None}) > 1:
            if getattr(module, "has_gate", False):
                names.append(f"{path}.gate_proj")
        elif binding.tensors[0].endswith(_QKVZ) and not infos:
            parts = [file.tensors.get(name) for name in _qkvz_parts(binding.tensors[0])]
            if len({part.type_name for part in parts if part is not None}) > 1:
                names.append(f"{path}.in_proj_qkv.weight")
        elif match := _KV.match(path):
            halves = [file.tensors.get(f"blk.{match['layer']}.{half}.weight") for half in (KEYS, VALUES)]
            if not infos and any(half is not None and half.format is not None for half in halves):
                names.append(f"{path}.k_b_proj.weight")
    keep_as_stored(model, names)
    return bool(names)


def merged_halves(bindings: Iterable[Binding], present: Mapping[str, Any], config: Any) -> list[Binding]:
    """Bindings for files that lay tensors out in another way: MLA's `attn_kv_b` in two halves that are not quantized, `ssm_in` of
    Qwen3-Next in two, gate and up experts in one.
    """
    out = []
    for binding in bindings:
        whole = binding.tensors[0]
        halves = tuple(whole.replace("attn_kv_b", half) for half in (KEYS, VALUES))
        if whole.endswith("attn_kv_b.weight") and whole not in present and all(half in present for half in halves):
            binding = Binding(binding.name, halves, heads=config.num_attention_heads)
        parts = _qkvz_parts(whole)
        if whole.endswith(_QKVZ) and whole not in present and all(part in present for part in parts):
            binding = Binding(binding.name, parts, order=partial(qkvz_rows, config))
        fused = whole.replace(".ffn_gate_exps.", ".ffn_gate_up_exps.")
        if len(binding.tensors) == 2 and not binding.alternating and whole not in present and fused in present:
            binding = replace(binding, tensors=(fused,))
        out.append(binding)
    return out


def _qkvz_parts(whole: str) -> tuple[str, ...]:
    """The tensors that newer files have in the place of Qwen3-Next's `ssm_in`."""
    return tuple(whole.replace(".ssm_in.", f".{part}.") for part in ("attn_qkv", "attn_gate"))


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
