"""Perplexity of the embedded model in every format: by iqtorch, and by ik_llama.cpp from the GGUF file that iqtorch wrote.

    python benchmarks/gguf_parity.py /path/to/llama-perplexity /path/to/llama-quantize > benchmarks/results/gguf_parity.csv

Each format is used for all matrices; with `--rounding theirs` the file is the other program's own. The two programs are compared in
four ways:

    decoded     both in float32: the other program decodes the file with its own `llama-quantize --allow-requantize IN OUT F32` and
                scores that; iqtorch scores the weights that `Format.decode` gives. Do the bytes mean the same weights to both?
    rounded     the other program's matrix kernels, and iqtorch's float32 with activations rounded to 8 bits in the same blocks (of 32
                or 256, one scale each), and with its one inconsistency: its matrix kernels multiply `iq2_kt` and `iq3_kt` by a factor
                that its lookup of embeddings lacks. Do its kernels use these weights too?
    kernels     the other program's matrix kernels, and iqtorch's own with their defaults: what a user of both sees. Includes the noise
                of either's rounding of activations.
    float       the other program in float32 (as in the first way), and iqtorch's own kernels that do not round activations. The two
                formats with a run-time factor differ here by that: a decoded file lacks it.

A line per format, and a summary on stderr.
"""

from __future__ import annotations

import argparse
import csv
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import results_file
import torch
from torch import Tensor, nn

import iqtorch
from iqtorch import IQTensor, data, evaluate, hf
from iqtorch.gguf import load_gguf, save_gguf

WAYS = ("decoded", "rounded", "kernels", "float")
FIELDS = ("format", "bpw", "tokens", *(f"{what}_{way}" for way in WAYS for what in ("iqtorch", "ik_llama.cpp", "difference")))
#: Formats of 256-weight blocks whose activations it rounds in blocks of 32 (ggml.c, `vec_dot_type`, with AVX2); others: their block.
BLOCKS_OF_32 = ("q4_k", "q5_k", "q6_k", "iq5_k", "iq1_kt", "iq2_kt", "iq3_kt", "iq4_kt")


def output_of(command: list[str]) -> str:
    run = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tempfile.gettempdir())  # it leaves a log there
    if run.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{(run.stdout + run.stderr)[-2000:]}")
    return run.stdout + run.stderr


def reference(program: str, file: Path, text: Path) -> float:
    """Perplexity by the other program: windows of 512, the second halves scored, no token replaced."""
    output = output_of([program, "-m", str(file), "-f", str(text), "-c", "512", "-b", "512", "-t", "1", "-fa", "off"])
    found = re.search(r"PPL over \d+ chunks for n_ctx=512 = ([0-9.]+)", output)
    if found is None:
        raise RuntimeError(f"no perplexity in the output of {program}:\n{output[-2000:]}")
    return float(found[1])


def quantize(model: nn.Module, tokenizer: Any, name: str, rounding: Any) -> None:
    recipe = iqtorch.Recipe.pure(name)
    if rounding == "nearest":
        iqtorch.quantize_model(model, recipe, importance=str(data.TINY_LLAMA_IMPORTANCE), progress=False)
        return
    ids = hf.encode(tokenizer, data.calibration_text())[: 48 * 512]
    iqtorch.quantize_model(model, recipe, calibration=ids.view(-1, 512).split(8), rounding=rounding, progress=False)


def decode(model: nn.Module, value_of: Callable[[IQTensor], Tensor]) -> nn.Module:
    """The same model with its weights decoded."""
    decoded: dict[int, nn.Parameter] = {}
    for module in model.modules():
        parameters: dict[str, Any] = module._parameters
        for name, value in list(parameters.items()):
            if isinstance(value, IQTensor):
                parameters[name] = decoded.setdefault(id(value), nn.Parameter(value_of(value), requires_grad=False))
    return model


def without_factor(weight: IQTensor) -> Tensor:
    """The weights as decoders give them: without the run-time factor of matrix products."""
    return weight.format.decode(weight.to_blocks(), tuple(weight.shape))


def as_loaded(way: str, file: Path, fmt: iqtorch.Format) -> nn.Module:
    """The model of a file, made to compute in one of the ways."""
    model = load_gguf(file, dtype=torch.float32)
    if way == "decoded":
        return decode(model, without_factor)
    if way == "rounded":
        decode(model, lambda weight: weight.dequantize())
        round_activations(model, 32 if fmt.name in BLOCKS_OF_32 else fmt.block_size)
        lookup: Any = model.get_input_embeddings()  # type: ignore[operator]
        lookup.weight = nn.Parameter(lookup.weight / fmt.runtime_scale, requires_grad=False)  # the tied output layer keeps its own
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
    parser.add_argument("perplexity", type=os.path.abspath, help="llama-perplexity of ik_llama.cpp")
    parser.add_argument("quantize", type=os.path.abspath, help="llama-quantize of ik_llama.cpp")
    parser.add_argument("--formats", nargs="*", default=[f for f in iqtorch.list_formats() if iqtorch.get_format(f).plain is None])
    parser.add_argument(
        "--rounding",
        choices=("nearest", "ldlq", "yaqa", "theirs"),
        default="nearest",
        help="by importance, calibrated, or by the other program",
    )
    parser.add_argument("--characters", type=int, default=None, help="only the beginning of the text")
    args = parser.parse_args()
    text = data.heldout_text()[: args.characters]
    print(*(f"# {line}" for line in results_file.machine(torch.get_num_threads())), sep="\n")
    writer = csv.DictWriter(sys.stdout, FIELDS, lineterminator="\n")
    writer.writeheader()
    found: dict[str, list[tuple[float, str]]] = {way: [] for way in WAYS}
    with tempfile.TemporaryDirectory() as folder:
        file, float_file, source = (Path(folder) / name for name in ("model.gguf", "float.gguf", "text.txt"))
        source.write_text(text, encoding="utf-8")
        for name in args.formats:
            fmt = iqtorch.get_format(name)
            model, tokenizer = data.load_tiny_llama()
            if args.rounding == "theirs":
                save_gguf(model, float_file, tokenizer)
                importance = ["--imatrix", str(data.TINY_LLAMA_IMPORTANCE)]
                output_of([args.quantize, "--pure", *importance, str(float_file), str(file), name.upper()])
            else:
                quantize(model, tokenizer, name, args.rounding)
                save_gguf(model, file, tokenizer)
            output_of([args.quantize, "--allow-requantize", str(file), str(float_file), "F32"])
            theirs = {"decoded": reference(args.perplexity, float_file, source), "kernels": reference(args.perplexity, file, source)}
            theirs |= {"rounded": theirs["kernels"], "float": theirs["decoded"]}
            ids = hf.encode(tokenizer, text)
            row = {"format": name, "bpw": f"{fmt.bits_per_weight(256):.4f}"}
            for way in WAYS:
                iqtorch.set_activation_precision("float" if way == "float" else "int8")
                ours = evaluate.perplexity(as_loaded(way, file, fmt), ids, bos=None)
                difference = ours.perplexity / theirs[way] - 1
                found[way].append((difference, name))
                row |= {
                    "tokens": str(ours.tokens), f"iqtorch_{way}": f"{ours.perplexity:.4f}", f"ik_llama.cpp_{way}": f"{theirs[way]:.4f}",
                    f"difference_{way}": f"{difference:.6f}",
                }  # fmt: skip
            writer.writerow(row)
            sys.stdout.flush()
    for way, differences in found.items():
        largest, name = max(differences, key=lambda pair: abs(pair[0]))
        mean = sum(abs(difference) for difference, _ in differences) / len(differences)
        close = sum(abs(difference) < 1e-3 for difference, _ in differences)
        print(
            f"{way}: mean {100 * mean:.3f} %, largest {name} {100 * largest:.3f} %, {close} of {len(differences)} formats within 0.1 %",
            file=sys.stderr,
        )


if __name__ == "__main__":
    main()
