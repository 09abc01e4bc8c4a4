"""Rules of ik_llama.cpp's `--custom-q`: regular expressions on GGUF tensor names, as rules of a `Recipe`."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable

from torch import nn

from ..errors import RecipeError, UnknownFormatError
from ..formats import get_format
from ..recipe import Rule
from .names import gguf_name

__all__ = ["custom_q"]

logger = logging.getLogger("iqtorch")

#: Types of unquantized tensors: such weights are kept as they are.
_PLAIN_TYPES = ("f32", "f16", "bf16")
_SEPARATOR = re.compile(r"[,\n]")


def custom_q(text: str, model: nn.Module | Iterable[str]) -> tuple[Rule, ...]:
    """Rules for `Recipe.with_rules` from `"regex=type,regex=type"`.

        recipe = iqtorch.Recipe.default("iq2_kl").with_rules(custom_q(r"blk\\.[0-3]\\.ffn_down=iq4_ks,attn_v=iq5_k", model))

    The expressions are searched in the names that the model's parameters have in a GGUF file, and the first match counts.
    Lines, blanks around rules, and comments from `#` to the end of a line are allowed too. Merged gate and up experts
    answer to both names.

    Args:
        text: the rules.
        model: the model, or the names of its parameters.

    Returns:
        One rule per parameter that matches. A rule that matches none is reported by a warning.

    Raises:
        RecipeError: a rule without `=`, an expression that does not compile, or an unknown type (with near matches).
    """
    parsed = [_parsed(rule) for rule in _SEPARATOR.split(re.sub(r"#.*", "", text)) if rule.strip()]
    names = [name for name, _ in model.named_parameters()] if isinstance(model, nn.Module) else list(model)
    rules, used = [], set()
    for name in names:
        for i, (pattern, kind) in enumerate(parsed):
            if any(pattern.search(alias) for alias in _aliases(name)):
                rules.append((f"^{re.escape(name)}$", kind))
                used.add(i)
                break
    for i, (pattern, _) in enumerate(parsed):
        if i not in used:
            logger.warning("rule %r matches no weight of this model, or only ones that an earlier rule took", pattern.pattern)
    return tuple(rules)


def _parsed(rule: str) -> tuple[re.Pattern[str], str | None]:
    pattern, equals, kind = (part.strip() for part in rule.rpartition("="))
    if not equals or not pattern:
        raise RecipeError(f"rule {rule.strip()!r} must be REGEX=TYPE, such as 'attn_v=iq5_k'")
    try:
        fmt = None if kind.lower() in _PLAIN_TYPES else get_format(kind)
        return re.compile(pattern), None if fmt is None else fmt.plain or fmt.name
    except re.error as error:
        raise RecipeError(f"rule {rule.strip()!r}: {pattern!r} is no regular expression: {error}") from error
    except UnknownFormatError as error:
        raise RecipeError(f"rule {rule.strip()!r}: {error}") from error


def _aliases(name: str) -> tuple[str, ...]:
    found = gguf_name(name)
    if found is None:
        return ()
    if "ffn_gate_up_exps" in found:
        return tuple(found.replace("gate_up", part) for part in ("gate", "up"))
    return (found,)
