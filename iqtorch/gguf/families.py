"""Model families: how a transformers configuration and a GGUF file say the same things.

A family is a record: which metadata key is which configuration attribute, and what is done to which tensors on the way. Both
directions follow from it. The records are in `family_table`.
"""

from __future__ import annotations

import logging
from typing import Any

import torch

from .errors import GGUFArchitectureError
from .family import Family, Keys, attributes, check_implied, dims, layer_types, plausible, short
from .family_table import FAMILIES
from .reader import GGUFFile
from .rope import read_rope, write_rope
from .writer import Typed

__all__ = [
    "FAMILIES",
    "FILE_NAME",
    "Family",
    "config_from_gguf",
    "family_of_config",
    "family_of_file",
    "metadata_from_config",
    "repeats_embedding",
]

logger = logging.getLogger("iqtorch")

#: Keys whose values are float32 in files, also where a configuration has a whole number.
_FLOATS = ("scale", "epsilon", "softcapping", "clamp_kqv")
#: Attribute of a configuration: `general.name` of the file that the model came from.
FILE_NAME = "gguf_name"
_TOKENS: Keys = (
    ("tokenizer.ggml.bos_token_id", "bos_token_id"),
    ("tokenizer.ggml.eos_token_id", "eos_token_id"),
    ("tokenizer.ggml.padding_token_id", "pad_token_id"),
)
#: Architectures of files that encode text, or have an encoder before the decoder.
_NOT_CAUSAL = (
    "bert",
    "modern-bert",
    "nomic-bert",
    "nomic-bert-moe",
    "neo-bert",
    "jina-bert-v2",
    "jina-bert-v3",
    "eurobert",
    "t5",
    "t5encoder",
)
#: Attributes without which there is no model, where an architecture has their keys.
_REQUIRED = ("max_position_embeddings", "hidden_size", "num_hidden_layers", "num_attention_heads")


def family_of_file(file: GGUFFile) -> Family:
    """Family of a file, by its `general.architecture`.

    Raises:
        GGUFArchitectureError: unknown; the message lists the known ones.
    """
    arch = file.metadata.get("general.architecture")
    for family in FAMILIES:
        if family.arch == arch and (family.matches is None or family.matches(file.metadata)):
            return family
    if arch in _NOT_CAUSAL:
        raise GGUFArchitectureError(f"{file.path}: {arch!r} is no causal language model, and load_gguf makes nothing else")
    known = ", ".join(dict.fromkeys(family.arch for family in FAMILIES))
    raise GGUFArchitectureError(f"{file.path}: architecture {arch!r} is not among {known}; pass config= (the folder of the original model)")


def family_of_config(config: Any) -> Family:
    """Family of a transformers configuration.

    Raises:
        GGUFArchitectureError: unknown; the message lists the known ones.
    """
    for family in FAMILIES:
        if config.model_type == family.model_type or config.model_type in family.aliases:
            return family
    known = ", ".join(name for family in FAMILIES for name in (family.model_type, *family.aliases))
    raise GGUFArchitectureError(f"models of type {config.model_type!r} cannot be written as GGUF files; known are {known}")


def repeats_embedding(file: GGUFFile) -> bool:
    """Whether the output layer of a file has the bytes of its embedding, as programs want it that know no tied ones."""
    infos = [file.tensors.get(f"{name}.weight") for name in ("output", "token_embd")]
    if any(info is None or info.shape != infos[0].shape or info.type_name != infos[0].type_name for info in infos):  # type: ignore[union-attr]
        return False
    output, embedding = (GGUFFile.data(file, f"{name}.weight") for name in ("output", "token_embd"))  # at once, also of a lazy file
    same = torch.equal(output[:1], embedding[:1]) and torch.equal(output, embedding)
    file.release(["output.weight", "token_embd.weight"])
    return same


def config_from_gguf(file: GGUFFile) -> dict[str, Any]:
    """Attributes of the transformers configuration (with `model_type`) that a file's metadata and tensors describe.

    Raises:
        GGUFArchitectureError: an architecture that is not known, or a key that it needs is missing.
    """
    family = family_of_file(file)
    config: dict[str, Any] = {"model_type": family.model_type, **family.implied}
    for key, attribute in family.keys:
        value = file.metadata.get(f"{family.arch}.{key}")
        if isinstance(value, list):
            if len(set(map(str, value))) != 1:
                raise GGUFArchitectureError(f"{file.path}: {family.arch}.{key} differs between layers; pass config=")
            value = value[0]
        if value is not None:
            config[attribute] = short(plausible(file, f"{family.arch}.{key}", value))
    missing = [f"{family.arch}.{key}" for key, attribute in family.keys if attribute in _REQUIRED and attribute not in config]
    if missing:
        raise GGUFArchitectureError(f"{file.path}: {', '.join(missing)} missing in the metadata; pass config=")
    # files count the layers that predict further tokens, transformers does not
    extra = plausible(file, f"{family.arch}.nextn_predict_layers", file.metadata.get(f"{family.arch}.nextn_predict_layers", 0))
    config["num_hidden_layers"] -= min(extra, config["num_hidden_layers"] - 1)
    known = attributes(family)
    if "num_key_value_heads" in known:
        config.setdefault("num_key_value_heads", config["num_attention_heads"])
    if "head_dim" in known:
        config.setdefault("head_dim", config["hidden_size"] // config["num_attention_heads"])
    if "token_embd.weight" in file.tensors:
        config["vocab_size"] = file.tensors["token_embd.weight"].shape[0]
    config["tie_word_embeddings"] = "output.weight" not in file.tensors or repeats_embedding(file)
    for attribute, tensor in family.detected.items():
        config[attribute] = tensor in file.tensors
    for key, attribute in _TOKENS:
        config[attribute] = file.metadata.get(key)
    if family.rope:
        config |= read_rope(family, file, config)
    if family.period:
        config["layer_types"] = layer_types(config["num_hidden_layers"], family.period)
    if family.read is not None:
        config |= family.read(file, config)
    return config


def metadata_from_config(family: Family, config: Any) -> dict[str, Any]:
    """Metadata of a configuration, under full keys; the inverse of `config_from_gguf`.

    Raises:
        GGUFArchitectureError: the configuration has a setting that files of this architecture cannot express.
    """
    check_implied(config, family.implied)
    if family.period:
        check_implied(config, {"layer_types": layer_types(config.num_hidden_layers, family.period)})
    for attribute, usual in family.dropped.items():
        if (found := getattr(config, attribute, usual)) != usual:
            logger.warning("%s=%r has no place in %r files: programs that read them do without", attribute, found, family.arch)
    out: dict[str, Any] = {}
    for key, attribute in family.keys:
        value = getattr(config, attribute, None)
        if value is None and attribute == "head_dim":
            value = dims(config)
        if value is not None:
            out[key] = float(value) if key.endswith(_FLOATS) else value
    if family.rope:
        out |= write_rope(family, config)
    if family.write is not None:
        out |= family.write(config)
    full = {f"{family.arch}.{key}": value for key, value in out.items()}
    for key, attribute in _TOKENS:
        value = getattr(config, attribute, None)
        if isinstance(value, list):  # files have room for one
            value = value[0] if value else None
        if value is not None:
            full[key] = Typed(value, 4)
    return full
