"""Models on a card: experts of every architecture, half precision, compiled graphs, export, training, memory, one process of NCCL.

With `-m slow` the same tests run on the CPU, where they test themselves.
"""

from __future__ import annotations

import copy
import gc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import iqtorch
from iqtorch import IQConfig, IQTensor, Recipe
from iqtorch.data import TINY_LLAMA

transformers = pytest.importorskip("transformers")

from test_experts import AUTO, DEFAULT, SLOW  # noqa: E402
from test_model import dequantized  # noqa: E402
from tiny_models import Logits, tiny_config, tiny_model  # noqa: E402
from torch._dynamo.utils import counters  # noqa: E402
from torch.distributed.tensor import DTensor  # noqa: E402
from transformers.models.auto.configuration_auto import CONFIG_MAPPING  # noqa: E402

IDS = torch.tensor([[5, 9, 12, 7, 3, 4], [8, 6, 4, 11, 10, 9]])
HERE = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
DEVICES = [pytest.param("cpu", marks=pytest.mark.slow), pytest.param("cuda", marks=HERE)]
devices = pytest.mark.parametrize("device", DEVICES)


@pytest.fixture(autouse=True)
def exact() -> Iterator[None]:
    """Activations that are not rounded, so that no token takes another expert or ends as another; no dense copies; new compilers."""
    torch.use_deterministic_algorithms(False)  # which keep compiled code out of CUDA graphs
    torch.backends.cudnn.allow_tf32 = False  # which rounds what convolutions read
    iqtorch.set_activation_precision("float")
    iqtorch.set_fallback("error")
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()
    iqtorch.set_fallback("warn")
    iqtorch.set_activation_precision("int8")


def close(got: Tensor, want: Tensor, limit: float | None = None) -> bool:
    """Equal but for the order of float32 sums, and on the CPU for bfloat16 activations of 16 rows or more."""
    limit = limit or (1e-3 if got.is_cuda else 0.02)
    error = float((got.double().cpu() - want.double().cpu()).norm() / want.double().norm().cpu())
    print(f"relative error {error:.2e}, limit {limit}")
    return error <= limit


def packed(kind: str = "llama", **changes: Any) -> nn.Module:
    return iqtorch.quantize_model(tiny_model(kind, **changes), Recipe.pure("q8_0"), progress=False)


def run(model: nn.Module) -> Tensor:
    ids = IDS.to(model.device)
    kwargs = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        out = model(input_ids=ids, **kwargs)
    return out.logits if hasattr(out, "logits") else out[0]


def on(model: nn.Module, device: str) -> nn.Module:
    """The model there, on the kernels of that device."""
    model = model.to(device)
    wanted = "triton" if device == "cuda" else "cpu"
    assert {p.backend for p in model.parameters() if isinstance(p, IQTensor)} == {wanted}
    return model


@devices
@pytest.mark.parametrize("model_type", [*DEFAULT, *SLOW])
def test_experts_of_every_architecture(model_type: str, device: str) -> None:
    """Quantized on the CPU, run on the card: logits, and tokens where the model generates."""
    if model_type not in CONFIG_MAPPING:
        pytest.skip(f"transformers {transformers.__version__} has none")
    model = tiny_model(model_type, AUTO.get(model_type, "AutoModelForCausalLM"))
    for parameter in model.parameters():
        if parameter.dim() > 1 and not parameter.any():  # a router that is born with zeros: each device breaks ties in its own way
            nn.init.normal_(parameter)
    iqtorch.quantize_model(model, Recipe.pure("q8_0"), progress=False)
    plain = dequantized(model)
    if getattr(plain.config, "_experts_implementation", None) == "iqtorch":
        plain.set_experts_implementation("eager")  # transformers' own loop over experts
    want = run(plain)
    there = on(model, device)
    assert close(run(there), want)
    if model.can_generate() and not model.config.is_encoder_decoder:
        feed = {"max_new_tokens": 2, "min_new_tokens": 2, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
        got, want = there.generate(IDS.to(device), **feed), plain.generate(IDS, **feed)
        assert got.sequences.shape == (2, 8) and close(got.logits[0], want.logits[0])
        if torch.equal(got.sequences.cpu(), want.sequences):
            assert close(got.logits[1], want.logits[1])
        else:  # only where two tokens are as good as equal
            top = want.logits[0].topk(2).values
            assert (top[:, 0] - top[:, 1]).min() <= 1e-2 * top.abs().max()


@devices
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("precision", ["int8", "float"])
@pytest.mark.parametrize("kind", ["llama", "qwen3_moe", "gpt_oss"])
def test_half_precision(kind: str, precision: str, dtype: torch.dtype, device: str) -> None:
    """The kernels for half precision, with few and many tokens. All experts are taken: rounding cannot choose another one."""
    iqtorch.set_activation_precision(precision)
    changes = {} if kind == "llama" else {"num_experts_per_tok": 4}
    model = packed(kind, **changes)
    want = run(dequantized(model))
    there = on(model.to(dtype), device)
    limit = 0.01 if precision == "float" and dtype == torch.float16 else 0.02
    assert close(run(there).float(), want, limit)
    many = torch.randint(3, 128, (3, 60), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        want, got = dequantized(packed(kind, **changes))(many).logits, there(many.to(device)).logits
    assert close(got.float(), want, limit)


def graphs_used(device: str) -> None:
    """On a card: code ran from CUDA graphs."""
    if device == "cuda":
        assert counters["inductor"]["cudagraph_skips"] == 0, counters["inductor"]
        manager = torch._inductor.cudagraph_trees.get_container(torch.cuda.current_device()).tree_manager
        assert manager is not None and manager.roots, "nothing was captured"


@devices
@pytest.mark.parametrize("kind", ["llama", "qwen3_moe"])
def test_generate_compiles_by_itself(kind: str, device: str) -> None:
    """`cache_implementation="static"` is all a user writes: transformers compiles the step of one token, in reduce-overhead mode."""
    model = on(packed(kind, num_hidden_layers=1), device)
    feed = {
        "max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "cache_implementation": "static",
        "output_logits": True, "return_dict_in_generate": True,
    }  # fmt: skip
    want = model.generate(IDS.to(device), disable_compile=True, **feed)
    assert "_compiled_call" not in vars(model)
    if device == "cpu":
        feed["compile_config"] = transformers.CompileConfig()
        feed["compile_config"]._compile_all_devices = True
    graphs = []
    for _ in range(3):
        got = model.generate(IDS.to(device), **feed)
        assert "_compiled_call" in vars(model)
        assert close(got.logits[1], want.logits[1]) and torch.equal(got.sequences, want.sequences)
        graphs.append(counters["stats"]["unique_graphs"])
    assert graphs == [1, 1, 1], f"one graph for all tokens: {graphs}"
    graphs_used(device)


@devices
@pytest.mark.parametrize("kind", ["llama", "qwen3_moe"])
def test_reduce_overhead(kind: str, device: str) -> None:
    """The whole model in one graph, which is captured, and not compiled again for another token."""
    model = on(packed(kind, num_hidden_layers=1), device)
    compiled = torch.compile(model, fullgraph=True, mode="reduce-overhead")
    with torch.no_grad():
        for step in range(5):
            ids = IDS[:, :1].to(device) + step
            torch.compiler.cudagraph_mark_step_begin()
            assert close(compiled(ids, use_cache=False).logits.clone(), model(ids, use_cache=False).logits)
    assert counters["stats"]["unique_graphs"] == 1
    graphs_used(device)


@pytest.fixture
def shared_library(tmp_path: Path) -> Iterator[None]:
    """Inductor's compiler links the C++ library that PyTorch runs with: packages with a copy of their own crash while they are loaded."""
    script = tmp_path / "g++"
    script.write_text('#!/bin/sh\ncase " $* " in *" -shared "*) exec g++ "$@" -l:libstdc++.so.6;; esac\nexec g++ "$@"\n')
    script.chmod(0o755)
    with torch._inductor.config.patch({"cpp.cxx": (None, str(script))}):
        yield


@devices
@pytest.mark.parametrize("kind", ["llama", "qwen3_moe"])
def test_export_and_aot_inductor(kind: str, device: str, tmp_path: Path, shared_library: None) -> None:
    """A saved program, and a compiled package, in which our operators are called through PyTorch's dispatcher."""
    model = Logits(on(packed(kind, num_hidden_layers=1), device)).eval()
    ids = IDS.to(device)
    with torch.no_grad():
        want = model(ids)
        program = torch.export.export(model, (ids,))
        torch.export.save(program, tmp_path / "program.pt2")
        assert close(torch.export.load(tmp_path / "program.pt2").module()(ids), want, 1e-5)
        package = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "package.pt2"))
        assert close(torch._inductor.aoti_load_package(package)(ids), want)


@devices
@pytest.mark.parametrize("kind", ["llama", "qwen3_moe"])
@pytest.mark.parametrize("how", ["float32", "bfloat16", "autocast, checkpointing"])
def test_gradients_of_adapters(how: str, kind: str, device: str) -> None:
    """LoRA on a packed model: gradients of the dequantized one, on the same device."""
    peft = pytest.importorskip("peft")

    def gradients(model: nn.Module, how: str) -> dict[str, Tensor]:
        torch.manual_seed(0)
        adapted = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj", "o_proj"]))
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter, std=0.05)
        if "checkpointing" in how:
            adapted.enable_input_require_grads()
            adapted.gradient_checkpointing_enable()
        adapted.train()
        ids = torch.randint(3, 128, (4, 24), generator=torch.Generator().manual_seed(0)).to(device)
        with torch.autocast(device, torch.bfloat16, enabled="autocast" in how):
            loss = adapted(input_ids=ids, labels=ids).loss
        loss.backward()
        return {name: p.grad for name, p in adapted.named_parameters() if p.requires_grad}

    changes = {} if kind == "llama" else {"num_experts_per_tok": 4}
    dtype = torch.bfloat16 if how == "bfloat16" else torch.float32
    model = on(packed(kind, **changes).to(dtype), device)
    plain = dequantized(model)
    if kind != "llama":
        plain.set_experts_implementation("eager")
    right = dequantized(packed(kind, **changes)).to(device)
    if kind != "llama":
        right.set_experts_implementation("eager")
    got, want, exact = (
        torch.cat([g.float().flatten() for g in gradients(one, how if one is not right else "float32").values()])
        for one in (model, plain, right)
    )
    assert len(got) > 2000
    if how == "float32":
        assert close(got, want)
    else:  # as near to the float32 gradients as those of the plain model
        assert close(got, exact, 1.5 * float((want - exact).norm() / exact.norm()))


def trained(folder: Path, device: str) -> Any:
    peft = pytest.importorskip("peft")
    ids = IDS.repeat(4, 1)
    arguments = transformers.TrainingArguments(
        str(folder), max_steps=4, per_device_train_batch_size=2, learning_rate=1e-2, gradient_checkpointing=True, bf16=True,
        save_strategy="no", report_to=[], logging_steps=1, disable_tqdm=True, use_cpu=device == "cpu",
    )  # fmt: skip
    model = peft.get_peft_model(packed(), peft.LoraConfig(r=4, target_modules="all-linear"))
    trainer = transformers.Trainer(model, arguments, train_dataset=[{"input_ids": row, "labels": row} for row in ids])
    trainer.train()
    return model, [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@devices
def test_trainer_with_autocast_and_checkpointing(device: str, tmp_path: Path) -> None:
    model, losses = trained(tmp_path, device)
    assert {p.device.type for p in model.parameters()} == {device}
    assert len(losses) == 4 and losses[-1] < losses[0]


def sizable(path: Path, **changes: Any) -> nn.Module:
    """A Llama of four layers with 100 million weights in bfloat16, saved."""
    torch.manual_seed(0)
    sizes = {
        "hidden_size": 2048, "intermediate_size": 2048, "num_hidden_layers": 4, "num_attention_heads": 16, "head_dim": 128,
        "num_key_value_heads": 4, "vocab_size": 2048,
    }  # fmt: skip
    config = tiny_config("llama", **{**sizes, **changes})
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    model.save_pretrained(path)
    return model


class Peak:
    """Most memory of a card above what was taken before, in bytes."""

    def __enter__(self) -> Peak:
        gc.collect()
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        self.before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        return self

    def __exit__(self, *error: object) -> None:
        torch.cuda.synchronize()
        self.bytes = torch.cuda.max_memory_allocated() - self.before


def warm() -> None:
    """Workspaces of cuBLAS are no memory of a model: taken before."""
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.randn(64, 64, device="cuda", dtype=dtype)
        (x @ x).sum().item()
    del x


@HERE
def test_memory_of_a_model_is_its_packed_size_and_activations(tmp_path: Path) -> None:
    plain = sizable(tmp_path / "plain")
    large = max(p.numel() for p in plain.parameters())
    iqtorch.quantize_model(plain, Recipe.pure("q4_0"), speed="fast", progress=False)
    plain.save_pretrained(tmp_path / "packed")
    size = sum(p.nbytes for p in plain.parameters())
    warm()
    with Peak() as loading:
        model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "packed", device_map="cuda")
    there = sum(p.nbytes for p in model.parameters())
    print(f"packed {size / 1e6:.1f} MB, on the card {there / 1e6:.1f} MB, peak of loading {loading.bytes / 1e6:.1f} MB")
    assert there <= 1.05 * size and loading.bytes <= 1.02 * there + 3 * large  # and one weight being packed
    for tokens in (1, 64, 512):
        ids = torch.arange(tokens, device="cuda")[None]
        with torch.no_grad():
            model(ids)
            with Peak() as running:
                model(ids)
        activations = tokens * (2 * 2048 * 4 * 2 + 2048 * 4 * 4)  # the cache and a few vectors of each layer, logits in float32
        print(f"{tokens} tokens: {running.bytes / 1e6:.2f} MB beside the weights, activations about {activations / 1e6:.2f} MB")
        assert running.bytes <= activations + 2**21  # no dense copy: one matrix has 8 MB


@HERE
@pytest.mark.parametrize("where", ["cuda", "auto"])
@pytest.mark.parametrize("name", ["q4_0", "iq2_kl", "iq4_ks", "q6_k"])
def test_memory_of_quantizing_while_loading(name: str, where: str, tmp_path: Path) -> None:
    """The packed model, and twice the largest weight."""
    plain = sizable(tmp_path, num_hidden_layers=4 if name == "q4_0" else 1)
    large, dense = max(p.nbytes for p in plain.parameters()), sum(p.nbytes for p in plain.parameters())
    warm()
    with Peak() as loading:
        config = IQConfig(recipe=Recipe.pure(name), speed="fast")
        model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=config, device_map=where)
    assert {p.device.type for p in model.parameters()} == {"cuda"}
    size = sum(p.nbytes for p in model.parameters())
    print(f"packed {size / 1e6:.1f} MB, dense {dense / 1e6:.1f} MB, largest {large / 1e6:.1f} MB, peak {loading.bytes / 1e6:.1f} MB")
    assert loading.bytes <= size + 2 * large


@pytest.fixture
def one_process(device: str, tmp_path: Path) -> Iterator[Any]:
    """The mesh of a process group of this process alone: NCCL on a card."""
    store = dist.FileStore(str(tmp_path / "store"), 1)
    dist.init_process_group("nccl" if device == "cuda" else "gloo", store=store, rank=0, world_size=1)
    yield dist.device_mesh.init_device_mesh(device, (1,))
    dist.destroy_process_group()


@devices
def test_fsdp2_with_packed_shards_in_one_process(device: str, one_process: Any, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    from torch.distributed.fsdp import fully_shard

    ids = IDS.to(device)
    want = run(packed())
    torch.manual_seed(0)
    model = peft.get_peft_model(on(packed(), device), peft.LoraConfig(r=4, target_modules="all-linear"))
    for layer in model.base_model.model.model.layers:
        fully_shard(layer, mesh=one_process)
    fully_shard(model, mesh=one_process)
    assert all(isinstance(p, DTensor) for p in model.parameters())
    with torch.no_grad():
        assert close(model(ids).logits, want)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1)
    losses = []
    for _ in range(3):
        losses.append(model(input_ids=ids, labels=ids).loss)
        losses[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0]


@devices
def test_columns_and_rows_in_one_process(device: str, one_process: Any) -> None:
    """PyTorch's tensor parallelism on packed layers."""
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(512, 1024), nn.GELU(), nn.Linear(1024, 512))
    model = iqtorch.quantize_model(model, Recipe.pure("iq4_ks"), progress=False).to(device)
    x = torch.randn(3, 512, device=device)
    results = []
    for split in (False, True):
        if split:
            parallelize_module(model, one_process, {"0": ColwiseParallel(), "2": RowwiseParallel()}, src_data_rank=None)
        leaf = x.clone().requires_grad_()
        model(leaf).square().sum().backward()
        results.append((model(x).detach(), leaf.grad))
    assert isinstance(model[0].weight, DTensor) and isinstance(model[0].weight.to_local(), IQTensor)
    assert all(close(got, want) for want, got in zip(*results, strict=True))


@devices
def test_fused_projections(device: str) -> None:
    model = on(packed("llama"), device)
    fused = copy.deepcopy(model)
    assert iqtorch.fuse(fused) == 4
    for ids in (IDS, IDS[:1, :1]):
        with torch.no_grad():
            assert torch.equal(fused(ids.to(device)).logits, model(ids.to(device)).logits)
    feed = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(fused.generate(IDS.to(device), **feed), model.generate(IDS.to(device), **feed))


@devices
def test_sentence_transformer(device: str, tmp_path: Path) -> None:
    library = pytest.importorskip("sentence_transformers")

    def load(path: Path, device: str, **kwargs: object) -> nn.Module:
        model = library.SentenceTransformer(str(path), device=device, model_kwargs={"dtype": torch.float32, **kwargs})
        model.tokenizer.pad_token = model.tokenizer.eos_token
        return model

    sentences = ["The old man looked at the sea.", "It rained."]
    model = iqtorch.quantize_model(load(TINY_LLAMA, "cpu"), Recipe.pure("q8_0"), progress=False)
    want = dequantized(copy.deepcopy(model)).encode(sentences, convert_to_tensor=True)
    assert close(on(model, device).encode(sentences, convert_to_tensor=True), want)
    model.save(str(tmp_path))
    assert close(load(tmp_path, device).encode(sentences, convert_to_tensor=True), want)


@devices
def test_diffusion_transformer(device: str) -> None:
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    config = {"num_attention_heads": 4, "attention_head_dim": 64, "in_channels": 4, "out_channels": 8, "num_layers": 2, "sample_size": 8}
    model = iqtorch.quantize_model(diffusers.DiTTransformer2DModel(**config).eval(), Recipe.pure("iq4_ks"), progress=False)
    feed = {"hidden_states": torch.randn(2, 4, 8, 8), "timestep": torch.tensor([3, 7]), "class_labels": torch.tensor([1, 2])}
    with torch.no_grad():
        want = dequantized(model)(**feed).sample
        got = on(model, device)(**{name: value.to(device) for name, value in feed.items()}).sample
    assert close(got, want)


@devices
def test_vision_transformer_of_timm(device: str) -> None:
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", pretrained=False, img_size=64, depth=2, num_classes=10).eval()
    iqtorch.quantize_model(model, Recipe.pure("q8_0"), skip=["patch_embed"], progress=False)
    assert sum(isinstance(p, IQTensor) for p in model.parameters()) == 9
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        want = dequantized(model)(images)
        assert close(on(model, device)(images.to(device)), want)
