"""Models of other libraries through the same `quantize_model`: diffusers, sentence-transformers, plain modules."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import iqtorch
from iqtorch import IQTensor, Recipe
from iqtorch.data import TINY_LLAMA

pytest.importorskip("transformers")

from test_model import dequantized


@pytest.fixture(autouse=True)
def plain_torch() -> object:
    """Kernels may round activations; here the models around them are tested, on outputs that are equal to the last bits."""
    iqtorch.set_backend("torch")
    yield
    iqtorch.set_backend(None)


def test_diffusers_pipeline(tmp_path: Path) -> None:
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    config = {"num_attention_heads": 4, "attention_head_dim": 64, "in_channels": 4, "out_channels": 8, "num_layers": 2, "sample_size": 8}
    transformer = diffusers.DiTTransformer2DModel(**config).eval()
    vae = diffusers.AutoencoderKL(block_out_channels=(32,), latent_channels=4, norm_num_groups=8, sample_size=16)
    pipeline = diffusers.DiTPipeline(transformer=transformer, vae=vae, scheduler=diffusers.DDIMScheduler())
    pipeline.set_progress_bar_config(disable=True)

    def images() -> Tensor:
        generator = torch.Generator().manual_seed(0)
        return torch.from_numpy(pipeline(class_labels=[1, 2], num_inference_steps=2, generator=generator, output_type="np").images)

    original = images()
    iqtorch.quantize_model(transformer, Recipe.pure("iq4_ks"), progress=False)
    assert iqtorch.report(transformer).packed_fraction >= 0.99
    got = images()
    pipeline.transformer = dequantized(transformer)
    assert (got - images()).norm() <= 1e-4 * got.norm() and not torch.allclose(got, original, atol=1e-6)

    # diffusers' own save_pretrained knows no packed weights; the state dict does.
    torch.save(transformer.state_dict(), tmp_path / "transformer.pt")
    again = diffusers.DiTTransformer2DModel(**config).eval().requires_grad_(False)
    again.load_state_dict(torch.load(tmp_path / "transformer.pt", weights_only=True), assign=True)
    pipeline.transformer = again
    assert torch.equal(images(), got)


@pytest.mark.slow
def test_other_diffusion_transformers() -> None:
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    heads = {"num_attention_heads": 4, "attention_head_dim": 64, "joint_attention_dim": 256, "pooled_projection_dim": 64}
    x, text, pooled, time = torch.randn(1, 16, 64), torch.randn(1, 5, 256), torch.randn(1, 64), torch.tensor([0.5])
    flux = diffusers.FluxTransformer2DModel(in_channels=64, num_layers=1, num_single_layers=1, axes_dims_rope=(16, 24, 24), **heads)
    sd3 = diffusers.SD3Transformer2DModel(
        sample_size=8, in_channels=4, num_layers=2, caption_projection_dim=256, pos_embed_max_size=8, **heads
    )
    calls = [
        (flux, {"hidden_states": x, "img_ids": torch.zeros(16, 3), "txt_ids": torch.zeros(5, 3), "guidance": time}),
        (sd3, {"hidden_states": torch.randn(1, 4, 8, 8)}),
    ]
    for model, own in calls:
        feed = {"encoder_hidden_states": text, "pooled_projections": pooled, "timestep": time, "return_dict": False, **own}
        if model is flux:
            feed.pop("guidance")
        with torch.no_grad():
            iqtorch.quantize_model(model.eval(), Recipe.pure("iq4_nl"), progress=False)
            assert iqtorch.report(model).packed_fraction >= 0.99
            got, want = model(**feed)[0], dequantized(model)(**feed)[0]
        assert (got - want).norm() <= 1e-4 * want.norm()


def test_sentence_transformer_saves_and_loads(tmp_path: Path) -> None:
    sentence_transformers = pytest.importorskip("sentence_transformers")

    def load(path: Path, **kwargs: object) -> nn.Module:
        model = sentence_transformers.SentenceTransformer(str(path), device="cpu", model_kwargs={"dtype": torch.float32, **kwargs})
        model.tokenizer.pad_token = model.tokenizer.eos_token
        return model

    sentences = ["The old man looked at the sea.", "It rained."]
    model = load(TINY_LLAMA)
    original = model.encode(sentences, convert_to_tensor=True)
    iqtorch.quantize_model(model, Recipe.pure("q8_0"), progress=False)
    assert iqtorch.report(model).packed_fraction == 1
    got = model.encode(sentences, convert_to_tensor=True)
    want = dequantized(copy.deepcopy(model)).encode(sentences, convert_to_tensor=True)
    assert (got - want).norm() <= 1e-3 * want.norm() and 0 < (got - original).norm() <= 0.05 * original.norm()
    model.save(str(tmp_path))
    again = load(tmp_path)
    assert all(isinstance(p, IQTensor) for p in again.parameters() if p.dim() > 1)
    assert torch.equal(again.encode(sentences, convert_to_tensor=True), got)
    loading = load(TINY_LLAMA, quantization_config=iqtorch.IQConfig(recipe=Recipe.pure("q8_0")))
    assert torch.equal(loading.encode(sentences, convert_to_tensor=True), got)
