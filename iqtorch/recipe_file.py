"""Recipes as small TOML files.

base = "iq2_kl"        # format of the weights that no rule names; without it they are kept
mix = "reference"      # how the base varies by the weight's role: "reference" (the default) or "pure"

[rules]                # regular expression, searched in the parameter's name -> format; the first match counts
'embed_tokens' = "keep"
'layers\\.[0-3]\\..*down_proj' = "iq4_ks"
"""

from __future__ import annotations

import json
import sys
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from .errors import RecipeError
from .recipe import MIXES, Recipe

if sys.version_info >= (3, 11):
    import tomllib
else:  # the same library under the name it had before it joined Python
    import tomli as tomllib

__all__ = ["KEEP", "load", "save"]

#: What a file says of weights that are kept as they are (TOML has no null).
KEEP = "keep"
_KEYS = ("base", "mix", "rules")


def load(path: str | Path) -> Recipe:
    """See `Recipe.load`."""
    try:
        stored = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path} is no TOML file: {error}") from error
    for key in stored:
        if key not in _KEYS:
            raise RecipeError(f"{path}: {key!r} means nothing in a recipe; {_hint(key, _KEYS)}")
    mix, rules = stored.get("mix", "reference"), stored.get("rules", {})
    if not isinstance(mix, str) or mix not in MIXES:
        raise RecipeError(f"{path}: mix is {mix!r}; {_hint(str(mix), tuple(MIXES))}")
    if not isinstance(rules, dict):
        raise RecipeError(f"{path}: rules must be a table, [rules], got {rules!r:.80}")
    try:
        return Recipe(_format(stored.get("base")), tuple((key, _format(value)) for key, value in rules.items()), MIXES[mix])
    except RecipeError as error:
        raise RecipeError(f"{path}: {error}") from None


def save(recipe: Recipe, path: str | Path) -> None:
    """See `Recipe.save`."""
    if recipe.mix_name not in MIXES:
        raise RecipeError(f"the mix of this recipe is a function of your own, which {path} cannot hold; known are {list(MIXES)}")
    lines = [f'base = "{recipe.base}"'] if recipe.base else []
    lines += [f'mix = "{recipe.mix_name}"', "", "[rules]"]
    first: dict[str, str | None] = {}
    for pattern, name in recipe.rules:
        first.setdefault(pattern, name)  # a later rule of the same pattern can never match
    lines += [f'{_quoted(pattern)} = "{name or KEEP}"' for pattern, name in first.items()]
    Path(path).write_text("\n".join(lines) + "\n", encoding="utf-8")


def _format(value: Any) -> str | None:
    """The format that a file names; unknown names are refused by `Recipe`."""
    if value is not None and not isinstance(value, str):
        raise RecipeError(f'{value!r:.80} is no format name; write "iq4_ks", or "{KEEP}" for weights to be kept')
    return None if value == KEEP else value


def _quoted(text: str) -> str:
    """A literal string where possible, since regular expressions are full of backslashes."""
    return f"'{text}'" if "'" not in text and text.isprintable() else json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")


def _hint(value: str, known: tuple[str, ...]) -> str:
    near = get_close_matches(value, known, 1)
    return f"did you mean {near[0]!r}?" if near else f"known are {', '.join(known)}"
