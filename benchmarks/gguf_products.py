"""Which program's products differ from the exact ones: of iqtorch or of ik_llama.cpp, on a real layer and its real activations.

    python benchmarks/gguf_products.py /path/to/ik_llama.cpp/build > benchmarks/results/gguf_products.csv

A matrix of the embedded model in every format, the activations that held-out text gives it, and the float64 product of the decoded
weights. Errors are relative RMS (|y - exact| / |exact|); "slope" is <y, exact> / <exact, exact> - 1: what rounding does on average.
"""

from __future__ import annotations

import argparse
import csv
import sys
from pathlib import Path
from typing import Any

import ik_ggml
import results_file
import torch
from torch import Tensor
from torch.nn import functional as F

import iqtorch
from iqtorch import data, hf

LAYER = "model.layers.3.mlp.down_proj"
ROWS = (1, 8, 512)
WAYS = ("int8", "float", "ik_llama.cpp")


def activations() -> tuple[Tensor, Tensor]:
    """The layer's weight `[N, K]`, and its inputs `[512, K]` for the first window of the held-out text."""
    model, tokenizer = data.load_tiny_llama()
    layer: Any = model.get_submodule(LAYER)
    found: list[Tensor] = []
    handle = layer.register_forward_pre_hook(lambda _, args: found.append(args[0]))
    with torch.no_grad():
        model(hf.encode(tokenizer, data.heldout_text())[:512][None])
    handle.remove()
    return layer.weight.detach().float(), found[0][0].float()


def products(way: str, weight: iqtorch.IQTensor, x: Tensor, library: ik_ggml.Library) -> Tensor:
    if way in ("int8", "float"):
        iqtorch.set_activation_precision(way)
        return F.linear(x, weight)
    matrices = ik_ggml.Matrices(library, weight.to_blocks(), weight.format.ggml_type, weight.shape[-1], 1)
    multiplied = ik_ggml.Products(matrices, x)
    multiplied.run(0)
    y = multiplied.result(0)
    multiplied.close()
    matrices.close()
    return y


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("ik", type=Path, help="build directory of ik_llama.cpp, with shared libraries")
    parser.add_argument("--formats", nargs="*", default=[f for f in iqtorch.list_formats() if iqtorch.get_format(f).plain is None])
    args = parser.parse_args()
    torch.set_num_threads(1)
    library = ik_ggml.Library(args.ik, threads=1)
    print(*(f"# {line}" for line in results_file.machine(1)), sep="\n")
    print(f"# {LAYER} of the embedded model, activations of held-out text; ik_llama.cpp commit 8337e4c")
    writer = csv.writer(sys.stdout, lineterminator="\n")
    writer.writerow(["format", "rows", *(f"{what}_{way}" for way in WAYS for what in ("error", "slope"))])
    matrix, x = activations()
    for name in args.formats:
        weight = iqtorch.quantize(matrix, name)
        decoded = weight.dequantize(torch.float64)
        for rows in ROWS:
            exact = F.linear(x[:rows].double(), decoded)
            row: list[str] = [name, str(rows)]
            for way in WAYS:
                y = products(way, weight, x[:rows], library).double()
                row += [f"{(y - exact).norm() / exact.norm():.2e}", f"{(y * exact).sum() / exact.square().sum() - 1:+.2e}"]
            writer.writerow(row)
            sys.stdout.flush()


if __name__ == "__main__":
    main()
