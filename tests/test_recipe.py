"""Recipe files: what is written, read and refused."""

from __future__ import annotations

import logging
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import iqtorch
from iqtorch import IQTensor, Recipe, recipe_file
from iqtorch.errors import RecipeError
from iqtorch.recipe import reference_mix

EXAMPLE = r"""
# a comment
base = "iq2_kl"
mix = "pure"

[rules]
'embed' = "keep"
'layers\.[0-3]\..*down_proj' = "iq4_ks"
"proj" = "IQ3_K"
"""


def test_example(tmp_path: Path) -> None:
    path = tmp_path / "mix.toml"
    path.write_text(EXAMPLE)
    found = Recipe.load(path)
    assert found == Recipe.pure("iq2_kl").with_rules({"embed": None, r"layers\.[0-3]\..*down_proj": "iq4_ks", "proj": "IQ3_K"})
    assert Recipe.of(path) == Recipe.of(str(path)) == found
    found.save(tmp_path / "again.toml")
    assert Recipe.load(tmp_path / "again.toml") == found
    assert r"'layers\.[0-3]\..*down_proj' = " in (tmp_path / "again.toml").read_text()  # as it was typed
    (tmp_path / "empty.toml").write_text("")
    assert Recipe.load(tmp_path / "empty.toml") == Recipe()
    (tmp_path / "base.toml").write_text('base = "iq4_ks"')
    assert Recipe.load(tmp_path / "base.toml") == Recipe.default("iq4_ks")


def test_the_module_that_reads_toml_on_every_python() -> None:
    """Python 3.10 gets the library from the package index; its import must be the one that the metadata names."""
    project = recipe_file.tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())["project"]
    assert recipe_file.tomllib.__name__ == ("tomllib" if sys.version_info >= (3, 11) else "tomli")
    assert any(line.startswith("tomli") and line.endswith("python_version < '3.11'") for line in project["dependencies"])


def test_model_packed_by_a_file(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "mix.toml"
    path.write_text("[rules]\n'0' = 'iq4_nl'\n'nothing' = 'q8_0'\n'1' = 'keep'\n")
    model = nn.Sequential(nn.Linear(64, 32), nn.Linear(32, 32), nn.Linear(32, 8))
    with caplog.at_level(logging.WARNING, "iqtorch"):
        iqtorch.quantize_model(model, str(path), progress=False)
    assert "rule 'nothing' matches no weight of this model" in caplog.text
    assert {n: p.format.name for n, p in model.named_parameters() if isinstance(p, IQTensor)} == {"0.weight": "iq4_nl"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("base = iq2_kl", "is no TOML file"),
        ("base = 'iq2_kll'", "iq2_kll.*did you mean.*'iq2_kl'"),
        ("[rules]\n'up' = 'q4_9'", "rule 'up'.*q4_9.*did you mean"),
        ("[rules]\n'(' = 'q4_0'", r"rule '\(' is no regular expression"),
        ("[rules]\n'up' = 4", "4 is no format name.*keep"),
        ("[rules]\n'up' = 'q4_0'\n'up' = 'q5_0'", "is no TOML file"),
        ("rules = 'up'", "rules must be a table"),
        ("rule = 'up'", "'rule' means nothing in a recipe; did you mean 'rules'"),
        ("formats = 1", "known are base, mix, rules"),
        ("mix = 'puer'", "mix is 'puer'; did you mean 'pure'"),
        ("mix = ['pure']", "mix is"),
        ("base = 2", "2 is no format name"),
    ],
)
def test_refusals(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "bad.toml"
    path.write_text(text)
    with pytest.raises(RecipeError, match=rf"(?s)bad\.toml.*{message}"):
        Recipe.load(path)


def test_files_that_cannot_be_read_or_written(tmp_path: Path) -> None:
    (tmp_path / "a.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(RecipeError, match="is no TOML file"):
        Recipe.load(tmp_path / "a.toml")
    with pytest.raises(FileNotFoundError):
        Recipe.load(tmp_path / "none.toml")
    own = Recipe("iq4_ks", mix=lambda *facts: reference_mix(*facts))
    with pytest.raises(RecipeError, match="function of your own"):
        own.save(tmp_path / "b.toml")
    assert not (tmp_path / "b.toml").exists()


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.tuples(st.text(min_size=1, max_size=12), st.sampled_from(["iq2_kl", "q8_0", None])), max_size=5, unique_by=lambda r: r[0]),
    st.sampled_from(["iq3_k", None]),
)
def test_any_recipe_survives(tmp_path_factory: pytest.TempPathFactory, rules: list[tuple[str, str | None]], base: str | None) -> None:
    try:
        recipe = Recipe(base, tuple(rules))
    except RecipeError:
        return  # no regular expression
    path = tmp_path_factory.mktemp("recipes") / "a.toml"
    recipe.save(path)
    assert Recipe.load(path) == recipe


def test_only_the_first_of_two_equal_patterns_counts(tmp_path: Path) -> None:
    recipe = Recipe(None, (("a", "q8_0"), ("b", None), ("a", "q4_0")))
    recipe.save(tmp_path / "a.toml")
    assert Recipe.load(tmp_path / "a.toml").rules == (("a", "q8_0"), ("b", None))
