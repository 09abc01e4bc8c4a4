"""Quantize a Hugging Face model while it loads, save it packed, and talk to it.

python examples/quantize_and_chat.py                                 # the small model inside iqtorch
python examples/quantize_and_chat.py --model Qwen/Qwen3-4B --format iq2_kl --save qwen3-iq2_kl
python examples/quantize_and_chat.py --model qwen3-iq2_kl            # loads packed; nothing is quantized again
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, TextStreamer

import iqtorch
from iqtorch.data import TINY_LLAMA


def load(path: str, recipe: str, importance: str | None) -> Any:
    """The model, quantized while it loads, or as it was saved if it is packed already."""
    if hasattr(AutoConfig.from_pretrained(path), "quantization_config"):
        return AutoModelForCausalLM.from_pretrained(path)
    config = iqtorch.IQConfig(recipe, importance=importance)
    return AutoModelForCausalLM.from_pretrained(path, quantization_config=config, dtype="auto")


def answer(model: Any, tokenizer: Any, messages: list[dict[str, str]], tokens: int) -> str:
    """The model's next message, printed while it is made."""
    if tokenizer.chat_template:
        inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True, return_tensors="pt")
    else:  # a base model goes on with the text
        inputs = tokenizer(" ".join(message["content"] for message in messages), return_tensors="pt")
    streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    out = model.generate(**inputs.to(model.device), max_new_tokens=tokens, do_sample=False, streamer=streamer)
    return str(tokenizer.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(TINY_LLAMA), help="folder or hub name")
    parser.add_argument("--format", default="iq2_kl", help="format whose mix is used, if the model is not packed already")
    parser.add_argument("--importance", help="importance file (.dat or GGUF), for a better choice of codes")
    parser.add_argument("--save", help="folder to save the packed model in")
    parser.add_argument("--prompt", help="one message instead of a conversation")
    parser.add_argument("--tokens", type=int, default=64, help="most tokens of an answer")
    arguments = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    model = load(arguments.model, arguments.format, arguments.importance).eval()
    print(str(iqtorch.report(model)).splitlines()[-1])
    if arguments.save:
        model.save_pretrained(arguments.save)
        tokenizer.save_pretrained(arguments.save)

    messages: list[dict[str, str]] = []
    with torch.inference_mode():
        while text := arguments.prompt if arguments.prompt and not messages else "" if arguments.prompt else input("> "):
            messages.append({"role": "user", "content": text})
            messages.append({"role": "assistant", "content": answer(model, tokenizer, messages, arguments.tokens)})


if __name__ == "__main__":
    main()
