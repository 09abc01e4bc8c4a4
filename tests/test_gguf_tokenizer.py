"""Tokenizers to GGUF files and back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from iqtorch.gguf import (
    GGUFFile,
    GGUFTokenizerError,
    load_tokenizer,
    save_gguf,
)

transformers = pytest.importorskip("transformers")
from gguf_models import TEXT, byte_level, rewrite, sentencepiece, tiny  # noqa: E402 (imports transformers)


def tokenizer_file(tmp_path: Path, tokenizer: Any, original: bool) -> Path:
    """A file with this tokenizer; without `original`, as other programs write it."""
    save_gguf(tiny("llama", vocab_size=1024), tmp_path / "a.gguf", tokenizer)
    if original:
        return tmp_path / "a.gguf"
    return rewrite(tmp_path / "a.gguf", tmp_path / "b.gguf", tokenizer__huggingface__json=None)


@pytest.mark.parametrize("original", [True, False], ids=["original", "rebuilt"])
@pytest.mark.parametrize("split", [None, "llama-bpe", "qwen2", "qwen35", "tekken", "gpt-4o", "deepseek-v3"])
def test_byte_level_tokenizers(tmp_path: Path, split: str | None, original: bool) -> None:
    tokenizer = byte_level(split)
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    path = tokenizer_file(tmp_path, tokenizer, original)
    meta = GGUFFile(path).metadata
    assert meta["tokenizer.ggml.model"] == "gpt2"
    assert meta["tokenizer.ggml.pre"] == (split or "gpt-2")
    assert len(meta["tokenizer.ggml.tokens"]) == 1024
    kinds = dict(zip(meta["tokenizer.ggml.tokens"], meta["tokenizer.ggml.token_type"], strict=True))
    assert (kinds["<s>"], kinds["<|end|>"], kinds["[PAD1023]"], kinds["a"]) == (3, 4, 5, 1)
    found = load_tokenizer(path)
    assert found(TEXT).input_ids == tokenizer(TEXT).input_ids
    assert found.decode(found(TEXT).input_ids) == TEXT
    assert (found.bos_token, found.eos_token, found.chat_template) == ("<s>", "</s>", tokenizer.chat_template)


@pytest.mark.parametrize("original", [True, False], ids=["original", "rebuilt"])
@pytest.mark.parametrize("prefix", [True, False])
def test_sentencepiece_tokenizers(tmp_path: Path, prefix: bool, original: bool) -> None:
    tokenizer = sentencepiece(prefix)
    path = tokenizer_file(tmp_path, tokenizer, original)
    meta = GGUFFile(path).metadata
    assert (meta["tokenizer.ggml.model"], meta["tokenizer.ggml.add_space_prefix"], meta["tokenizer.ggml.add_bos_token"]) == (
        "llama",
        prefix,
        True,
    )
    kinds = dict(zip(meta["tokenizer.ggml.tokens"], meta["tokenizer.ggml.token_type"], strict=True))
    assert (kinds["<unk>"], kinds["<s>"], kinds["<0x41>"], kinds["[PAD1023]"]) == (2, 3, 6, 5)
    found = load_tokenizer(path)
    assert found(TEXT).input_ids == tokenizer(TEXT).input_ids
    assert found.decode(found(TEXT).input_ids, skip_special_tokens=True) == TEXT


def test_vocabulary_of_gemma4(tmp_path: Path) -> None:
    """As converters write it: the kind has a name of its own, and the merges are in the file."""
    tokenizer = sentencepiece(False)
    path = tokenizer_file(tmp_path, tokenizer, original=False)
    merges = [" ".join(pair) for pair in json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]]
    changes = {"tokenizer__ggml__model": "gemma4", "tokenizer__ggml__merges": merges, "tokenizer__ggml__add_space_prefix": None}
    found = load_tokenizer(rewrite(path, tmp_path / "c.gguf", **changes))
    assert found(TEXT).input_ids == tokenizer(TEXT).input_ids
    assert found.decode(found(TEXT).input_ids, skip_special_tokens=True) == TEXT


def test_tokenizers_that_cannot_be_converted(tmp_path: Path) -> None:
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers

    path = tmp_path / "a.gguf"
    model = tiny("llama", vocab_size=1024)
    pieces = transformers.PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordPiece({"[UNK]": 0}, unk_token="[UNK]")))
    with pytest.raises(GGUFTokenizerError, match="'WordPiece'"):
        save_gguf(model, path, pieces)
    odd = byte_level()
    odd.backend_tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("x+"), behavior="isolated")
    with pytest.raises(GGUFTokenizerError, match="no known name.*x\\+.*tokenizer=None"):
        save_gguf(model, path, odd)
    with pytest.raises(GGUFTokenizerError, match=r"ids up to \d+, the embedding 96 rows"):
        save_gguf(tiny("llama"), path, byte_level())
    with pytest.raises(GGUFTokenizerError, match="no tokenizer.json"):
        save_gguf(model, path, object())
    assert not list(tmp_path.iterdir())

    good = tokenizer_file(tmp_path, byte_level(), original=False)
    for change, message in (
        ({"tokenizer__ggml__model": "bert"}, "'bert' cannot be rebuilt"),
        ({"tokenizer__ggml__model": None}, "None cannot be rebuilt"),
        ({"tokenizer__ggml__pre": "unheard-of"}, "'unheard-of', known are"),
        ({"tokenizer__ggml__token_type": [1, 2]}, "2 types"),
        ({"tokenizer__ggml__tokens": ["a", "a"]}, "1 of them different"),
        ({"tokenizer__ggml__tokens": [1, 2]}, "tokens must be an array of str"),
        ({"tokenizer__ggml__merges": "a b"}, "merges must be an array of str"),
        ({"tokenizer__ggml__merges": ["zz zz"]}, "makes no tokenizer"),
        ({"tokenizer__huggingface__json": "{}"}, "cannot be read"),
    ):
        with pytest.raises(GGUFTokenizerError, match=message):
            load_tokenizer(rewrite(good, tmp_path / "c.gguf", **change))
