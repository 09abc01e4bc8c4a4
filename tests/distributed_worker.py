"""What each process of test_distributed.py runs: `torch.distributed.run distributed_worker.py MODE CHECKPOINT`."""

from __future__ import annotations

import sys
from typing import Any

import peft
import torch
import torch.distributed as dist
import transformers
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers.distributed import DistributedConfig

import iqtorch
from iqtorch import IQTensor

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
    try:
        parts.save_pretrained("nowhere")
        checks["save"] = False
    except iqtorch.errors.UnsupportedOperationError:
        checks["save"] = True
    return checks


def sharded_adapters(path: str) -> dict[str, bool]:
    """FSDP2 shards what is trained; frozen packed weights stay whole. One step equals that of one process."""

    def adapted() -> nn.Module:
        torch.manual_seed(0)
        model = peft.get_peft_model(load(path), peft.LoraConfig(r=4, target_modules="all-linear"))
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter, std=0.05)
        return model

    def step(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        with torch.no_grad():
            return model(input_ids=IDS).logits

    want = step(adapted(), IDS)
    model = adapted()
    packed = {p for p in model.parameters() if isinstance(p, IQTensor)}
    for layer in model.base_model.model.model.layers:
        fully_shard(layer, ignored_params=packed)
    fully_shard(model, ignored_params=packed)
    trained = [p for p in model.parameters() if p.requires_grad]
    got = step(model, IDS[dist.get_rank() :: dist.get_world_size()])  # each process has its own part of the batch
    return {"sharded": len(trained) > 0 and all(isinstance(p, DTensor) for p in trained), "step": close(got, want)}


if __name__ == "__main__":
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    iqtorch.set_backend("torch")  # the same float32 products whatever the size of the parts
    dist.init_process_group("gloo")
    results = {"tensor_parallel": tensor_parallel, "sharded_adapters": sharded_adapters}[sys.argv[1]](sys.argv[2])
    failed = [name for name, passed in results.items() if not passed]
    dist.barrier()
    dist.destroy_process_group()
    sys.exit(f"rank failed: {failed}" if failed or not results else 0)
