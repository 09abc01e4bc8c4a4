"""Do files of every family compute the same in ik_llama.cpp? Small random models, token by token.

    python benchmarks/gguf_families.py /path/to/llama-perplexity > benchmarks/results/gguf_families.csv

Each model of `tests/gguf_models.py` (its norms, biases and routers random too) is written as a file of float32 weights with a tokenizer.
The other program reads it, cuts a text into tokens and saves the distribution it gives for each next token
(`--kl-divergence-base`); iqtorch reads the same file and gives its own. A line per model: whether the tokens are the same, both
perplexities, the KL divergence between the two (where two experts are as good as equal, rounding decides, and a few tokens differ: hence
median and mean), and how often the first choice is the same. What rounds there: keys and values are kept in float16, and the file of
distributions has 16 bits per logarithm.
"""

from __future__ import annotations

import argparse
import csv
import math
import os
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import results_file
import torch
from torch import Tensor

from iqtorch import IQTensor, data, quantize, set_activation_precision
from iqtorch.gguf import GGUFFile, load_gguf, load_tokenizer, save_gguf
from iqtorch.linear import set_weight
from iqtorch.mla import SplitKV

sys.path.append(str(Path(__file__).parents[1] / "tests"))
from gguf_models import MODELS, byte_level, sentencepiece, tiny

WINDOW, VOCABULARY, CHARACTERS = 128, 1024, 6000
FIELDS = (
    "family", "tokens", "same tokens", "ik_llama.cpp perplexity", "iqtorch perplexity", "median KL", "mean KL", "same first choice",
)  # fmt: skip
#: Files whose `attn_kv_b` is in two halves, packed: of the real models' sizes, which the other program demands.
HALVES = "deepseek-v3, halves in q8_0"
_ONE_GROUP = {"n_group": 1, "topk_group": 1}
#: Sizes that the other program takes for given. It reads no groups of experts.
SETTINGS: dict[str, dict[str, Any]] = {
    "gemma2": {"num_hidden_layers": 26},
    # with heads of 16 its flash attention is off by 1e-3
    "gemma4": {"vocab_size_per_layer_input": VOCABULARY, "head_dim": 64, "global_head_dim": 128},
    "gemma4-moe": {"head_dim": 64, "global_head_dim": 128},
    "deepseek-v2": {"num_hidden_layers": 27, **_ONE_GROUP},  # only then queries may be without a latent
    "deepseek-v3": _ONE_GROUP,
    "deepseek-yarn": _ONE_GROUP,
    HALVES: {
        "kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128, "num_hidden_layers": 2, **_ONE_GROUP,
    },
    "glm4": {"head_dim": 16},
    "dots1": {"num_key_value_heads": 4},
    "cohere2": {"head_dim": 16},
    # its product of linear attention wants heads of 64 or 128
    **{name: {"linear_key_head_dim": 64, "linear_value_head_dim": 64} for name in MODELS if name.startswith(("qwen3.5", "qwen3-next"))},
}  # fmt: skip
OPTIONS = {
    "deepseek-v2": "-mla 0",  # with its other kinds of attention it ends with a segmentation fault
    # without, it attends to values that are in the wrong order
    "gemma4": "-fa on",
    "gemma4-moe": "-fa on",
}


def split_heads(model: Any) -> None:
    """Packs MLA's `kv_b_proj` in two halves, as newer files have them."""
    for layer in model.model.layers:
        attention = layer.self_attn
        whole = attention.kv_b_proj
        split = SplitKV(whole, attention.num_heads, attention.qk_nope_head_dim)
        k, v = whole.weight.unflatten(0, (attention.num_heads, -1)).split([attention.qk_nope_head_dim, attention.v_head_dim], 1)
        keys = quantize(k.mT.contiguous(), "q8_0").to_blocks()
        set_weight(split.k_b_proj, "weight", IQTensor.from_blocks(keys, "q8_0", torch.float32, transposed=True))
        set_weight(split.v_b_proj, "weight", quantize(v.flatten(0, 1), "q8_0"))
        attention.kv_b_proj = split


def distributions(program: str, file: Path, text: Path, target: Path, options: str) -> str | None:
    """Has the other program write its distributions; None, or the end of what it said when it failed."""
    command = f"{program} -m {file} -f {text} -c {WINDOW} -b {WINDOW} -t 1 -fa off {options} --kl-divergence-base {target}"
    run = subprocess.run(shlex.split(command), capture_output=True, check=False, cwd=target.parent)
    return None if run.returncode == 0 else " ".join((run.stdout + run.stderr).decode(errors="replace").split())[-300:]


def parse(path: Path) -> tuple[Tensor, Tensor]:
    """Tokens `[windows, WINDOW]`, and logarithms of the probabilities `[windows, scored, VOCABULARY]`, of the second halves."""
    raw = path.read_bytes()
    if raw[:8] != b"_logits_":
        raise ValueError(f"{path} is no file of distributions")
    window, vocabulary, windows = np.frombuffer(raw, "<u4", 3, 8).tolist()
    tokens = np.frombuffer(raw, "<i4", windows * window, 20)
    row = 2 * (vocabulary // 2 * 2 + vocabulary % 2 + 4)
    scored = window - 1 - window // 2
    rows = np.frombuffer(raw, np.uint8, offset=20 + tokens.nbytes).reshape(windows, scored, row)
    scale, least = np.ascontiguousarray(rows[..., :8]).view("<f4").transpose(2, 0, 1)
    codes = np.ascontiguousarray(rows[..., 8 : 8 + 2 * vocabulary]).view("<u2")
    logs = least[..., None].astype(np.float64) + scale[..., None] * codes
    return torch.from_numpy(tokens.reshape(windows, window).copy()).long(), torch.from_numpy(logs)


def compare(name: str, program: str, folder: Path) -> dict[str, Any]:
    """One line of the result."""
    settings = {"vocab_size": VOCABULARY, "max_position_embeddings": 2 * WINDOW, **SETTINGS.get(name, {})}
    model: Any = tiny(name.partition(",")[0], torch.float32, **settings)
    for layer in model.modules():  # scores of some size, so that a wrong position shows
        if hasattr(layer, "q_proj") and isinstance(layer.q_proj, torch.nn.Linear):
            layer.q_proj.weight.data *= 2
    if name == HALVES:
        split_heads(model)
    tokenizer = sentencepiece() if len(name) % 2 else byte_level("llama-bpe")
    file, text, target = folder / "model.gguf", folder / "text.txt", folder / "distributions.bin"
    text.write_text(data.heldout_text()[:CHARACTERS], encoding="utf-8")
    save_gguf(model, file, tokenizer)
    line: dict[str, Any] = {"family": name}
    if (failure := distributions(program, file, text, target, OPTIONS.get(name, ""))) is not None:
        print(f"{name}: {failure}", file=sys.stderr)
        return line | {"ik_llama.cpp perplexity": "does not load it"}
    tokens, theirs = parse(target)
    ours_model: Any = load_gguf(file, dtype=torch.float32)
    own = load_tokenizer(file)(text.read_text(encoding="utf-8")).input_ids[: tokens.numel()]
    same = own == tokens.flatten().tolist()
    if GGUFFile(file).metadata["tokenizer.ggml.add_bos_token"]:
        tokens[:, 0] = tokenizer.bos_token_id  # which it does before each window
    with torch.no_grad():
        ours = ours_model(tokens).logits[:, WINDOW // 2 : -1].double().log_softmax(-1)
    targets = tokens[:, WINDOW // 2 + 1 :, None]
    ours_ppl, theirs_ppl = (math.exp(-logs.gather(-1, targets).mean()) for logs in (ours, theirs))
    kl = (theirs.exp() * (theirs - ours)).sum(-1)
    return line | {
        "tokens": targets.numel(), "same tokens": same, "ik_llama.cpp perplexity": f"{theirs_ppl:.3f}",
        "iqtorch perplexity": f"{ours_ppl:.3f}", "median KL": f"{kl.median():.1e}", "mean KL": f"{kl.mean():.1e}",
        "same first choice": f"{(ours.argmax(-1) == theirs.argmax(-1)).double().mean():.4f}",
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("perplexity", type=os.path.abspath, help="llama-perplexity of ik_llama.cpp")
    parser.add_argument("families", nargs="*", default=[*MODELS, HALVES])
    args = parser.parse_args()
    torch.set_num_threads(1)
    set_activation_precision("float")
    print(*(f"# {line}" for line in results_file.machine(1)), sep="\n")
    writer = csv.DictWriter(sys.stdout, FIELDS, lineterminator="\n")
    writer.writeheader()
    for name in args.families:
        with tempfile.TemporaryDirectory() as folder:
            writer.writerow(compare(name, args.perplexity, Path(folder)))
        sys.stdout.flush()


if __name__ == "__main__":
    main()
