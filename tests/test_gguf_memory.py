"""Loading a file of more than a gigabyte: packed weights, and little else in memory."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from iqtorch.formats import get_format
from iqtorch.gguf import TensorSource, write_gguf
from iqtorch.gguf.families import family_of_config, metadata_from_config

transformers = pytest.importorskip("transformers")

#: A process of its own, because the peak of a process never falls.
LOAD = """
import json, sys, time
import gguf, torch, transformers.models.llama.modeling_llama
import iqtorch

def status(key):
    return next(int(line.split()[1]) << 10 for line in open("/proc/self/status") if line.startswith(key))

before = status("VmRSS")
start = time.perf_counter()
model = iqtorch.load_gguf(sys.argv[1])
seconds = time.perf_counter() - start
packed = sum(p.packed.nbytes if isinstance(p, iqtorch.IQTensor) else p.nbytes for p in model.parameters())
print(json.dumps({"before": before, "peak": status("VmHWM"), "packed": packed, "seconds": seconds}))
"""


def write_big(path: Path) -> int:
    """A Llama of 3.5 G weights in iq2_kl, random bytes, made one tensor at a time; returns the size of the file."""
    fmt = get_format("iq2_kl")
    config = transformers.LlamaConfig(
        vocab_size=32000, hidden_size=4096, intermediate_size=14336, num_hidden_layers=15, num_attention_heads=32, num_key_value_heads=8
    )
    generator = torch.Generator().manual_seed(0)

    def matrix(name: str, rows: int, k: int) -> TensorSource:
        made = (rows, fmt.row_bytes(k))
        return TensorSource(name, (rows, k), fmt, lambda: torch.randint(0, 256, made, dtype=torch.uint8, generator=generator))

    sources = [matrix("token_embd.weight", 32000, 4096), matrix("output.weight", 32000, 4096)]
    sources.append(TensorSource.of("output_norm.weight", torch.ones(4096)))
    shapes = {
        "attn_q": (4096, 4096), "attn_k": (1024, 4096), "attn_v": (1024, 4096), "attn_output": (4096, 4096),
        "ffn_gate": (14336, 4096), "ffn_up": (14336, 4096), "ffn_down": (4096, 14336),
    }  # fmt: skip
    for layer in range(15):
        sources += [matrix(f"blk.{layer}.{name}.weight", *shape) for name, shape in shapes.items()]
        sources += [TensorSource.of(f"blk.{layer}.{name}.weight", torch.ones(4096)) for name in ("attn_norm", "ffn_norm")]
    write_gguf(path, {"general.architecture": "llama", **metadata_from_config(family_of_config(config), config)}, sources)
    return path.stat().st_size


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak of a process from /proc")
def test_memory_while_loading(tmp_path: Path) -> None:
    size = write_big(tmp_path / "big.gguf")
    assert size > 1 << 30
    done = subprocess.run([sys.executable, "-c", LOAD, str(tmp_path / "big.gguf")], capture_output=True, text=True, check=True)
    found = json.loads(done.stdout.splitlines()[-1])
    print(found)
    assert found["packed"] < 1.03 * size
    # beyond the libraries (some 450 MiB): the packed weights, the largest tensor as it lies in the file, parts of huge pages
    assert found["peak"] - found["before"] - found["packed"] < 250 << 20
