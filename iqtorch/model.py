"""`quantize_model`: packs the weights of a PyTorch or Hugging Face model in place."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch
from torch import Tensor, nn

from .encode import Objective, Speed
from .errors import CalibrationError, ImportanceError
from .formats import get_format
from .fuse import fuse as fuse_projections
from .linear import is_conv1d, is_flat_experts, is_pointwise, matrix_of, packable, set_weight
from .progress import share_bars
from .quantize import Rounding, check_finite, check_importance, check_options, check_rounding, check_weight, quantize
from .recipe import ModelFacts, Recipe, WeightFacts, layer_of, role_of
from .tensor import IQTensor

if TYPE_CHECKING:
    from .calibration import Calibration

logger = logging.getLogger("iqtorch")

M = TypeVar("M", bound=nn.Module)

#: Attribute of a quantized model: parameter name -> why it was kept or got its format (read by `iqtorch.report`).
NOTES = "_iqtorch_notes"

#: How the notes begin on weights that the caller asked to keep.
ASKED = ("skipped by the caller", "rule ", "no rule names it")

#: The note on weights that an earlier call packed.
PACKED = "packed already"

#: Called with each model whose weights were packed in memory, and the recipe: packages that build on this one add what their models need.
WHEN_PACKED: list[Callable[[nn.Module, Recipe], None]] = []

#: Weights that the reference never quantizes: routers, position and token-type tables, small projections of state-space layers.
_NEVER = re.compile(
    r"(^|\.)(router|gate|shared_expert_gate|wpe|position_embeddings?|embed_positions?|token_type_embeddings?|relative_attention_bias"
    r"|pos_embed\w*|x_proj|dt_proj)\.(weight|classifier\.weight)$|norm[^.]*\.weight$"
)


@dataclass
class Site:
    """One weight that can be packed, and every place that holds it.

    Attributes:
        name: its first parameter name.
        places: `(module, attribute)` of every place (more than one: tied weights).
        weight: the floating-point parameter, as the model has it.
        transposed: experts that the model keeps as `[E, K, N]`; they are stored as `[E, N, K]`, and seen transposed.
        role: see `WeightFacts`.
    """

    name: str
    places: list[tuple[nn.Module, str]]
    weight: nn.Parameter
    transposed: bool
    role: str

    @property
    def matrix(self) -> Tensor:
        """The weight as `[.., N, K]`."""
        matrix = matrix_of(self.places[0][0], self.weight.detach())
        return matrix.mT if self.transposed else matrix


#: A weight to pack, its format, and its importance.
Planned = tuple[Site, str, "Tensor | None"]


@dataclass(frozen=True)
class Choice:
    """What a recipe decided for a weight: a format, or None to keep it, and the reason."""

    format: str | None
    reason: str


def _is_experts(module: nn.Module, name: str, parameter: Tensor) -> bool:
    """3-D weights of a mixture of experts, as transformers 5 keeps them."""
    conv = isinstance(module, nn.modules.conv._ConvNd)
    return (
        parameter.dim() == 3 and parameter.is_floating_point() and not conv and bool(re.search(r"(_proj|^w[123]|^weight|_linear)$", name))
    )


def _experts_transposed(module: nn.Module) -> bool:
    """Whether experts are `[E, K, N]`: transformers' flag, or the one architecture that has no flag."""
    return bool(getattr(module, "is_transposed", type(module).__name__ == "Llama4TextExperts"))


def find_sites(model: nn.Module) -> tuple[list[Site], dict[str, str]]:
    """Weights of a model that can be packed, and the reason for each parameter that cannot."""
    sites: dict[int, Site] = {}
    kept: dict[str, str] = {}
    tied: dict[int, str] = {}  # kept for one of its places: then for all, or the tie would break
    output = _output_weight(model)
    for module_name, module in model.named_modules():
        for attribute, parameter in module._parameters.items():
            if parameter is None:
                continue
            name = f"{module_name}.{attribute}" if module_name else attribute
            reason = PACKED if isinstance(parameter, IQTensor) else _why_not(module, attribute, name, parameter)
            if id(parameter) in tied:
                kept[name] = f"tied to {tied[id(parameter)]}"
            elif reason:
                kept[name], tied[id(parameter)] = reason, name
                if id(parameter) in sites:
                    kept[sites.pop(id(parameter)).name] = f"tied to {name}"
            elif id(parameter) in sites:
                site = sites[id(parameter)]
                site.places.append((module, attribute))
                site.role = "tied" if site.role in ("embedding", "output") else site.role
            else:
                transposed = parameter.dim() == 3 and _experts_transposed(module)
                role = "embedding" if isinstance(module, nn.Embedding) else role_of(name)
                if parameter is output and role != "embedding":
                    role = "output"
                sites[id(parameter)] = Site(name, [(module, attribute)], parameter, transposed, role)
    return list(sites.values()), kept


def _why_not(module: nn.Module, attribute: str, name: str, parameter: Tensor) -> str | None:
    """Why a parameter is kept whatever the recipe says; None if it can be packed."""
    if parameter.dim() < 2:
        return f"{parameter.dim()}-D"
    if not parameter.is_floating_point():
        return f"dtype {parameter.dtype}"
    if not parameter.numel():
        return "empty"
    if _NEVER.search(name):
        return "router, position table or the like"
    if attribute == "weight" and (isinstance(module, (nn.Linear, nn.Embedding)) or is_conv1d(module) or is_pointwise(module)):
        return None
    if attribute == "weight" and type(module) is nn.Conv1d and module.kernel_size == (1,):
        return f"convolution with groups {module.groups} and padding {module.padding}: only groups=1, padding=0 is a linear layer"
    if _is_experts(module, attribute, parameter) or is_flat_experts(module):
        return None
    return f"no linear layer, embedding or expert ({type(module).__name__}.{attribute})"


def _output_weight(model: nn.Module) -> Tensor | None:
    get = getattr(model, "get_output_embeddings", None)
    try:
        head = get() if callable(get) else None
    except (AttributeError, NotImplementedError):  # models without a head answer in either way
        head = None
    return getattr(head, "weight", None)


def model_facts(model: nn.Module, has_importance: bool = False) -> ModelFacts:
    """Layers, grouped-query factor and experts, from a Hugging Face config (defaults where it says nothing)."""
    config: Any = getattr(model, "config", None)
    if hasattr(config, "get_text_config"):
        config = config.get_text_config()

    def value(name: str) -> Any:
        try:
            return getattr(config, name, None)
        except RuntimeError:  # a config whose layers differ refuses to give one value for all of them
            return None

    def read(*names: str) -> int:
        return next((v for v in map(value, names) if isinstance(v, int) and not isinstance(v, bool)), 0)

    heads = read("num_attention_heads", "n_head")
    kv_heads = read("num_key_value_heads") or heads
    return ModelFacts(
        layers=read("num_hidden_layers", "n_layer", "num_layers"),
        gqa=max(1, heads // kv_heads) if kv_heads else 1,
        experts=read("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts"),
        has_importance=has_importance,
    )


def choose_format(site: Site, recipe: Recipe, facts: ModelFacts) -> Choice:
    """A recipe's choice for a weight, with the fallback for rows that the format cannot hold."""
    k = site.matrix.shape[-1]
    weight = WeightFacts(site.name, site.role, layer_of(site.name), k, "shared_expert" in site.name)
    name, reason = recipe.choose(weight, facts)
    if name is None:
        return Choice(None, reason)
    fmt = get_format(name)
    if k % 32:
        return Choice(None, f"rows of {k} weights are no multiple of 32")
    if k % fmt.block_size == 0:
        return Choice(fmt.name, reason)
    substitute = "q8_0" if site.role in ("output", "tied") else fmt.fallback
    if substitute is None:
        return Choice(None, f"rows of {k} weights do not fit {fmt.name}, which has no fallback")
    return Choice(substitute, f"{reason}; substituted for {fmt.name}: rows of {k} are no multiple of {fmt.block_size}")


def _matches(rules: Iterable[tuple[str, str | None]], name: str) -> bool:
    return any(re.search(pattern, name) for pattern, _ in rules)


def plan_formats(
    model: nn.Module, recipe: Recipe, skip: Iterable[str] = (), has_importance: bool = False
) -> tuple[list[tuple[Site, Choice]], dict[str, str]]:
    """What a recipe makes of every weight of a model; values are not looked at, so the model may be on the meta device.

    Returns:
        The choice for each weight that can be packed, and for every parameter the reason why it is kept or got its format.
    """
    facts = model_facts(model, has_importance)
    skipped = Recipe(None, tuple((pattern, None) for pattern in ([skip] if isinstance(skip, str) else skip))).rules
    sites, notes = find_sites(model)
    choices = []
    for site in sites:
        choice = choose_format(site, recipe, facts)
        choices.append((site, Choice(None, ASKED[0]) if _matches(skipped, site.name) else choice))
    notes.update({site.name: choice.reason for site, choice in choices})
    notes.update({name: ASKED[0] for name in notes if _matches(skipped, name)})
    for pattern, _ in recipe.rules:
        if not any(re.search(pattern, site.name) for site in sites):
            logger.warning("rule %r matches no weight of this model", pattern)
    return choices, notes


def quantize_model(
    model: M,
    recipe: Recipe | str | Mapping[str, str | None],
    importance: Mapping[str, Tensor] | str | Path | None = None,
    *,
    calibration: Calibration | Iterable[Tensor | Mapping[str, Any]] | None = None,
    rounding: Rounding = "nearest",
    checkpoint: str | Path | None = None,
    device: torch.device | str | None = None,
    objective: Objective = "model",
    speed: Speed = "default",
    skip: Iterable[str] = (),
    fuse: bool = False,
    progress: bool = True,
) -> M:
    """Packs the weights of a model, in place.

    `nn.Linear`, `nn.Embedding`, `nn.Conv1d` of kernel size 1, GPT-2's `Conv1D` and 3-D expert weights are packed; norms, biases,
    other 1-D tensors, routers and position tables are kept. Tied weights are packed once and stay tied. Rows that a format cannot
    hold take its fallback format. `iqtorch.report(model)` lists what every parameter became, and why.

    Args:
        model: any `nn.Module` with its weights loaded, on any device.
        recipe: a format name (the reference's mix of that name, `Recipe.default`), a `Recipe` or its file, or `{regex: format or None}`
            searched in parameter names, in order, where weights without a match are kept.
        importance: mean squared activation of each input column by parameter name (`[K]`, experts `[E, K]`), such as an
            `iqtorch.Importance`, or the path of an importance file. Weights without an entry get unit importance.
        calibration: for `rounding="ldlq"` and `"yaqa"`: batches of token ids `[B, T]` (or dictionaries of arguments), which are run through
            layer by layer, so that each layer makes up for what packing changed before it; or an `iqtorch.Calibration`, for
            models that cannot be run so. It takes the place of `importance` for the weights that it covers.
        rounding: `"nearest"`, each weight for itself; `"ldlq"`: with error feedback by the second moments of the calibration, which
            lowers the divergence of a model by a third at the same bits; or `"yaqa"`: by the curvature of the loss in the layers'
            outputs too, which takes a tenth more off and needs backward passes. A weight for which held-out activations say that
            it does not help is rounded to nearest (`iqtorch.report` tells).
        checkpoint: a folder in which batches as `calibration` leave each block that is finished; the same call finds them there and goes
            on after them. Remove it at the end.
        device: for batches as `calibration` and `rounding="ldlq"`: where the model's blocks run and are rounded, one after the other, if
            that is not where the model is: a GPU that has no room for all of them. The packed weights are where the model is, and
            experts are rounded there.
        objective, speed: as in `iqtorch.quantize`.
        skip: regular expressions, searched in parameter names: those weights are kept.
        fuse: compute projections of the same activations in one call (the same bits; measure first), see `iqtorch.fuse`.
        progress: show a progress bar.

    Returns:
        The same model.

    Raises:
        UnknownFormatError, RecipeError: unknown format (with near matches) or unreadable rule.
        WeightError, ImportanceError: NaN or Inf in a weight, importance that does not fit; named.
        CalibrationError: calibration is missing, without tokens, of another model or tokenizer, or not finite.
        All checks come before the first change, and weights are swapped only after the last one is packed: on any error the
        model is as it was.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"quantize_model needs an nn.Module, got {type(model).__name__}; iqtorch.quantize packs a single tensor")
    check_options(objective, speed)
    check_rounding(rounding, calibration)
    if calibration is None and (checkpoint is not None or device is not None):
        raise CalibrationError("checkpoint= and device= are for calibrated rounding: pass batches as calibration too")
    chosen = Recipe.of(recipe)
    table = importance_table(importance)
    plan, notes = plan_packing(model, chosen, table, skip, has_importance=bool(table) or calibration is not None)
    before = list(notes.values()).count(PACKED)
    if before and not plan:
        logger.warning("nothing is packed now: %d weights are packed already and stay as they are; start from the plain model", before)
    for site, _, _ in plan:
        check_finite(site.matrix, site.name)
    packed = list(_progress(_packed(model, plan, calibration, rounding, checkpoint, device, objective, speed, notes), plan, progress))
    install_packed(model, packed, notes, chosen)
    if fuse:
        fuse_projections(model)
    return model


def plan_packing(
    model: nn.Module, recipe: Recipe, table: Mapping[str, Tensor], skip: Iterable[str], has_importance: bool
) -> tuple[list[Planned], dict[str, str]]:
    """The weights that a recipe packs, each with its format and its checked importance, and the notes of `plan_formats`.

    Raises:
        WeightError, ShapeError, ImportanceError: a weight that its format cannot hold, importance that does not fit.
    """
    choices, notes = plan_formats(model, recipe, skip, has_importance)
    check_coverage(table, [site for site, _ in choices], [site for site, choice in choices if choice.format])
    plan: list[Planned] = []
    for site, choice in choices:
        if choice.format is not None:
            check_weight(site.matrix, get_format(choice.format), site.name)
            plan.append((site, choice.format, check_importance(lookup_importance(table, site), site.matrix, site.name)))
    return plan, notes


def install_packed(model: nn.Module, packed: Iterable[tuple[Site, IQTensor]], notes: Mapping[str, str], recipe: Recipe) -> None:
    """Puts packed weights in their places, and makes the model one that can be reported on and saved."""
    for site, weight in packed:
        _install(model, site, weight)
    earlier = getattr(model, NOTES, {})
    setattr(model, NOTES, {**earlier, **{name: note for name, note in notes.items() if note != PACKED or name not in earlier}})
    for act in WHEN_PACKED:
        act(model, recipe)
    from .report import warn_if_kept  # which imports this module

    warn_if_kept(model, stacklevel=4)  # whoever called quantize_model


def _packed(
    model: nn.Module,
    plan: list[Planned],
    calibration: Calibration | Iterable[Tensor | Mapping[str, Any]] | None,
    rounding: Rounding,
    checkpoint: str | Path | None,
    device: torch.device | str | None,
    objective: Objective,
    speed: Speed,
    notes: dict[str, str],
) -> Iterator[tuple[Site, IQTensor]]:
    """Packs the weights of a plan: first those that calibration covers, then the others."""
    sites = {site.name: site for site, _, _ in plan}
    if calibration is not None:
        from .calibration import Target, round_weights

        targets = [Target(site.name, site.matrix, get_format(name)) for site, name, _ in plan]
        curvature = rounding == "yaqa"
        for name, weight, note in round_weights(model, targets, calibration, objective, curvature, checkpoint, speed, device):
            notes[name] = f"{notes[name]}; {note}"
            yield sites.pop(name), weight
    for site, name, weights in plan:
        if site.name in sites:
            yield site, quantize(site.matrix, name, weights, objective, speed=speed, name=site.name)


def _install(model: nn.Module, site: Site, weight: IQTensor) -> None:
    """Puts a packed weight in every place of its site; the places share one parameter."""
    if site.transposed:
        weight = weight._swapped()
    module, attribute = site.places[0]
    target = packable(module)
    if target is not module:
        replace_module(model, module, target)
    set_weight(target, attribute, weight)
    for module, attribute in site.places[1:]:
        set_weight(module, attribute, target._parameters[site.places[0][1]])  # type: ignore[arg-type]


def replace_module(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Puts a module in every place of another."""
    for parent in model.modules():
        for name, child in parent.named_children():
            if child is old:
                setattr(parent, name, new)


def importance_table(importance: Mapping[str, Tensor] | str | Path | None) -> Mapping[str, Tensor]:
    """Importance as a mapping; a path is loaded."""
    if importance is None:
        return {}
    if isinstance(importance, Mapping):
        return importance
    if not isinstance(importance, str | Path):
        raise ImportanceError(f"importance must be a mapping, an Importance or a file path, got {type(importance).__name__}")
    from .importance import Importance

    return Importance.load(importance)


def check_coverage(table: Mapping[str, Tensor], sites: Sequence[Site], packed: Sequence[Site]) -> None:
    """Warns of weights without importance, which are packed with unit importance.

    Args:
        table: importance by name; empty: nothing is checked.
        sites: all weights of the model that can be packed.
        packed: those that will be.

    Raises:
        ImportanceError: none of them has an entry: the names are those of another model.
    """

    def known(site: Site) -> bool:
        return site.name in table or site.name.removesuffix(".weight") in table

    if not table or not sites:
        return
    if not any(map(known, sites)):
        raise ImportanceError(
            f"importance has no entry for any of the {len(sites)} weights of this model, such as {sites[-1].name!r}; "
            f"its {len(table)} entries are named like {next(iter(table))!r}: was it made with another model?"
        )
    # a lookup of embeddings has no inputs, so nobody collects importance for it
    lacking = [site for site in packed if site.role != "embedding" and not known(site)]
    missing = [site.name for site in lacking]
    if missing:
        some = ", ".join(missing[:4]) + (", ..." if len(missing) > 4 else "")
        # the reference's program leaves the output layer out unless it is asked for, and quantizes without
        level = logging.INFO if all(site.role in ("output", "tied") for site in lacking) else logging.WARNING
        logger.log(level, "no importance for %d of %d weights, taken as 1 for all their columns: %s", len(missing), len(packed), some)


def lookup_importance(table: Mapping[str, Tensor], site: Site) -> Tensor | None:
    """Importance of a weight, by its parameter name or its module's name."""
    for_weight = getattr(table, "for_weight", None)
    if for_weight is not None:  # an Importance knows names and shapes of other programs too
        return cast("Tensor | None", for_weight(site.name, site.matrix.shape))
    found = table.get(site.name)
    return found if found is not None else table.get(site.name.removesuffix(".weight"))


def _progress(packed: Iterator[tuple[Site, IQTensor]], plan: list[Planned], show: bool) -> Iterator[tuple[Site, IQTensor]]:
    """What is packed, under a progress bar that counts weights."""
    with share_bars("quantizing", show) as bar:
        task = bar.add_task("", total=sum(site.weight.numel() for site, _, _ in plan))
        for site, weight in packed:
            bar.update(task, advance=site.weight.numel(), description=f"{site.name} {weight.format.name}")
            yield site, weight
