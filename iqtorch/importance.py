"""Importance: how strongly each input column of a weight is excited, the mean of its squared activations.

Quantizers weight the error of column `k` by it. Two file kinds are read and written: the `.dat` files of ik_llama.cpp and
older llama.cpp (no header at all), and llama.cpp's GGUF files.
"""

from __future__ import annotations

import logging
import math
import os
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .errors import ImportanceError, MissingDependencyError
from .files import replacing
from .linear import is_conv1d, is_pointwise

__all__ = ["Importance", "ImportanceEntry", "collect_importance"]

logger = logging.getLogger("iqtorch")

#: Tokens per chunk where a file does not say (the reference tool's default).
CHUNK_SIZE = 512


@dataclass(frozen=True)
class ImportanceEntry:
    """Importance of one weight.

    Attributes:
        mean: float32 `[K]`, or `[E, K]` for an array of experts: mean squared activation.
        count: float64 `[1]` or `[E]`: activation rows (tokens) behind each mean; 0 = this expert saw none, its mean is 1.
    """

    mean: Tensor
    count: Tensor


class Importance(Mapping[str, Tensor]):
    """Mapping from parameter name to its importance, float32 `[K]` or `[E, K]`.

    Names are looked up as they are, then through the names of GGUF files, so `blk.0.attn_q.weight` of a file answers for
    `model.layers.0.self_attn.q_proj.weight`, and the reference's substitutions apply (the gate of an MLP has the inputs of
    its `up`). `for_weight` also checks the length.

    Args:
        entries: by name; a tensor counts as the mean of one token.
        datasets: names of the calibration texts.
        chunks: sequences they were cut into.
        chunk_size: tokens in each.

    Raises:
        ImportanceError: a value is negative or not finite, or a tensor is not `[K]` or `[E, K]`.
    """

    def __init__(
        self,
        entries: Mapping[str, Tensor | ImportanceEntry] | None = None,
        *,
        datasets: Sequence[str] = (),
        chunks: int = 0,
        chunk_size: int = CHUNK_SIZE,
    ) -> None:
        self.datasets = tuple(datasets)
        self.chunks = chunks
        self.chunk_size = chunk_size
        self._entries = {name: _checked(name, value) for name, value in (entries or {}).items()}
        self._aliases: dict[str, str] | None = None

    # -- mapping -------------------------------------------------------------------------------------------

    def __getitem__(self, name: str) -> Tensor:
        return self.entry(name).mean

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and self._find(name) is not None

    def __repr__(self) -> str:
        return f"Importance({len(self)} weights, {self.chunks} chunks of {self.chunk_size} tokens)"

    def entry(self, name: str) -> ImportanceEntry:
        """Mean and count of a weight.

        Raises:
            KeyError: no entry, under any of its names.
        """
        key = self._find(name)
        if key is None:
            raise KeyError(name)
        return self._entries[key]

    def for_weight(self, name: str, shape: Sequence[int]) -> Tensor | None:
        """Importance of the weight `name` of shape `[N, K]` or `[E, N, K]`: float32 `[K]` or `[E, K]`, None if missing.

        Raises:
            ImportanceError: the entry has another length: it was made with another model.
        """
        key = self._find(name)
        if key is None:
            return None
        mean = self._entries[key].mean
        wanted = (*shape[:-2], shape[-1])
        if mean.numel() == math.prod(wanted):  # a `.dat` file does not tell where one expert ends
            return mean.reshape(wanted)
        if _canonical(name) == "token_embd.weight":
            return None  # as in the reference: some tools write an entry of another length for the embedding
        raise ImportanceError(
            f"importance of {key!r} has {mean.numel()} values, {name!r} of shape {tuple(shape)} needs {math.prod(wanted)}; "
            "it was made with another model, or pass importance=None"
        )

    def unused(self, names: Iterable[str]) -> list[str]:
        """Entries that none of the parameters `names` uses: if many, the file belongs to another model."""
        used = {self._find(name) for name in names}
        return [name for name in self._entries if name not in used]

    def _find(self, name: str) -> str | None:
        if name in self._entries:
            return name
        if self._aliases is None:
            try:
                self._aliases = {_canonical(key): key for key in reversed(self._entries)}
            except MissingDependencyError:  # gguf's tables of names: needed only for names of files
                if any(key.startswith("blk.") for key in self._entries):
                    raise
                self._aliases = {}
        if not self._aliases:
            return None
        canonical = _canonical(name)
        for alias in (canonical, *_substitutes(canonical)):
            if alias in self._aliases:
                return self._aliases[alias]
        return None

    # -- combining -----------------------------------------------------------------------------------------

    def merge(self, *others: Importance) -> Importance:
        """The importance of all texts together: means weighted by their token counts.

        Raises:
            ImportanceError: two entries of one name differ in shape, or no name is in both: they are of different models.
        """
        entries = dict(self._entries)
        same = all(name in entries for other in others for name in other)  # and no table of names is needed
        own = {} if same else {_canonical(name): name for name in reversed(entries)}
        for other in others:
            if entries and len(other) and not any(name in entries or _canonical(name) in own for name in other):
                raise ImportanceError(f"no weight in common, as {next(iter(entries))!r} and {next(iter(other))!r}: of different models?")
            for name, entry in other._entries.items():
                key = name if name in entries else own.setdefault(_canonical(name), name)
                entries[key] = _combined(key, entries[key], entry) if key in entries else entry
        return Importance(
            entries,
            datasets=tuple(dict.fromkeys(d for i in (self, *others) for d in i.datasets)),
            chunks=sum(i.chunks for i in (self, *others)),
            chunk_size=self.chunk_size,
        )

    def summary(self) -> list[dict[str, Any]]:
        """One row per weight: name, columns, experts, least and most tokens, mean, largest value, share of the top 1 % columns."""
        rows = []
        for name, entry in self._entries.items():
            mean = entry.mean.double().reshape(-1, entry.mean.shape[-1])
            top = mean.topk(max(1, mean.shape[-1] // 100)).values.sum(-1) / mean.sum(-1).clamp(min=1e-300)
            rows.append({
                "name": name, "columns": mean.shape[-1], "experts": mean.shape[0] if entry.mean.ndim == 2 else None,
                "tokens": (int(entry.count.min()), int(entry.count.max())),
                "mean": float(mean.mean()), "max": float(mean.max()), "top_percent_share": float(top.mean()),
            })  # fmt: skip
        return rows

    # -- files ---------------------------------------------------------------------------------------------

    @classmethod
    def load(cls, path: str | Path) -> Importance:
        """Reads a `.dat` or GGUF importance file, whatever its name.

        Raises:
            ImportanceError: the file is damaged, or a value is negative or not finite.
            GGUFError: it is a GGUF file, and damaged or of another kind.
        """
        with open(path, "rb") as file:
            if file.read(4) == b"GGUF":
                from .gguf.importance import load

                return load(path)
            file.seek(0)
            return _load_legacy(file, str(path))

    def save(self, path: str | Path) -> None:
        """Writes a file under GGUF names: `.dat` the legacy kind, any other suffix the GGUF kind.

        Raises:
            ImportanceError: there is nothing to write.
        """
        if not self._entries:
            raise ImportanceError(f"no importance to write to {path}; collect_importance found no weight in use")
        if Path(path).suffix == ".dat":
            with replacing(path) as file:
                _save_legacy(self, file)
        else:
            from .gguf.importance import save

            save(self, path)

    def file_entries(self) -> dict[str, ImportanceEntry]:
        """The entries under the names files use; merged gate and up experts under both their names."""
        found: dict[str, ImportanceEntry] = {}
        for name, entry in self._entries.items():
            canonical = _canonical(name)
            if "ffn_gate_up_exps" in canonical:
                for part in ("ffn_gate_exps", "ffn_up_exps"):
                    found.setdefault(canonical.replace("ffn_gate_up_exps", part), entry)
            else:
                found[canonical] = entry
        return found


def _checked(name: str, value: Tensor | ImportanceEntry) -> ImportanceEntry:
    entry = value if isinstance(value, ImportanceEntry) else ImportanceEntry(value, torch.ones(1, dtype=torch.float64, device="cpu"))
    mean = entry.mean.detach().to("cpu", torch.float32)
    if mean.ndim not in (1, 2) or not mean.numel():
        raise ImportanceError(f"importance of {name!r} must be [K] or [E, K], got shape {tuple(mean.shape)}")
    count = entry.count.detach().to("cpu", torch.float64).reshape(-1)
    matrices = mean.shape[0] if mean.ndim == 2 else 1
    if count.numel() not in (1, matrices):
        raise ImportanceError(f"importance of {name!r} has {matrices} matrices and {count.numel()} counts")
    if not mean.isfinite().all():
        raise ImportanceError(f"importance of {name!r} has {int((~mean.isfinite()).sum())} values that are NaN or Inf; collect it again")
    if mean.min() < 0 or not bool((count >= 0).all()):
        raise ImportanceError(f"importance of {name!r} has negative values (least {float(mean.min()):g}); it must be a mean of squares")
    return ImportanceEntry(mean, count.expand(matrices).clone())


def _canonical(name: str) -> str:
    """The GGUF name, or the name itself if it has none."""
    from .gguf.names import gguf_name

    return gguf_name(name) or name


#: Which entry answers when there is none of the exact name, first match first (as in the reference tool).
_SUBSTITUTES: dict[str, tuple[str, ...]] = {
    "ffn_up_exps": ("ffn_gate_up_exps", "ffn_gate_exps"),
    "ffn_gate_exps": ("ffn_gate_up_exps", "ffn_up_exps"),
    "ffn_gate_up_exps": ("ffn_up_exps", "ffn_gate_exps"),
    "ffn_gate": ("ffn_up",),
    "attn_v_b": ("attn_kv_b",),
    "attn_kv_b": ("attn_v_b",),
}


def _substitutes(canonical: str) -> list[str]:
    stem, _, kind = canonical.removesuffix(".weight").rpartition(".")
    return [f"{stem}.{other}.weight" for other in _SUBSTITUTES.get(kind, ())]


def _combined(name: str, a: ImportanceEntry, b: ImportanceEntry) -> ImportanceEntry:
    if a.mean.shape != b.mean.shape:
        raise ImportanceError(f"importance of {name!r} has shapes {tuple(a.mean.shape)} and {tuple(b.mean.shape)}: not of one model")
    total = a.count + b.count
    share = torch.where(total > 0, a.count / total.clamp(min=1), 0.5).reshape(-1, *[1] * (a.mean.ndim - 1))
    mean = a.mean.double() * share + b.mean.double() * (1 - share)
    return ImportanceEntry(mean.float(), total)


# -- legacy files ----------------------------------------------------------------------------------------------


def _load_legacy(file: BinaryIO, path: str) -> Importance:
    """The `.dat` kind: all counts are int32, nothing marks the file, so each length is checked against the bytes left."""
    left = os.fstat(file.fileno()).st_size

    def take(n: int, what: str) -> bytes:
        nonlocal left
        if n < 0 or n > left:
            raise ImportanceError(f"{path} is no importance file or damaged: {what} needs {n} bytes, {left} are left")
        left -= n
        return file.read(n)

    def integer(what: str) -> int:
        return int(struct.unpack("<i", take(4, what))[0])

    entries: dict[str, ImportanceEntry] = {}
    n_entries = integer("the number of entries")
    if n_entries < 1 or 13 * n_entries > left:
        raise ImportanceError(f"{path} is no importance file or damaged: it claims {n_entries} entries in {left} bytes")
    for i in range(n_entries):
        raw = take(integer(f"name of entry {i}"), f"name of entry {i}")
        try:
            name = raw.decode()
        except UnicodeDecodeError as error:
            raise ImportanceError(f"{path} is no importance file or damaged: name of entry {i} is {raw[:40]!r}") from error
        calls = integer(f"calls of {name!r}")
        values = np.frombuffer(take(4 * integer(f"length of {name!r}"), f"values of {name!r}"), "<f4").copy()
        if name in entries or not values.size:
            raise ImportanceError(f"{path}: entry {name!r} is {'empty' if name not in entries else 'there twice'}")
        mean = torch.from_numpy(values / np.float32(calls) if calls > 0 else values)
        entries[name] = ImportanceEntry(mean, torch.tensor([max(calls, 1) * CHUNK_SIZE], device="cpu"))
    chunks, datasets = 0, []
    if left:  # absent in old files
        chunks = integer("the number of chunks")
        datasets = [take(integer("length of the text's name"), "the text's name").decode(errors="replace")]
    return Importance(entries, datasets=datasets, chunks=max(chunks, 0))


def _save_legacy(importance: Importance, file: BinaryIO) -> None:
    entries = importance.file_entries()
    file.write(struct.pack("<i", len(entries)))
    for name, entry in entries.items():
        calls = max(1, min(round(float(entry.count.max()) / importance.chunk_size), 2**31 - 1))
        values = (entry.mean * calls).numpy().astype("<f4").ravel()
        raw = name.encode()
        file.write(struct.pack("<i", len(raw)) + raw + struct.pack("<ii", calls, values.size) + values.tobytes())
    text = ", ".join(importance.datasets).encode()
    file.write(struct.pack("<ii", importance.chunks, len(text)) + text)


# -- collecting ------------------------------------------------------------------------------------------------


class Collector(Protocol):
    """Receives the inputs of one weight, `[..., K]` at a time (of one expert of it)."""

    def add(self, x: Tensor, expert: int = 0) -> None: ...


C = TypeVar("C", bound=Collector)


class _Sums:
    """Running sums of squares of one weight's inputs: float64, since a float32 sum stops growing after some millions of tokens."""

    def __init__(self, experts: int | None) -> None:
        self.experts = experts
        self.total: Tensor | None = None
        self.count = torch.zeros(experts or 1, dtype=torch.int64, device="cpu")

    def add(self, x: Tensor, expert: int = 0) -> None:
        rows = x.detach().reshape(-1, x.shape[-1]).float()
        wide = torch.float32 if x.device.type == "mps" else torch.float64
        if self.total is None:
            self.total = torch.zeros(self.experts or 1, rows.shape[-1], dtype=wide, device=x.device)
        with torch.autocast(x.device.type, enabled=False):  # which may be on for the model
            squares = torch.einsum("nk,nk->k", rows, rows)
        self.total[expert] += squares.to(self.total.device, wide)
        self.count[expert] += rows.shape[0]

    def entry(self) -> ImportanceEntry:
        total = torch.zeros(1, 1, device="cpu") if self.total is None else self.total.cpu()
        mean = (total / self.count.clamp(min=1)[:, None]).float()
        mean[self.count == 0] = 1.0
        return ImportanceEntry(mean if self.experts is not None else mean[0], self.count.double())


class _WatchExperts(TorchFunctionMode):
    """Sees the products of an expert module: each is with one matrix of a 3-D parameter, known by its place in memory."""

    _PRODUCTS: frozenset[Callable[..., Any]] = frozenset(
        (nn.functional.linear, torch.matmul, torch.mm, Tensor.matmul, Tensor.mm, Tensor.__matmul__)
    )

    def __init__(self, module: nn.Module, collectors: Mapping[str, Collector]) -> None:
        super().__init__()
        self.module = module
        self.collectors = collectors

    def __torch_function__(
        self, func: Callable[..., Any], types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in self._PRODUCTS and len(args) > 1:
            x, weight = args[:2]
            for name, collector in self.collectors.items():
                # looked up now: a layer that streams through memory has another tensor at each call
                stack = getattr(self.module, name)
                if type(stack) is not nn.Parameter or type(weight) is not Tensor:
                    continue
                if weight.untyped_storage().data_ptr() == stack.untyped_storage().data_ptr() and weight.numel() == stack[0].numel():
                    collector.add(x, (weight.storage_offset() - stack.storage_offset()) // stack.stride(0))
        return func(*args, **kwargs)


def _first_names(model: nn.Module) -> dict[int, str]:
    """id of a parameter -> its name; a tied output layer has the name of the embedding, also when offloading pulled them apart."""
    names = {id(p): name for name, p in model.named_parameters()}
    if getattr(getattr(model, "config", None), "tie_word_embeddings", False):
        tied: list[Any] = [get() if (get := getattr(model, f"get_{end}_embeddings", None)) else None for end in ("input", "output")]
        if all(isinstance(getattr(module, "weight", None), Tensor) for module in tied):
            names[id(tied[1].weight)] = names[id(tied[0].weight)]
    return names


def _watch_linear(collector: Collector) -> Callable[..., None]:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = args[0] if args else kwargs["input"]
        collector.add(x.mT if is_pointwise(module) else x)

    return hook


def _watch_experts(module: nn.Module, mode: _WatchExperts) -> list[Any]:
    def enter(*_: object) -> None:
        mode.__enter__()

    def leave(*_: object) -> None:
        mode.__exit__(None, None, None)

    return [module.register_forward_pre_hook(enter), module.register_forward_hook(leave, always_call=True)]


def observe_inputs(
    model: nn.Module, batches: Iterable[Tensor | Mapping[str, Any]], make: Callable[[str, int | None], C]
) -> tuple[dict[str, C], int, int]:
    """Runs the model without gradients and shows every linear layer's and expert's inputs to the collector of its weight.

    Args:
        model: a model that is called with token ids; its training flags are restored.
        batches: int64 `[B, T]` token ids, or dictionaries of arguments.
        make: makes the collector of a weight from its parameter name and its number of experts (None: a linear layer).

    Returns:
        The collectors by parameter name, the number of sequences seen and the length of the longest.
    """
    first_name = _first_names(model)
    collectors: dict[str, C] = {}
    hooks: list[Any] = []

    def collector_of(name: str, experts: int | None) -> C:
        if name not in collectors:
            collectors[name] = make(name, experts)
        return collectors[name]

    for module_name, module in model.named_modules():
        prefix = f"{module_name}." if module_name else ""
        if isinstance(module, nn.Linear) or is_conv1d(module) or is_pointwise(module):
            own = collector_of(first_name[id(module.weight)], None)
            hooks.append(module.register_forward_pre_hook(_watch_linear(own), with_kwargs=True))
            continue
        stacks = {name: p for name, p in module.named_parameters(recurse=False) if p.ndim == 3}
        if stacks:
            watched = {name: collector_of(first_name.get(id(p), prefix + name), p.shape[0]) for name, p in stacks.items()}
            hooks.extend(_watch_experts(module, _WatchExperts(module, watched)))

    device = next((p.device for p in model.parameters() if p.device.type != "meta"), torch.device("cpu"))
    training = [module for module in model.modules() if module.training]
    chunks = chunk_size = 0
    model.eval()
    try:
        with _one_expert_at_a_time(model), torch.no_grad():
            for batch in batches:
                inputs: dict[str, Any] = dict(batch) if isinstance(batch, Mapping) else {"input_ids": batch}
                inputs = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in inputs.items()}
                ids = inputs.get("input_ids")
                if isinstance(ids, Tensor):
                    chunks += ids.shape[0]
                    chunk_size = max(chunk_size, ids.shape[-1])
                if isinstance(batch, Mapping):
                    model(**inputs)
                else:
                    model(inputs["input_ids"])
    finally:
        for hook in hooks:
            hook.remove()
        for module in training:
            module.training = True
    return collectors, chunks, chunk_size


def collect_importance(model: nn.Module, batches: Iterable[Tensor | Mapping[str, Any]], *, datasets: Sequence[str] = ()) -> Importance:
    """Runs the model on some text and collects the mean squared inputs of its linear layers and experts.

    Each batch is added to float64 sums, so any number of tokens is safe; only `K` numbers per weight are kept. The model
    may be on any device, or stream its layers through memory (accelerate's offloading). A weight shared by the embedding and
    the output layer is counted as the output layer, under its first name.

    Args:
        model: a model that is called with token ids, in any float dtype.
        batches: int64 `[B, T]` token ids, or dictionaries of arguments. Wrap it for a progress bar.
        datasets: names of the texts, kept in the files.

    Returns:
        Entries by parameter name. Experts that saw no token have importance 1 (a warning names them); weights that were never
        used have no entry.

    Raises:
        ImportanceError: no batches, or the activations of a layer are not finite.
    """
    sums, chunks, chunk_size = observe_inputs(model, batches, lambda _, experts: _Sums(experts))
    if not any(int(s.count.sum()) for s in sums.values()):
        raise ImportanceError("no activations were seen: the batches are empty, or the model has no linear layer; pass token ids [B, T]")
    return _finished(sums, tuple(datasets), chunks, chunk_size or CHUNK_SIZE)


def _finished(sums: dict[str, _Sums], datasets: tuple[str, ...], chunks: int, chunk_size: int) -> Importance:
    entries = {}
    for name, own in sums.items():
        if not int(own.count.sum()):
            logger.warning("no activations reached %r: it has no importance", name)
            continue
        unseen = (own.count == 0).nonzero().flatten().tolist()
        if unseen:
            logger.warning("experts %s of %r saw no token: importance 1 for all their columns; use more text", unseen, name)
        entries[name] = own.entry()
    return Importance(entries, datasets=datasets, chunks=chunks, chunk_size=chunk_size)


class _one_expert_at_a_time:
    """Within the block, a transformers model computes its experts in a loop, where each product can be seen."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.before = getattr(getattr(model, "config", None), "_experts_implementation", None)

    def _select(self, implementation: str | None) -> None:
        select = getattr(self.model, "set_experts_implementation", None)
        if self.before is not None and select is not None:
            select(implementation)

    def __enter__(self) -> None:
        self._select("eager")

    def __exit__(self, *_: object) -> None:
        self._select(self.before)
