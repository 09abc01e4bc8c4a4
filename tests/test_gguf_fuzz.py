"""Model files with damage anywhere: each loads, or is refused by name, soon and in little memory; a truncated one never loads."""

from __future__ import annotations

import logging
import os
import random
import resource
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import iqtorch
from iqtorch.gguf import GGUFError, GGUFFile, load_gguf, load_tokenizer, save_gguf, use_file_order

transformers = pytest.importorskip("transformers")
from gguf_models import MODELS, byte_level, sentencepiece, tiny  # noqa: E402 (imports transformers)

#: Bytes that make numbers extreme.
EXTREME = (0, 1, 2, 0x7F, 0x80, 0xFF)
SECONDS, MEGABYTES = 20, 1500


def file_of(path: Path, name: str, tokenizer: bool = True) -> Path:
    use_file_order(model := tiny(name, vocab_size=1024))
    iqtorch.quantize_model(model, iqtorch.Recipe.pure("q8_0"), progress=False)
    save_gguf(model, path, (byte_level("llama-bpe") if len(name) % 2 else sentencepiece()) if tokenizer else None)
    return path


def end_of_header(file: GGUFFile) -> int:
    return min(info.offset for info in file.tensors.values())


def damaged(raw: bytes, file: GGUFFile, rng: random.Random) -> bytes:
    """A copy with a few bytes of the header changed: half of the time within a number or a length of the metadata."""
    out, end = bytearray(raw), end_of_header(file)
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


@contextmanager
def little_memory() -> Iterator[None]:
    """A file that asks for much fails, where it would take the machine down."""
    if sys.platform != "linux":
        yield
        return
    size = next(int(line.split()[1]) << 10 for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmSize"))
    old = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (size + (MEGABYTES << 20), old[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, old)


def check(folder: Path, names: list[str], rounds: int, seed: int) -> None:
    """Any other exception than a GGUFError fails the test; so does a file that takes long, or much memory."""
    rng, path = random.Random(seed), folder / "damaged.gguf"
    files = [file_of(folder / f"{name}.gguf", name) for name in names]
    good = [(file.read_bytes(), GGUFFile(file)) for file in files]
    loaded, refusals = 0, []
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with little_memory():
        for _ in range(rounds):
            path.write_bytes(damaged(*rng.choice(good), rng))
            start = time.process_time()
            for read in (load_gguf, load_tokenizer):
                try:
                    read(path)
                    loaded += 1
                except GGUFError as error:
                    refusals.append(str(error))
            assert time.process_time() - start < SECONDS
    assert loaded > rounds / 10 and len(refusals) > rounds / 10
    # each says which file, and none comes of memory that a damaged number asked for
    assert [text for text in refusals if not text.startswith(str(path)) or "allocate" in text] == []
    unit = 1024 if sys.platform == "linux" else 1
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * unit < MEGABYTES << 20


def refusal(path: Path) -> GGUFError | None:
    """What the reader says about a file; all of its metadata are decoded."""
    try:
        dict(GGUFFile(path).metadata)
    except GGUFError as error:
        return error
    return None


def accepted_when_cut(path: Path, cuts: Iterable[int]) -> list[int]:
    """Lengths, the largest first, to which a file can be cut without a refusal."""
    found = []
    for cut in sorted(cuts, reverse=True):
        os.truncate(path, cut)
        if refusal(path) is None:
            found.append(cut)
    return found


def test_truncated_at_any_byte(tmp_path: Path) -> None:
    path = file_of(tmp_path / "a.gguf", "llama", tokenizer=False)
    file, rng = GGUFFile(path), random.Random(0)
    last = max(info.offset + info.nbytes for info in file.tensors.values())
    os.truncate(path, last - 1)
    with pytest.raises(GGUFError, match=r"1 beyond the end of the file; download it again"):
        load_gguf(path)
    os.truncate(path, last)  # the padding after the last tensor is not needed
    cuts = [*range(end_of_header(file) + 65), *(rng.randrange(last) for _ in range(200)), last]
    assert accepted_when_cut(path, cuts) == [last]


@pytest.mark.parametrize("tokenizer", [False, True], ids=["plain", "tokenizer"])
def test_damaged_bytes_of_the_header(tmp_path: Path, tokenizer: bool) -> None:
    """The reader alone: every byte of a short header, some of a long one."""
    path = file_of(tmp_path / "a.gguf", "qwen2-moe", tokenizer)
    raw, end, rng = path.read_bytes(), end_of_header(GGUFFile(path)), random.Random(1)
    refused = 0
    with path.open("r+b", buffering=0) as file:
        for at in rng.sample(range(end), 1000) if tokenizer else range(end):
            value = rng.choice([byte for byte in (*EXTREME, raw[at] ^ 1 << rng.randrange(8)) if byte != raw[at]])
            for byte in (value, raw[at]):
                file.seek(at)
                file.write(bytes([byte]))
                if byte == value:
                    refused += refusal(path) is not None
    assert refused > 50
    assert path.read_bytes() == raw


def test_damaged_headers(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.CRITICAL)
    check(tmp_path, ["llama", "deepseek-yarn", "gemma3", "qwen3.5"], 160, seed=1)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
def test_damaged_headers_of_all_families(tmp_path: Path, seed: int, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.CRITICAL)
    check(tmp_path, list(MODELS), 2500, seed)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama-3.1", "qwen3-moe", "deepseek-v3", "phi3"])
def test_truncated_with_a_tokenizer(tmp_path: Path, name: str) -> None:
    path = file_of(tmp_path / "a.gguf", name)
    assert accepted_when_cut(path, range(end_of_header(GGUFFile(path)))) == []
