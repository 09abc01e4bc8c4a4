"""Several processes (gloo, CPU): tensor parallelism on packed weights, and adapters under FSDP2."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

import iqtorch
from iqtorch import IQTensor, Recipe, get_format
from iqtorch.errors import ShapeError

pytest.importorskip("transformers")
pytest.importorskip("peft")

from tiny_models import tiny_model

from iqtorch.experts import SPLIT, split_experts
from iqtorch.sharding import join_blocks, split_blocks

TESTS = Path(__file__).parent


Spawn = Callable[[int, str, Path], None]


@pytest.fixture(scope="module")
def spawn() -> Iterator[Spawn]:
    """Runs a mode of distributed_worker.py in as many processes; all of them have to answer that nothing failed."""
    hidden = {"CUDA_VISIBLE_DEVICES": "", "HIP_VISIBLE_DEVICES": ""}  # transformers would take cards, of which there may be fewer
    environment = {
        **os.environ,
        **hidden,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": f"{TESTS.parent}{os.pathsep}{os.environ.get('PYTHONPATH', '')}",
    }
    command = [sys.executable, str(TESTS / "distributed_worker.py")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment) as server:
        assert server.stdin and server.stdout

        def ask(processes: int, mode: str, folder: Path) -> None:
            print(json.dumps([processes, mode, str(folder), 240]), file=server.stdin, flush=True)
            answer = server.stdout.readline()
            assert answer, f"the server has ended: {server.poll()}"
            assert not json.loads(answer), json.loads(answer)

        yield ask
        server.stdin.close()


def save(kind: str, path: Path, split: bool = False, quantize: bool = True, **changes: object) -> Path:
    """A packed model; `split`: with gate and up experts of different formats; or one that is not packed yet."""
    model = tiny_model(kind, **{"num_hidden_layers": 1, "hidden_size": 1024, "head_dim": 256, "intermediate_size": 1024, **changes})
    experts = [module for name, module in model.named_modules() if split and name.endswith(".experts")]
    for module in experts:
        halves = module.gate_up_proj.chunk(2, 1)
        split_experts(module)
        for name, half in zip(SPLIT, halves, strict=True):
            module._parameters[name] = torch.nn.Parameter(half.clone())
    if quantize:
        recipe = Recipe.pure("iq4_ks").with_rules([("experts.up_proj", "q8_0")])  # a format with row headers
        iqtorch.quantize_model(model, recipe, progress=False)
    model.save_pretrained(path)
    return path


@pytest.mark.parametrize("mode", ["tensor_parallel", "ep_size=2"])
def test_experts_in_halves(spawn: Spawn, mode: str, tmp_path: Path) -> None:
    spawn(2, mode, save("mixtral", tmp_path, split=True, num_key_value_heads=4))


def test_tensor_parallel_on_two_processes(spawn: Spawn, tmp_path: Path) -> None:
    spawn(2, "tensor_parallel", save("llama", tmp_path))


@pytest.mark.parametrize(
    ("kind", "processes"),
    [("llama", 4), pytest.param("mixtral", 2, marks=pytest.mark.slow), pytest.param("mixtral", 4, marks=pytest.mark.slow)],
)
def test_tensor_parallel(spawn: Spawn, kind: str, processes: int, tmp_path: Path) -> None:
    spawn(processes, "tensor_parallel", save(kind, tmp_path, num_key_value_heads=4))


@pytest.mark.slow
def test_tensor_parallel_of_a_tied_model(spawn: Spawn, tmp_path: Path) -> None:
    spawn(2, "tensor_parallel", save("llama", tmp_path, tie_word_embeddings=True))


def test_fsdp2_with_packed_shards_on_two_processes(spawn: Spawn, tmp_path: Path) -> None:
    spawn(2, "fsdp", save("llama", tmp_path))


@pytest.mark.parametrize(
    ("mode", "processes", "kind"),
    [
        ("fsdp", 4, "llama"),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in [("fsdp", 2, "mixtral"), ("fsdp", 4, "gpt_oss"), ("fsdp_adapters", 2, "llama"), ("fsdp_adapters", 4, "llama")]
        ),
    ],
)
def test_fsdp2(spawn: Spawn, mode: str, processes: int, kind: str, tmp_path: Path) -> None:
    spawn(processes, mode, save(kind, tmp_path))


@pytest.mark.parametrize(
    ("sizes", "kind"),
    [
        ("pp_size=2", "llama"),
        ("fsdp_size=2", "llama"),
        ("ep_size=2", "mixtral"),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in [("pp_size=4", "llama"), ("fsdp_size=4", "gpt_oss"), ("fsdp_size=4", "llama"), ("ep_size=4", "mixtral")]
        ),
    ],
)
def test_split_by_from_pretrained(spawn: Spawn, sizes: str, kind: str, tmp_path: Path) -> None:
    processes = int(sizes[-1])
    spawn(processes, sizes, save(kind, tmp_path, num_hidden_layers=processes if "pp" in sizes else 1, num_key_value_heads=4))


@pytest.mark.parametrize(
    ("sizes", "kind"),
    [
        ("tp_size=2", "llama"),
        ("ep_size=2", "mixtral"),
        ("pp_size=2", "llama"),
        pytest.param("tp_size=4", "mixtral", marks=pytest.mark.slow),
        pytest.param("pp_size=4", "mixtral", marks=pytest.mark.slow),
    ],
)
def test_quantizing_while_loading_in_several_processes(spawn: Spawn, sizes: str, kind: str, tmp_path: Path) -> None:
    processes = int(sizes[-1])
    layers = processes if "pp" in sizes else 1
    plain = save(kind, tmp_path, quantize=False, num_hidden_layers=layers, num_key_value_heads=4)
    spawn(processes, f"quantizing, {sizes}", plain)


@pytest.mark.parametrize(
    ("mode", "processes"),
    [("data_parallel", 2), pytest.param("trainer", 2, marks=pytest.mark.slow), pytest.param("data_parallel", 4, marks=pytest.mark.slow)],
)
def test_data_parallel(spawn: Spawn, mode: str, processes: int, tmp_path: Path) -> None:
    spawn(processes, mode, save("llama", tmp_path))


def test_what_cannot_be_split_is_said(spawn: Spawn, tmp_path: Path) -> None:
    spawn(3, "refused", save("llama", tmp_path))


@pytest.mark.parametrize("processes", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_dtensor(spawn: Spawn, processes: int, tmp_path: Path) -> None:
    spawn(processes, "dtensor", tmp_path)


@pytest.mark.parametrize("name", ["iq2_kl", "iq4_ks", "iq4_k", "q6_k", "q8_0"])
def test_parts_of_blocks_are_parts_of_the_weights(name: str) -> None:
    torch.manual_seed(0)
    fmt = get_format(name)
    k = 2 * fmt.block_size
    for shape in ((8, k), (3, 8, k)):
        whole = iqtorch.quantize(torch.randn(shape), name)
        plain, blocks = whole.dequantize(), whole.to_blocks()
        for dim, groups in ((len(shape) - 1, 1), (len(shape) - 2, 1), (len(shape) - 2, 2)):
            for rank in range(2):
                part = IQTensor.from_blocks(split_blocks(blocks, fmt, dim, 2, rank, groups).contiguous(), fmt, plain.dtype)
                want = torch.cat([g.chunk(2, dim)[rank] for g in plain.chunk(groups, dim)], dim)
                assert torch.equal(part.dequantize(), want)
            parts = [split_blocks(blocks, fmt, dim, 2, rank, groups) for rank in range(2)]
            assert torch.equal(join_blocks(parts, fmt, dim, groups), blocks)
    with pytest.raises(ShapeError, match=f"rows of {k} weights.*3 processes"):
        split_blocks(blocks, fmt, 2, 3, 0)
    with pytest.raises(ShapeError, match="8 rows cannot be split over 3"):
        split_blocks(blocks, fmt, 1, 3, 0)
