"""README and docs tell the truth: their Python and commands run, what they name exists, the table of formats is the registry's."""

from __future__ import annotations

import csv
import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import typer.main
from torch import Tensor
from typer.testing import CliRunner

import iqtorch
from iqtorch import cli, data, get_format, list_formats

transformers = pytest.importorskip("transformers")

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
DOCUMENTS = [README, ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
TEXT = README.read_text(encoding="utf-8")

every_document = pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.stem)


def fenced(document: Path, language: str) -> list[tuple[int, str]]:
    """Line number and text of each fenced block of a language."""
    text = document.read_text(encoding="utf-8")
    found = re.finditer(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return [(text.count("\n", 0, match.start(1)), match[1]) for match in found]


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files that documents name: the first layer of the embedded model as a folder and in a GGUF file, its importance, a text."""
    folder = tmp_path_factory.mktemp("shelf")
    model, tokenizer = data.load_tiny_llama()
    del model.model.layers[1:]
    model.config.num_hidden_layers = 1
    for name in ("folder", "my-model", "folder/of/the/original/model"):
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    iqtorch.save_gguf(iqtorch.quantize_model(model, "iq2_kl", progress=False), folder / "model.gguf", tokenizer)
    shutil.copy(folder / "model.gguf", folder / "Qwen3-8B-IQ2_KL.gguf")
    for name in ("imatrix.dat", "one.dat", "other.dat"):
        shutil.copy(data.TINY_LLAMA_IMPORTANCE, folder / name)
    (folder / "book.txt").write_text(data.heldout_text()[:6000], encoding="utf-8")
    (folder / "mix.toml").write_text('base = "iq2_kl"\n[rules]\nembed_tokens = "keep"\n', encoding="utf-8")
    return folder


@pytest.fixture
def desk(shelf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the shelf as the current folder."""
    shutil.copytree(shelf, tmp_path / "desk")
    monkeypatch.chdir(tmp_path / "desk")
    return tmp_path / "desk"


def reader(folder: Path) -> dict[str, Any]:
    """The names that documents take for given."""
    load = transformers.AutoModelForCausalLM.from_pretrained
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "folder")
    ids: Tensor = tokenizer(data.calibration_text()[:4000], return_tensors="pt", verbose=False).input_ids[:, :768]
    windows = ids.view(12, 64)
    models = {name: load(folder / "folder", dtype=torch.float32) for name in ("model", "base")}
    return {**models, "ids": ids, "windows": windows, "more_batches": windows.split(6)}


def test_the_readme_has_python_to_run() -> None:
    assert len(fenced(README, "python")) >= 4


@pytest.mark.parametrize("document", [path for path in DOCUMENTS if fenced(path, "python")], ids=lambda path: path.stem)
def test_python_runs_in_order(document: Path, desk: Path, request: pytest.FixtureRequest) -> None:
    """In one namespace, as a reader would type it; tracebacks show the document's lines. Only the device is another."""
    namespace: dict[str, Any] = {"__name__": "reader", **({} if document == README else reader(desk))}
    for line, block in fenced(document, "python"):
        if "torch.compile(" in block:
            continue  # tests/test_hf_compile.py does this
        exec(compile("\n" * line + block.replace('"cuda"', '"cpu"'), str(document), "exec"), namespace)


@every_document
def test_commands_exist(document: Path) -> None:
    group = typer.main.get_command(cli.app)
    for words in commands(document):
        command = group.commands[words[0]]  # type: ignore[attr-defined]
        options = {option for parameter in command.params for option in parameter.opts}
        assert {word for word in words if word.startswith("-")} <= options, words


@pytest.mark.parametrize("document", [README, ROOT / "docs" / "checkpoints.md"], ids=lambda path: path.stem)
def test_commands_run_in_order(document: Path, desk: Path) -> None:
    """Those on a reader's own files; the others are run by tests/test_cli.py and tests/test_demo.py."""
    ran = 0
    for words in commands(document):
        if not {"demo", "tiny-llama", "bench"} & set(words):
            result = CliRunner().invoke(cli.app, words)
            assert result.exit_code == 0, (words, result.output, result.exception)
            ran += 1
    assert ran >= 3


def commands(document: Path) -> list[list[str]]:
    """The words of each command `iqtorch` in a document's shell blocks."""
    lines = [line for _, block in fenced(document, "sh") for line in block.splitlines() if line.startswith("iqtorch ")]
    return [shlex.split(line, comments=True)[1:] for line in lines]


@every_document
def test_make_targets_exist(document: Path) -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"\bmake ([a-z-]+)", "\n".join(block for _, block in fenced(document, "sh"))))
    assert document != README or targets >= {"demo", "test"}
    for target in targets:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


@every_document
def test_what_is_named_exists(document: Path) -> None:
    """Links, and files of this repository in code marks."""
    text = document.read_text(encoding="utf-8")
    links = [link.partition("#")[0] for link in re.findall(r"\]\(([^)]+)\)", text) if "://" not in link]
    assert document != README or len(links) >= 5
    assert [link for link in links if link and not (document.parent / link).exists()] == []
    files = re.findall(r"`((?:benchmarks|tests|examples|docs|iqtorch)/[\w/.-]+\.\w+)`", text.replace("NAME", "iq2_kl"))
    assert [file for file in files if not (ROOT / file).exists()] == []


def results(name: str, **wanted: str) -> dict[str, str]:
    """The one line of a file of results with these values."""
    lines = (ROOT / "benchmarks" / "results" / name).read_text(encoding="utf-8").splitlines()
    rows = [row for row in csv.DictReader(line for line in lines if not line.startswith("#")) if row.items() >= wanted.items()]
    assert len(rows) == 1, (name, wanted, rows)
    return rows[0]


def test_first_figures_are_the_measured_ones() -> None:
    """Of the README's second paragraph."""
    own = [results("quality.csv", format="iq2_kl", rounding=way, windows="48", seed="0") for way in ("nearest", "yaqa")]
    kinds = [*own, results("quality_reference.csv", format="iq2_kl")]
    kl, perplexity = ([float(row[key]) for row in kinds] for key in ("mean_kl", "perplexity"))
    zen, xeon = (results(name, format="iq2_kl", m="1", n="4096", k="4096") for name in ("cpu_zen5_memory.csv", "cpu_memory.csv"))
    text = " ".join(TEXT.split("```")[0].split())
    for said in (
        "is {:.3f} nats per token, and {:.3f} with calibrated rounding; files quantized by ik_llama.cpp's own program have {:.3f}".format(
            *kl
        ),
        "(perplexity {:.1f}, {:.1f} and {:.1f};".format(*perplexity),
        f"is {float(zen['speedup']):.0f} times faster than",
        f"and {float(xeon['speedup']):.0f} times on one of a Xeon",
        f"it is {float(zen['over_ik']):.1f} and {float(xeon['over_ik']):.1f} times the speed",
    ):
        assert said in text, said


def agrees(said: str, value: float) -> bool:
    """Whether a figure is this value, rounded to the digits that it has."""
    return abs(float(said) - value) <= 0.5 * 10.0 ** -len(said.partition(".")[2]) + 1e-9


@pytest.mark.parametrize(("part", "memory", "cache"), [("Zen 5", "cpu_zen5_memory", "cpu_zen5"), ("Xeon with AMX", "cpu_memory", "cpu")])
def test_products_on_cpus_are_the_measured_ones(part: str, memory: str, cache: str) -> None:
    """Milliseconds, times the bfloat16 layer, times ik_llama.cpp of docs/cpu.md."""
    text = (ROOT / "docs" / "cpu.md").read_text(encoding="utf-8").split(f"\n### {part}\n")[1].split("\n### ")[0]
    cell = r" ([\d.]+) \(([\d.]+), ([\d.]+)\) \|"
    rows = re.findall(rf"^\| (\w+) \|{cell * 4}$", text, re.MULTILINE)
    assert len(rows) >= 6
    for name, *said in rows:
        for place, (file, m) in enumerate(((memory, "1"), (cache, "1"), (cache, "8"), (cache, "512"))):
            row = results(f"{file}.csv", format=name, m=m, n="4096", k="4096")
            measured = [float(row[key]) for key in ("ms", "speedup", "over_ik")]
            cells = said[3 * place : 3 * place + 3]
            assert all(map(agrees, cells, measured)), (name, file, m, cells, measured)


@pytest.mark.parametrize(("head", "file"), [("format", "gpu_h200_linear"), ("first version", "gpu_h200_linear_first")])
def test_products_on_a_card_are_the_measured_ones(head: str, file: str) -> None:
    """Microseconds of docs/gpu.md."""
    text = (ROOT / "docs" / "gpu.md").read_text(encoding="utf-8").split(f"\n| {head} | 1 token, int8 | 1, float |")[1].split("\n\n")[0]
    kinds = [("1", "int8"), ("1", "float"), ("2", "int8"), ("16", "float"), ("512", "float"), ("2048", "float")]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()[2:]]
    assert len(rows) == 5
    for name, *said in rows:
        for cell, (tokens, precision) in zip(said, kinds, strict=True):
            measured = cell and float(results(f"{file}.csv", format=name, tokens=tokens, precision=precision)["us"])
            assert not cell or agrees(cell, measured), (name, tokens, precision, cell, measured)


def test_errors_of_encoders_are_the_measured_ones() -> None:
    """Percent beside the reference, and seconds, of docs/encoders.md."""
    text = (ROOT / "docs" / "encoders.md").read_text(encoding="utf-8").split("\n## Error and speed\n")[1]
    pair = r" (\S+) / (\S+) \|"
    rows = re.findall(rf"^\| `(\w+)` \|{pair}{pair} (?:-|(\S+) / (\S+)) \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \|$", text, re.MULTILINE)
    assert len(rows) == 36
    for name, *said in rows:
        row = results("quantize_trellis.csv" if name.endswith("_kt") else "quantize.csv", format=name)
        value = {key: float(row[key] or "nan") for key in row if key not in ("format", "speed")}
        against = [("w_gauss", "w_gauss_reference"), ("w_t5", "w_t5_reference"), ("ones_gauss", "ones_gauss_reference")]
        against += [("ones_t5", "ones_t5_reference"), ("ones_gauss", "plain_gauss_reference"), ("ones_t5", "plain_t5_reference")]
        measured = [100 * (value[ours] / value[theirs] - 1) for ours, theirs in against]
        measured += [value["seconds"], value["seconds_reference"], value["seconds"] / value["seconds_reference"]]
        assert all(agrees(cell, found) for cell, found in zip(said, measured, strict=True) if cell), (name, said, measured)


def test_divergences_are_the_measured_ones() -> None:
    """The tables of docs/quality.md: all formats, refining, and the second model."""
    text = (ROOT / "docs" / "quality.md").read_text(encoding="utf-8")

    def line(name: str, rounding: str) -> dict[str, str]:
        return results("quality.csv", format=name, rounding=rounding, windows="48", seed="0")

    numbers = r"([\d.]+) \| ([\d.]+) \| ([\d.]+)"
    rows = re.findall(rf"^\| `(\w+)` \| [\d.]+ \| \S+ \| {numbers} \| [^|]* \| \S+, (\S+), (\S+), (\S+) \|$", text, re.MULTILINE)
    assert len(rows) == 25
    for name, *said in rows:
        own = [line(name, rounding) for rounding in ("nearest", "ldlq", "yaqa")]
        assert said == [row["mean_kl"] for row in own] + [f"{float(row['perplexity']):.2f}" for row in own], name
    refined = re.findall(r"^\| `(\w+)` \| ([\d.]+) \| \**([\d.]+)\** \| (\d+) % \| ([\d.]+), ([\d.]+) \|$", text, re.MULTILINE)
    assert len(refined) == 8
    for name, before, after, off, *perplexities in refined:
        own = [line(name, rounding) for rounding in ("yaqa", "yaqa+refine")]
        assert [before, after] == [row["mean_kl"] for row in own] and agrees(off, 100 * (1 - float(after) / float(before))), name
        assert perplexities == [f"{float(row['perplexity']):.2f}" for row in own], name
    second = re.findall(
        rf"^\| `(\w+)` \| ([\d.]+) \| {numbers} \| [^|]* \| [^|]* \|$", text.split("A second trained model")[1], re.MULTILINE
    )
    assert len(second) == 3
    for name, *said in second:
        for cell, rounding in zip(said, ("reference", "nearest", "ldlq", "yaqa"), strict=True):
            measured = float(results("quality_models.csv", model="qwen2-512", format=name, rounding=rounding)["error"])
            assert float(cell) == pytest.approx(measured, abs=5.1e-6), (name, rounding)


def test_table_of_formats_is_complete_and_right() -> None:
    rows = re.findall(r"^\| `(\w+)` \| ([\d.]+) \| (\d+) \| ", TEXT, re.MULTILINE)
    expected = [(name, f"{get_format(name).bits_per_weight():.3f}", str(get_format(name).block_size)) for name in list_formats()]
    assert sorted(rows) == sorted(row for row in expected if get_format(row[0]).plain is None)
    for name in list_formats():
        assert f"`{name}`" in TEXT, name
