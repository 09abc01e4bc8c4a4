"""Recipes: which format each weight of a model gets.

A recipe is a base format, the reference's default mix around it (or not), and rules of the user's own, which come first.
The mixes are those of ik_llama.cpp (src/llama-quantize.cpp, `llama_tensor_get_type`), restated as a table.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from .errors import RecipeError, UnknownFormatError
from .formats import get_format

if TYPE_CHECKING:
    from .calibration import Calibration

#: A rule: regular expression searched in the parameter's name -> format name, or None to keep the weight as it is.
Rule = tuple[str, str | None]


@dataclass(frozen=True)
class ModelFacts:
    """What a mix needs to know of a model.

    Attributes:
        layers: number of layers.
        gqa: query heads per key-value head.
        experts: experts per layer, 0 for a dense model.
        has_importance: importance values are given.
    """

    layers: int = 0
    gqa: int = 1
    experts: int = 0
    has_importance: bool = False


@dataclass(frozen=True)
class WeightFacts:
    """What a mix needs to know of a weight.

    Attributes:
        name: parameter name.
        role: `output`, `tied` (embedding used as output too), `embedding`, `attn_q`, `attn_k`, `attn_v`, `attn_qkv`,
            `attn_output`, `ffn_gate`, `ffn_up`, `ffn_down`, or `other`.
        layer: index of its layer, or -1.
        k: row length.
        shared_expert: it belongs to the experts that every token uses.
    """

    name: str
    role: str
    layer: int = -1
    k: int = 256
    shared_expert: bool = False


Mix = Callable[[str, WeightFacts, ModelFacts], str]

#: Role of a parameter by its name in the model families of transformers; the first match counts.
_ROLES: tuple[tuple[str, str], ...] = (
    (r"(^|\.)(lm_head|embed_out|output_projection)\.weight$", "output"),
    (r"(^|\.)(qkv_proj|query_key_value|c_attn|Wqkv|qkv|in_proj_qkv|attn\.in_proj)(\.|_|$)", "attn_qkv"),
    (r"(^|\.)(q_proj|q_lin|query|q_a_proj|q_b_proj|wq|SelfAttention\.q|EncDecAttention\.q)\.weight$", "attn_q"),
    (r"(^|\.)(k_proj|k_lin|key|kv_a_proj_with_mqa|kv_b_proj|wk|SelfAttention\.k|EncDecAttention\.k)\.weight$", "attn_k"),
    (r"(^|\.)(v_proj|v_lin|value|wv|SelfAttention\.v|EncDecAttention\.v)\.weight$", "attn_v"),
    (r"attn.*\.(o_proj|out_proj|out_lin|c_proj|dense|wo)\.weight$", "attn_output"),
    (r"(^|\.)(o_proj|attention\.output\.dense|SelfAttention\.o|EncDecAttention\.o|attention\.dense)\.weight$", "attn_output"),
    (r"(^|\.)(down_proj|w2|fc2|fc_out|c_proj|dense_4h_to_h|lin2|wo|output\.dense|output_linear)(\.weight)?$", "ffn_down"),
    (r"(^|\.)(gate_proj|w1|gate_up_proj|wi_0)(\.weight)?$", "ffn_gate"),
    (r"(^|\.)(up_proj|w3|fc1|fc_in|c_fc|dense_h_to_4h|lin1|wi|wi_1|intermediate\.dense|input_linear)(\.weight)?$", "ffn_up"),
)
_LAYER = re.compile(r"(?:^|\.)(?:layers?|h|blocks?|block)\.(\d+)\.")


def check_pattern(pattern: str) -> None:
    """Raises RecipeError for what is no regular expression."""
    try:
        re.compile(pattern)
    except re.error as error:
        raise RecipeError(f"rule {pattern!r} is no regular expression: {error}") from None


def role_of(name: str) -> str:
    """Role of a parameter, from its name (see `WeightFacts.role`; embeddings are told apart by the caller)."""
    return next((role for pattern, role in _ROLES if re.search(pattern, name)), "other")


def layer_of(name: str) -> int:
    """Index of the layer in a parameter's name, or -1."""
    found = _LAYER.search(name)
    return int(found.group(1)) if found else -1


# One function per reference mix. `base` is the recipe's format; a weight without a row in the table gets it.
# Rows that differ only in the format name are data: (output, tied) and the attn_v column by grouped-query factor.
_OUTPUT = {"iq4_k": ("q6_k", "q6_k"), "iq4_kt": ("q6_k", "q6_k")}
_ATTN_V = {  # gqa >= 4, gqa 2 or 3, gqa 1, four experts or more; None = base
    "iq2_ks": ("iq4_k", "iq3_k", "q2_k", "iq4_k"),
    "iq2_kt": ("iq4_k", "iq3_k", "q2_k", "iq4_k"),
    "iq2_k": ("iq4_k", "iq4_k", "iq3_k", "q8_0"),
    "iq2_kl": ("iq4_ks", "iq4_ks", None, "q8_0"),
    "iq3_k": ("iq4_k", "iq4_k", None, "q8_0"),
    "iq3_kt": ("iq4_k", "iq3_k", "iq3_k", "q8_0"),
    "iq4_k": ("iq5_k", "iq5_k", None, "q8_0"),
    "iq4_kt": ("iq5_k", "iq4_k", "iq4_k", "q8_0"),
}
_TINY = ("iq2_ks", "iq2_kt")  # the two mixes that treat mixtures of experts by rules of their own


def _attn_v(base: str, model: ModelFacts) -> str:
    many, few, one, expert = _ATTN_V[base]
    if model.experts >= 4:
        return expert or base
    if model.gqa >= 4:
        return many or base
    if model.gqa >= 2 or (base == "iq2_ks" and model.experts >= 2):
        return few or base
    return one or base


def _attn_output(base: str, model: ModelFacts) -> str:
    if model.experts >= 4:
        return {"iq2_kl": "iq4_ks", "iq4_kt": base}.get(base, "q5_k")
    if base == "iq3_kt":
        return "iq3_k" if model.gqa >= 4 else base
    return "iq3_k" if base in ("iq2_kt", "iq2_k") else base


def _ffn_down(base: str, weight: WeightFacts, model: ModelFacts) -> str:
    first_eighth = 0 <= weight.layer < model.layers // 8
    if first_eighth:
        special = {"iq2_ks": "q2_k", "iq2_kt": "iq3_k"}
        if base in special:
            return special[base]
    if base == "iq3_kt" and not model.has_importance:
        return "iq4_k" if first_eighth else "iq3_k"
    return base


def reference_mix(base: str, weight: WeightFacts, model: ModelFacts) -> str:
    """Format of a weight in ik_llama.cpp's mix named after `base`.

    Formats without a mix of their own there get: output and tied embedding in q6_k (or the base, if it has more bits),
    everything else in the base.
    """
    role = weight.role
    if base not in _ATTN_V:
        if role in ("output", "tied"):
            return base if get_format(base).bits_per_weight() >= 6.5 else "q6_k"
        return base
    if role in ("output", "tied"):
        output, tied = _OUTPUT.get(base, ("q5_k", "iq4_k"))
        return output if role == "output" else tied
    if role == "embedding":
        return "iq3_s" if base == "iq3_kt" else base
    if role == "attn_v":
        return _attn_v(base, model)
    crowded = model.experts >= 8
    if role == "attn_k":
        if base in _TINY:
            return "q4_k" if crowded else base
        return "q8_0" if model.experts >= 4 else base
    if base == "iq2_kt" and role.startswith("ffn") and crowded and weight.layer == 0:
        return "iq3_k"
    if role in ("attn_q", "attn_qkv") and crowded and base in _TINY:
        return "q4_k"
    if role == "attn_qkv":
        return {"iq2_ks": "iq2_k", "iq2_kt": "iq3_k"}.get(base, base)
    if base == "iq2_kt" and weight.shared_expert:
        return "iq4_k"
    if role == "ffn_down":
        return _ffn_down(base, weight, model)
    if role == "attn_output":
        return _attn_output(base, model)
    return base


def pure_mix(base: str, weight: WeightFacts, model: ModelFacts) -> str:
    """The base format everywhere."""
    return base


#: The mixes by the name that a stored recipe gives them.
MIXES: dict[str, Mix] = {"reference": reference_mix, "pure": pure_mix}


@dataclass(frozen=True)
class Recipe:
    """Which format each weight gets.

    Attributes:
        base: format of the weights that no rule names; None keeps them as they are.
        rules: `(regex, format or None)`, searched in the parameter's name, the first match wins.
        mix: how the base is varied by the weight's role (`reference_mix` or `pure_mix`).
    """

    base: str | None = None
    rules: tuple[Rule, ...] = ()
    mix: Mix = field(default=reference_mix, repr=False)

    def __post_init__(self) -> None:
        """Raises RecipeError for an unknown format or a regular expression that does not compile."""
        for pattern, name in (("base", self.base), *self.rules):
            check_pattern(pattern)
            try:
                if name is not None:
                    get_format(name)
            except UnknownFormatError as error:
                raise RecipeError(f"rule {pattern!r}: {error}") from None

    @classmethod
    def default(cls, name: str) -> Recipe:
        """ik_llama.cpp's mix of that name: what a plain format name means to `quantize_model`."""
        return cls(get_format(name).name)

    @classmethod
    def pure(cls, name: str) -> Recipe:
        """One format everywhere (rows that do not fit take the format's fallback)."""
        return cls(get_format(name).name, mix=pure_mix)

    @classmethod
    def fit(
        cls,
        model: nn.Module,
        importance: Mapping[str, Tensor] | str | Path | None = None,
        *,
        target_bpw: float,
        batches: Iterable[Tensor] | None = None,
        calibration: Calibration | None = None,
        progress: bool = True,
    ) -> Recipe:
        """The best formats for a model of at most `target_bpw` bits per packed weight, by measured sensitivities.

            recipe = iqtorch.Recipe.fit(model, "imatrix.dat", target_bpw=2.7)

        If `progress`, a bar and at the end the size, the predicted and the achieved divergence are shown on standard error.
        `iqtorch.fit.fit` has more choices, and returns all that it measured; arguments and errors as there.
        """
        from .fit import fit

        how: dict[str, Any] = {"batches": batches, "calibration": calibration, "measure": progress, "progress": progress}
        found = fit(model, importance, target_bpw=target_bpw, **how)
        if progress:
            print(found, file=sys.stderr)
        return found.recipe

    @classmethod
    def load(cls, path: str | Path) -> Recipe:
        """Reads a TOML file; see `iqtorch.recipe_file` for what it looks like.

        Raises:
            RecipeError: no TOML, a key or a format that is not known (with near matches), or a rule that cannot be read; named.
            OSError: the file cannot be opened.
        """
        from .recipe_file import load

        return load(path)

    def save(self, path: str | Path) -> None:
        """Writes a TOML file that `load` reads.

        Raises:
            RecipeError: the mix is not one of `MIXES`.
        """
        from .recipe_file import save

        save(self, path)

    @classmethod
    def of(cls, value: Recipe | str | Path | Mapping[str, str | None]) -> Recipe:
        """A recipe from a format name, a file (a `Path` or a name ending in `.toml`), a `{regex: format}` mapping (weights
        without a match are kept), or a recipe.

        Raises:
            UnknownFormatError, RecipeError: unknown format name, or a rule that cannot be read.
        """
        if isinstance(value, Recipe):
            return value
        if isinstance(value, Path) or (isinstance(value, str) and value.endswith(".toml")):
            return cls.load(value)
        if isinstance(value, Mapping):
            return cls(None, tuple(value.items()))
        return cls.default(value)

    def with_rules(self, rules: Mapping[str, str | None] | Iterable[Rule]) -> Recipe:
        """The same recipe with more rules in front."""
        added = tuple(rules.items()) if isinstance(rules, Mapping) else tuple(rules)
        return Recipe(self.base, added + self.rules, self.mix)

    @property
    def mix_name(self) -> str:
        """Name of the mix in `MIXES`; "custom" for any other function."""
        return next((name for name, mix in MIXES.items() if mix is self.mix), "custom")

    def choose(self, weight: WeightFacts, model: ModelFacts) -> tuple[str | None, str]:
        """Format name of a weight (None = keep it), and the reason in words. Row length is not considered."""
        for pattern, name in self.rules:
            if re.search(pattern, weight.name):
                return name, f"rule {pattern!r}"
        if self.base is None:
            return None, "no rule names it"
        name = self.mix(self.base, weight, model)
        return name, "base format" if name == self.base else f"mix of {self.base}: {weight.role}"
