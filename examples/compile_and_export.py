"""Compile a packed model: fast generation with a static cache, torch.export, and a package that runs without Python.

python examples/compile_and_export.py
python examples/compile_and_export.py --aot      # also with AOTInductor (needs a C++ compiler, about a minute)
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

import iqtorch
from iqtorch.data import TINY_LLAMA


class Logits(nn.Module):
    """Ids `[1, T]` to logits `[1, T, vocabulary]`, without a cache: what is exported."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor) -> Tensor:
        return self.model(ids, use_cache=False).logits


def generate(model: Any, ids: Tensor) -> tuple[Tensor, float]:
    start = time.perf_counter()
    tokens = model.generate(ids, max_new_tokens=24, min_new_tokens=24, do_sample=False, cache_implementation="static", disable_compile=True)
    return tokens, 24 / (time.perf_counter() - start)


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(TINY_LLAMA), help="folder or hub name")
    parser.add_argument("--format", default="iq4_ks")
    parser.add_argument("--dtype", default="auto", help="of activations; float32 shows that compiled code computes the same")
    parser.add_argument("--backend", default="inductor", help="of torch.compile; aot_eager needs no compiler")
    parser.add_argument("--aot", action="store_true", help="also make a package with AOTInductor")
    arguments = parser.parse_args()

    model = AutoModelForCausalLM.from_pretrained(
        arguments.model, quantization_config=iqtorch.IQConfig(arguments.format), dtype=arguments.dtype
    ).eval()
    ids = AutoTokenizer.from_pretrained(arguments.model)("The old man looked at", return_tensors="pt").input_ids

    # A static cache has one shape for all tokens: two graphs are compiled, for the prompt and for every token after it.
    eager, speed = generate(model, ids)
    forward = model.forward
    model.forward = torch.compile(forward, fullgraph=True, backend=arguments.backend)
    generate(model, ids)  # compiles
    compiled, compiled_speed = generate(model, ids)
    model.forward = forward
    same = "the same" if torch.equal(eager, compiled) else "other"
    print(f"generate: {speed:.1f} tokens per second, compiled {compiled_speed:.1f}, {same} tokens")

    with tempfile.TemporaryDirectory() as folder:
        logits = Logits(model)
        length = torch.export.Dim("length", min=2, max=512)
        program = torch.export.export(logits, (ids,), dynamic_shapes=({1: length},))
        path = Path(folder) / "exported.pt2"
        torch.export.save(program, path)
        error = (torch.export.load(path).module()(ids) - logits(ids)).abs().max()
        print(f"torch.export: {path.stat().st_size / 2**20:.1f} MiB, largest difference {error:.2g}")
        if arguments.aot:
            package = torch._inductor.aoti_compile_and_package(program, package_path=f"{folder}/package.pt2")
            error = (torch._inductor.aoti_load_package(package)(ids) - logits(ids)).abs().max()
            print(f"AOTInductor: {Path(package).stat().st_size / 2**20:.1f} MiB, largest difference {error:.2g}")


if __name__ == "__main__":
    main()
