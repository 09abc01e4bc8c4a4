"""Distillation of scales, norms and codes: it lowers the divergence, the bytes hold what was trained, and it never makes a model worse."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import iqtorch
from iqtorch.calibration import refine as refining
from iqtorch.calibration.own_text import own_text
from iqtorch.calibration.refine import _Weight, refine
from iqtorch.errors import CalibrationError

transformers = pytest.importorskip("transformers")


def llama() -> nn.Module:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=256, intermediate_size=256, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2, vocab_size=64,
        initializer_range=0.1, tie_word_embeddings=False,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


def tokens(batches: int = 9) -> list[Tensor]:
    g = torch.Generator().manual_seed(1)
    return [torch.randint(64, (4, 32), generator=g) for _ in range(batches)]


def packed(base: nn.Module, name: str) -> nn.Module:
    return iqtorch.quantize_model(copy.deepcopy(base), {"_proj": name}, progress=False)


def blocks_of(model: nn.Module) -> dict[str, Tensor]:
    return {n: p.to_blocks().clone() for n, p in model.named_parameters() if isinstance(p, iqtorch.IQTensor)}


@pytest.mark.parametrize("name", ["iq2_k", "q2_k", "iq4_ks", "iq2_xxs"])
@pytest.mark.parametrize("codes", [False, True])
def test_divergence_falls_and_is_what_the_bytes_give(name: str, codes: bool) -> None:
    base = llama()
    model = packed(base, name)
    before = blocks_of(model)
    text = tokens(33 if codes else 9)
    found = refine(model, base, text, codes=codes)
    assert found.kept and found.after < found.before
    assert (found.codes > 0) == codes
    after = blocks_of(model)
    assert any(not torch.equal(before[n], after[n]) for n in before)
    if not codes:  # only what is stored of d and dmin
        fmt = iqtorch.get_format(name)
        for n, old in before.items():
            a, b = fmt.unpack(old), fmt.unpack(after[n])
            assert all(torch.equal(a[f], b[f]) for f in a if f not in ("d", "dmin"))
    total = 0.0
    for aside in text[7::8]:
        with torch.no_grad():
            ours = torch.log_softmax(iqtorch_float(model)(aside).logits, -1)
            theirs = torch.log_softmax(base(aside).logits, -1)
        total += float((theirs.exp() * (theirs - ours)).sum(-1).mean()) / len(text[7::8])
    assert total == pytest.approx(found.after, rel=1e-3)


def iqtorch_float(model: nn.Module) -> nn.Module:
    """The model with decoded weights: no rounding of activations."""
    model = copy.deepcopy(model)
    for module in model.modules():
        for name, value in list(module._parameters.items()):
            if isinstance(value, iqtorch.IQTensor):
                module._parameters[name] = nn.Parameter(value.dequantize(torch.float32), requires_grad=False)
    return model


@pytest.mark.parametrize("name", [n for n in iqtorch.list_formats() if iqtorch.get_format(n).plain is None])
def test_untouched_weights_keep_their_bytes(name: str) -> None:
    weight = iqtorch.quantize(torch.randn(3, 256, generator=torch.Generator().manual_seed(0)), name)
    own = _Weight("w", nn.Linear(1, 1), "weight", weight, codes=False)
    torch.testing.assert_close(own.dense().detach(), weight.dequantize(torch.float32), rtol=1e-6, atol=1e-9)
    assert torch.equal(own.packed().to_blocks(), weight.to_blocks())


def test_a_worse_model_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setattr(sys.modules["iqtorch.calibration.refine"], "SCALE_STEP", 3.0)
    base = llama()
    model = packed(base, "iq4_ks")
    before, norms = blocks_of(model), {n: p.clone() for n, p in model.named_parameters() if p.ndim == 1}
    found = refine(model, base, tokens(4))
    assert not found.kept and found.after >= found.before and "left as it was" in str(found)
    assert all(torch.equal(value, before[n]) for n, value in blocks_of(model).items())
    assert all(torch.equal(p, norms[n]) for n, p in model.named_parameters() if n in norms)


def test_defaults_of_others_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Scales are trained in float32 whatever `torch.set_default_dtype` says, and texts are drawn on the CPU."""
    value = iqtorch.quantize(torch.randn(8, 256, generator=torch.Generator().manual_seed(0)), "q4_k")
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        weight = _Weight("weight", nn.Linear(256, 8), "weight", value, codes=True)
        weight.assign()
    finally:
        torch.set_default_dtype(before)
    assert weight.factors.dtype == weight.dense().dtype == weight.value.dtype == torch.float32
    assert torch.equal(weight.code, weight.parts["code"])
    monkeypatch.setattr(refining, "write", lambda model, texts, seed: list(texts))
    texts = tokens(5)
    want = refining._with_own_text(nn.Identity(), texts, 1)
    with torch.device("meta"):
        assert all(a is b for a, b in zip(refining._with_own_text(nn.Identity(), texts, 1), want, strict=True))


def test_refining_within_no_grad() -> None:
    base = llama()
    models = [packed(base, "iq4_ks") for _ in range(2)]
    want = refine(models[0], base, tokens(2), epochs=1)
    with torch.no_grad():
        found = refine(models[1], base, tokens(2), epochs=1)
    assert found == want and all(
        torch.equal(a, b) for a, b in zip(blocks_of(models[0]).values(), blocks_of(models[1]).values(), strict=True)
    )


def test_refusals() -> None:
    assert iqtorch.refine is refine  # the function, also after its module is imported
    base = llama()
    with pytest.raises(CalibrationError, match="two batches"):
        refine(packed(base, "iq4_ks"), base, tokens(1))
    with pytest.raises(CalibrationError, match="no packed linear layer"):
        refine(copy.deepcopy(base), base, tokens(2))
    with pytest.raises(CalibrationError, match="own tokenizer"):
        refine(packed(base, "iq4_ks"), base, [torch.full((1, 8), 64)] * 2)


def test_text_that_the_model_writes() -> None:
    """Of the given shapes and first tokens, likely to the model, the same again; the caller's random numbers stay as they were."""
    base = llama()
    batches: list = [torch.randint(64, (3, 24)), {"input_ids": torch.randint(64, (2, 16))}, torch.randint(64, (1, 24))]
    state = torch.get_rng_state()
    found = own_text(base, batches)
    assert torch.equal(state, torch.get_rng_state())
    given = [batch["input_ids"] if isinstance(batch, dict) else batch for batch in batches]
    assert [t.shape for t in found] == [t.shape for t in given] and all(torch.equal(a[:, 0], b[:, 0]) for a, b in zip(found, given))
    assert all(torch.equal(a, b) for a, b in zip(found, own_text(base, batches)))
    assert base(found[0], labels=found[0]).loss < base(given[0], labels=given[0]).loss
    base.generation_config.update(repetition_penalty=9.0, top_p=0.1, eos_token_id=3, suppress_tokens=[1, 2], num_beams=2)
    assert all(torch.equal(a, b) for a, b in zip(found, own_text(base, batches)))
    assert base.generation_config.num_beams == 2
    with pytest.raises(CalibrationError, match="can generate"):
        own_text(nn.Linear(2, 2), batches)
    with pytest.raises(CalibrationError, match="token ids"):
        own_text(base, [{"inputs_embeds": torch.zeros(1, 3, 256)}])


def test_refining_on_own_text_as_well() -> None:
    base = llama()
    model = packed(base, "q2_k")
    found = refine(model, base, tokens(9), codes=True, own_text=True)
    assert found.kept and found.after < found.before and found.steps == 3 * 8
