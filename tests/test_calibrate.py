"""Calibration and rounding with error feedback: the algebra against float64, every format, whole models."""

from __future__ import annotations

import copy
import gc
import weakref
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from calibration_cases import correlated, llama, output_error, tokens
from torch import Tensor, nn

import iqtorch
from iqtorch import cpu_ext
from iqtorch.calibration import sequence
from iqtorch.calibration.curvature import Curvatures
from iqtorch.calibration.moments import Moments
from iqtorch.calibration.rounding import FEEDBACK, PRECISE, quantize_calibrated
from iqtorch.encode import compiled, encode
from iqtorch.encode import metric as metrics
from iqtorch.encode.choose import GridChooser, SignedChooser, TableChooser
from iqtorch.encode.feedback import Feedback, Rounding, encode_with_feedback, feedback_effort
from iqtorch.encode.metric import BLOCK, Metric, RowFeedback, damped, unit_factor
from iqtorch.errors import CalibrationError

transformers = pytest.importorskip("transformers")

FORMATS = [name for name in iqtorch.list_formats() if iqtorch.get_format(name).plain is None]


@pytest.fixture(autouse=True)
def one_thread() -> object:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def cost(weight: Tensor, blocks: Tensor, name: str, moments: Tensor) -> Tensor:
    """float64 `[rows]`: e H e^T."""
    fmt = iqtorch.get_format(name)
    error = weight.double() - fmt.decode(blocks).double() * fmt.runtime_scale
    return ((error @ moments.double()) * error).sum(1)


# -- error feedback ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_gains(name: str) -> None:
    """The error that the moments measure falls for the matrix, and the bytes decode to the weights that the search worked with."""
    x = correlated(512, 2048)
    h = x.T @ x / len(x)
    weight = 0.5 * torch.randn(6, 512, generator=torch.Generator().manual_seed(3))
    weight[2] *= 37
    weight[4] = 0
    fmt = iqtorch.get_format(name).for_encoding
    start = encode(weight, fmt, h.diagonal().contiguous(), "rmse")
    metric = Metric(h, fmt, 0.01)
    rounding = Rounding(weight, fmt, metric, feedback_effort(fmt))
    rounding.run("rmse")
    blocks = rounding.blocks()
    rows = torch.tensor([0, 1, 2, 3, 5])
    before, after = cost(weight, start, name, h)[rows], cost(weight, blocks, name, h)[rows]
    assert (after / before).mean() < 0.9
    assert (after / before).max() < 1.05
    found = torch.ldexp(rounding._effective().T[:, metric.order.argsort()], rounding.exponent[:, None])
    torch.testing.assert_close(fmt.decode(blocks) * fmt.runtime_scale, found, rtol=1e-6, atol=1e-12)
    assert fmt.decode(blocks)[4].abs().max() <= 1e-3
    assert torch.equal(blocks, encode_with_feedback(weight, fmt, metric, "rmse"))


def test_interleaved_format_has_the_same_integers() -> None:
    x = correlated(256, 600)
    weight = torch.randn(8, 256, generator=torch.Generator().manual_seed(3))
    metric = Metric(x.T @ x / 600, iqtorch.get_format("iq4_ks"), 0.05)
    plain, merged = (encode_with_feedback(weight, iqtorch.get_format(n), metric) for n in ("iq4_ks", "iq4_ks_r4"))
    assert torch.equal(iqtorch.get_format("iq4_ks").decode(plain), iqtorch.get_format("iq4_ks_r4").decode(merged))


def whole(metric: Metric) -> Tensor:
    """float64 `[K, K]`: the damped moments, in rounding order, from their factors."""
    unit = metric.unit.double()
    return unit @ torch.block_diag(*metric.form.double()) @ unit.T


def test_factor_with_unit_diagonal_blocks() -> None:
    """In one part and in several, the last of them incomplete."""
    g = torch.Generator().manual_seed(2)
    for k, step in (
        (48, 1),
        (48, 8),
        (50, 16),
        (2 * BLOCK + 40, 1),
        (2 * BLOCK + 40, 8),
        (3 * BLOCK + 10, 100),
        (2 * BLOCK, 2 * BLOCK - 7),
    ):
        x = torch.randn(k + 200, k, generator=g, dtype=torch.float64)
        form = x.T @ x / len(x)
        unit, blocks, inverses = unit_factor(form.clone(), step)
        middle = torch.block_diag(*blocks)[:k, :k]
        torch.testing.assert_close(unit @ middle @ unit.T, form)
        assert torch.equal(unit.tril(-1), torch.zeros_like(unit))
        for i in range(0, k, step):
            torch.testing.assert_close(unit[i : i + step, i : i + step], torch.eye(min(step, k - i), dtype=torch.float64))
        own = [unit[i : i + len(inverses[0]), i : i + len(inverses[0])] for i in range(0, k, len(inverses[0]))]
        for a, b in zip(own, inverses, strict=True):
            torch.testing.assert_close(a @ b, torch.eye(len(a), dtype=torch.float64))


@pytest.mark.parametrize("step", [1, 2, 4, 8])
@pytest.mark.parametrize("k", [16, 272, 3 * BLOCK, 1024 + 32])
def test_compiled_factor(k: int, step: int) -> None:
    """As near to a float64 factor as float32 allows, from the upper part alone; larger matrices in parts; the same by every vector ISA."""
    if not compiled.available(torch.device("cpu")):
        pytest.skip("no compiled module")
    x = correlated(k, 2 * k)
    form = damped(x.T @ x / len(x), torch.arange(k), 0.01)
    exact_unit, exact_blocks, exact_inverses = unit_factor(form.double(), step)
    found = {}
    try:
        for isa in (i for i, state in cpu_ext.capabilities().items() if state == "available"):
            cpu_ext.select_isa(isa)
            unit, blocks, inverses = found[isa] = unit_factor(form.triu() + torch.full((k, k), 1e9).tril(-1) * (k <= 1024), step)
            assert float((unit - exact_unit).norm() / exact_unit.norm()) < 1e-5
            assert float((blocks - exact_blocks).norm() / exact_blocks.norm()) < 1e-5
            for a, b in zip(inverses, exact_inverses, strict=True):
                assert float((a - b).norm() / b.norm()) < 1e-5
    finally:
        cpu_ext.select_isa(None)
    vectors = [unit for isa, (unit, _, _) in found.items() if isa != "scalar"]
    assert all(torch.equal(unit, vectors[0]) for unit in vectors)


def test_compiled_factor_refuses() -> None:
    if not compiled.available(torch.device("cpu")):
        pytest.skip("no compiled module")
    for bad in (-torch.eye(32), torch.full((32, 32), float("nan"))):
        with pytest.raises((RuntimeError, ValueError), match="not positive definite"):
            unit_factor(bad, 1)


@pytest.mark.parametrize("rows", [24, 1000])
@pytest.mark.parametrize("name", ["iq2_kl", "iq4_ks"])
def test_weight_that_makes_up_for_the_layers_before(name: str, rows: int) -> None:
    """W' = W (I + C H^-1), by either way of computing it, within the three digits that corrections get."""
    k = 2 * BLOCK
    y = correlated(k, 2000)
    x = y + 0.2 * correlated(k, 2000, seed=1)
    moments, drift = y.T @ y / len(y), y.T @ (x - y) / len(y)
    metric = Metric(moments, iqtorch.get_format(name), 0.1, drift, rows)
    weight = torch.randn(rows, k, generator=torch.Generator().manual_seed(1))
    exact = weight.double() @ drift.double().T @ torch.linalg.inv(damped(moments, torch.arange(k), 0.1).double())
    exact = (exact[:, metric.order] @ metric.unit.double()).T
    found = metric.pull(weight.T[metric.order])
    assert found is not None
    assert float((found - exact).norm() / exact.norm()) < 0.01
    # and it lowers the error that it is for
    plain = Metric(moments, iqtorch.get_format(name), 0.1)
    errors = [
        float(
            (weight @ x.T - iqtorch.get_format(name).decode(encode_with_feedback(weight, iqtorch.get_format(name), m)) @ y.T).square().sum()
        )
        for m in (plain, metric)
    ]
    assert errors[1] < 0.95 * errors[0]


#: Rows, and how far the mean errors of both passes may lie apart. Near-ties fall either way and send a row another way, in large codebooks
#: at nearly every step (scores are summed in another order, and found by bytes or cells first): there it takes more rows for the same mean.
APART = dict.fromkeys(("iq2_kl", "iq3_k", "iq4_kss", "q4_k", "q4_1", "mxfp4", "iq2_xxs", "iq3_s"), (19, 0.01))
APART |= dict.fromkeys(("iq1_s", "iq1_m", "iq1_kt", "iq4_kt"), (67, 0.006))


@pytest.mark.parametrize("name", APART)
def test_compiled_pass_is_the_plain_one(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same errors by either, and each the e H e^T of the weights it leaves: the identity the method rests on."""
    rows, apart = APART[name]
    monkeypatch.setattr(metrics, "factor_dtype", lambda _: torch.float32)
    if not compiled.available(torch.device("cpu")):
        pytest.skip("no compiled module")
    x = correlated(512, 2048)
    weight = 0.5 * torch.randn(rows, 512, generator=torch.Generator().manual_seed(3))
    weight[2] *= 37
    fmt = iqtorch.get_format(name).for_encoding
    metric = Metric(x.T @ x / 2048, fmt, 0.01)
    costs = []
    for plain in (False, True):
        rounding = Rounding(weight, fmt, metric, feedback_effort(fmt))
        if plain:
            rounding._round_block_compiled = rounding._round_block  # type: ignore[method-assign]
        rounding.sweep()
        rest = rounding.rest.unflatten(0, (-1, fmt.vec))
        reported = ((metric.form @ rest) * rest).sum((0, 1))
        error = (rounding.x - rounding._effective()).double()
        costs.append((error * (whole(metric) @ error)).sum(0))
        torch.testing.assert_close(reported.double(), costs[-1], rtol=1e-4, atol=0)
    torch.testing.assert_close(costs[0].mean(), costs[1].mean(), rtol=apart, atol=0)


@pytest.mark.parametrize("name", ["iq4_k", "q4_k", "q4_0", "iq2_kl", "iq2_xxs"])
@pytest.mark.parametrize("plain", [False, True])
def test_a_default_dtype_changes_nothing(name: str, plain: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if plain:
        monkeypatch.setattr(compiled, "available", lambda device: False)
    x, weight = correlated(512, 1024), torch.randn(16, 512, generator=torch.Generator().manual_seed(3))
    moments = (Moments(x.T @ x / len(x), len(x), x[:64]),)

    def run() -> Tensor:
        for table in (compiled.value_table, compiled._prepared, compiled._products, compiled._book):
            table.cache_clear()
        return quantize_calibrated(weight, iqtorch.get_format(name), moments)[0].to_blocks()

    want, before = run(), torch.get_default_dtype()
    for dtype in (torch.float64, torch.bfloat16):
        torch.set_default_dtype(dtype)
        try:
            assert torch.equal(run(), want), dtype
        finally:
            torch.set_default_dtype(before)
            run()


@pytest.mark.parametrize("name", ["iq4_k", "iq2_kl", "iq2_xxs"])
@pytest.mark.parametrize("plain", [False, True])
def test_autocast_changes_nothing(name: str, plain: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if plain:
        monkeypatch.setattr(compiled, "available", lambda device: False)
    x, weight = correlated(512, 1024), torch.randn(16, 512, generator=torch.Generator().manual_seed(3))
    moments, curvature = (Moments(x.T @ x / len(x), len(x), x[:64]),), torch.eye(16) + 0.1
    fmt = iqtorch.get_format(name)

    def run() -> Tensor:
        rounded, _ = quantize_calibrated(weight, fmt, moments, curvature=curvature)
        return torch.cat([iqtorch.quantize(weight, fmt).to_blocks(), rounded.to_blocks()])

    want = run()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(run(), want)


def test_layers_are_rounded_within_autocast() -> None:
    """The model runs as the caller asks; what is rounded is rounded in full precision."""
    base = llama(num_hidden_layers=1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model = iqtorch.quantize_model(copy.deepcopy(base), {"down_proj": "iq2_kl"}, calibration=tokens(), rounding="ldlq", progress=False)
    (packed,) = (p for p in model.parameters() if isinstance(p, iqtorch.IQTensor))
    assert packed.dequantize().isfinite().all()


@pytest.mark.parametrize("name", ["iq2_kl", "iq4_ks", "iq3_xxs", "iq4_kt"])
def test_instruction_sets_agree_on_feedback(name: str) -> None:
    """Not so formats of vectors of eight, compared as bytes only where AVX512-VNNI is, nor scalar code, whose multiply-adds are not fused
    (see docs/quality.md, Cost)."""
    if not compiled.available(torch.device("cpu")):
        pytest.skip("no compiled module")
    x = correlated(512, 1024)
    weight = torch.randn(19, 512, generator=torch.Generator().manual_seed(3))
    fmt = iqtorch.get_format(name).for_encoding
    metric = Metric(x.T @ x / 1024, fmt, 0.01)
    found: dict[str, Tensor] = {}
    try:
        for isa in (i for i, state in cpu_ext.capabilities().items() if state == "available" and i != "scalar"):
            cpu_ext.select_isa(isa)
            found[isa] = encode_with_feedback(weight, fmt, metric)
    finally:
        cpu_ext.select_isa(None)
    first, *others = found.values()
    assert all(torch.equal(blocks, first) for blocks in others)


@pytest.mark.parametrize("name", ["iq1_m", "iq1_kt", "iq2_kt", "iq3_kt", "iq4_kt"])
def test_search_of_large_codebooks_leaves_hardly_more_error(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By bytes and by cells first, against a comparison of all entries in float32."""
    if not compiled.available(torch.device("cpu")):
        pytest.skip("no compiled module")
    if name != "iq4_kt" and cpu_ext.capabilities().get("avx512") != "available":
        pytest.skip("bytes are compared only where AVX512-VNNI is")
    x = correlated(256, 1024)
    weight = torch.randn(99, 256, generator=torch.Generator().manual_seed(3))
    weight[5], weight[7, :64] = 0, 0
    fmt = iqtorch.get_format(name).for_encoding
    metric = Metric(x.T @ x / 1024, fmt, 0.01)

    def left() -> float:
        rounding = Rounding(weight, fmt, metric, feedback_effort(fmt))
        rounding.sweep()
        rest = rounding.rest.unflatten(0, (-1, fmt.vec))
        assert not rounding._effective()[:, 5].any()
        return float(((metric.form @ rest) * rest).sum())

    quick, book = left(), compiled._book
    none = torch.zeros(0)
    monkeypatch.setattr(compiled, "_book", lambda *a: replace(book(*a), tiles=none, bytes=none.to(torch.uint8), cuts=none))
    assert quick == pytest.approx(left(), rel=0.003)


def test_what_8_bit_activations_hide_is_rounded_to_nearest() -> None:
    x = correlated(256, 1024)
    weight = torch.randn(64, 256, generator=torch.Generator().manual_seed(3))
    moments = Moments(x.T @ x / 1024, 1024, x[::8])
    for name, note in {"q8_0": PRECISE, "q6_k": FEEDBACK, "iq4_ks": FEEDBACK}.items():
        fmt = iqtorch.get_format(name)
        found, said = quantize_calibrated(weight, fmt, (moments,))
        assert said == note
        nearest = iqtorch.quantize(weight, name, moments.importance)
        assert torch.equal(found.to_blocks(), nearest.to_blocks()) == (note == PRECISE)


@pytest.mark.parametrize("sample", [torch.zeros(0, 256), torch.zeros(8, 256)], ids=["none", "zeros"])
def test_without_activations_kept_aside_feedback_is_trusted(sample: Tensor) -> None:
    x = correlated(256, 1024)
    weight = torch.randn(64, 256, generator=torch.Generator().manual_seed(3))
    fmt = iqtorch.get_format("iq2_kl")
    moments = Moments(x.T @ x / 1024, 1024, sample)
    found, said = quantize_calibrated(weight, fmt, (moments,))
    nearest = iqtorch.quantize(weight, fmt, moments.importance).to_blocks()
    assert said == FEEDBACK
    assert cost(weight, found.to_blocks(), fmt.name, moments.matrix).sum() < 0.9 * cost(weight, nearest, fmt.name, moments.matrix).sum()


def test_rows_make_up_for_each_other() -> None:
    """tr(E H E^T O) falls when rows are fed back too, most where outputs go together."""
    x = correlated(256, 1000)
    h = x.T @ x / 1000
    g = torch.Generator().manual_seed(3)
    weight, mix = torch.randn(80, 256, generator=g), torch.randn(20, 80, generator=g)
    o = mix.T @ mix / 20 + 0.1 * torch.eye(80)
    for name in ("iq2_kl", "iq4_ks"):
        fmt = iqtorch.get_format(name)
        metric = Metric(h, fmt, 0.01)
        errors = []
        for rows in (None, RowFeedback(o, 0.01)):
            e = (weight - fmt.decode(encode_with_feedback(weight, fmt, metric, "rmse", rows=rows))).double()
            errors.append(float(((e @ h.double() @ e.T) * o.double()).sum()))
        assert errors[1] < 0.75 * errors[0]


@pytest.mark.parametrize("name", ["iq2_kl", "iq1_s", "iq2_s", "iq3_s", "iq4_k"])
def test_codes_of_a_step_are_the_best(name: str) -> None:
    """Against all entries (and signs) in float64, by the whole quadratic form of the step."""
    fmt = iqtorch.get_format(name)
    x = correlated(256, 400)
    metric = Metric(x.T @ x / 400, fmt, 0.01)
    kind = TableChooser if fmt.vec == 1 else SignedChooser if "sign" in fmt.fields else GridChooser
    chooser = kind(fmt, metric, Feedback())
    g = torch.Generator().manual_seed(5)
    s = torch.rand(12, generator=g) + 0.5
    wanted = torch.randn(fmt.vec, 12, generator=g) * fmt.codebook.values.astype("float32").std() * 1.5
    variants = torch.zeros(12, dtype=torch.int64)
    if fmt.variant_size == fmt.group_size and fmt.vec > 1:  # candidates come variant by variant
        variants[6:] = 1
    chooser.enter(0, s, variants)
    _, value = chooser.choose(0, 0, wanted)
    book = fmt.codebook.tensor(dtype=torch.float64).view(fmt.codebook.values.shape)
    signs = torch.ones(1, fmt.vec, dtype=torch.float64)
    if "sign" in fmt.fields:
        signs = torch.cartesian_prod(*[torch.tensor([1.0, -1.0], dtype=torch.float64)] * fmt.vec)
    form = metric.form[0].double()

    def price(e: Tensor) -> Tensor:
        return ((e @ form) * e).sum(-1)

    best, found = [], []
    for i in range(12):
        every = (book[variants[i]][:, None] * signs).flatten(0, 1)
        best.append(price(wanted[:, i].double() - s[i].double() * every).min())
        found.append(price(wanted[:, i].double() - s[i].double() * value[:, i].double()))
    excess = torch.stack(found) / torch.stack(best) - 1
    if "sign" in fmt.fields:  # the best of a shortlist
        assert excess.mean() < 0.03
    else:
        assert excess.max() < 1e-4


@pytest.mark.parametrize("name", ["q4_0", "q5_1", "mxfp4"])
def test_floats_of_groups_are_chosen_on_the_way(name: str) -> None:
    """Formats whose groups have a float of their own instead of an integer scale try neighbours of it as well."""
    x = correlated(512, 1000)
    fmt = iqtorch.get_format(name)
    weight = torch.randn(256, 512, generator=torch.Generator().manual_seed(3))
    h = x.T @ x / 1000
    errors = [
        cost(weight, encode_with_feedback(weight, fmt, Metric(h, fmt, 0.01), "rmse", Feedback(reach=reach, min_reach=reach)), name, h).sum()
        for reach in (0, 3)
    ]
    # powers of two are far apart: the first choice is rarely wrong
    assert errors[1] < (0.995 if fmt.d_kind == "e8m0" else 0.95) * errors[0]


@pytest.mark.parametrize("name", ["iq3_k", "q4_k", "iq2_kl", "iq3_xxs", "iq1_s", "iq1_m", "iq2_kt"])
def test_more_speed_costs_accuracy(name: str) -> None:
    """`speed` is how many scales are tried."""
    x = correlated(512, 1000)
    fmt = iqtorch.get_format(name)
    weight = torch.randn(48, 512, generator=torch.Generator().manual_seed(3))
    h = x.T @ x / 1000
    metric = Metric(h, fmt, 0.01)
    fast, default, best = (
        float(cost(weight, encode_with_feedback(weight, fmt, metric, "rmse", feedback_effort(fmt, speed)), name, h).sum())
        for speed in ("fast", "default", "best")
    )
    assert best < 1.01 * default < 1.02 * fast  # where default tries as many, chance decides
    if name != "iq1_s":  # where one scale fits about as well as the next: 0.3 % on average, and chance decides
        assert best < 0.997 * fast


def test_products_of_corrections() -> None:
    """Three digits, whatever the CPU multiplies in."""
    g = torch.Generator().manual_seed(0)
    a, b = torch.randn(70, 300, generator=g), torch.randn(300, 50, generator=g)
    exact = a.double() @ b.double()
    found = metrics.product(a, b)
    assert found.dtype == torch.float32
    assert float((found - exact).norm() / exact.norm()) < 5e-3


def test_model_objective_does_not_shrink() -> None:
    x = correlated(256, 1000)
    h = x.T @ x / 1000
    weight = torch.randn(16, 256, generator=torch.Generator().manual_seed(3))
    fmt, kept = iqtorch.get_format("iq2_ks"), {}
    metric = Metric(h, fmt, 0.05)
    back = metric.order.argsort()
    seen = weight @ whole(metric).float()[back][:, back]
    for objective in ("model", "rmse"):
        q = fmt.decode(encode_with_feedback(weight, fmt, metric, objective))  # type: ignore[arg-type]
        kept[objective] = (seen * q).sum(1) / (seen * weight).sum(1)  # each row
    assert kept["rmse"].mean() < 0.995
    torch.testing.assert_close(kept["model"], kept["rmse"].clamp(min=1.0), rtol=1e-3, atol=0)


# -- whole models ------------------------------------------------------------------------------------------


def test_layer_by_layer_beats_fixed_beats_nearest() -> None:
    base = llama(intermediate_size=256)
    text, unseen = tokens(batches=6), tokens(batches=8)[6:]
    recipe = {r"layers\..*proj": "iq2_k"}
    errors, notes = [], ""
    for arguments in (
        {"importance": iqtorch.collect_importance(base, text)},
        {"calibration": iqtorch.calibrate(base, text), "rounding": "ldlq"},
        {"calibration": text, "rounding": "ldlq"},
        {"calibration": text, "rounding": "yaqa"},
    ):
        model = iqtorch.quantize_model(copy.deepcopy(base), recipe, progress=False, **arguments)  # type: ignore[arg-type]
        assert isinstance(model.model.layers[0].mlp.up_proj.weight, iqtorch.IQTensor)
        errors.append(output_error(model, base, unseen))
        notes = str(iqtorch.report(model))
    assert errors[2] < errors[1] < errors[0]
    assert errors[3] < errors[1]
    assert errors[2] < 0.8 * errors[0]
    assert FEEDBACK in notes.replace("\n", " ") or "error feedback" in notes


def test_statistics_of_one_input_are_held_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """When the sums of an input are begun, the factors of those before it are gone."""
    made: weakref.WeakSet[object] = weakref.WeakSet()
    alive: list[int] = []

    def begin(self: sequence._Pairs) -> None:
        plain(self)
        gc.collect()
        alive.append(len(made))

    def make(*arguments: object) -> Metric:
        made.add(metric := Metric(*arguments))  # type: ignore[arg-type]
        return metric

    plain = sequence._Pairs.__init__
    monkeypatch.setattr(sequence._Pairs, "__init__", begin)
    monkeypatch.setattr(sequence, "Metric", make)
    for rounding in ("ldlq", "yaqa"):
        iqtorch.quantize_model(llama(), {r"layers\..*proj": "iq4_ks"}, calibration=tokens(), rounding=rounding, progress=False)  # type: ignore[arg-type]
    assert alive == [0] * 16  # two roundings of two blocks with four inputs each


def test_an_interrupted_rounding_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same bytes as without interruption, finished blocks not rounded again, and no checkpoint of anything else taken for its own."""
    base = llama()

    def pack(rounding: str = "yaqa", text: list[Tensor] | None = None, **more: object) -> dict[str, Tensor]:
        recipe = {r"layers\..*proj": "iq3_k", "lm_head": "iq4_ks"}
        calibration = tokens() if text is None else text
        model = iqtorch.quantize_model(copy.deepcopy(base), recipe, calibration=calibration, rounding=rounding, progress=False, **more)  # type: ignore[arg-type]
        return {n: p.to_blocks() for n, p in model.named_parameters() if isinstance(p, iqtorch.IQTensor)}

    whole = pack()
    finish, seen = sequence._Pairs.finish, []

    def fails_in_the_second_block(self: object, name: str, rows: int) -> object:
        seen.append(name)
        if "layers.1.mlp" in name and len(seen) < 8:
            raise KeyboardInterrupt
        return finish(self, name, rows)  # type: ignore[arg-type]

    monkeypatch.setattr(sequence._Pairs, "finish", fails_in_the_second_block)
    with pytest.raises(KeyboardInterrupt):
        pack(checkpoint=tmp_path)
    assert any("layers.0" in name for name in seen)
    seen[:] = [""] * 8
    again = pack(checkpoint=tmp_path)
    assert not any("layers.0" in name for name in seen) and any("layers.1" in name for name in seen)
    assert all(torch.equal(whole[n], again[n]) for n in whole)
    for other in ({"rounding": "ldlq"}, {"text": tokens(batches=2)}, {"text": [ids.view(2, -1) for ids in tokens()]}):
        with pytest.raises(CalibrationError, match="safetensors is of another text, model, recipe or setting; pass an empty folder .* it$"):
            pack(checkpoint=tmp_path, **other)  # type: ignore[arg-type]
    next(tmp_path.glob("*layers.0*")).write_bytes(b"x" * 50)
    with pytest.raises(CalibrationError, match="damaged"):
        pack(checkpoint=tmp_path)
    with pytest.raises(CalibrationError, match="calibrated rounding"):
        iqtorch.quantize_model(copy.deepcopy(base), "iq4_ks", checkpoint=tmp_path)


def test_curvature_of_the_outputs(tmp_path: Path) -> None:
    """Of a softmax right behind the layer it is the mean of diag(p) - p p^T; it is saved, loaded, and rounded by."""
    torch.manual_seed(0)
    head = nn.Linear(16, 5)
    x = 2 * torch.randn(20000, 16)

    class Logits(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = head

        def forward(self, x: Tensor) -> object:
            return transformers.modeling_outputs.CausalLMOutput(logits=self.head(x))

    found = iqtorch.calibrate(Logits(), [x], curvature=True).curvature("head.weight")
    p = torch.softmax(head(x).detach(), -1)
    exact = torch.diag(p.mean(0)) - p.T @ p / len(p)
    assert found is not None
    torch.testing.assert_close(found, exact / exact.diagonal().mean(), rtol=0.1, atol=0.05)

    base = llama()
    without = iqtorch.calibrate(base, tokens())
    with pytest.raises(CalibrationError, match="curvature=True"):
        iqtorch.quantize_model(copy.deepcopy(base), "iq4_ks", calibration=without, rounding="yaqa", progress=False)
    calibration = iqtorch.calibrate(base, tokens(), curvature=True)
    assert all(p.requires_grad for p in base.parameters()) and all(p.grad is None for p in base.parameters())
    calibration.save(tmp_path / "c.safetensors")
    again = iqtorch.Calibration.load(tmp_path / "c.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    assert torch.equal(calibration.curvature(name), again.curvature(name))  # type: ignore[arg-type]
    models = [
        iqtorch.quantize_model(copy.deepcopy(base), {"layers": "iq4_ks"}, calibration=again, rounding=rounding, progress=False)  # type: ignore[arg-type]
        for rounding in ("ldlq", "yaqa")
    ]
    assert not torch.equal(*(m.get_parameter(name).to_blocks() for m in models))


class Twice(nn.Module):
    """A block that calls one of its layers twice."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(256, 256), nn.Linear(256, 256)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.b(torch.relu(self.a(torch.relu(self.a(x)))))


@pytest.mark.parametrize("rounding", ["ldlq", "yaqa"])
def test_layers_that_are_called_twice(rounding: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(64, 256), nn.ModuleList([Twice(), Twice()]), nn.Linear(256, 64))
    model.forward = lambda ids: model[2](model[1][1](model[1][0](model[0](ids))))  # type: ignore[method-assign]
    packed = iqtorch.quantize_model(model, {r"1\..*weight": "iq4_k"}, calibration=tokens(), rounding=rounding, progress=False)  # type: ignore[arg-type]
    assert isinstance(packed.get_submodule("1.0.a").weight, iqtorch.IQTensor)


def test_energies_are_in_the_order_of_the_calls() -> None:
    layer = nn.Linear(4, 3)
    sums = Curvatures({"a": layer})
    x, g = torch.randn(3, 5, 4), torch.randn(3, 5, 3)
    with sums.watching():
        outs = [layer(rows) for rows in x]
        ((outs[0] * g[0]).sum() + (outs[2] * g[2]).sum()).backward()
    (found,) = sums.energy["a"]
    torch.testing.assert_close(found, torch.cat([g[0], g[2]]).square().sum(1))
    torch.testing.assert_close(sums.total["a"], g[0].T @ g[0] + g[2].T @ g[2])


def test_model_is_not_touched_by_the_passes() -> None:
    """Same outputs of the weights that are kept, flags and configuration as before."""
    model = llama(num_hidden_layers=1).train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    iqtorch.quantize_model(model, {r"layers\.0\.mlp": "iq4_ks"}, calibration=tokens(), rounding="ldlq", progress=False)
    assert model.training and model.config.use_cache
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    for name, value in model.state_dict().items():
        if "layers.0.mlp" not in name:
            assert torch.equal(value, before[name]), name


def test_conv1d_layers() -> None:
    """GPT-2 keeps its weights transposed, square ones too."""
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=64, n_embd=256, n_inner=256, n_layer=2, n_head=4, n_positions=64)
    base = transformers.GPT2LMHeadModel(config).train()
    recipe = {r"\.h\.": "iq3_k"}
    text, unseen = tokens(), tokens(batches=5)[3:]
    by_importance = iqtorch.quantize_model(copy.deepcopy(base), recipe, iqtorch.collect_importance(base, text), progress=False)
    model = iqtorch.quantize_model(copy.deepcopy(base), recipe, calibration=text, rounding="ldlq", progress=False)
    assert model.training and base.training
    assert output_error(model.eval(), base.eval(), unseen) < output_error(by_importance.eval(), base, unseen)


def test_blocks_that_are_no_chain() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([nn.Sequential(nn.Linear(256, 256)) for _ in range(2)])

        def forward(self, x: Tensor) -> Tensor:
            return self.layers[1](self.layers[0](x)) + self.layers[0](x + 1)

    model = Twice()
    batches = [torch.randn(2, 300, 256)]
    with pytest.raises(CalibrationError, match=r"layer by layer.*iqtorch\.calibrate"):
        iqtorch.quantize_model(model, {"layers": "iq4_ks"}, calibration=batches, rounding="ldlq", progress=False)
    iqtorch.quantize_model(model, {"layers": "iq4_ks"}, calibration=iqtorch.calibrate(model, batches), rounding="ldlq", progress=False)
    assert isinstance(model.layers[1][0].weight, iqtorch.IQTensor)


@pytest.mark.parametrize("fixed", [True, False])
def test_experts(fixed: bool, caplog: pytest.LogCaptureFixture) -> None:
    """Experts are rounded by the tokens routed to them; one without tokens by those of all."""
    torch.manual_seed(0)
    config = transformers.MixtralConfig(
        hidden_size=256, intermediate_size=256, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2, vocab_size=64,
        num_local_experts=4, num_experts_per_tok=1,
    )  # fmt: skip
    base = transformers.MixtralForCausalLM(config).eval()
    gate = base.model.layers[0].mlp.gate
    with torch.no_grad():
        gate.weight[3] = 0
        gate.weight[:3] = gate.weight[:3] * 50
        gate.weight[2] = -gate.weight[0] - gate.weight[1]  # of three that sum to zero one is always above expert 3
    text = tokens(batches=4)
    found = iqtorch.calibrate(base, text)
    name = next(n for n in found if "gate_up" in n)
    assert [m.tokens > 0 for m in found[name]] == [True, True, True, False]
    assert "experts [3]" in caplog.text
    assert found[name][3].matrix.diagonal().min() > 0
    recipe = {"experts": "iq2_k", "_proj": "iq3_k"}
    by_importance = iqtorch.quantize_model(copy.deepcopy(base), recipe, iqtorch.collect_importance(base, text), progress=False)
    model = iqtorch.quantize_model(copy.deepcopy(base), recipe, calibration=found if fixed else text, rounding="ldlq", progress=False)
    assert all("nearest" not in row.reason for row in iqtorch.report(model).rows if "experts" in row.name)
    assert output_error(model, base, tokens(batches=9)[6:]) < output_error(by_importance, base, tokens(batches=9)[6:])


@pytest.mark.slow
def test_divergence_of_the_embedded_model() -> None:
    """The figure to reach: 0.75 of the reference's 0.0902 for iq2_kl, with 32 calibration windows."""
    from iqtorch.data import calibration_text, heldout_text, load_tiny_llama

    base, tokenizer = load_tiny_llama()
    ids, text = (torch.tensor(tokenizer(t, add_special_tokens=False).input_ids) for t in (heldout_text(), calibration_text()))
    windows = text[: 32 * 512].view(-1, 512)
    model = iqtorch.quantize_model(
        copy.deepcopy(base), {r"layers\.": "iq2_kl", "embed": "q8_0"}, calibration=windows.split(8), rounding="ldlq", progress=False
    )
    assert iqtorch.evaluate.kl_divergence(model, base, ids).mean_kl < 0.75 * 0.0902
