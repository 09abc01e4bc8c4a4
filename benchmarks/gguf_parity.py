"""Perplexity of the embedded model in every format: by iqtorch, and by ik_llama.cpp from the GGUF file that iqtorch wrote.

    python benchmarks/gguf_parity.py /path/to/llama-perplexity > benchmarks/results/gguf_parity.csv

Each format is used for all matrices. iqtorch loads the model back from the file and scores it in three ways:

    kernels     its own kernels, which round activations to 8 bits (a scale per 32) or bfloat16 where that is faster
    float32     the decoded weights in float32
    rounded     the decoded weights in float32, activations rounded to 8 bits with one scale per 32 or 256, as the other program does

The last says whether the weights mean the same to both programs; the others include the effect of the other program's rounding.
A line per format, and a summary on stderr.
"""

from __future__ import annotations

import argparse
import csv
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import iqtorch
from iqtorch import IQTensor, data, evaluate, hf
from iqtorch.gguf import load_gguf, save_gguf

WAYS = ("kernels", "float32", "rounded")
FIELDS = ("format", "bpw", "tokens", "ik_llama.cpp", *(f"{what}_{way}" for way in WAYS for what in ("iqtorch", "difference")))
#: Formats of 256-weight blocks whose activations it rounds in blocks of 32 (ggml.c, `vec_dot_type`, with AVX2); others: their block.
BLOCKS_OF_32 = ("q4_k", "q5_k", "q6_k", "iq5_k", "iq1_kt", "iq2_kt", "iq3_kt", "iq4_kt")


def reference(program: str, file: Path, text: Path) -> float:
    """Perplexity by the other program: windows of 512, the second halves scored, no token replaced."""
    command = [program, "-m", str(file), "-f", str(text), "-c", "512", "-b", "512", "-t", "1", "-fa", "off"]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    found = re.search(r"PPL over \d+ chunks for n_ctx=512 = ([0-9.]+)", run.stdout + run.stderr)
    if found is None:
        raise RuntimeError(f"no perplexity in the output of {' '.join(command)}:\n{(run.stdout + run.stderr)[-2000:]}")
    return float(found[1])


def decode(model: nn.Module) -> nn.Module:
    """The same model with its weights decoded."""
    decoded: dict[int, nn.Parameter] = {}
    for module in model.modules():
        parameters: dict[str, Any] = module._parameters
        for name, value in list(parameters.items()):
            if isinstance(value, IQTensor):
                parameters[name] = decoded.setdefault(id(value), nn.Parameter(value.dequantize(), requires_grad=False))
    return model


def round_activations(model: nn.Module, block: int) -> None:
    """Rounds the inputs of all linear layers to 8 bits, with one scale per `block` values."""

    def hook(_: nn.Module, args: tuple[Tensor, ...]) -> Tensor:
        x = args[0].reshape(-1, block)
        d = x.abs().amax(1, keepdim=True).clamp(min=1e-30) / 127
        return ((x / d).round() * d).view(args[0].shape)

    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.register_forward_pre_hook(hook)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("program", help="llama-perplexity of ik_llama.cpp")
    parser.add_argument("--formats", nargs="*", default=[f for f in iqtorch.list_formats() if iqtorch.get_format(f).plain is None])
    parser.add_argument("--characters", type=int, default=None, help="only the beginning of the text")
    args = parser.parse_args()
    text = data.heldout_text()[: args.characters]
    writer = csv.DictWriter(sys.stdout, FIELDS, lineterminator="\n")
    writer.writeheader()
    worst = dict.fromkeys(WAYS, ("", 0.0))
    with tempfile.TemporaryDirectory() as folder:
        file, source = Path(folder) / "model.gguf", Path(folder) / "text.txt"
        source.write_text(text, encoding="utf-8")
        for name in args.formats:
            fmt = iqtorch.get_format(name)
            model, tokenizer = data.load_tiny_llama()
            iqtorch.quantize_model(model, iqtorch.Recipe.pure(name), importance=str(data.TINY_LLAMA_IMPORTANCE), progress=False)
            save_gguf(model, file, tokenizer)
            ids = hf.encode(tokenizer, text)
            theirs = reference(args.program, file, source)
            row = {"format": name, "bpw": f"{fmt.bits_per_weight(256):.4f}", "ik_llama.cpp": f"{theirs:.4f}"}
            for way in WAYS:
                loaded = load_gguf(file, dtype=torch.float32)
                if way != "kernels":
                    decode(loaded)
                if way == "rounded":
                    round_activations(loaded, 32 if name in BLOCKS_OF_32 else fmt.block_size)
                ours = evaluate.perplexity(loaded, ids, bos=None)
                difference = ours.perplexity / theirs - 1
                worst[way] = max(worst[way], (name, difference), key=lambda pair: abs(pair[1]))
                row |= {"tokens": str(ours.tokens), f"iqtorch_{way}": f"{ours.perplexity:.4f}", f"difference_{way}": f"{difference:.6f}"}
            writer.writerow(row)
            sys.stdout.flush()
    for way, (name, difference) in worst.items():
        print(f"{way}: largest difference {name} {100 * difference:.3f} %", file=sys.stderr)


if __name__ == "__main__":
    main()
