"""`fit`: the best format for each weight of a model under a limit on its size, from measured sensitivities.

What a format costs a model is measured, not assumed: one weight at a time is replaced by its quantized self in a probe format, and
the divergence of the model's predictions is what this weight's error costs. Divergence grows in proportion to the squared error,
and the errors of different weights add up, so the cost of every other format follows from its squared error on a sample of rows.
The formats are then chosen by the largest fall of divergence per bit until the size is used up.
"""

from __future__ import annotations

import heapq
import logging
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from .calibration import Calibration, quantize_calibrated
from .encode import Objective
from .errors import RecipeError
from .formats import Format, get_format
from .model import Site, check_coverage, find_sites, importance_table, lookup_importance
from .progress import share_bars
from .quantize import check_importance, quantize
from .recipe import Recipe

__all__ = ["Fit", "fit"]

logger = logging.getLogger("iqtorch")

#: Formats chosen from: those of 2 to 8 bits whose encoding is fast.
CANDIDATES = ("iq2_ks", "iq2_k", "iq2_kl", "iq3_ks", "iq3_k", "iq4_ks", "iq4_k", "iq5_ks", "iq5_k", "iq6_k", "q8_0")
#: Experts of an array that the sample of rows is taken from.
SAMPLED_EXPERTS = 4
#: Tokens of the text inside the package that are taken where no batches are given, those of a window, and characters that hold as many.
OWN_TOKENS, WINDOW, BEGINNING = 2048, 512, 20_000


@dataclass(frozen=True)
class Fit:
    """A recipe made for one model.

    Attributes:
        recipe: an exact rule for each weight; weights without one are kept.
        bits_per_weight: of all weights that are packed, row headers included.
        predicted_kl: expected mean KL divergence from the original model, in nats per token, on text like the batches.
        achieved_kl: the same as measured with the recipe on the batches; None if that was not asked for.
        formats: parameter name -> format.
        sensitivity: parameter name -> mean KL divergence measured with this weight alone in the probe format.
    """

    recipe: Recipe
    bits_per_weight: float
    predicted_kl: float
    achieved_kl: float | None
    formats: dict[str, str]
    sensitivity: dict[str, float]

    def __str__(self) -> str:
        achieved = "" if self.achieved_kl is None else f", achieved {self.achieved_kl:.5f}"
        size = f"{len(self.formats)} weights, {self.bits_per_weight:.3f} bits per weight"
        return f"{size}, KL divergence in nats: predicted {self.predicted_kl:.5f}{achieved}"


@dataclass(frozen=True)
class _Option:
    """A format for a weight: bits it takes, divergence it is expected to cost."""

    format: str
    bits: int
    cost: float


def fit(
    model: nn.Module,
    importance: Mapping[str, Tensor] | str | Path | None = None,
    *,
    target_bpw: float,
    batches: Iterable[Tensor] | None = None,
    formats: Sequence[str] = CANDIDATES,
    probe: str | None = None,
    objective: Objective = "model",
    skip: Sequence[str] = (),
    rows: int = 64,
    calibration: Calibration | None = None,
    measure: bool = True,
    progress: bool = True,
) -> Fit:
    """A recipe for a model, of at most `target_bpw` bits per packed weight.

    It takes one pass over the batches per weight, and keeps their original predictions in memory (`tokens * vocabulary`
    float32): some thousands of tokens are enough. The model is unchanged afterwards.

    Args:
        model: with floating-point weights, on any device.
        importance: as in `quantize_model`.
        target_bpw: bits per weight, row headers included, over all weights that are packed.
        batches: int64 `[B, T]` token ids. Default: 2,048 tokens of the text inside the package, cut by the tokenizer in the folder that
            the model was loaded from.
        formats: names to choose from.
        probe: format of the measurement; default: the candidate nearest to the target.
        objective: as in `quantize_model`.
        skip: regular expressions, searched in parameter names: those weights are kept, and not counted.
        rows: rows of each weight on which the errors of the formats are compared.
        calibration: if the model is to be rounded with error feedback: the weights that it covers are rounded so when their
            sensitivity is measured, and it takes the place of their importance.
        measure: measure what the recipe achieves, too: every weight is quantized once more, and a copy of all is held meanwhile.
        progress: show a progress bar.

    Raises:
        RecipeError: no batches, or no tokenizer to make them with; not even the smallest formats reach the target.
        UnknownFormatError, ImportanceError, CalibrationError: as in `quantize_model`.
    """
    candidates = sorted({get_format(name) for name in formats}, key=lambda f: f.bits_per_weight())
    chosen = get_format(probe) if probe else min(candidates, key=lambda f: abs(f.bits_per_weight() - target_bpw))
    table = importance_table(importance)
    kept = [re.compile(pattern) for pattern in skip]
    sites = [s for s in find_sites(model)[0] if s.matrix.shape[-1] % 32 == 0 and not any(pattern.search(s.name) for pattern in kept)]
    check_coverage(table, sites, sites)
    fitting = {site.name: _fitting(candidates, site.matrix.shape[-1]) for site in sites}
    count = sum(site.matrix.numel() for site in sites)
    least = sum(min(_bits(f, site.matrix.shape) for f in fitting[site.name]) for site in sites)
    if least > target_bpw * count:
        raise RecipeError(f"the smallest formats take {least / count:.3f} bits per weight, the target is {target_bpw}; allow smaller ones")
    reference = _Reference(model, _own_text(model) if batches is None else list(batches))
    options: dict[str, list[_Option]] = {}
    sensitivity: dict[str, float] = {}
    for site in _shown(sites, progress):
        weights = check_importance(lookup_importance(table, site), site.matrix, site.name)
        allowed = fitting[site.name]
        measured = _fitting([chosen], site.matrix.shape[-1])[0]
        probed, weights = _rounded(site, measured, weights, objective, calibration)
        sensitivity[site.name] = reference.divergence([(site, probed)])
        errors = {f: _error(site.matrix, f, weights, objective, rows) for f in {measured, *allowed}}
        ratio = sensitivity[site.name] / max(errors[measured], 1e-30)
        options[site.name] = _hull([_Option(f.name, _bits(f, site.matrix.shape), ratio * errors[f]) for f in allowed])
        logger.info("%s: KL %.3g in %s", site.name, sensitivity[site.name], measured.name)
    found = _allocate(options, target_bpw * count)
    names = {name: option.format for name, option in found.items()}
    recipe = Recipe(None, tuple((f"^{re.escape(name)}$", fmt) for name, fmt in names.items()))
    bits = sum(option.bits for option in found.values())
    achieved = None
    if measure:
        achieved = reference.divergence(
            (site, _rounded(site, get_format(names[site.name]), lookup_importance(table, site), objective, calibration)[0])
            for site in sites
        )
    result = Fit(recipe, bits / count, sum(option.cost for option in found.values()), achieved, names, sensitivity)
    logger.info("%s", result)
    return result


def _shown(sites: Sequence[Site], show: bool) -> Iterator[Site]:
    """The weights, under a progress bar; each takes a pass of the model."""
    with share_bars("measuring", show) as bar:
        task = bar.add_task("", total=len(sites))
        for site in sites:
            bar.update(task, description=site.name)
            yield site
            bar.advance(task)


def _rounded(
    site: Site, fmt: Format, weights: Tensor | None, objective: Objective, calibration: Calibration | None
) -> tuple[Tensor, Tensor | None]:
    """A weight as a format gives it back, and its importance: that of the calibration, if it covers the weight."""
    moments = calibration.for_weight(site.name, site.matrix.shape) if calibration is not None else None
    if calibration is None or moments is None:
        return quantize(site.matrix, fmt, weights, objective, name=site.name).dequantize(), weights
    packed, _ = quantize_calibrated(site.matrix, fmt, moments, objective, calibration.curvature(site.name))
    own = [m.importance.to(site.matrix.device) for m in moments]
    return packed.dequantize(), torch.stack(own) if site.matrix.ndim == 3 else own[0]


def _own_text(model: nn.Module) -> list[Tensor]:
    """Windows of the text inside the package, as the model's own tokenizer cuts it."""
    from . import data, evaluate, hf

    config = getattr(model, "config", None)
    source = getattr(config, "_name_or_path", "")
    if not source:
        raise RecipeError(f"{type(model).__name__} was not loaded from a folder, and has no tokenizer to cut a text with; pass batches=")
    try:
        tokenizer = hf.transformers().AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise RecipeError(f"{source} has no tokenizer to cut a text with; pass batches=") from error
    text = hf.encode(tokenizer, data.calibration_text()[:BEGINNING])
    window = min(WINDOW, getattr(config, "max_position_embeddings", WINDOW), len(text))
    return list(evaluate.windows(model, text, window)[: OWN_TOKENS // window].split(1))


class _Reference:
    """The predictions of the unchanged model on the batches."""

    def __init__(self, model: nn.Module, batches: list[Tensor]) -> None:
        if not batches:
            raise RecipeError("fit needs batches of token ids [B, T]; iqtorch.data.calibration_text() is a text to start with")
        self.model = model
        device = next(model.parameters()).device
        self.batches = [batch.to(device) for batch in batches]
        self.log_probs = [self._predict(batch).cpu() for batch in self.batches]

    def _predict(self, batch: Tensor) -> Tensor:
        training = self.model.training
        try:
            with torch.no_grad():
                out = self.model.eval()(batch)
        finally:
            self.model.train(training)
        return torch.log_softmax(getattr(out, "logits", out).float(), -1)

    def divergence(self, values: Iterable[tuple[Site, Tensor]]) -> float:
        """Mean KL divergence with other values `[.., N, K]` in place of some weights; each is made when it is put in place."""
        originals: list[tuple[Site, Tensor]] = []
        try:
            with torch.no_grad():
                for site, value in values:
                    originals.append((site, site.weight.detach().clone()))
                    site.matrix.copy_(value)  # a view of the weight
            total = tokens = 0.0
            for batch, base in zip(self.batches, self.log_probs, strict=True):
                base = base.to(batch.device)
                total += float((base.exp() * (base - self._predict(batch))).sum())
                tokens += batch.numel()
        finally:
            with torch.no_grad():
                for site, original in originals:
                    site.weight.copy_(original)
        return max(total / tokens, 0.0)


def _fitting(formats: Sequence[Format], k: int) -> list[Format]:
    """The formats that hold rows of `k` weights, each replaced by its fallback where it does not."""
    return list(dict.fromkeys(f if k % f.block_size == 0 else get_format(f.fallback or "q8_0") for f in formats))


def _bits(fmt: Format, shape: torch.Size) -> int:
    return 8 * fmt.row_bytes(shape[-1]) * (shape.numel() // shape[-1])


def _error(matrix: Tensor, fmt: Format, importance: Tensor | None, objective: Objective, rows: int) -> float:
    """Importance-weighted squared error on evenly spaced rows, relative to their weighted squares."""
    experts = matrix if matrix.ndim == 3 else matrix[None]
    weights = None if importance is None else importance.reshape(-1, matrix.shape[-1]).expand(len(experts), -1)
    picked = torch.linspace(0, len(experts) - 1, min(SAMPLED_EXPERTS, len(experts)), device="cpu").long().unique().tolist()
    error = energy = 0.0
    for e in picked:
        n = min(max(rows // len(picked), 1), experts.shape[1])
        sample = experts[e, torch.linspace(0, experts.shape[1] - 1, n, device="cpu").long()].float()
        own = None if weights is None else weights[e]
        difference = sample - quantize(sample, fmt, own, objective).dequantize(torch.float32)
        scale = torch.ones(1, device=sample.device) if own is None else own
        error += float((scale * difference.square()).sum())
        energy += float((scale * sample.square()).sum())
    return error / max(energy, 1e-30)


def _hull(options: Sequence[_Option]) -> list[_Option]:
    """The options on the lower convex hull of cost over bits, smallest first: each step pays less per bit than the one before."""
    hull: list[_Option] = []
    for option in sorted(options, key=lambda o: (o.bits, o.cost)):
        if hull and option.cost >= hull[-1].cost:
            continue
        while len(hull) > 1 and _gain(hull[-2], hull[-1]) <= _gain(hull[-2], option):
            hull.pop()
        hull.append(option)
    return hull


def _gain(a: _Option, b: _Option) -> float:
    """Fall of the cost per bit from a to b."""
    return (a.cost - b.cost) / max(b.bits - a.bits, 1)


def _allocate(options: Mapping[str, list[_Option]], budget: float) -> dict[str, _Option]:
    """One option per weight: from the smallest, always the step with the largest gain that still fits."""
    level = dict.fromkeys(options, 0)
    left = budget - sum(steps[0].bits for steps in options.values())
    queue = [(-_gain(steps[0], steps[1]), name) for name, steps in options.items() if len(steps) > 1]
    heapq.heapify(queue)
    while queue:
        _, name = heapq.heappop(queue)
        steps, i = options[name], level[name]
        extra = steps[i + 1].bits - steps[i].bits
        if extra > left:
            continue
        left -= extra
        level[name] = i + 1
        if i + 2 < len(steps):
            heapq.heappush(queue, (-_gain(steps[i + 1], steps[i + 2]), name))
    return {name: steps[level[name]] for name, steps in options.items()}
