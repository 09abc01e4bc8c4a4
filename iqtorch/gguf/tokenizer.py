"""Tokenizers: Hugging Face's fast tokenizers <-> the vocabulary inside GGUF files.

Two kinds are converted: byte-level BPE (`gpt2` in files) and SentencePiece BPE with byte fallback (`llama`; `gemma4` is the same with
merges in the file, and read only). Files written here also keep the original `tokenizer.json`, so that loading them gives the same
tokenizer back; others are rebuilt from their vocabulary. Chat templates are copied as text, never rendered.
Sources: llama.cpp convert_hf_to_gguf.py and src/llama-vocab.cpp.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..hf import transformers
from .errors import GGUFTokenizerError
from .reader import GGUFFile
from .writer import FLOAT32, INT32, Typed

__all__ = ["load_tokenizer", "metadata_from_tokenizer"]

#: Kinds of vocabularies that can be rebuilt.
_KINDS = ("gpt2", "llama", "gemma4")
_ORIGINAL = "tokenizer.huggingface.json"
_UNKNOWN_SPLIT = "pass tokenizer=None and use the original model's tokenizer"
_ASK_ORIGINAL = "use the original model's tokenizer"

#: Kinds of tokens in files.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)

# Regular expressions that cut text before byte-level BPE, by the name files give them. Those of the models' own tokenizer.json.
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_TAIL = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_WORD = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_CASED = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+",
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*",
)
_CASED_TAIL = _TAIL.replace(r"[\r\n]*|", r"[\r\n/]*|", 1)
#: The regex of ByteLevel itself.
GPT2 = "gpt-2"
_SPLITS: dict[str, tuple[str, ...]] = {
    "llama-bpe": (rf"{_CONTRACTIONS}|{_WORD}|\p{{N}}{{1,3}}|{_TAIL}",),
    "qwen2": (rf"{_CONTRACTIONS}|{_WORD}|\p{{N}}|{_TAIL}",),
    "qwen35": (
        rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    ),
    "tekken": (rf"{_CASED[0]}|{_CASED[1]}|\p{{N}}|{_CASED_TAIL}",),
    "gpt-4o": (rf"{_CASED[0]}{_CONTRACTIONS}?|{_CASED[1]}{_CONTRACTIONS}?|\p{{N}}{{1,3}}|{_CASED_TAIL}",),
    "deepseek-v3": (
        r"\p{N}{1,3}",
        "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+",
        r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"""
        r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    ),
}
#: Other names of the same cuts, read but not written; `glm4` cuts like Llama 3 and has no token for the beginning of text.
_SAME_SPLIT = {
    "llama3": "llama-bpe", "llama-v3": "llama-bpe", "falcon3": "llama-bpe", "pixtral": "llama-bpe", "dbrx": "llama-bpe",
    "smaug-bpe": "llama-bpe", "glm4": "llama-bpe", "chatglm-bpe": "llama-bpe", "deepseek-r1-qwen": "qwen2", "phi-2": GPT2, "default": GPT2,
    "mpt": GPT2, "olmo": GPT2, "jais": GPT2,
}  # fmt: skip
#: As some tokenizer.json files spell them.
_SPELLINGS = {
    r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])": _CONTRACTIONS,
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|": _CONTRACTIONS + "|",
}
#: Texts of tokens that end an answer.
_ENDS = {
    "<|eot_id|>", "<|eom_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>", "<end_of_turn>", "<|endoftext|>", "<|end_of_text|>",
    "<EOT>", "_<EOT>", "[EOT]", "<end_of_utterance>", "<turn|>", "<|tool_response>", "<｜end▁of▁sentence｜>",
}  # fmt: skip
_SPECIAL = {"bos": "bos_token", "eos": "eos_token", "unknown": "unk_token", "padding": "pad_token"}


# -- writing -------------------------------------------------------------------------------------------------


def metadata_from_tokenizer(tokenizer: Any, vocab_size: int) -> dict[str, Any]:
    """The `tokenizer.*` metadata of a fast tokenizer.

    Args:
        tokenizer: a transformers fast tokenizer.
        vocab_size: rows of the embedding; ids that the tokenizer lacks become unused tokens.

    Raises:
        GGUFTokenizerError: it is no BPE tokenizer, cuts text in a way that has no name in files, or has more tokens than rows.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise GGUFTokenizerError(f"{type(tokenizer).__name__} has no tokenizer.json; load it with AutoTokenizer, or pass tokenizer=None")
    text = backend.to_str()
    parts = json.loads(text)
    model = parts["model"]
    if model["type"] != "BPE":
        raise GGUFTokenizerError(f"tokenizers of type {model['type']!r} cannot be written, only BPE; {_UNKNOWN_SPLIT}")
    vocab = backend.get_vocab(with_added_tokens=True)
    if max(vocab.values()) >= vocab_size:
        raise GGUFTokenizerError(f"the tokenizer has ids up to {max(vocab.values())}, the embedding {vocab_size} rows: not of one model")
    tokens = [f"[PAD{i}]" for i in range(vocab_size)]
    kinds = [UNUSED] * vocab_size
    for token, i in vocab.items():
        tokens[i], kinds[i] = token, NORMAL
    for added in parts["added_tokens"]:
        kinds[added["id"]] = CONTROL if added["special"] else USER_DEFINED
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    out: dict[str, Any] = {"tokenizer.ggml.tokens": tokens}
    if model.get("byte_fallback"):
        out |= _sentencepiece(parts, tokens, kinds, merges)
    else:
        out |= {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": _split_name(parts["pre_tokenizer"]), "tokenizer.ggml.merges": merges}
    out["tokenizer.ggml.token_type"] = Typed(kinds, INT32)
    for name, attribute in _SPECIAL.items():
        if (token := getattr(tokenizer, attribute, None)) is not None and token in vocab:
            out[f"tokenizer.ggml.{name}_token_id"] = vocab[token]
    ids = tokenizer("a").input_ids
    out["tokenizer.ggml.add_bos_token"] = bool(ids) and ids[0] == tokenizer.bos_token_id
    out["tokenizer.ggml.add_eos_token"] = bool(ids) and ids[-1] == tokenizer.eos_token_id
    if isinstance(getattr(tokenizer, "chat_template", None), str):
        out["tokenizer.chat_template"] = tokenizer.chat_template
    return out | {_ORIGINAL: text}


def _sentencepiece(parts: Mapping[str, Any], tokens: list[str], kinds: list[int], merges: list[str]) -> dict[str, Any]:
    """Files order the merges by a score per token; here the earlier merge gets the higher one."""
    rank = {left + right: i for i, (left, _, right) in reversed([(i, merge.partition(" ")) for i, merge in enumerate(merges)])}
    scores = []
    for i, token in enumerate(tokens):
        if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
            kinds[i] = BYTE
        elif token == parts["model"].get("unk_token"):
            kinds[i] = UNKNOWN
        scores.append(-float(rank.get(token, len(merges))) if kinds[i] in (NORMAL, USER_DEFINED) else 0.0)
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.scores": Typed(scores, FLOAT32),
        "tokenizer.ggml.add_space_prefix": "prepend" in json.dumps(parts["normalizer"]).lower() or _prepends(parts["pre_tokenizer"]),
    }


def _prepends(pre_tokenizer: Any) -> bool:
    return isinstance(pre_tokenizer, Mapping) and pre_tokenizer.get("prepend_scheme") in ("first", "always")


def _split_name(pre_tokenizer: Any) -> str:
    """The files' name for the way a tokenizer cuts text."""
    steps = pre_tokenizer.get("pretokenizers", [pre_tokenizer]) if isinstance(pre_tokenizer, Mapping) else []
    patterns = tuple(_spelled(step["pattern"].get("Regex", "")) for step in steps if step["type"] == "Split")
    byte_level = [step for step in steps if step["type"] == "ByteLevel"]
    known = [name for name, split in _SPLITS.items() if tuple(map(_spelled, split)) == patterns]
    if len(byte_level) == 1 and len(patterns) + 1 == len(steps) and not byte_level[0].get("add_prefix_space"):
        if byte_level[0].get("use_regex", True) and not patterns:
            return GPT2
        if known:
            return known[0]
    raise GGUFTokenizerError(f"its way to cut text has no known name in files: {json.dumps(pre_tokenizer)[:400]}; {_UNKNOWN_SPLIT}")


def _spelled(pattern: str) -> str:
    for spelling, usual in _SPELLINGS.items():
        pattern = pattern.replace(spelling, usual)
    return pattern


# -- reading -------------------------------------------------------------------------------------------------


def load_tokenizer(path: str | Path | GGUFFile) -> Any:
    """The tokenizer of a GGUF file, as a transformers fast tokenizer.

    Raises:
        GGUFTokenizerError: the file has none, or one of a kind that cannot be rebuilt.
        GGUFError: a damaged file.
        MissingDependencyError: transformers is not installed.
    """
    file = path if isinstance(path, GGUFFile) else GGUFFile(path)
    hf = transformers()
    from tokenizers import Tokenizer

    meta = file.metadata
    if _ORIGINAL in meta:
        try:
            backend = Tokenizer.from_str(meta[_ORIGINAL])
        except Exception as error:  # the tokenizers package raises plain Exception
            raise GGUFTokenizerError(f"{file.path}: {_ORIGINAL} cannot be read: {error}") from error
    else:
        backend = _rebuilt(file)
    tokens = _list(file, "tokenizer.ggml.tokens", str)
    special = {}
    for name, attribute in _SPECIAL.items():
        i = meta.get(f"tokenizer.ggml.{name}_token_id")
        if isinstance(i, int) and 0 <= i < len(tokens):
            special[attribute] = tokens[i]
    try:
        tokenizer = hf.PreTrainedTokenizerFast(tokenizer_object=backend, clean_up_tokenization_spaces=False, **special)
    except Exception as error:  # as above: it copies the backend by way of its text
        raise GGUFTokenizerError(f"{file.path}: the vocabulary makes no tokenizer: {error}; {_ASK_ORIGINAL}") from error
    if isinstance(meta.get("tokenizer.chat_template"), str):
        tokenizer.chat_template = meta["tokenizer.chat_template"]
    return tokenizer


def ends_of_turns(file: GGUFFile) -> list[int]:
    """Ids of the tokens at which an answer ends besides `eos_token_id`, for which files have room for one only.

    As programs of the llama.cpp family do, by two keys and by the texts of tokens (src/llama-vocab.cpp).
    """
    tokens = file.metadata.get("tokenizer.ggml.tokens", [])
    kinds = file.metadata.get("tokenizer.ggml.token_type", [])
    if not isinstance(tokens, list) or not isinstance(kinds, list):
        return []
    named = [file.metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("eot", "eom")]
    found = {i for i in named if isinstance(i, int) and 0 <= i < len(tokens)}
    found |= {i for i, (token, kind) in enumerate(zip(tokens, kinds)) if kind == CONTROL and token in _ENDS}
    if {"<|return|>", "<|call|>"} <= {tokens[i] for i in found}:  # gpt-oss, where `<|end|>` stands between its messages
        found = {i for i in found if tokens[i] != "<|end|>"}
    return sorted(found)


def _list(file: GGUFFile, key: str, kind: type) -> list[Any]:
    """A list in the metadata, [] where there is none."""
    value = file.metadata.get(key, [])
    if not isinstance(value, list) or not all(isinstance(element, kind) for element in value):
        raise GGUFTokenizerError(f"{file.path}: {key} must be an array of {kind.__name__}, got {value!r:.80}; {_ASK_ORIGINAL}")
    return value


def _rebuilt(file: GGUFFile) -> Any:
    from tokenizers import AddedToken, Tokenizer, models, processors

    meta = file.metadata
    kind, tokens = meta.get("tokenizer.ggml.model"), _list(file, "tokenizer.ggml.tokens", str)
    if kind not in _KINDS or not tokens:
        raise GGUFTokenizerError(
            f"{file.path}: {len(tokens)} tokens of kind {kind!r} cannot be rebuilt, only {', '.join(_KINDS)}; {_ASK_ORIGINAL}"
        )
    kinds = _list(file, "tokenizer.ggml.token_type", int) or [NORMAL] * len(tokens)
    vocab = {token: i for i, token in enumerate(tokens)}
    if len(kinds) != len(tokens) or len(vocab) != len(tokens):
        raise GGUFTokenizerError(f"{file.path}: {len(tokens)} tokens, {len(vocab)} of them different, {len(kinds)} types: they must agree")
    merges = [tuple(merge.split(" ", 1)) for merge in _list(file, "tokenizer.ggml.merges", str)]
    try:
        if kind == "gpt2":
            backend = Tokenizer(models.BPE(vocab=vocab, merges=merges, ignore_merges=_split_of(file) == "llama-bpe"))
            _cut_byte_level(backend, _split_of(file))
        else:
            scores = _list(file, "tokenizer.ggml.scores", float)
            unknown = next((tokens[i] for i, k in enumerate(kinds) if k == UNKNOWN), None)
            backend = Tokenizer(
                models.BPE(
                    vocab=vocab, merges=merges or _merges_from_scores(vocab, scores), byte_fallback=True, fuse_unk=True, unk_token=unknown
                )
            )
            _cut_sentencepiece(backend, bool(meta.get("tokenizer.ggml.add_space_prefix", kind == "llama")))
    except GGUFTokenizerError:
        raise
    except Exception as error:  # the tokenizers package raises plain Exception
        raise GGUFTokenizerError(f"{file.path}: the vocabulary makes no tokenizer: {error}; {_ASK_ORIGINAL}") from error
    for special in (True, False):
        chosen = [tokens[i] for i, k in enumerate(kinds) if k == (CONTROL if special else USER_DEFINED)]
        backend.add_tokens([AddedToken(token, normalized=False, special=special) for token in chosen])
    bos = meta.get("tokenizer.ggml.bos_token_id")
    if meta.get("tokenizer.ggml.add_bos_token", kind != "gpt2") and isinstance(bos, int) and 0 <= bos < len(tokens):
        backend.post_processor = processors.TemplateProcessing(
            single=f"{tokens[bos]}:0 $A:0", pair=f"{tokens[bos]}:0 $A:0 $B:1", special_tokens=[(tokens[bos], bos)]
        )
    return backend


def _split_of(file: GGUFFile) -> str:
    name = file.metadata.get("tokenizer.ggml.pre", "default")
    name = _SAME_SPLIT.get(name, name)
    if name != GPT2 and name not in _SPLITS:
        raise GGUFTokenizerError(
            f"{file.path}: tokenizer.ggml.pre is {name!r}, known are {[GPT2, *_SPLITS, *_SAME_SPLIT]}; {_ASK_ORIGINAL}"
        )
    return str(name)


def _cut_byte_level(backend: Any, split: str) -> None:
    from tokenizers import Regex, decoders, pre_tokenizers

    steps: list[Any] = [pre_tokenizers.Split(Regex(pattern), behavior="isolated") for pattern in _SPLITS.get(split, ())]
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=split == GPT2))
    backend.pre_tokenizer = pre_tokenizers.Sequence(steps)
    backend.decoder = decoders.ByteLevel()


def _cut_sentencepiece(backend: Any, prefix: bool) -> None:
    from tokenizers import decoders, normalizers

    replace = [normalizers.Prepend("\u2581")] if prefix else []
    backend.normalizer = normalizers.Sequence([*replace, normalizers.Replace(" ", "\u2581")])
    strip = [decoders.Strip(" ", 1, 0)] if prefix else []
    backend.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), *strip])


def _merges_from_scores(vocab: Mapping[str, int], scores: list[float]) -> list[tuple[str, str]]:
    """Every way to put a token together from two others, the best token first (ties: the lower ids)."""
    found = []
    for token, i in vocab.items():
        pairs = [(token[:n], token[n:]) for n in range(1, len(token)) if token[:n] in vocab and token[n:] in vocab]
        score = scores[i] if i < len(scores) else 0.0
        found += [(-score, vocab[a], vocab[b], a, b) for a, b in pairs]
    return [(a, b) for _, _, _, a, b in sorted(found)]
