"""Importing, loading a packed checkpoint, and the way to the first token, beside what the same machine needs to read the same bytes.

    python benchmarks/loading.py --csv benchmarks/results/loading.csv

Every figure is of a process of its own (so that memory is fresh), the kinds take turns, and medians are given:

import      `import iqtorch` after `import torch`
map         safetensors opens the file: no byte is read
read        safetensors, and every tensor copied into ordinary memory: what loading costs where nothing is computed
read huge   the same into huge pages, in which packed weights lie because products then read them faster; where a virtual machine gets
            its memory from the host on first touch, they are the more expensive ones to get
load        `from_pretrained` of the packed checkpoint
first       the first forward pass of one token after it, less one in the same process later: packing, which loading puts off

The checkpoint is a Llama of random weights, in one file, in the page cache."""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import results_file

COLUMNS = ("what", "median_s", "least_s", "most_s", "over_read", "over_read_huge")

IMPORT = """
import time, torch
start = time.perf_counter()
import iqtorch
print(time.perf_counter() - start)
"""

MAP = """
import sys, time, torch
from safetensors import safe_open
start = time.perf_counter()
with safe_open(sys.argv[1], "pt") as file:
    tensors = {name: file.get_tensor(name) for name in file.keys()}
print(time.perf_counter() - start)
"""

READ_HUGE = MAP.replace("file.get_tensor(name)", "cpu_ext.copy(file.get_tensor(name))").replace(
    "torch\n", "torch\nfrom iqtorch import cpu_ext\n", 1
)
READ = MAP.replace("file.get_tensor(name)", "file.get_tensor(name).clone()")

LOAD = """
import os, sys, time, torch, transformers, iqtorch
from transformers import LlamaForCausalLM
transformers.utils.logging.disable_progress_bar()
torch.set_num_threads(int(sys.argv[2]))
LlamaForCausalLM(transformers.LlamaConfig(hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=1, vocab_size=8))
start = time.perf_counter()
model = LlamaForCausalLM.from_pretrained(os.path.dirname(sys.argv[1]))
loaded = time.perf_counter() - start
ids = torch.tensor([[1]])
with torch.no_grad():
    start = time.perf_counter()
    model(ids)
    first = time.perf_counter() - start
    later = []
    for _ in range(3):
        start = time.perf_counter()
        model(ids)
        later.append(time.perf_counter() - start)
print(loaded, first - min(later), min(later))
"""


def save_model(folder: Path, fmt: str, layers: int) -> Path:
    """A packed Llama of `layers` layers of a 2B model's shape; every row is one of 64 that were quantized."""
    import torch
    import transformers

    import iqtorch
    from iqtorch.hf import adopt
    from iqtorch.linear import set_weight

    config = transformers.LlamaConfig(
        hidden_size=2048, intermediate_size=8192, num_hidden_layers=layers, num_attention_heads=32, num_key_value_heads=8, vocab_size=32000,
        max_position_embeddings=4096, dtype="bfloat16",
    )  # fmt: skip
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config).to(torch.bfloat16)
    rows: dict[int, torch.Tensor] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is None:
                continue
            if parameter.dim() < 2:
                module._parameters[name] = torch.nn.Parameter(torch.ones(parameter.shape, dtype=parameter.dtype))
                continue
            n, k = parameter.shape
            if k not in rows:
                rows[k] = iqtorch.quantize(torch.randn(64, k) / k**0.5, fmt, speed="fast").to_blocks()
            set_weight(module, name, iqtorch.IQTensor.from_blocks(rows[k].repeat(n // 64, 1), fmt))
    adopt(model, iqtorch.Recipe.pure(fmt))
    model.save_pretrained(folder)
    return folder / "model.safetensors"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--format", default="iq4_ks")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--checkpoint", type=Path, help="where the checkpoint is kept and found again (default: a temporary folder)")
    parser.add_argument("--csv", type=Path, help="file to write; a header of comment lines describes the machine")
    args = parser.parse_args()

    with tempfile.TemporaryDirectory() as folder:
        home = args.checkpoint or Path(folder)
        file = home / "model.safetensors"
        if not file.exists():
            save_model(home, args.format, args.layers)
        size = file.stat().st_size / 1e9
        entry = json.loads((home / "config.json").read_text())["num_hidden_layers"]
        header = [
            *results_file.machine(args.threads)[:2],
            f"threads: {args.threads}; clock: wall",
            f"checkpoint: {size:.3f} GB, {args.format}, {entry} layers, one file",
        ]
        print("\n".join(header))
        file.read_bytes()  # into the page cache
        times: dict[str, list[float]] = {}

        def run(code: str, *names: str) -> None:
            done = subprocess.run(
                [sys.executable, "-W", "ignore", "-c", code, str(file), str(args.threads)], capture_output=True, text=True, check=True
            )
            for name, value in zip(names, map(float, done.stdout.split())):
                times.setdefault(name, []).append(value)

        for _ in range(args.repeats):
            run(IMPORT, "import")
            run(MAP, "map")
            run(READ, "read")
            run(READ_HUGE, "read huge")
            run(LOAD, "load", "first", "later pass")
    times["load + first"] = [sum(pair) for pair in zip(times["load"], times["first"])]
    medians = {name: statistics.median(all_) for name, all_ in times.items()}
    rows = [
        (
            name,
            *(
                round(value, 4)
                for value in (median, min(times[name]), max(times[name]), median / medians["read"], median / medians["read huge"])
            ),
        )
        for name, median in medians.items()
    ]
    results_file.report(args.csv, header, COLUMNS, rows)


if __name__ == "__main__":
    main()
