"""What the processes of test_distributed.py run. As a program: reads `[processes, mode, folder, seconds]`, answers what failed."""

from __future__ import annotations

import json
import multiprocessing
import os
import queue
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import peft
import torch
import torch.distributed as dist
import transformers
from safetensors.torch import load_file
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel
from transformers.distributed import DistributedConfig

import iqtorch
from iqtorch import IQTensor
from iqtorch.errors import ShapeError, UnsupportedOperationError

IDS = torch.tensor([[1, 5, 9, 12, 7, 3], [2, 8, 6, 4, 11, 10]])


def load(path: str, **kwargs: Any) -> nn.Module:
    return transformers.AutoModelForCausalLM.from_pretrained(path, **kwargs)


def close(got: torch.Tensor, want: torch.Tensor) -> bool:
    return bool((got - want).norm() <= 1e-5 * want.norm())


def tensor_parallel(path: str) -> dict[str, bool]:
    """Outputs, gradients and tokens of a model split over the processes, against the whole one."""
    whole, parts = load(path), load(path, distributed_config=DistributedConfig(tp_size=dist.get_world_size(), tp_plan="auto"))
    layer, full = parts.model.layers[0].self_attn, whole.model.layers[0].self_attn
    n, k = full.q_proj.weight.shape
    checks = {
        "rows": isinstance(layer.q_proj.weight, IQTensor) and tuple(layer.q_proj.weight.shape) == (n // dist.get_world_size(), k),
        "columns": tuple(layer.o_proj.weight.shape) == (full.o_proj.weight.shape[0], full.o_proj.weight.shape[1] // dist.get_world_size()),
    }
    with torch.no_grad():
        checks["output"] = close(parts(IDS).logits, whole(IDS).logits)
    feed = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    checks["tokens"] = torch.equal(parts.generate(IDS, **feed), whole.generate(IDS, **feed))
    for model in (whole, parts):
        model(IDS, labels=IDS).loss.backward()
    checks["gradient"] = close(parts.model.layers[0].input_layernorm.weight.grad, whole.model.layers[0].input_layernorm.weight.grad)
    parts.save_pretrained(f"{path}/again")  # put together again: the same bytes as from one process
    dist.barrier()
    checks["save"] = same_bytes(f"{path}/again", path)
    config = [json.loads(Path(folder, "config.json").read_text())["quantization_config"] for folder in (path, f"{path}/again")]
    checks["config"] = config[0]["tensors"] == config[1]["tensors"]
    return checks


def same_bytes(first: str, second: str) -> bool:
    """Whether two checkpoints have the same tensors."""
    a, b = (load_file(Path(folder, "model.safetensors")) for folder in (first, second))
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def fsdp(path: str, whole: bool) -> dict[str, bool]:
    """FSDP2, with packed weights sharded too, or whole in every process: one step of adapters equals that of one process."""

    def adapted() -> nn.Module:
        torch.manual_seed(0)
        model = peft.get_peft_model(load(path), peft.LoraConfig(r=4, target_modules="all-linear"))
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter, std=0.05)
        return model

    def step(model: nn.Module, ids: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        model(input_ids=ids, labels=ids).loss.backward()
        gradients = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
        optimizer.step()
        with torch.no_grad():
            return model(input_ids=IDS).logits, gradients

    world = dist.get_world_size()
    ids = IDS.repeat(world // 2, 1)
    want, gradients = step(adapted(), ids)
    model = adapted()
    packed = {p for p in model.parameters() if isinstance(p, IQTensor)}
    ignored = packed if whole else set()
    for layer in model.base_model.model.model.layers:
        fully_shard(layer, ignored_params=ignored)
    fully_shard(model, ignored_params=ignored)
    trained = [p for p in model.parameters() if p.requires_grad]
    parts = [p.to_local() for p in model.parameters() if isinstance(p, DTensor) and isinstance(p.to_local(), IQTensor)]
    nbytes = sum(p.to_blocks().nbytes for p in packed)
    got, sharded = step(model, ids[dist.get_rank() :: world])  # each process has its own part of the batch
    checks = {
        "sharded": len(trained) > 0 and all(isinstance(p, DTensor) for p in trained),
        "step": close(got, want),
        "gradients": all(close(sharded[name].full_tensor(), gradients[name]) for name in gradients) and gradients.keys() == sharded.keys(),
    }
    checks["packed"] = len(parts) == (0 if whole else len(packed))
    if not whole:
        checks["bytes"] = sum(p.nbytes for p in parts) * world == nbytes
        # the kernels of this machine, and the bytes of the whole put together
        iqtorch.set_backend(None)
        one, many = load(path), load(path)
        for layer in many.model.layers:
            fully_shard(layer)
        fully_shard(many)
        with torch.no_grad():
            for _ in range(2):  # the second time into the memory of the first
                checks["kernels"] = checks.get("kernels", True) and torch.equal(many(IDS).logits, one(IDS).logits)
        many.save_pretrained(f"{path}/again", is_main_process=dist.get_rank() == 0)
        dist.barrier()
        checks["save"] = same_bytes(f"{path}/again", path)
    return checks


def data_parallel(path: str) -> dict[str, bool]:
    """DistributedDataParallel: gradients of adapters over parts of a batch, against the whole batch in one process."""

    def gradients(model: nn.Module, ids: torch.Tensor) -> list[torch.Tensor]:
        model(input_ids=ids, labels=ids).loss.backward()
        return [p.grad for p in model.parameters() if p.requires_grad]

    def adapted(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        return peft.get_peft_model(load(path), peft.LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))

    rank, world = dist.get_rank(), dist.get_world_size()
    want = gradients(adapted(0), IDS.repeat(world // 2, 1))
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*no packed form")
        model = DistributedDataParallel(adapted(rank))  # which gives all processes the adapters of the first
    got = gradients(model, IDS.repeat(world // 2, 1)[rank::world])
    checks = {"gradients": len(got) > 10 and all(close(a, b) for a, b in zip(got, want, strict=True))}
    other = load(path)
    if rank:
        other.lm_head.weight = nn.Parameter(iqtorch.quantize(torch.ones_like(other.lm_head.weight.dequantize()), "iq4_ks"), False)
    # what only the others notice: their packed weights are not those of the first
    checks["other weights"] = raises(UnsupportedOperationError, lambda: DistributedDataParallel(other)) == bool(rank)
    return checks


def trainer(path: str) -> dict[str, bool]:
    """transformers' Trainer, which takes DistributedDataParallel."""
    model = peft.get_peft_model(load(path), peft.LoraConfig(r=4, target_modules="all-linear"))
    arguments = transformers.TrainingArguments(
        output_dir=f"{path}/trained", max_steps=3, per_device_train_batch_size=1, use_cpu=True, report_to=[], save_steps=3, logging_steps=1,
        learning_rate=5e-3, ddp_backend="gloo", disable_tqdm=True,
    )  # fmt: skip
    data = [{"input_ids": row, "labels": row} for row in IDS.repeat(4, 1)]
    one = transformers.Trainer(model=model, args=arguments, train_dataset=data)
    one.train()
    losses = [entry["loss"] for entry in one.state.log_history if "loss" in entry]
    dist.barrier()
    saved = Path(path, "trained", "checkpoint-3", "adapter_model.safetensors")
    return {"world": arguments.world_size == dist.get_world_size(), "loss": losses[-1] < losses[0], "saved": saved.exists()}


def split_by_transformers(path: str, saves: bool = True, quantize: bool = False, **sizes: Any) -> dict[str, bool]:
    """Tensor, expert or pipeline parallelism, or FSDP2, by `from_pretrained`: outputs, tokens, and what a process holds.

    Args:
        saves: whether such a model can be saved, to the bytes of the whole one.
        quantize: `path` is a plain checkpoint, which is quantized while it is loaded.
    """
    config = {"quantization_config": iqtorch.IQConfig(recipe=iqtorch.Recipe.pure("iq4_ks"))} if quantize else {}
    whole, parts = load(path, **config), load(path, distributed_config=DistributedConfig(**sizes), **config)
    held = [getattr(p, "_local_tensor", p) for p in parts.parameters()]
    total = sum(p.to_blocks().nbytes for p in whole.parameters() if isinstance(p, IQTensor))
    feed = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    checks = {"part": 0 < sum(p.to_blocks().nbytes for p in held if isinstance(p, IQTensor)) < 0.7 * total}
    with torch.no_grad():
        checks["output"] = close(parts(IDS).logits, whole(IDS).logits)
    checks["tokens"] = torch.equal(parts.generate(IDS, **feed), whole.generate(IDS, **feed))
    if saves:
        parts.save_pretrained(f"{path}/again")
        if dist.get_rank() == 0:
            whole.save_pretrained(f"{path}/whole")
        dist.barrier()
        checks["save"] = same_bytes(f"{path}/again", f"{path}/whole")
    else:
        checks["save"] = raises(UnsupportedOperationError, lambda: parts.save_pretrained(f"{path}/again"))
    return checks


def refused(path: str) -> dict[str, bool]:
    """What is said where packed weights cannot be split."""
    whole = load(path)
    plain, world = whole.dequantize(), dist.get_world_size()
    if dist.get_rank() == 0:
        plain.save_pretrained(f"{path}/plain")
    dist.barrier()
    config, quantize = DistributedConfig(fsdp_size=world), iqtorch.IQConfig("q8_0")
    checks = {
        "quantizing": raises(
            UnsupportedOperationError, lambda: load(f"{path}/plain", distributed_config=config, quantization_config=quantize)
        )
    }
    if world == 3:
        checks["rows"] = raises(ShapeError, lambda: load(path, distributed_config=config))
    return checks


def raises(kind: type[Exception], call: Callable[[], object]) -> bool:
    try:
        call()
    except kind:
        return True
    return False


def dtensor(path: str) -> dict[str, bool]:
    """PyTorch's own tensor parallelism on packed linear layers."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    checks = {}
    for bias in (True, False):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(512, 1024, bias=bias), nn.GELU(), nn.Linear(1024, 512, bias=bias))
        iqtorch.quantize_model(model, iqtorch.Recipe.pure("iq4_ks" if bias else "q8_0"), progress=False)
        x = torch.randn(3, 512)
        results = []
        for split in (False, True):
            if split:
                parallelize_module(model, mesh, {"0": ColwiseParallel(), "2": RowwiseParallel()}, src_data_rank=None)
            leaf = x.clone().requires_grad_()
            y = model(leaf)
            y.square().sum().backward()
            results.append((y.detach(), leaf.grad))
        checks[f"equal, bias {bias}"] = all(close(got, want) for want, got in zip(*results))
        checks[f"packed, bias {bias}"] = isinstance(model[0].weight.to_local(), IQTensor)
    return checks


SPLITS: dict[str, Any] = {
    **{f"pp_size={n}": {"saves": False, "pp_size": n} for n in (2, 4)},
    **{f"fsdp_size={n}": {"fsdp_size": n} for n in (2, 4)},
    **{f"tp_size={n}": {"tp_size": n, "tp_plan": "auto"} for n in (2, 4)},
    **{f"ep_size={n}": {"ep_size": n, "tp_size": n} for n in (2, 4)},
}
MODES = {
    "tensor_parallel": tensor_parallel,
    "fsdp": partial(fsdp, whole=False),
    "fsdp_adapters": partial(fsdp, whole=True),
    "dtensor": dtensor,
    "data_parallel": data_parallel,
    "trainer": trainer,
    **{name: partial(split_by_transformers, **sizes) for name, sizes in SPLITS.items()},
    **{f"quantizing, {name}": partial(split_by_transformers, quantize=True, **sizes) for name, sizes in SPLITS.items()},
    "refused": refused,
}


def run(rank: int, world: int, mode: str, folder: str, answers: Any) -> None:
    """One process of `world`: answers with its rank and what failed, an empty text if nothing did."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), LOCAL_WORLD_SIZE=str(world))
    os.dup2(2, 1)  # what the server answers stands there alone
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    iqtorch.set_backend("torch")  # the same float32 products whatever the size of the parts
    try:
        dist.init_process_group("gloo", store=dist.FileStore(f"{folder}/store", world), rank=rank, world_size=world)
        results = MODES[mode](folder)
        answers.put((rank, ", ".join(name for name, passed in results.items() if not passed) if results else "nothing was checked"))
        dist.barrier()
        dist.destroy_process_group()
    except BaseException:
        answers.put((rank, traceback.format_exc()))
        raise


def serve(world: int, mode: str, folder: str, seconds: float) -> str:
    """Forks `world` processes for a mode; what failed."""
    context = multiprocessing.get_context("fork")
    answers = context.Queue()
    workers = [context.Process(target=run, args=(rank, world, mode, folder, answers), daemon=True) for rank in range(world)]
    for worker in workers:
        worker.start()
    end, seen = time.monotonic() + seconds, set()
    try:
        for _ in workers:
            rank, failed = answers.get(timeout=max(end - time.monotonic(), 0.1))
            seen.add(rank)
            if failed:
                return f"process {rank} of {world}: {failed}"
        for worker in workers:
            worker.join(max(end - time.monotonic(), 0.1))
        return "" if all(worker.exitcode == 0 for worker in workers) else f"exit codes {[worker.exitcode for worker in workers]}"
    except queue.Empty:
        return f"after {seconds} s only {sorted(seen)} of {world} processes have answered"
    finally:
        for worker in workers:
            worker.kill()


if __name__ == "__main__":  # importing takes longer than what is done then: one process imports, and is forked for each request
    for line in sys.stdin:
        print(json.dumps(serve(*json.loads(line))), flush=True)
