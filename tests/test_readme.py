"""The README tells the truth: its Python runs, its commands exist, its table is the registry's."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import typer.main

from iqtorch import cli, get_format, list_formats

README = Path(__file__).parent.parent / "README.md"
TEXT = README.read_text(encoding="utf-8")


def fenced(language: str) -> list[tuple[int, str]]:
    """Line number and text of each fenced block of a language."""
    found = re.finditer(rf"^```{language}\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL)
    return [(TEXT.count("\n", 0, match.start(1)), match[1]) for match in found]


def test_python_examples_run_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In one namespace, as a reader would type them; tracebacks show the README's lines."""
    monkeypatch.chdir(tmp_path)
    blocks = fenced("python")
    assert len(blocks) >= 4
    namespace: dict[str, object] = {"__name__": "readme"}
    for line, block in blocks:
        exec(compile("\n" * line + block, str(README), "exec"), namespace)


def test_commands_exist() -> None:
    group = typer.main.get_command(cli.app)
    lines = [line for _, block in fenced("sh") for line in block.splitlines() if line.startswith("iqtorch ")]
    assert lines
    for line in lines:
        words = shlex.split(line, comments=True)[1:]
        command = group.commands[words[0]]  # type: ignore[attr-defined]
        options = {option for parameter in command.params for option in parameter.opts}
        assert {word for word in words if word.startswith("-")} <= options, line


def test_make_targets_exist() -> None:
    makefile = (README.parent / "Makefile").read_text(encoding="utf-8")
    named = set(re.findall(r"\bmake ([a-z]+)", "\n".join(block for _, block in fenced("sh"))))
    assert {"demo", "test"} <= named
    for target in named:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def test_links_lead_somewhere() -> None:
    links = [link for link in re.findall(r"\]\(([^)]+)\)", TEXT) if "://" not in link]
    assert len(links) >= 5
    assert [link for link in links if not (README.parent / link).exists()] == []


def test_table_of_formats_is_complete_and_right() -> None:
    rows = re.findall(r"^\| `(\w+)` \| ([\d.]+) \| (\d+) \| ", TEXT, re.MULTILINE)
    expected = [(name, f"{get_format(name).bits_per_weight():.3f}", str(get_format(name).block_size)) for name in list_formats()]
    assert sorted(rows) == sorted(row for row in expected if get_format(row[0]).plain is None)
    for name in list_formats():
        assert f"`{name}`" in TEXT, name
