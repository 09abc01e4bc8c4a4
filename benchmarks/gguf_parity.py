"""Perplexity of the embedded model in every format: by iqtorch, and by ik_llama.cpp from the GGUF file that iqtorch wrote.

    python benchmarks/gguf_parity.py /path/to/llama-perplexity > benchmarks/results/gguf_parity.csv

Each format is used for all matrices. iqtorch runs the model it loaded back from the file, with floating-point activations; the
other program rounds activations to 8 bits, so the two differ by that noise. A line per format, and a summary on stderr.
"""

from __future__ import annotations

import argparse
import csv
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

import iqtorch
from iqtorch import data, evaluate, hf
from iqtorch.gguf import load_gguf, save_gguf

FIELDS = ("format", "bpw", "tokens", "iqtorch", "ik_llama.cpp", "difference")


def reference(program: str, file: Path, text: Path) -> float:
    """Perplexity by the other program: windows of 512, the second halves scored, no token replaced."""
    command = [program, "-m", str(file), "-f", str(text), "-c", "512", "-b", "512", "-t", "1", "-fa", "off"]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    found = re.search(r"PPL over \d+ chunks for n_ctx=512 = ([0-9.]+)", run.stdout + run.stderr)
    if found is None:
        raise RuntimeError(f"no perplexity in the output of {' '.join(command)}:\n{(run.stdout + run.stderr)[-2000:]}")
    return float(found[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("program", help="llama-perplexity of ik_llama.cpp")
    parser.add_argument("--formats", nargs="*", default=[f for f in iqtorch.list_formats() if iqtorch.get_format(f).plain is None])
    parser.add_argument("--characters", type=int, default=None, help="only the beginning of the text")
    args = parser.parse_args()
    iqtorch.set_activation_precision("float")
    text = data.heldout_text()[: args.characters]
    writer = csv.DictWriter(sys.stdout, FIELDS, lineterminator="\n")
    writer.writeheader()
    worst = ("", 0.0)
    with tempfile.TemporaryDirectory() as folder:
        file, source = Path(folder) / "model.gguf", Path(folder) / "text.txt"
        source.write_text(text, encoding="utf-8")
        for name in args.formats:
            model, tokenizer = data.load_tiny_llama()
            iqtorch.quantize_model(model, iqtorch.Recipe.pure(name), importance=data.TINY_LLAMA_IMPORTANCE, progress=False)
            save_gguf(model, file, tokenizer)
            ours = evaluate.perplexity(load_gguf(file, dtype=torch.float32), hf.encode(tokenizer, text), bos=None)
            theirs = reference(args.program, file, source)
            difference = ours.perplexity / theirs - 1
            worst = max(worst, (name, difference), key=lambda pair: abs(pair[1]))
            values = (
                name,
                f"{iqtorch.get_format(name).bits_per_weight(256):.4f}",
                ours.tokens,
                f"{ours.perplexity:.4f}",
                theirs,
                f"{difference:.6f}",
            )
            writer.writerow(dict(zip(FIELDS, values, strict=True)))
            sys.stdout.flush()
    print(f"largest difference: {worst[0]} {100 * worst[1]:.3f} %", file=sys.stderr)


if __name__ == "__main__":
    main()
