"""Converting and quantizing from file to file where GGUF files are on one side or on both."""

from __future__ import annotations

import filecmp
from pathlib import Path
from typing import Any

import gguf_models
import pytest
import torch
import transformers
from test_checkpoint import assert_same, needs_proc, peak_growth, write_llama

import iqtorch
from iqtorch import IQTensor, Recipe
from iqtorch.checkpoint import job
from iqtorch.data import TINY_LLAMA
from iqtorch.errors import CheckpointError
from iqtorch.gguf import GGUFFile, GGUFMagicError, TensorSource, load_tokenizer, write_gguf
from iqtorch.gguf.lazy import LazyGGUFFile
from iqtorch.gguf.writer import Typed

PURE = Recipe.pure("iq4_nl")


@pytest.fixture(autouse=True)
def quiet() -> None:
    transformers.utils.logging.disable_progress_bar()


def same(a: Path, b: Path) -> bool:
    return filecmp.cmp(a, b, shallow=False)


def loaded(folder: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="auto")


@pytest.mark.parametrize(
    "name",
    [
        "llama", "llama-3.1", "qwen3-moe", "gemma2", "deepseek-v2", "phi3", "gpt-oss", "gpt2", "bloom", "falcon-new", "mamba", "lfm2",
        "qwen3-next",
    ],
)  # fmt: skip
def test_every_way_gives_the_files_of_the_way_through_memory(tmp_path: Path, name: str) -> None:
    gguf_models.tiny(name).save_pretrained(tmp_path / "in")
    model = loaded(tmp_path / "in")
    iqtorch.save_gguf(model, tmp_path / "plain.gguf")
    iqtorch.convert_checkpoint(tmp_path / "in", tmp_path / "made.gguf", progress=False)
    assert same(tmp_path / "made.gguf", tmp_path / "plain.gguf")

    iqtorch.quantize_model(model, PURE, progress=False)
    iqtorch.save_gguf(model, tmp_path / "packed.gguf")
    iqtorch.quantize_checkpoint(tmp_path / "in", tmp_path / "made-packed.gguf", PURE, progress=False)
    assert same(tmp_path / "made-packed.gguf", tmp_path / "packed.gguf")

    iqtorch.quantize_checkpoint(tmp_path / "in", tmp_path / "folder", PURE, progress=False)
    iqtorch.save_gguf(loaded(tmp_path / "folder"), tmp_path / "from-folder.gguf")
    iqtorch.convert_checkpoint(tmp_path / "folder", tmp_path / "made-from-folder.gguf", progress=False)
    assert same(tmp_path / "made-from-folder.gguf", tmp_path / "from-folder.gguf")

    iqtorch.load_gguf(tmp_path / "packed.gguf").save_pretrained(tmp_path / "back")
    iqtorch.convert_checkpoint(tmp_path / "packed.gguf", tmp_path / "made-back", progress=False)
    assert_same(tmp_path / "made-back", tmp_path / "back")

    iqtorch.convert_checkpoint(tmp_path / "packed.gguf", tmp_path / "again.gguf", progress=False)
    assert same(tmp_path / "again.gguf", tmp_path / "packed.gguf")


def test_columns_in_the_order_of_files(tmp_path: Path) -> None:
    """What is quantized into a GGUF file has its columns as the file wants them; other ways are those through memory."""
    gguf_models.tiny("qwen3.5-moe").save_pretrained(tmp_path / "in")
    model = loaded(tmp_path / "in")
    iqtorch.gguf.use_file_order(model)
    iqtorch.quantize_model(model, PURE, progress=False)
    iqtorch.save_gguf(model, tmp_path / "packed.gguf")
    iqtorch.quantize_checkpoint(tmp_path / "in", tmp_path / "made.gguf", PURE, progress=False)
    assert same(tmp_path / "made.gguf", tmp_path / "packed.gguf")
    iqtorch.load_gguf(tmp_path / "made.gguf").save_pretrained(tmp_path / "back")
    iqtorch.convert_checkpoint(tmp_path / "made.gguf", tmp_path / "made-back", progress=False)
    assert_same(tmp_path / "made-back", tmp_path / "back")
    iqtorch.save_gguf(loaded(tmp_path / "back"), tmp_path / "again.gguf")
    assert same(tmp_path / "again.gguf", tmp_path / "made.gguf")


@pytest.fixture(scope="module")
def tiny_gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    iqtorch.quantize_checkpoint(TINY_LLAMA, path, Recipe.pure("iq2_k"), progress=False)
    return path


def test_the_tokenizer_comes_along(tmp_path: Path, tiny_gguf: Path) -> None:
    iqtorch.convert_checkpoint(tiny_gguf, tmp_path / "folder", progress=False)
    text = "The old man looked at the sea."
    ids = transformers.AutoTokenizer.from_pretrained(TINY_LLAMA)(text).input_ids
    assert load_tokenizer(tiny_gguf)(text).input_ids == ids
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "folder")(text).input_ids == ids


def rewritten(source: Path, path: Path, tensors: dict[str, TensorSource], parts: int = 1, **metadata: Any) -> list[Path]:
    """The file with other tensors and more metadata, in several parts."""
    kept = LazyGGUFFile(source).plain_metadata() | metadata
    if parts == 1:
        write_gguf(path, kept, tensors.values())
        return [path]
    names, paths = list(tensors), []
    for i in range(parts):
        split = {"split.no": Typed(i, 2), "split.count": Typed(parts, 2), "split.tensors.count": Typed(len(names), 5)}
        paths.append(path.with_name(f"{path.stem}-{i + 1:05d}-of-{parts:05d}.gguf"))
        write_gguf(paths[-1], (kept if i == 0 else {}) | split, [tensors[name] for name in names[i::parts]])
    return paths


def test_interleaved_rows_become_plain_ones_and_parts_one_file(tmp_path: Path, tiny_gguf: Path) -> None:
    file = GGUFFile(tiny_gguf)
    tensors: dict[str, TensorSource] = {}
    for info in file.tensors.values():
        data = file.data(info.name).clone()
        if info.format is None:
            tensors[info.name] = TensorSource.of(info.name, data)
            continue
        twin = iqtorch.get_format(f"{info.format.name}_r4") if info.format.name == "iq2_k" else info.format
        blocks = IQTensor.from_blocks(data, info.format).to_blocks(twin)
        tensors[info.name] = TensorSource(info.name, info.shape, twin, lambda blocks=blocks: blocks)  # type: ignore[misc]
    paths = rewritten(tiny_gguf, tmp_path / "x.gguf", tensors, parts=3, **{"general.file_type": 338})
    assert {info.type_name for info in GGUFFile(paths[0]).tensors.values()} >= {"iq2_k_r4", "float32"}
    iqtorch.convert_checkpoint(paths[1], tmp_path / "plain.gguf", progress=False)
    plain, original = GGUFFile(tmp_path / "plain.gguf"), file
    assert {key: (plain.metadata.kinds(key), plain.metadata[key]) for key in plain.metadata} == {
        key: (original.metadata.kinds(key), original.metadata[key]) for key in original.metadata
    }
    assert sorted(plain.tensors) == sorted(original.tensors)
    for name, info in original.tensors.items():
        assert plain.tensors[name].format is info.format
        assert torch.equal(plain.data(name), original.data(name))
    # and to a folder, from the parts
    iqtorch.convert_checkpoint(paths[0], tmp_path / "from-parts", progress=False)
    iqtorch.convert_checkpoint(tiny_gguf, tmp_path / "from-one", progress=False)
    assert_same(tmp_path / "from-parts", tmp_path / "from-one")


def test_quantizing_again_must_be_asked_for(tmp_path: Path, tiny_gguf: Path) -> None:
    with pytest.raises(CheckpointError, match=r"29 weights are quantized already .* in iq2_k\).*--requantize"):
        iqtorch.quantize_checkpoint(tiny_gguf, tmp_path / "x.gguf", "iq4_nl", progress=False)
    rules = Recipe.pure("iq4_nl")
    iqtorch.quantize_checkpoint(tiny_gguf, tmp_path / "x.gguf", rules, requantize=True, progress=False)
    before, after = iqtorch.load_gguf(tiny_gguf), iqtorch.load_gguf(tmp_path / "x.gguf")
    for (name, old), new in zip(before.named_parameters(), after.parameters(), strict=True):
        if isinstance(old, IQTensor):
            assert isinstance(new, IQTensor) and new.format.name == "iq4_nl"
            assert torch.equal(new.to_blocks(), iqtorch.quantize(old.dequantize(), "iq4_nl").to_blocks()), name


def test_a_file_of_plain_weights_is_quantized(tmp_path: Path) -> None:
    iqtorch.convert_checkpoint(TINY_LLAMA, tmp_path / "plain.gguf", progress=False)
    iqtorch.quantize_checkpoint(tmp_path / "plain.gguf", tmp_path / "packed.gguf", Recipe.pure("iq2_k"), progress=False)
    model = iqtorch.load_gguf(tmp_path / "plain.gguf")
    iqtorch.quantize_model(model, Recipe.pure("iq2_k"), progress=False)
    iqtorch.save_gguf(model, tmp_path / "expected.gguf", load_tokenizer(tmp_path / "plain.gguf"))
    assert same(tmp_path / "packed.gguf", tmp_path / "expected.gguf")


def test_an_interrupted_file_goes_on(tmp_path: Path, tiny_gguf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make, left = job._make, iter(range(9))

    def stop(piece: job.Piece, fd: int) -> None:
        if next(left, None) is None:
            raise KeyboardInterrupt
        make(piece, fd)

    monkeypatch.setattr(job, "_make", stop)
    with pytest.raises(KeyboardInterrupt):
        iqtorch.quantize_checkpoint(TINY_LLAMA, tmp_path / "tiny.gguf", Recipe.pure("iq2_k"), threads=1, progress=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".tiny.gguf.journal", ".tiny.gguf.part"]
    made = []
    monkeypatch.setattr(job, "_make", lambda piece, fd: (made.append(piece), make(piece, fd)))
    iqtorch.quantize_checkpoint(TINY_LLAMA, tmp_path / "tiny.gguf", Recipe.pure("iq2_k"), progress=False)
    assert len(made) == len(GGUFFile(tiny_gguf).tensors) - 9
    assert same(tmp_path / "tiny.gguf", tiny_gguf)
    assert [path.name for path in tmp_path.iterdir()] == ["tiny.gguf"]


def test_what_cannot_be_converted(tmp_path: Path, tiny_gguf: Path) -> None:
    with pytest.raises(CheckpointError, match="are both folders: there is nothing to convert"):
        iqtorch.convert_checkpoint(TINY_LLAMA, tmp_path / "out")
    with pytest.raises(CheckpointError, match="is the checkpoint itself"):
        iqtorch.convert_checkpoint(tiny_gguf, tiny_gguf)
    (tmp_path / "x.gguf").write_bytes(b"\0" * 100)
    with pytest.raises(GGUFMagicError):
        iqtorch.convert_checkpoint(tmp_path / "x.gguf", tmp_path / "out")
    with pytest.raises(CheckpointError, match=r"has x.gguf already"):
        iqtorch.convert_checkpoint(tiny_gguf, tmp_path / "x.gguf")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x.gguf"]


@needs_proc
def test_memory_does_not_grow_with_the_file(tmp_path: Path) -> None:
    size = write_llama(tmp_path / "in", hidden=1024, intermediate=8192, layers=8, vocabulary=32768)
    assert size > 500e6
    convert = "iqtorch.convert_checkpoint(*sys.argv[1:3], progress=False)"
    assert peak_growth(convert, tmp_path / "in", tmp_path / "x.gguf") < 150 << 20
    assert peak_growth(convert, tmp_path / "x.gguf", tmp_path / "back") < 150 << 20
