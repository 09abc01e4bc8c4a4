"""Models of other libraries through the same `quantize_model`: diffusers, sentence-transformers, plain modules."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import iqtorch
from iqtorch import IQConfig, IQTensor, Recipe
from iqtorch.data import TINY_LLAMA
from iqtorch.errors import CheckpointError, UnsupportedOperationError, WeightError

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

    pipeline.transformer = transformer
    pipeline.save_pretrained(tmp_path / "pipeline")
    pipeline = diffusers.DiTPipeline.from_pretrained(tmp_path / "pipeline")
    pipeline.set_progress_bar_config(disable=True)
    assert iqtorch.report(pipeline.transformer).packed_fraction >= 0.99 and torch.equal(images(), got)


@pytest.fixture
def dit(tmp_path: Path) -> Any:
    """A class of diffusers, and a saved model of it that is not packed."""
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    cls = diffusers.DiTTransformer2DModel
    model = cls(num_attention_heads=4, attention_head_dim=64, in_channels=4, out_channels=8, num_layers=2, sample_size=8)
    model.save_pretrained(tmp_path / "plain")
    return cls


def sample(model: Any) -> Tensor:
    torch.manual_seed(1)
    feed = {"hidden_states": torch.randn(2, 4, 8, 8), "timestep": torch.tensor([3, 7]), "class_labels": torch.tensor([1, 2])}
    with torch.no_grad():
        return model(**feed).sample


def test_diffusers_quantizes_while_loading_saves_and_loads(dit: Any, tmp_path: Path) -> None:
    model = dit.from_pretrained(tmp_path / "plain")
    iqtorch.quantize_model(model, "iq4_ks", progress=False)
    want = sample(model)
    loading = dit.from_pretrained(tmp_path / "plain", quantization_config=IQConfig("iq4_ks"), device_map={"": "cpu"})
    assert torch.equal(sample(loading), want)
    for name, one in (("after", model), ("while", loading)):
        one.save_pretrained(tmp_path / name)
        again, info = dit.from_pretrained(tmp_path / name, output_loading_info=True)
        assert not any(info.values()) and torch.equal(sample(again), want)
        assert type(again.transformer_blocks[0].attn1.to_q) is iqtorch.Linear and again.hf_quantizer.is_serializable
    files = [load_file(tmp_path / name / "diffusion_pytorch_model.safetensors") for name in ("after", "while")]
    assert files[0].keys() == files[1].keys() and all(torch.equal(files[0][name], files[1][name]) for name in files[0])
    narrow = dit.from_pretrained(tmp_path / "after", torch_dtype=torch.bfloat16)
    weight = narrow.transformer_blocks[0].attn1.to_q.weight
    assert weight.dtype == torch.bfloat16 and torch.equal(weight.to_blocks(), model.transformer_blocks[0].attn1.to_q.weight.to_blocks())
    plain = loading.dequantize()
    assert not any(isinstance(p, IQTensor) for p in plain.parameters()) and (sample(plain) - want).norm() <= 1e-4 * want.norm()


def test_a_pipeline_of_diffusers_quantizes_a_part_while_loading(dit: Any, tmp_path: Path) -> None:
    import diffusers

    vae = diffusers.AutoencoderKL(block_out_channels=(32,), latent_channels=4, norm_num_groups=8, sample_size=16)
    transformer = dit.from_pretrained(tmp_path / "plain")
    diffusers.DiTPipeline(transformer=transformer, vae=vae, scheduler=diffusers.DDIMScheduler()).save_pretrained(tmp_path / "pipeline")
    config = diffusers.PipelineQuantizationConfig(quant_mapping={"transformer": IQConfig("iq4_ks")})
    loaded = diffusers.DiTPipeline.from_pretrained(tmp_path / "pipeline", quantization_config=config)
    want = iqtorch.quantize_model(transformer, "iq4_ks", progress=False)
    assert torch.equal(sample(loaded.transformer), sample(want)) and not any(isinstance(p, IQTensor) for p in loaded.vae.parameters())


def test_damaged_models_of_diffusers_are_refused(dit: Any, tmp_path: Path) -> None:
    dit.from_pretrained(tmp_path / "plain", quantization_config=IQConfig("iq4_ks")).save_pretrained(tmp_path / "packed")
    file = tmp_path / "packed" / "diffusion_pytorch_model.safetensors"
    good = load_file(file)
    name = "transformer_blocks.1.attn1.to_k.weight"
    save_file({**good, name: good[name][:, :-2].contiguous()}, file)
    with pytest.raises(CheckpointError, match=f"{name}.*damaged"):
        dit.from_pretrained(tmp_path / "packed")
    save_file({key: value for key, value in good.items() if key != name}, file)
    with pytest.raises(CheckpointError, match=name):
        dit.from_pretrained(tmp_path / "packed")
    plain = load_file(tmp_path / "plain" / file.name)
    plain[name][3, 4] = float("nan")
    save_file(plain, tmp_path / "plain" / file.name)
    with pytest.raises(WeightError, match=name):
        dit.from_pretrained(tmp_path / "plain", quantization_config=IQConfig("iq4_ks"))
    with pytest.raises(UnsupportedOperationError, match="disk"):
        dit.from_pretrained(tmp_path / "plain", quantization_config=IQConfig("iq4_ks"), device_map={"": "disk"})


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
