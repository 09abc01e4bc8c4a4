"""The command that talks: chat."""

from __future__ import annotations

import time
from typing import Annotated, Any

import torch
import typer

from .options import AsJson, Device, Model, Quantization, command, err, open_model, print_json, shared


@command(
    "iqtorch chat ./packed",
    "iqtorch chat my-model.gguf --prompt 'Why is the sky blue?'",
    "iqtorch chat tiny-llama --prompt 'The old man looked at' --format iq2_kl",
)
@shared(how=Quantization)
def chat(
    model: Model,
    how: Quantization,
    prompt: Annotated[
        str | None, typer.Option("--prompt", "-p", help="One message; without it you are asked for one after the other.")
    ] = None,
    tokens: Annotated[int, typer.Option(help="Most tokens of an answer.", min=1)] = 256,
    device: Device = "cpu",
    as_json: AsJson = False,
) -> None:
    """Talk to a model, or let a base model go on with a text; with --format, after quantizing it in memory."""
    if as_json and prompt is None:
        raise typer.BadParameter("give --prompt", param_hint="--json")
    loaded, tokenizer = open_model(model)
    if how.wanted:
        how.apply(loaded, model)
    loaded.to(device)
    said: list[dict[str, str]] = []
    while text := prompt if prompt is not None else _asked():
        said.append({"role": "user", "content": text})
        answer, made, seconds = _answer(loaded, tokenizer, said, tokens, shown=not as_json)
        said.append({"role": "assistant", "content": answer})
        if as_json:
            return print_json({"prompt": text, "text": answer, "tokens": made, "seconds": seconds})
        err.print(f"{made} tokens, {made / seconds:.1f} per second", style="dim", highlight=False)
        if prompt is not None:
            return


def _asked() -> str:
    """A line of standard input; empty at its end."""
    try:
        return input("> ")
    except EOFError:
        return ""


@torch.inference_mode()
def _answer(model: Any, tokenizer: Any, said: list[dict[str, str]], tokens: int, shown: bool) -> tuple[str, int, float]:
    """The model's next message, its tokens, and the seconds that it took, the prompt included."""
    from ..hf import transformers

    if tokenizer.chat_template:
        inputs = tokenizer.apply_chat_template(said, add_generation_prompt=True, return_dict=True, return_tensors="pt")
    else:
        inputs = tokenizer(" ".join(message["content"] for message in said), return_tensors="pt")
    streamer = transformers().TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True) if shown else None
    start = time.perf_counter()
    out = model.generate(**inputs.to(model.device), max_new_tokens=tokens, streamer=streamer)
    new = out[0, inputs["input_ids"].shape[1] :]
    return str(tokenizer.decode(new, skip_special_tokens=True)), len(new), time.perf_counter() - start
