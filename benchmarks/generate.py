"""Generation and prompt speed of a Llama of a billion weights in transformers: packed, bfloat16, and ik_llama.cpp's own benchmark.

    python benchmarks/generate.py --format iq2_kl --csv benchmarks/results/generate.csv
    python benchmarks/generate.py --ik ~/ik_llama.cpp/build/bin/llama-bench --compile

The model has the shape of Llama 3.2 1B (16 layers, hidden size 2048, 8192 in the middle, 32 heads, 8 for keys and values) with a
vocabulary of 32000, and random weights: a few rows are quantized and repeated, because speed does not depend on values. All
programs run the same file (`iqtorch.save_gguf`) or the same bytes; the bfloat16 model is the same one, dequantized.
The prompt is processed once (512 tokens), and 32 tokens are generated after a prompt of 4; programs take turns in one run.
Figures are tokens per second, medians over turns. `outside_ms` is what a generated token takes beside its matrix products.
"""

from __future__ import annotations

import argparse
import copy
import functools
import json
import os
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import results_file
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

import iqtorch
from iqtorch.data import TINY_LLAMA
from iqtorch.hf import adopt
from iqtorch.linear import set_weight
from iqtorch.model import plan_formats

PROMPT, SHORT, NEW = 512, 4, 32
COLUMNS = (
    "program",
    "recipe",
    "bpw",
    "threads",
    "prompt_tokens_per_s",
    "generated_tokens_per_s",
    "ms_per_token",
    "products_ms",
    "outside_ms",
)
#: What the documentation recommends (docs/huggingface.md).
COMPILE = {"cpp_wrapper": True, "guard_filter_fn": torch.compiler.skip_guard_on_all_nn_modules_unsafe}


def build(recipe: iqtorch.Recipe, layers: int) -> LlamaForCausalLM:
    """The packed model."""
    config = LlamaConfig(
        vocab_size=32000, hidden_size=2048, intermediate_size=8192, num_hidden_layers=layers, num_attention_heads=32,
        num_key_value_heads=8, head_dim=64, max_position_embeddings=4096, tie_word_embeddings=True, rope_theta=500000.0,
    )  # fmt: skip
    with torch.device("meta"):
        model = LlamaForCausalLM(config).to(torch.bfloat16).eval()
    choices, _ = plan_formats(model, recipe)
    model.to_empty(device="cpu")
    model.model.rotary_emb = type(model.model.rotary_emb)(config)
    blocks: dict[tuple[str, int], Tensor] = {}
    generator = torch.Generator().manual_seed(0)
    for site, choice in choices:
        rows, k = site.weight.shape
        if (choice.format, k) not in blocks:
            few = torch.randn(128, k, generator=generator) / k**0.5
            blocks[choice.format, k] = iqtorch.quantize(few, choice.format, speed="fast").to_blocks()
        weight = iqtorch.IQTensor.from_blocks(blocks[choice.format, k].repeat(rows // 128, 1), choice.format)
        set_weight(*site.places[0], weight)
        for module, attribute in site.places[1:]:
            set_weight(module, attribute, site.places[0][0]._parameters[attribute])  # type: ignore[arg-type]
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.data.fill_(1.0)
    adopt(model, recipe)
    return model


def dense(model: LlamaForCausalLM) -> LlamaForCausalLM:
    """The same model in bfloat16."""
    plain: Any = copy.deepcopy(model)
    return plain.dequantize(torch.bfloat16)


class Clock:
    """A streamer that notes when tokens come."""

    def __init__(self) -> None:
        self.times = [time.perf_counter()]

    def put(self, tokens: Tensor) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass


def seconds(model: LlamaForCausalLM, prompt: int, new: int, cache: str | None) -> tuple[float, float]:
    """Time to the first token, and the median time between the ones after it."""
    ids = torch.arange(prompt).remainder(1000)[None] + 5
    clock = Clock()
    how = {"cache_implementation": cache} if cache else {}
    model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=new,
        min_new_tokens=new,
        do_sample=False,
        streamer=clock,
        disable_compile=True,
        **how,
    )
    vars(model).pop("_previous_max_cache_length", None)  # else static caches only grow, and a long one makes every token slower
    start, _, first, *rest = clock.times  # the streamer gets the prompt first
    steps = [b - a for a, b in zip([first, *rest], rest)]
    return first - start, statistics.median(steps) if steps else float("nan")


def product_seconds(model: LlamaForCausalLM) -> float:
    """All matrix products of one token."""
    layers = [module for module in model.modules() if isinstance(module, nn.Linear)]
    inputs = {k: torch.randn(1, 1, k).bfloat16() for k in (2048, 8192)}
    start = time.perf_counter()
    for layer in layers:
        F.linear(inputs[layer.in_features], layer.weight)
    return time.perf_counter() - start


def compiled(model: LlamaForCausalLM, name: str) -> Callable[..., Any]:
    """A compiled forward. Its code object is its own: without guards on modules, models that share one would be taken for each other."""
    forward = model.forward

    @functools.wraps(forward)
    def run(*args: Any, **kwargs: Any) -> Any:
        return forward(*args, **kwargs)

    run.__code__ = run.__code__.replace(co_name=name.replace(", ", "_"))
    return torch.compile(run, fullgraph=True, dynamic=False, options=dict(COMPILE))


class Program:
    """A way to run the model; `turn` measures it once."""

    def __init__(self, name: str, model: LlamaForCausalLM, static: bool) -> None:
        self.name, self.model, self.cache = name, model, "static" if static else None
        self.forward: Callable[..., Any] = compiled(model, name) if static else model.forward
        self.prompt: list[float] = []
        self.step: list[float] = []
        self.products: list[float] = []

    def turn(self) -> None:
        eager, self.model.forward = self.model.forward, self.forward
        try:
            self.prompt.append(seconds(self.model, PROMPT, 1, self.cache)[0])
            self.step.append(seconds(self.model, SHORT, NEW, self.cache)[1])
        finally:
            self.model.forward = eager
        self.products.append(product_seconds(self.model))

    def row(self, recipe: str, bpw: float, threads: int) -> tuple[Any, ...]:
        prompt, step, products = (statistics.median(values[1:]) for values in (self.prompt, self.step, self.products))
        ms = [round(1e3 * value, 2) for value in (step, products, step - products)]
        return self.name, recipe, round(bpw, 3), threads, round(PROMPT / prompt, 1), round(1 / step, 2), *ms


def reference(program: Path, file: Path, threads: int) -> tuple[float, float]:
    """Tokens per second of prompt and generation, by llama-bench."""
    command = [program, "-m", file, "-p", PROMPT, "-n", NEW, "-t", threads, "-r", 1, "-o", "json"]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=True)
    rates = {bool(test["n_gen"]): test["avg_ts"] for test in json.loads(done.stdout[done.stdout.index("[") :])}
    return rates[False], rates[True]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--format", default="iq2_kl")
    parser.add_argument("--pure", action="store_true", help="this format everywhere, instead of the default recipe of its name")
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--turns", type=int, default=4)
    parser.add_argument("--compile", action="store_true", help="also compiled, with a static cache")
    parser.add_argument("--fuse", action="store_true", help="packed projections of the same activations in one call (iqtorch.fuse)")
    parser.add_argument("--no-dense", action="store_true", help="without the bfloat16 model")
    parser.add_argument("--ik", type=Path, help="llama-bench of a locally built ik_llama.cpp")
    parser.add_argument("--csv", type=Path, help="file to write; a header of comment lines describes the machine")
    args = parser.parse_args()

    torch.set_num_threads(args.threads)
    header = [
        *results_file.machine(args.threads)[:2],
        f"threads: {args.threads}; clock: wall; load average at start: {os.getloadavg()[0]:.1f}",
    ]
    print("\n".join(header), flush=True)
    recipe = (iqtorch.Recipe.pure if args.pure else iqtorch.Recipe.default)(args.format)
    name = args.format + (", pure" if args.pure else "") + (", fused" if args.fuse else "")
    with torch.inference_mode(), tempfile.TemporaryDirectory() as folder:
        model = build(recipe, args.layers)
        bpw = iqtorch.report(model).bits_per_weight
        file = Path(folder) / "model.gguf"
        if args.ik:
            iqtorch.save_gguf(model, file, AutoTokenizer.from_pretrained(TINY_LLAMA))
        if args.fuse:
            iqtorch.fuse(model)
        programs = [Program("iqtorch", model, False)] + ([Program("iqtorch, compiled", model, True)] if args.compile else [])
        if not args.no_dense:
            plain = dense(model)
            programs += [Program("bfloat16", plain, False)] + ([Program("bfloat16, compiled", plain, True)] if args.compile else [])
        ik = []
        for turn in range(args.turns + 1):  # the first warms up
            for program in programs:
                program.turn()
            if args.ik:
                ik.append(reference(args.ik, file, args.threads))
            last = "  ".join(f"{p.name} {PROMPT / p.prompt[-1]:.1f} {1 / p.step[-1]:.2f}" for p in programs)
            print(f"turn {turn}: {last}" + (f"  ik {ik[-1][0]:.1f} {ik[-1][1]:.2f}" if ik else ""), flush=True)
        rows = [p.row(name, 16.0 if "bfloat16" in p.name else bpw, args.threads) for p in programs]
        if ik:
            prompt, generated = (statistics.median(values) for values in zip(*ik[1:]))
            rows.append(
                (
                    "ik_llama.cpp",
                    name,
                    round(bpw, 3),
                    args.threads,
                    round(prompt, 1),
                    round(generated, 2),
                    round(1e3 / generated, 2),
                    "",
                    "",
                )
            )
    results_file.report(args.csv, header, COLUMNS, rows)


if __name__ == "__main__":
    main()
