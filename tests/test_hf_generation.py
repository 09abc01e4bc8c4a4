"""What people do first with a loaded model: pipelines, and every way to generate, against the dequantized model."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import iqtorch
from iqtorch import IQConfig, IQTensor, Recipe
from iqtorch.data import TINY_LLAMA

transformers = pytest.importorskip("transformers")

from test_model import dequantized  # noqa: E402

PROMPT = "The old man looked at"


@pytest.fixture(autouse=True)
def plain_torch() -> Iterator[None]:
    """Kernels may round activations; here tokens are compared with those of the dequantized model, which are equal then."""
    iqtorch.set_backend("torch")
    yield
    iqtorch.set_backend(None)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """The embedded model: packed, in a folder, dequantized; its tokenizer, and ids of a prompt."""
    iqtorch.set_backend("torch")
    folder = tmp_path_factory.mktemp("packed")
    auto = transformers.AutoModelForCausalLM
    tokenizer = transformers.AutoTokenizer.from_pretrained(TINY_LLAMA, padding_side="left", pad_token="</s>")
    model = auto.from_pretrained(TINY_LLAMA, dtype=torch.float32, quantization_config=IQConfig(recipe=Recipe.pure("q4_0"))).eval()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return SimpleNamespace(
        folder=folder, model=model, plain=dequantized(model), tokenizer=tokenizer, inputs=tokenizer(PROMPT, return_tensors="pt")
    )


def tokens(model: Any, inputs: Any, **how: Any) -> torch.Tensor:
    torch.manual_seed(0)
    return model.generate(**inputs, **{"max_new_tokens": 16, "min_new_tokens": 16, "do_sample": False, "pad_token_id": 2, **how})


@pytest.mark.parametrize("given", ["a packed folder", "a plain folder and a config", "a model"])
def test_text_generation_pipeline(made: SimpleNamespace, given: str) -> None:
    arguments: dict[str, Any] = {
        "a packed folder": {"model": str(made.folder)},
        "a plain folder and a config": {
            "model": str(TINY_LLAMA), "dtype": torch.float32, "model_kwargs": {"quantization_config": IQConfig(recipe=Recipe.pure("q4_0"))}
        },
        "a model": {"model": made.model, "tokenizer": made.tokenizer},
    }[given]  # fmt: skip
    pipeline = transformers.pipeline("text-generation", device="cpu", **arguments)
    assert isinstance(pipeline.model.lm_head.weight, IQTensor)
    (one,) = pipeline(PROMPT, max_new_tokens=12, do_sample=False)
    want = tokens(made.plain, made.inputs, max_new_tokens=12, min_new_tokens=None)
    assert one["generated_text"] == made.tokenizer.decode(want[0], skip_special_tokens=True) and len(one["generated_text"]) > len(PROMPT)
    pipeline.tokenizer.pad_token_id, pipeline.tokenizer.padding_side = 2, "left"
    many = pipeline([PROMPT, "She"], max_new_tokens=12, do_sample=False, batch_size=2)
    assert many[0][0] == one


@pytest.mark.parametrize(
    "how", [{"num_beams": 3}, {"num_beams": 4, "num_return_sequences": 3}, {"do_sample": True, "top_k": 5}, {"repetition_penalty": 1.3}]
)
def test_beams_and_samples_are_those_of_the_dequantized_model(made: SimpleNamespace, how: dict[str, Any]) -> None:
    got = tokens(made.model, made.inputs, **how)
    assert torch.equal(got, tokens(made.plain, made.inputs, **how))
    assert not torch.equal(got[:1], tokens(made.model, made.inputs))  # not the greedy tokens


@pytest.mark.parametrize("way", ["assistant", "prompt lookup", "early exit"])
def test_speculated_tokens_are_the_greedy_ones(made: SimpleNamespace, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    draft = iqtorch.quantize_model(dequantized(made.model), Recipe.pure("iq2_ks"), speed="fast", progress=False)
    how: dict[str, Any] = {
        "assistant": {"assistant_model": draft}, "prompt lookup": {"prompt_lookup_num_tokens": 3}, "early exit": {"assistant_early_exit": 2}
    }[way]  # fmt: skip
    want = tokens(made.plain, made.inputs, max_new_tokens=24, min_new_tokens=24)
    widths = []
    forward = type(made.model).forward

    def watched(self: Any, input_ids: Any = None, *args: Any, **kwargs: Any) -> Any:
        if self is made.model and input_ids is not None:
            widths.append(input_ids.shape[1])
        return forward(self, input_ids, *args, **kwargs)

    monkeypatch.setattr(type(made.model), "forward", watched)
    assert torch.equal(tokens(made.model, made.inputs, max_new_tokens=24, min_new_tokens=None, **how), want)
    assert any(1 < width < made.inputs.input_ids.shape[1] for width in widths[1:]) or way == "prompt lookup"  # several were checked at once


def test_batches_with_padding_on_the_left(made: SimpleNamespace) -> None:
    texts = ["She", PROMPT, "It was not until the end of the day that he had seen the"]
    batch = made.tokenizer(texts, return_tensors="pt", padding=True)
    assert (batch.attention_mask[0] == 0).any()
    got = tokens(made.model, batch)
    for row, text in zip(got, texts, strict=True):
        assert torch.equal(row[-16:], tokens(made.plain, made.tokenizer(text, return_tensors="pt"))[0, -16:])


@pytest.mark.slow
def test_continuous_batching(made: SimpleNamespace) -> None:
    if not hasattr(made.model, "generate_batch"):
        pytest.skip(f"transformers {transformers.__version__} has none")
    config = transformers.GenerationConfig(max_new_tokens=8, do_sample=False, eos_token_id=-1)
    prompts = [made.tokenizer(text).input_ids for text in ("She", PROMPT)]
    for ids, answer in zip(prompts, made.model.generate_batch(prompts, generation_config=config).values(), strict=True):
        want = made.plain.generate(torch.tensor([ids]), max_new_tokens=8, min_new_tokens=8, do_sample=False, pad_token_id=2)
        assert answer.generated_tokens == want[0, len(ids) :].tolist()


def test_other_pipelines_and_streaming(made: SimpleNamespace, capsys: pytest.CaptureFixture[str]) -> None:
    pipeline = transformers.pipeline("feature-extraction", model=made.model.model, tokenizer=made.tokenizer, device="cpu")
    want = made.plain.model(**made.inputs).last_hidden_state
    torch.testing.assert_close(torch.tensor(pipeline(PROMPT)), want.detach(), rtol=1e-4, atol=1e-4)
    got = tokens(made.model, made.inputs, streamer=transformers.TextStreamer(made.tokenizer))
    assert capsys.readouterr().out.strip() == made.tokenizer.decode(got[0]).strip()
