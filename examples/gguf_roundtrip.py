"""From a Hugging Face model to a GGUF file that ik_llama.cpp runs, and back, without changing a bit.

    python examples/gguf_roundtrip.py [FOLDER]

Without an argument it uses the small model inside the package.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import iqtorch
from iqtorch import data
from iqtorch.gguf import GGUFFile, load_tokenizer


def main(source: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(source)
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16)

    # Which columns matter: the mean squared input of every weight on some text.
    tokens = tokenizer(data.calibration_text(), return_tensors="pt", verbose=False).input_ids[0]
    importance = iqtorch.collect_importance(model, tokens[: 16 * 256].view(16, 1, 256), datasets=["calibration.txt"])

    iqtorch.quantize_model(model, "iq2_kl", importance=importance)

    with tempfile.TemporaryDirectory() as folder:
        importance.save(Path(folder) / "imatrix.dat")  # for ik_llama.cpp's own llama-quantize
        path = Path(folder) / "model-iq2_kl.gguf"
        iqtorch.save_gguf(model, path, tokenizer)

        file = GGUFFile(path)
        kinds = sorted({info.type_name for info in file.tensors.values()})
        print(f"{path.name}: {path.stat().st_size / 2**20:.2f} MiB, {len(file.tensors)} tensors of types {', '.join(kinds)}")

        again = iqtorch.load_gguf(path)
        tokenizer = load_tokenizer(path)

    prompt = tokenizer("The old man looked at", return_tensors="pt")
    with torch.no_grad():
        same = torch.equal(model(**prompt).logits, again(**prompt).logits)
    print(f"same logits after the round trip: {same}")
    print(tokenizer.decode(again.generate(**prompt, max_new_tokens=20, do_sample=False)[0]))


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else str(data.TINY_LLAMA))
