"""Quantizing from folder to folder: the same files as in memory, whatever happens on the way."""

from __future__ import annotations

import errno
import filecmp
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tiny_models import tiny_model
from torch import nn

import iqtorch
from iqtorch.checkpoint import job, stream
from iqtorch.errors import CheckpointError, ImportanceError, WeightError

RECIPE = {"lm_head|wte|embed": "q8_0", ".": "iq2_kl"}


@pytest.fixture(autouse=True)
def quiet() -> None:
    transformers.utils.logging.disable_progress_bar()


def save(folder: Path, model_type: str = "llama", shards: str = "500KB", **changes: Any) -> nn.Module:
    model = tiny_model(model_type, **changes).to(torch.bfloat16)
    model.save_pretrained(folder, max_shard_size=shards)
    return model


def in_memory(source: Path, output: Path, recipe: Any, shards: str = "400KB", **how: Any) -> iqtorch.report.Report:
    model = transformers.AutoModelForCausalLM.from_pretrained(source, dtype="auto")
    iqtorch.quantize_model(model, recipe, progress=False, **how)
    model.save_pretrained(output, max_shard_size=shards)
    return iqtorch.report(model)


def assert_same(found: Path, expected: Path) -> None:
    names = sorted(path.name for path in expected.iterdir())
    assert sorted(path.name for path in found.iterdir()) == names
    assert filecmp.cmpfiles(found, expected, names, shallow=False)[1:] == ([], [])


@pytest.mark.parametrize(
    ("model_type", "changes"),
    [
        ("llama", {}),
        ("llama", {"tie_word_embeddings": True}),
        ("gpt2", {}),
        ("mixtral", {}),  # the files have each expert for itself, the model has them in one parameter
        ("gpt_oss", {}),  # experts transposed
        ("deepseek_v3", {}),
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore:only 99.0 % of the weights")
def test_the_files_are_those_of_quantize_model(tmp_path: Path, model_type: str, changes: dict[str, Any]) -> None:
    save(tmp_path / "in", model_type, **changes)
    expected = in_memory(tmp_path / "in", tmp_path / "expected", RECIPE)
    made = iqtorch.quantize_checkpoint(tmp_path / "in", tmp_path / "out", RECIPE, max_shard_size="400KB", progress=False)
    assert_same(tmp_path / "out", tmp_path / "expected")
    assert str(made) == str(expected)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert again(torch.tensor([[1, 5, 9]])).logits.isfinite().all()


def test_every_option_means_the_same(tmp_path: Path) -> None:
    model = save(tmp_path / "in", "mixtral", shards="1GB")
    importance = {name: torch.rand(p.shape[-1] if p.dim() == 2 else (p.shape[0], p.shape[-1])) for name, p in model.named_parameters()}
    how: dict[str, Any] = {"importance": importance, "objective": "rmse", "speed": "fast", "skip": "layers.0.self_attn"}
    in_memory(tmp_path / "in", tmp_path / "expected", "iq3_k", shards="50GB", **how)
    iqtorch.quantize_checkpoint(tmp_path / "in", tmp_path / "out", "iq3_k", **how, progress=False)
    assert_same(tmp_path / "out", tmp_path / "expected")


def test_other_files_come_along(tmp_path: Path) -> None:
    from iqtorch.data import TINY_LLAMA

    iqtorch.quantize_checkpoint(TINY_LLAMA, tmp_path / "out", {"lm_head|embed": "q8_0"}, progress=False)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert filecmp.cmp(TINY_LLAMA / name, tmp_path / "out" / name, shallow=False)
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "out")("The old man").input_ids


def test_pieces_threads_and_the_order_of_work_change_no_byte(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path / "in", "gpt_oss")
    iqtorch.quantize_checkpoint(tmp_path / "in", tmp_path / "whole", RECIPE, threads=1, progress=False)
    monkeypatch.setattr(job, "PIECE", 1000)
    monkeypatch.setattr(job, "BUDGET", 1)
    iqtorch.quantize_checkpoint(tmp_path / "in", tmp_path / "small", RECIPE, threads=1, progress=False)
    monkeypatch.setattr(job, "BUDGET", 1 << 30)
    before = torch.get_num_threads()
    iqtorch.quantize_checkpoint(tmp_path / "in", tmp_path / "many", RECIPE, threads=5, progress=False)
    assert torch.get_num_threads() == before
    assert_same(tmp_path / "small", tmp_path / "whole")
    assert_same(tmp_path / "many", tmp_path / "whole")


# -- interruptions -------------------------------------------------------------------------------------------

#: A run in small pieces that waits after each, so that it can be killed between any two of them.
SLOW_RUN = """
import os, sys, time, iqtorch
from iqtorch.checkpoint import job, stream
job.PIECE, job._FLUSH, stream._PIECE, make = 4096, 0.0, 1, job._make
def slowly(piece, fd):
    time.sleep(0.005)
    make(piece, fd)
    print(".", end="", flush=True)
job._make = slowly
iqtorch.quantize_checkpoint(sys.argv[1], sys.argv[2], {"lm_head|embed": "q8_0", ".": "iq2_kl"}, threads=2, progress=False)
"""


def test_killed_runs_go_on_and_end_with_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path / "in", "llama", num_hidden_layers=6, tie_word_embeddings=True)
    source, out, expected = tmp_path / "in", tmp_path / "out", tmp_path / "expected"
    monkeypatch.setattr(job, "PIECE", 4096)
    monkeypatch.setattr(stream, "_PIECE", 1)  # what the journal counts: must be the same in every run
    made, make = [], job._make

    def counted(piece: job.Piece, fd: int) -> None:
        made.append(piece)
        make(piece, fd)

    monkeypatch.setattr(job, "_make", counted)
    iqtorch.quantize_checkpoint(source, expected, RECIPE, progress=False)
    total = len(made)
    moments = random.Random(0)
    noted = 0
    for _ in range(3):
        run = subprocess.Popen([sys.executable, "-c", SLOW_RUN, source, out], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        assert run.stdout is not None
        assert len(run.stdout.read(moments.randint(6, 15))) > 0, run.communicate()[1].decode()
        run.send_signal(signal.SIGKILL)
        assert run.wait() == -signal.SIGKILL
        run.communicate()
        assert not [path.name for path in out.iterdir() if not path.name.startswith(".")], "nothing under a final name"
        now = (out / ".iqtorch.journal").read_bytes().count(b"\n")
        assert now > noted, "each run goes on where the one before it was"
        noted = now
    with (out / ".iqtorch.journal").open("ab") as journal:
        journal.write(b"17 2")  # a line that was being written: 2 may be the beginning of 29
    noted = sum(len(line.split()) for line in (out / ".iqtorch.journal").read_bytes().split(b"\n")[1:-1])
    made.clear()
    iqtorch.quantize_checkpoint(source, out, RECIPE, progress=False)
    assert_same(out, expected)
    assert noted > 0 and len(made) == total - noted


def test_a_run_that_was_stopped_while_it_gave_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path / "in")
    run = [tmp_path / "in", tmp_path / "out", RECIPE]
    iqtorch.quantize_checkpoint(tmp_path / "in", tmp_path / "expected", RECIPE, max_shard_size="200KB", progress=False)
    replace = Path.replace
    for allowed in (0, 1, 1, 1, 2):  # two files with weights, each time; then the small ones, config.json the last
        count = iter(range(allowed))

        def stop(self: Path, target: Path, count: Any = count) -> Path:
            if next(count, None) is None:
                raise KeyboardInterrupt
            return replace(self, target)

        monkeypatch.setattr(Path, "replace", stop)
        with pytest.raises(KeyboardInterrupt):
            iqtorch.quantize_checkpoint(*run, max_shard_size="200KB", progress=False)
        monkeypatch.setattr(Path, "replace", replace)
        assert not (tmp_path / "out" / "config.json").exists()
    monkeypatch.setattr(job, "_make", None)  # all is written
    iqtorch.quantize_checkpoint(*run, max_shard_size="200KB", progress=False)
    assert_same(tmp_path / "out", tmp_path / "expected")
    assert len(list((tmp_path / "out").iterdir())) == 5


def test_a_full_disk_shows_at_once_or_leaves_a_run_to_resume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path / "in")
    usage = job.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(job.shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(OSError, match=r"no space for [\d,]+ bytes, 1,000 are free: nothing was written"):
        iqtorch.quantize_checkpoint(tmp_path / "in", tmp_path / "out", RECIPE, progress=False)
    assert list((tmp_path / "out").iterdir()) == []
    monkeypatch.undo()

    pwrite, left = os.pwrite, iter(range(5))

    def full(fd: int, data: memoryview, offset: int) -> int:
        if next(left, None) is None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return pwrite(fd, data[: len(data) // 2 + 1], offset)  # and a write may be short

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(OSError, match="No space left on device while '.*' was written; the same run goes on"):
        iqtorch.quantize_checkpoint(tmp_path / "in", tmp_path / "out", RECIPE, progress=False)
    assert not [path.name for path in (tmp_path / "out").iterdir() if not path.name.startswith(".")]
    monkeypatch.undo()
    iqtorch.quantize_checkpoint(tmp_path / "in", tmp_path / "out", RECIPE, progress=False)
    iqtorch.quantize_checkpoint(tmp_path / "in", tmp_path / "expected", RECIPE, progress=False)
    assert_same(tmp_path / "out", tmp_path / "expected")


def test_an_unfinished_run_is_not_mixed_with_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path / "in")

    def stop(piece: Any, fd: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(job, "_make", stop)
    with pytest.raises(KeyboardInterrupt):
        iqtorch.quantize_checkpoint(tmp_path / "in", tmp_path / "out", RECIPE, progress=False)
    monkeypatch.undo()
    with pytest.raises(CheckpointError, match=r"unfinished run that differs in options: run it again as it was .* overwrite"):
        iqtorch.quantize_checkpoint(tmp_path / "in", tmp_path / "out", RECIPE, objective="rmse", progress=False)
    with pytest.raises(CheckpointError, match=r"differs in files, headers"):
        iqtorch.quantize_checkpoint(tmp_path / "in", tmp_path / "out", {".": "iq4_ks"}, progress=False)
    iqtorch.quantize_checkpoint(tmp_path / "in", tmp_path / "out", {".": "iq4_ks"}, overwrite=True, progress=False)
    iqtorch.quantize_checkpoint(tmp_path / "in", tmp_path / "expected", {".": "iq4_ks"}, progress=False)
    assert_same(tmp_path / "out", tmp_path / "expected")
    with pytest.raises(CheckpointError, match=r"has model.safetensors, config.json already"):
        iqtorch.quantize_checkpoint(tmp_path / "in", tmp_path / "out", {".": "iq4_ks"}, progress=False)


def test_overwriting_leaves_no_file_of_the_old_checkpoint(tmp_path: Path) -> None:
    save(tmp_path / "in")
    how: dict[str, Any] = {"overwrite": True, "progress": False}
    iqtorch.quantize_checkpoint(tmp_path / "in", tmp_path / "one", RECIPE, **how)
    iqtorch.quantize_checkpoint(tmp_path / "in", tmp_path / "many", RECIPE, max_shard_size="400KB", **how)
    for first, second in (("50GB", "400KB"), ("400KB", "50GB")):
        out = tmp_path / first
        iqtorch.quantize_checkpoint(tmp_path / "in", out, RECIPE, max_shard_size=first, **how)
        iqtorch.quantize_checkpoint(tmp_path / "in", out, RECIPE, max_shard_size=second, **how)
        assert_same(out, tmp_path / ("one" if second == "50GB" else "many"))


def test_two_runs_do_not_write_into_one_folder(tmp_path: Path) -> None:
    save(tmp_path / "in")
    (tmp_path / "out").mkdir()
    with job._locked(tmp_path / "out" / ".iqtorch.journal"), pytest.raises(CheckpointError, match="another process is writing"):
        iqtorch.quantize_checkpoint(tmp_path / "in", tmp_path / "out", RECIPE, progress=False)


# -- checkpoints that cannot be quantized ----------------------------------------------------------------------


def rewrite(file: Path, change: Any) -> None:
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("model_type", "name", "position"),
    [("llama", "model.layers.1.mlp.up_proj.weight", (201, 7)), ("gpt_oss", "model.layers.0.mlp.experts.down_proj", (3, 100, 9))],
)
def test_nan_is_named_with_its_position(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model_type: str, name: str, position: tuple[int, ...]
) -> None:
    save(tmp_path / "in", model_type, shards="1GB")

    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        stored = tensors[name].mT if tensors[name].dim() == 3 else tensors[name]
        stored[position] = float("nan")

    rewrite(tmp_path / "in" / "model.safetensors", spoil)
    monkeypatch.setattr(stream, "_PIECE", 1)
    with pytest.raises(WeightError, match=rf"'{name}' has 1 NaN or Inf values, the first at \({', '.join(map(str, position))}\): nan"):
        iqtorch.quantize_checkpoint(tmp_path / "in", tmp_path / "out", RECIPE, progress=False)
    assert not [path.name for path in (tmp_path / "out").iterdir() if not path.name.startswith(".")]


def _drop_shard(folder: Path) -> None:
    (folder / "model-00002-of-00002.safetensors").unlink()


def _wrong_index(folder: Path) -> None:
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    first, second = "model.layers.0.mlp.up_proj.weight", "model.norm.weight"
    index["weight_map"][first] = index["weight_map"][second]
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def _escaping_index(folder: Path) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "../x.safetensors"}}))


def _cut(folder: Path) -> None:
    file = folder / "model-00002-of-00002.safetensors"
    file.write_bytes(file.read_bytes()[:-1])


def _other_shape(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "intermediate_size": 1024}))


def _missing_tensor(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 3}))


def _quantized(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "fp8"}}))


def _only_pickle(folder: Path) -> None:
    for path in folder.glob("model*"):
        path.unlink()
    (folder / "pytorch_model.bin").write_bytes(b"")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_drop_shard, r"1 of 2 shards are missing in .*: model-00002-of-00002.safetensors"),
        (_wrong_index, r"index.json names 1 tensors that .*: 'model.layers.0.mlp.up_proj.weight' \(model-00002"),
        (_escaping_index, r"must give each tensor the name of a file beside it"),
        (_cut, r"model-00002-of-00002.safetensors is not a whole safetensors file"),
        (_other_shape, r"does not hold the model of its config.json"),
        (_missing_tensor, r"no file has model.layers.2.input_layernorm.weight, .* and \d+ more|no file has model.layers.2"),
        (_quantized, r"quantized already, by 'fp8'"),
        (_only_pickle, r"neither model.safetensors nor model.safetensors.index.json, but pytorch_model.bin"),
    ],
)
def test_a_checkpoint_that_is_not_whole(tmp_path: Path, damage: Any, message: str) -> None:
    save(tmp_path / "in", shards="1MB")
    damage(tmp_path / "in")
    with pytest.raises(CheckpointError, match=message):
        iqtorch.quantize_checkpoint(tmp_path / "in", tmp_path / "out", RECIPE, progress=False)
    assert not (tmp_path / "out").exists()


def test_arguments_that_cannot_be(tmp_path: Path) -> None:
    save(tmp_path / "in")
    with pytest.raises(CheckpointError, match="is the checkpoint itself"):
        iqtorch.quantize_checkpoint(tmp_path / "in", tmp_path / "in" / ".", RECIPE)
    with pytest.raises(CheckpointError, match="is not a folder"):
        iqtorch.quantize_checkpoint(tmp_path / "missing", tmp_path / "out", RECIPE)
    with pytest.raises(ValueError, match="speed must be one of"):
        iqtorch.quantize_checkpoint(tmp_path / "in", tmp_path / "out", RECIPE, speed="slow")  # type: ignore[arg-type]
    with pytest.raises(ImportanceError, match=r"must have shape \(256,\)"):
        iqtorch.quantize_checkpoint(tmp_path / "in", tmp_path / "out", RECIPE, {"lm_head": torch.ones(3)})


# -- memory ----------------------------------------------------------------------------------------------------

#: Prints by how many bytes the resident memory grew at most, from the moment that the packages are imported.
MEASURED = """
import sys, torch, transformers, iqtorch, iqtorch.checkpoint, iqtorch.hf.lazy, iqtorch.gguf.lazy, huggingface_hub
from transformers.models.llama import modeling_llama
iqtorch.quantize(torch.randn(64, 256), "iq2_kl")
def peak():
    fields = dict(line.split(":", 1) for line in open("/proc/self/status"))
    return int(fields["VmHWM"].split()[0]) * 1024
open("/proc/self/clear_refs", "w").write("5")
before = peak()
{}
print(peak() - before)
"""


def peak_growth(code: str, *arguments: object) -> int:
    command = [sys.executable, "-c", MEASURED.format(code), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


def grown(source: Path, output: Path, recipe: dict[str, str | None]) -> int:
    return peak_growth(f"iqtorch.quantize_checkpoint(*sys.argv[1:3], {recipe!r}, speed='fast', progress=False)", source, output)


def write_llama(folder: Path, hidden: int, intermediate: int, layers: int, vocabulary: int) -> int:
    """A random bfloat16 checkpoint, one file per layer; returns its bytes."""
    config = transformers.LlamaConfig(
        hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=layers, vocab_size=vocabulary, num_attention_heads=8,
        num_key_value_heads=8, tie_word_embeddings=True, dtype="bfloat16", architectures=["LlamaForCausalLM"],
    )  # fmt: skip
    config.save_pretrained(folder)
    with torch.device("meta"):
        shapes = {name: p.shape for name, p in transformers.LlamaForCausalLM(config).named_parameters()}
    weight_map, values = {}, torch.randn(1 << 16, generator=torch.Generator().manual_seed(0)).mul(0.02).bfloat16()
    for layer in range(-1, layers):
        names = [n for n in shapes if (f"layers.{layer}." in n if layer >= 0 else "layers" not in n)]
        file = f"model-{layer + 2:05d}-of-{layers + 1:05d}.safetensors"
        save_file(
            {n: values.repeat(-(-shapes[n].numel() // len(values)))[: shapes[n].numel()].view(shapes[n]) for n in names}, folder / file
        )
        weight_map |= dict.fromkeys(names, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


needs_proc = pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="peak memory is read from Linux's /proc")


@needs_proc
def test_memory_does_not_grow_with_the_model(tmp_path: Path) -> None:
    size = write_llama(tmp_path / "in", hidden=1024, intermediate=8192, layers=8, vocabulary=32768)
    assert size > 500e6
    assert grown(tmp_path / "in", tmp_path / "out", {r"layers\.0\..*down_proj|layers\.7\..*v_proj": "q8_0"}) < 100 << 20


@needs_proc
@pytest.mark.slow
def test_memory_while_a_large_checkpoint_is_quantized(tmp_path: Path) -> None:
    size = write_llama(tmp_path / "in", hidden=2048, intermediate=8192, layers=11, vocabulary=32768)
    assert size > 1.5e9
    start = time.monotonic()
    growth = grown(tmp_path / "in", tmp_path / "out", {".": "iq4_nl"})
    print(f"{size / 1e9:.2f} GB: {growth / 2**20:.0f} MiB more at the peak, {time.monotonic() - start:.0f} s")
    largest = 32768 * 2048 * 4
    assert growth < 2 * largest + (500 << 20)  # the promise
    assert growth < 200 << 20  # what it takes


def test_the_progress_bar_counts_and_tells_the_time_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    save(tmp_path / "in")
    monkeypatch.setenv("FORCE_COLOR", "1")  # to rich, standard error is a terminal
    monkeypatch.setenv("COLUMNS", "160")
    make = job._make

    def slowly(*args: Any) -> None:
        time.sleep(0.05)
        make(*args)

    monkeypatch.setattr(job, "_make", slowly)
    iqtorch.quantize_checkpoint(tmp_path / "in", tmp_path / "out", RECIPE, threads=1)
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", capsys.readouterr().err)
    drawn = re.findall(r"quantizing \S+ +(\d+)% (-:--:--|\d:\d\d:\d\d) ?([\w.]*)", shown)
    shares = [int(share) for share, _, _ in drawn]
    assert shares == sorted(shares) and shares[0] == 0 and shares[-1] == 100
    assert any(0 < int(share) < 100 and left[0] == "0" and name.endswith(".weight") for share, left, name in drawn), drawn
    assert drawn[-1][1] == "0:00:00"

    iqtorch.quantize_checkpoint(tmp_path / "in", tmp_path / "quiet", RECIPE, progress=False)
    assert "quantizing" not in capsys.readouterr().err
