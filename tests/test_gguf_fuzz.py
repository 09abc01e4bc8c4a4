"""Model files with damage anywhere in their headers: each loads, or is refused by name, soon and in little memory."""

from __future__ import annotations

import logging
import random
import resource
import sys
import time
from pathlib import Path

import pytest

import iqtorch
from iqtorch.gguf import GGUFError, GGUFFile, load_gguf, load_tokenizer, save_gguf

transformers = pytest.importorskip("transformers")
from gguf_models import MODELS, tiny  # noqa: E402 (imports transformers)
from test_gguf import byte_level, sentencepiece  # noqa: E402

#: Bytes that make numbers extreme.
EXTREME = (0, 1, 2, 0x7F, 0x80, 0xFF)
SECONDS, MEGABYTES = 20, 1500


def file_of(path: Path, name: str) -> Path:
    model = iqtorch.quantize_model(tiny(name, vocab_size=1024), iqtorch.Recipe.pure("q8_0"), progress=False)
    save_gguf(model, path, byte_level("llama-bpe") if len(name) % 2 else sentencepiece())
    return path


def damaged(raw: bytes, file: GGUFFile, rng: random.Random) -> bytes:
    """A copy with a few bytes of the header changed: half of the time within a number or a length of the metadata."""
    out, end = bytearray(raw), min(info.offset for info in file.tensors.values())
    scalars = [key for key in file.metadata if file.metadata.kinds(key)[0] != 9]
    if rng.random() < 0.5:
        for key in rng.sample(scalars, rng.randint(1, 2)):
            start = file.metadata._values[key].start
            for i in range(4):
                if rng.random() < 0.6:
                    out[start + i] = rng.choice((*EXTREME, rng.randrange(256)))
    else:
        first = rng.choice((0, max(0, end - 3000)))  # the whole header, or the entries of the tensors
        for _ in range(rng.randint(1, 4)):
            out[rng.randrange(first, end)] = rng.choice((*EXTREME, rng.randrange(256)))
    return bytes(out)


def check(folder: Path, names: list[str], rounds: int, seed: int) -> None:
    """Any other exception than a GGUFError fails the test; so does a file that takes long, or much memory."""
    rng, path = random.Random(seed), folder / "damaged.gguf"
    files = [file_of(folder / f"{name}.gguf", name) for name in names]
    good = [(file.read_bytes(), GGUFFile(file)) for file in files]
    loaded = refused = 0
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(rounds):
        path.write_bytes(damaged(*rng.choice(good), rng))
        start = time.process_time()
        for read in (load_gguf, load_tokenizer):
            try:
                read(path)
                loaded += 1
            except GGUFError:
                refused += 1
        assert time.process_time() - start < SECONDS
    assert loaded > rounds / 10 and refused > rounds / 10
    unit = 1024 if sys.platform == "linux" else 1
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * unit < MEGABYTES << 20


def test_damaged_headers(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.CRITICAL)
    check(tmp_path, ["llama", "deepseek-v3"], 60, seed=1)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
def test_damaged_headers_of_all_families(tmp_path: Path, seed: int, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.CRITICAL)
    check(tmp_path, list(MODELS), 2500, seed)
