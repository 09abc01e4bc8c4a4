"""The command line: what each word prints, JSON, exit codes."""

from __future__ import annotations

import filecmp
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from typer.testing import CliRunner

import iqtorch
from iqtorch import Recipe, bench, cli, cpu_ext, data, evaluate, get_format, hf, kernel_info, list_formats, quantize_checkpoint
from iqtorch.errors import CheckpointError, EvaluationError, RecipeError, UnknownFormatError
from iqtorch.importance import Importance, ImportanceEntry, collect_importance

runner = CliRunner()


def run(*arguments: object) -> str:
    result = runner.invoke(cli.app, [str(a) for a in arguments])
    assert result.exit_code == 0, result.output
    return result.stdout


def run_json(*arguments: object) -> Any:
    return json.loads(run(*arguments, "--json"))


def process(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "iqtorch.cli", *map(str, arguments)], capture_output=True, text=True, check=False)


def test_help_names_every_command_and_gives_examples() -> None:
    printed = run("--help")
    commands = [command.name or command.callback.__name__ for command in cli.app.registered_commands if command.callback]
    assert len(commands) >= 6
    for word in (*commands, "Examples", "iqtorch kl tiny-llama --format iq2_kl"):
        assert word in printed
    for command in commands:
        shown = run(command, "--help")
        assert "Usage" in shown and "Examples" in shown and f"iqtorch {command}" in shown and "--json" in shown


def test_shell_completion() -> None:
    def complete(**variables: str) -> str:
        code = "import sys; sys.argv = ['iqtorch']; from iqtorch.cli import main; main()"
        done = subprocess.run([sys.executable, "-c", code], env={**os.environ, **variables}, capture_output=True, text=True, check=False)
        assert done.stdout, done.stderr
        return done.stdout

    words = complete(_IQTORCH_COMPLETE="complete_bash", COMP_CWORD="3", COMP_WORDS="iqtorch quantize --format iq2_").split()
    assert {"iq2_kl", "iq2_ks", "iq2_k"} <= set(words)
    assert not any(name.startswith("iq3") for name in words)
    # What --show-completion prints; that option asks which shell runs this process, and the tests may run under any.
    assert "complete_bash" in complete(_IQTORCH_COMPLETE="source_bash")
    assert {"--install-completion", "--show-completion"} <= set(run("--help").split())


def test_version_says_which_kernels_run() -> None:
    shown = run("--version")
    info = kernel_info()
    assert f"iqtorch {iqtorch.__version__}, PyTorch {torch.__version__}\n" in shown
    assert f"cpu: available ({info['isa']})\n" in shown and info["isa"] == cpu_ext.capabilities()["isa"]


def test_mistakes_are_found_before_a_model_is_looked_for(tmp_path: Path) -> None:
    """`someone/model` would be looked for on the hub."""
    text, folder = str(data.TINY_LLAMA_IMPORTANCE.with_name("config.json")), str(data.TINY_LLAMA)
    for words, kind in (
        (["importance", "someone/model", str(tmp_path / "missing" / "imatrix.dat")], FileNotFoundError),
        (["quantize", "someone/model", folder, "--format", "iq4_ks", "--calibration", text], CheckpointError),
        (["demo", "-o", str(tmp_path / "missing" / "plot.png")], FileNotFoundError),
        (["demo", "-o", "plot.txt"], EvaluationError),
        (["quantize", "someone/model", "out", "--format", "iq2kl"], UnknownFormatError),
        (["perplexity", "someone/model", "--rule", "(=iq2_kl"], RecipeError),
        (["convert", "someone/model", "out", "--recipe", "missing.toml"], FileNotFoundError),
    ):
        assert isinstance(runner.invoke(cli.app, words).exception, kind), words
    for words, message in (
        (["kl", "someone/model", "--device", "abacus"], "no device"),
        (["quantize", "a/b", "c", "--format", "iq4_ks", "--calibration", text, "--device", "abacus"], "no device"),
        (["quantize", "a/b", "c", "--format", "iq4_ks", "--device", "cpu"], "for --calibration"),
        (["quantize", "a/b", "c", "--rule", "x"], "REGEX=FORMAT"),
        (["quantize", "a/b", "c", "--format", "iq4_ks", "--windows", "3"], "for --calibration"),
        (["quantize", "a/b", "c", "--format", "iq4_ks", "--max-shard-size", "large"], "'large' is no size"),
        (["chat", "a/b", "--json"], "give --prompt"),
        (["quantize", "a/b", "c", "--format", "iq4_ks", "--rounding", "yaqa"], "for --calibration"),
    ):
        result = runner.invoke(cli.app, words)
        assert result.exit_code == 2 and message in " ".join(result.output.split()), result.output


def test_formats_lists_all() -> None:
    rows = run_json("formats")
    assert sorted(row["format"] for row in rows) == sorted(list_formats())
    assert [row["bpw"] for row in rows if not row["plain"]] == sorted(row["bpw"] for row in rows if not row["plain"])
    assert "iq2_kl" in run("formats")


def test_perplexity_of_the_embedded_model(tmp_path: Path) -> None:
    model, tokenizer = data.load_tiny_llama()
    text = data.heldout_text()[:8000]
    (tmp_path / "text.txt").write_text(text, encoding="utf-8")
    expected = evaluate.perplexity(model, hf.encode(tokenizer, text)[:1024])
    found = run_json("perplexity", data.TINY_LLAMA, "--text", tmp_path / "text.txt", "--windows", 2)
    assert found["tokens"] == 510
    assert found["perplexity"] == pytest.approx(expected.perplexity, rel=1e-2)  # the folder loads as bfloat16
    whole = run_json("perplexity", "tiny-llama", "--windows", 2, "--batch-size", 1)
    assert whole["perplexity"] == pytest.approx(evaluate.perplexity(model, hf.encode(tokenizer, data.heldout_text())[:1024]).perplexity)
    assert "perplexity" in run("perplexity", "tiny-llama", "--windows", 1)


def test_kl_of_a_quantized_model_and_its_plot(tmp_path: Path) -> None:
    rows = []
    for name in ("q8_0", "iq4_nl"):
        found = run_json("kl", "tiny-llama", "--format", name, "--pure", "--windows", 2)
        assert found["format"] == name
        assert found["bpw"] == pytest.approx(get_format(name).bits_per_weight(), abs=0.03)
        rows.append(found)
    assert 0 < rows[0]["mean_kl"] < rows[1]["mean_kl"] < 0.05
    (tmp_path / "a.json").write_text(json.dumps(rows[0]), encoding="utf-8")
    (tmp_path / "b.json").write_text(json.dumps(rows[1:]), encoding="utf-8")
    run("plot", tmp_path / "a.json", tmp_path / "b.json", "-o", tmp_path / "quality.png")
    assert (tmp_path / "quality.png").stat().st_size > 5000


def test_kl_between_two_models() -> None:
    found = run_json("kl", "tiny-llama", "--base", data.TINY_LLAMA, "--windows", 1)
    assert 0 < found["mean_kl"] < 1e-3  # float32 against bfloat16 activations


def test_importance_of_the_embedded_model(tmp_path: Path) -> None:
    run("importance", "tiny-llama", tmp_path / "imatrix.dat", "--windows", 1)
    found = run_json("inspect", tmp_path / "imatrix.dat")
    assert found["kind"] == "importance"
    assert len(found["rows"]) == 29  # seven matrices in each of four layers, and the tied output
    assert {tuple(row["tokens"]) for row in found["rows"]} == {(512, 512)}
    model, tokenizer = data.load_tiny_llama()
    ids = evaluate.windows(model, hf.encode(tokenizer, data.calibration_text()))[:1]
    name = "model.layers.1.mlp.down_proj.weight"
    torch.testing.assert_close(Importance.load(tmp_path / "imatrix.dat")[name], collect_importance(model, [ids])[name])


def test_importance_files_are_merged(tmp_path: Path) -> None:
    files = [tmp_path / name for name in ("a.dat", "b.gguf", "c.dat")]
    parts = [
        Importance({"blk.0.attn_q.weight": ImportanceEntry(torch.full((32,), mean), torch.tensor([512 * chunks]))}, chunks=chunks)
        for mean, chunks in ((1.0, 1), (4.0, 2), (10.0, 3))
    ]
    for part, file in zip(parts, files, strict=True):
        part.save(file)
    for output in (tmp_path / "all.gguf", tmp_path / "all.dat"):
        assert run_json("importance", "--merge", *files, output) == {"output": str(output), "weights": 1, "files": 3}
        merged = Importance.load(output)
        torch.testing.assert_close(merged["model.layers.0.self_attn.q_proj.weight"], torch.full((32,), 39 / 6))
        assert merged.entry("blk.0.attn_q.weight").count.tolist() == [6 * 512] and merged.chunks == 6
    assert "Importance(1 weights, 6 chunks" in run("importance", *files, tmp_path / "again.gguf", "--merge")

    def refused(*arguments: object) -> str:
        done = process("importance", *arguments)
        assert done.returncode and not done.stdout
        return " ".join(done.stderr.replace("│", " ").split())

    assert "several files are for --merge" in refused(*files, tmp_path / "x.dat")
    assert "are for collecting" in refused("--merge", *files, tmp_path / "x.dat", "--windows", 3)
    Importance({"blk.0.attn_q.weight": torch.ones(64)}).save(tmp_path / "other.dat")
    assert "shapes (32,) and (64,): not of one model" in refused("--merge", files[0], tmp_path / "other.dat", tmp_path / "x.dat")
    (tmp_path / "bad.dat").write_bytes(b"nonsense")
    assert "no importance file or damaged" in refused("--merge", files[0], tmp_path / "bad.dat", tmp_path / "x.dat")
    assert not (tmp_path / "x.dat").exists()


def test_quantize_to_gguf_and_back_to_a_folder(tmp_path: Path) -> None:
    made = run_json("quantize", "tiny-llama", tmp_path / "q.gguf", "--format", "iq4_nl", "--pure")
    listed = run_json("inspect", tmp_path / "q.gguf")
    assert listed["metadata"]["general.architecture"] == "llama"
    assert {row["format"] for row in listed["rows"]} == {"iq4_nl", "float32"}
    assert made["bytes"] == pytest.approx(sum(row["bytes"] for row in listed["rows"]), rel=0.01)
    run("convert", tmp_path / "q.gguf", tmp_path / "folder")
    folder = run_json("inspect", tmp_path / "folder")
    assert sum(row["bytes"] for row in folder["rows"] if row["format"] == "iq4_nl") == sum(
        row["bytes"] for row in listed["rows"] if row["format"] == "iq4_nl"
    )
    scores = [run_json("perplexity", tmp_path / part, "--windows", 1)["perplexity"] for part in ("q.gguf", "folder")]
    assert scores[0] == pytest.approx(scores[1], rel=1e-6)


@pytest.mark.parametrize(("rounding", "lent", "moved"), [("ldlq", "cpu", False), ("yaqa", None, True)])
def test_calibrated_rounding_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rounding: str, lent: str | None, moved: bool
) -> None:
    """Blocks are lent to the device one by one; yaqa, which runs backward through all of them, has the model moved there."""
    (tmp_path / "text.txt").write_text(data.calibration_text()[:8000], encoding="utf-8")
    seen: list[object] = []

    def quantize_model(model: torch.nn.Module, *_: object, device: str | None, checkpoint: Path, **__: object) -> torch.nn.Module:
        checkpoint.mkdir()
        seen.append(device)
        return model

    monkeypatch.setattr("iqtorch.model.quantize_model", quantize_model)
    monkeypatch.setattr(torch.nn.Module, "to", lambda self, device: seen.append(f"moved to {device}") or self)
    options = ["--format", "iq4_nl", "--calibration", tmp_path / "text.txt", "--rounding", rounding, "--device", "cpu"]
    run("quantize", "tiny-llama", tmp_path / "made", *options)
    assert seen == ["moved to cpu"] * moved + [lent]


def test_quantize_by_rules_and_calibration(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(data.calibration_text()[:30000], encoding="utf-8")
    rules = ["--rule", "layers.0.*down_proj=iq5_k", "--custom-q", "blk.1.attn_q=q8_0", "--skip", "layers.2.", "--skip", "embed"]
    calibration = ["--calibration", tmp_path / "text.txt", "--windows", 4]
    for how, kept in ((calibration, "float32"), ([], "bfloat16")):  # in memory the embedded model is a float32 one
        run("quantize", "tiny-llama", tmp_path / kept, "--format", "iq4_ks", "--pure", *rules, *how)
        formats = {row["tensor"]: row["format"] for row in run_json("inspect", tmp_path / kept)["rows"]}
        assert formats["model.layers.0.mlp.down_proj.weight"] == "iq5_k"
        assert formats["model.layers.1.self_attn.q_proj.weight"] == "q8_0"
        assert formats["model.layers.1.self_attn.k_proj.weight"] == "iq4_ks"
        assert formats["model.layers.2.mlp.down_proj.weight"] == formats["model.embed_tokens.weight"] == kept


def test_calibrated_rounding_that_cannot_be_written_goes_on_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "text.txt").write_text(data.calibration_text()[:8000], encoding="utf-8")
    words = ["quantize", "tiny-llama", str(tmp_path / "made"), "--format", "iq4_nl", "--pure", "--calibration", str(tmp_path / "text.txt")]

    def full(*_: object, **__: object) -> None:
        raise SafetensorError("No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr("transformers.modeling_utils.safe_save_file", full)
        assert "goes on where it was" in str(runner.invoke(cli.app, words).exception)
    assert not (tmp_path / "made").exists()
    with monkeypatch.context() as patched:  # nothing is left to be rounded
        patched.delattr("iqtorch.calibration.sequence.best_of")
        patched.delattr("iqtorch.calibration.sequence.quantize_calibrated")
        run(*words)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["made", "text.txt"]
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {path.name for path in (tmp_path / "made").iterdir()}
    assert "is there already" in str(runner.invoke(cli.app, words).exception)
    run(*words, "--overwrite", "--max-shard-size", "1MB")
    assert not (tmp_path / "made" / "model.safetensors").exists()
    assert run_json("perplexity", tmp_path / "made", "--windows", 1)["perplexity"] > 1


def test_quantize_and_convert_stream(tmp_path: Path) -> None:
    """The commands are the functions: same bytes, same refusals."""
    recipe = tmp_path / "recipe.toml"
    Recipe.pure("iq3_k").save(recipe)
    made = run_json("quantize", data.TINY_LLAMA, tmp_path / "packed", "--recipe", recipe, "--speed", "fast", "--objective", "rmse")
    expected = quantize_checkpoint(
        data.TINY_LLAMA, tmp_path / "expected", Recipe.pure("iq3_k"), speed="fast", objective="rmse", progress=False
    )
    assert (made["bpw"], made["bytes"]) == (expected.bits_per_weight, expected.nbytes)
    names = sorted(path.name for path in (tmp_path / "packed").iterdir())
    assert filecmp.cmpfiles(tmp_path / "packed", tmp_path / "expected", names, shallow=False)[1:] == ([], [])
    run("convert", tmp_path / "packed", tmp_path / "packed.gguf")
    run("convert", tmp_path / "packed.gguf", tmp_path / "copy.gguf")
    assert filecmp.cmp(tmp_path / "packed.gguf", tmp_path / "copy.gguf", shallow=False)
    assert run_json("convert", data.TINY_LLAMA, tmp_path / "new.gguf", "--format", "iq4_nl", "--pure") == {
        "output": str(tmp_path / "new.gguf")
    }
    for arguments, message in (
        (("convert", tmp_path / "packed.gguf", tmp_path / "copy.gguf"), "has copy.gguf already"),
        (("quantize", tmp_path / "packed.gguf", tmp_path / "x.gguf", "--format", "iq2_kl"), "--requantize"),
    ):
        result = runner.invoke(cli.app, list(map(str, arguments)))
        assert message in str(result.exception)
    run("convert", tmp_path / "packed.gguf", tmp_path / "copy.gguf", "--overwrite")


def test_an_interrupted_command_says_how_to_go_on(tmp_path: Path) -> None:
    code = """
import os, signal
from iqtorch import cli
from iqtorch.checkpoint import job
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs start with the signal ignored
make = job._make
def stop(piece, fd):
    make(piece, fd)
    os.kill(os.getpid(), signal.SIGINT)
job._make = stop
cli.main()
"""
    arguments = ["quantize", str(data.TINY_LLAMA), str(tmp_path / "out"), "--format", "iq4_ks", "--threads", "1"]
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 128 + signal.SIGINT, done.stderr
    assert "the same command goes on where it was" in done.stderr
    assert "Traceback" not in done.stderr
    assert all(path.name.startswith(".") for path in (tmp_path / "out").iterdir())


def test_a_folder_with_one_gguf_model_names_it(tmp_path: Path) -> None:
    run("convert", data.TINY_LLAMA, tmp_path / "m.gguf")
    assert run_json("inspect", tmp_path) == run_json("inspect", tmp_path / "m.gguf")
    run("convert", tmp_path, tmp_path / "copy")
    (tmp_path / "n-00002-of-00002.gguf").touch()
    (tmp_path / "n-00001-of-00002.gguf").touch()
    for command in (["inspect"], ["perplexity", "--windows", "1"], ["convert", str(tmp_path / "x.gguf")]):
        found = str(runner.invoke(cli.app, [command[0], str(tmp_path), *command[1:]]).exception)
        assert "2 GGUF files, name one of them: m.gguf, n-00001-of-00002.gguf" in found
    (tmp_path / "copy" / "config.json").write_text("{}", encoding="utf-8")
    assert "cannot be loaded: " in str(runner.invoke(cli.app, ["perplexity", str(tmp_path / "copy")]).exception)


def test_chat(tmp_path: Path) -> None:
    """Greedy, so a conversation in a terminal says what one prompt after the other gives."""
    model, tokenizer = data.load_tiny_llama()
    words = ["chat", "tiny-llama", "--tokens", "6"]
    asked = tokenizer("The old man", return_tensors="pt")
    (expected,) = model.generate(**asked, max_new_tokens=6)
    found = run_json(*words, "--prompt", "The old man")
    assert found["text"] == tokenizer.decode(expected[-6:]) and found["tokens"] == 6
    assert found["text"] in run(*words, "--prompt", "The old man")
    talked = runner.invoke(cli.app, words, input="The old man\nAnd then\n")
    assert talked.exit_code == 0 and found["text"] in talked.stdout and talked.stdout.count("> ") == 3
    assert run_json(*words, "--prompt", "The old man", "--format", "iq2_ks")["text"] != found["text"]


def test_bench_checks_and_times() -> None:
    rows = run_json("bench", "iq4_nl", "q8_0", "--shape", "96x64", "--rows", 1, "--rows", 3, "--megabytes", 0)["rows"]
    assert [(row["format"], row["n"], row["k"], row["rows"]) for row in rows] == [
        (name, 96, 64, m) for name in ("iq4_nl", "q8_0") for m in (1, 3)
    ]
    for row in rows:
        assert 0 < row["error"] < 0.02
        assert row["packed_us"] > 0 and row["plain_us"] > 0 and row["speedup"] > 0
    assert "speedup" in run("bench", "q8_0", "--shape", "32x32", "--rows", 1, "--megabytes", 0)


def test_bench_of_gpu_kernels() -> None:
    """The way of cards, on a CPU: copies in turn, whose kind does not matter."""
    pytest.importorskip("triton")
    assert bench._in_a_graph(torch.randn(2, 64), [torch.randn(8, 64), iqtorch.quantize(torch.randn(8, 64), "q8_0")]) > 0


def test_bench_refuses_to_time_wrong_products(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench.F, "linear", lambda x, weight: torch.ones(x.shape[0], weight.shape[0], dtype=x.dtype))
    with pytest.raises(EvaluationError, match=r"with 2 rows has an error of .*: it is not timed"):
        bench.run(["q8_0"], [(64, 32)], [2], megabytes=0)


def test_inspect_a_plain_file(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(3, 5), "b": torch.zeros(2, dtype=torch.bfloat16)}, tmp_path / "x.safetensors")
    found = run_json("inspect", tmp_path / "x.safetensors")
    assert [tuple(row.values()) for row in found["rows"]] == [("a", "float32", [3, 5], 60, 32.0), ("b", "bfloat16", [2], 4, 16.0)]
    assert "17 weights, 64 bytes" in run("inspect", tmp_path)
    name = "a" * 200
    save_file({name: torch.zeros(3, 5)}, tmp_path / "x.safetensors")
    assert name in run("inspect", tmp_path)  # in pipes, names are whole


def test_inspect_packed_weights(tmp_path: Path) -> None:
    fmt = get_format("iq2_kl")
    save_file({"w": torch.zeros(4, fmt.row_bytes(512), dtype=torch.uint8)}, tmp_path / "x.safetensors")
    config = {"quantization_config": {"quant_method": "iqtorch", "tensors": {"w": {"format": "iq2_kl", "shape": [4, 512]}}}}
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    (row,) = run_json("inspect", tmp_path)["rows"]
    assert (row["format"], row["shape"], row["bpw"]) == ("iq2_kl", [4, 512], fmt.bits_per_weight(512))


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("kl", "tiny-llama", "--format", "iq2_kk", "--windows", "1"), 1, "iq2_kl"),
        (("perplexity", "tiny-llama", "--text", "missing.txt"), 1, "missing.txt"),
        (("perplexity", "missing-model", "--text", data.TINY_LLAMA_IMPORTANCE), 1, "is no UTF-8 text"),  # before it looks for the model
        (("plot", Path(data.__file__).with_name("heldout.txt")), 1, "is no JSON"),
        (("inspect", "missing"), 1, "missing"),
        (("kl", "tiny-llama"), 2, "--base"),
        (("perplexity",), 2, "MODEL"),
        (("quantize", "tiny-llama", "out.gguf", "--format", "iq4_ks", "--rule", "down_proj"), 2, "REGEX=FORMAT"),
        (("quantize", "tiny-llama", "out.gguf"), 2, "--format"),
        (("quantize", "tiny-llama", "out.gguf", "--format", "iq4_ks", "--recipe", "x.toml"), 2, "not both"),
        (("quantize", "tiny-llama", "out.gguf", "--format", "iq4_ks", "--speed", "slow"), 2, "fast, default, best"),
        (("quantize", "missing", "out", "--format", "iq4_ks"), 1, "not a folder"),
        (("bench", "--shape", "12"), 2, "N x K"),
        (("sing",), 2, "sing"),
    ],
)
def test_exit_codes(arguments: tuple[str, ...], code: int, message: str) -> None:
    done = process(*arguments)
    assert done.returncode == code, done.stderr
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


def test_a_damaged_file_is_an_error_not_a_crash(tmp_path: Path) -> None:
    (tmp_path / "x.safetensors").write_bytes(b"\xff" * 100)
    done = process("inspect", tmp_path)
    assert done.returncode == 1
    assert "not a whole safetensors file" in done.stderr
    assert "Traceback" not in done.stderr
    run("convert", data.TINY_LLAMA, tmp_path / "a.gguf")
    (tmp_path / "b.gguf").write_bytes((tmp_path / "a.gguf").read_bytes()[:100_000])
    for arguments in (
        ("inspect",),
        ("perplexity", "--windows", "1"),
        ("convert", tmp_path / "folder"),
        ("quantize", tmp_path / "c", "-f", "q8_0"),
    ):
        done = process(arguments[0], tmp_path / "b.gguf", *arguments[1:])
        assert done.returncode == 1 and not done.stdout
        assert "b.gguf" in done.stderr and "Traceback" not in done.stderr


def test_starting_does_not_import_heavy_packages() -> None:
    code = "import sys, iqtorch.cli; print([m for m in ('transformers', 'matplotlib', 'triton') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
