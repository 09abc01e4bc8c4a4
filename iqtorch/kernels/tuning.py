"""Measured choices per card: a JSON file, written by `tune` (the command line's `iqtorch bench --tune`), read at the first launch.

    {"version": 1, "card": "NVIDIA H200", "torch": "2.13.0", "triton": "3.9.0",
     "choices": {"gemv iq2_kl 8192x8192 tokens 1 digits 1": {"rows": 8, "passes": 2, "runs": 128, "warps": 4}, ...}}

Without a file, or for what it does not name, the closed forms of choices.py hold. Nothing is tuned during inference.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ..errors import IQTorchError, KernelUnavailableError

VERSION = 1
#: Values that a choice may have; a file with others is refused.
ALLOWED: dict[str, dict[str, tuple[int, ...]]] = {
    "gemv": {"rows": (1, 2, 4, 8, 16), "passes": (1, 2, 4), "runs": (1, 2, 4, 8, 16, 32, 64, 128, 256), "warps": (1, 2, 4, 8)},
    "gemm": {"split": tuple(range(1, 65)), "stages": (1, 2, 3, 4, 5)},
    "large": {"above": (0, 4, 128, 256, 512, 1024, 2048, 4096)},
}

Choices = Mapping[str, Mapping[str, int]]


class TuningError(IQTorchError, ValueError):
    """A file of tuned choices that is damaged, of another version or of another card."""


def tuning_path(card: str) -> Path:
    """File of a card's choices: in the folder `IQTORCH_TUNING`, else in iqtorch's folder of the user's cache."""
    folder = os.environ.get("IQTORCH_TUNING")
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    slug = re.sub(r"[^a-z0-9]+", "-", card.lower()).strip("-")
    return (Path(folder) if folder else cache / "iqtorch") / f"triton-{slug}.json"


def read(path: Path, card: str) -> Choices:
    """The choices in a file.

    Raises:
        TuningError: not JSON, another version or card, or a choice that no kernel has.
    """
    remedy = "delete it, or run `iqtorch bench --tune` again"
    try:
        found = json.loads(path.read_text())
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise TuningError(f"{path} cannot be read as JSON ({error}); {remedy}") from error
    if not isinstance(found, dict) or found.get("version") != VERSION:
        raise TuningError(f"{path} is not of version {VERSION}; {remedy}")
    if found.get("card") != card:
        raise TuningError(f"{path} was made on {found.get('card')!r}, this card is {card!r}; {remedy}")
    choices = found.get("choices")
    if not isinstance(choices, dict):
        raise TuningError(f"{path} has no table of choices; {remedy}")
    for name, fields in choices.items():
        allowed = ALLOWED.get(name.split(" ", 1)[0], {})
        good = isinstance(fields, dict) and all(type(v) is int and v in allowed.get(f, ()) for f, v in fields.items())
        if not good or not fields:
            raise TuningError(f"{path}: {name!r} may choose {allowed}, found {fields!r}; {remedy}")
    return choices


def write(path: Path, card: str, choices: Choices) -> None:
    """Writes choices, keeping those of other matrices that the file already has; the file is replaced in one step."""
    import triton

    old: Choices = {}
    if path.exists():
        with contextlib.suppress(TuningError):  # a file that is refused on reading is replaced
            old = read(path, card)
    made = {"version": VERSION, "card": card, "torch": torch.__version__, "triton": triton.__version__, "choices": {**old, **choices}}
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(made, indent=1) + "\n")
    partial.replace(path)


def candidates(kernel: str) -> Iterator[dict[str, int]]:
    """What `tune` tries."""
    if kernel == "gemv":
        for rows, passes, warps in itertools.product((2, 4, 8), (1, 2, 4), (1, 2, 4, 8)):
            if rows * passes <= 16:
                yield {"rows": rows, "passes": passes, "runs": 32 * warps, "warps": warps}
    else:
        for split, stages in itertools.product((1, 2, 3, 4, 6, 8), (2, 3, 4)):
            yield {"split": split, "stages": stages}


def tune(
    formats: Sequence[str],
    shapes: Sequence[tuple[int, int]],
    device: torch.device | str = "cuda",
    path: Path | None = None,
    report: Callable[[str], object] = print,
    tries: Callable[[str], Iterator[dict[str, int]]] = candidates,
) -> Path:
    """Measures tiles for products with matrices `[rows, k]` of the formats, and writes the best ones to the card's file.

    Takes a minute or two per format and shape, most of it compiling.

    Args:
        formats: names, plain formats.
        shapes: `(rows, k)` of the matrices; k a multiple of the formats' block size.
        device: a GPU (in the interpreter: the CPU).
        path: the file; default `tuning_path` of the device's card.
        report: called with one line per choice.
        tries: the tiles to try for `gemv` and `gemm`.

    Returns:
        The file.

    Raises:
        KernelUnavailableError: the kernels cannot run on this machine.
    """
    from ..formats import get_format
    from . import supports

    reason = supports(get_format(formats[0]), *shapes[0])
    if reason is not None:
        raise KernelUnavailableError(f"tuning measures the kernels on a GPU: {reason}")
    from . import launch
    from .timing import card_name, microseconds, rotating

    device = torch.device(device)
    card = card_name(device)
    chosen: dict[str, dict[str, int]] = {}

    def best(name: str, options: Iterator[dict[str, int]], call: Callable[[int], Any], copies: int) -> None:
        launch.override = {}
        times: list[tuple[float, dict[str, int]]] = [(microseconds(call, copies, device), {})]
        for option in options:
            launch.override = {name: option}
            try:
                times.append((microseconds(call, copies, device), option))
            except Exception as error:  # a tile that does not compile or does not fit is no candidate
                report(f"{name} {option}: {type(error).__name__}")
        us, option = min(times, key=lambda pair: pair[0])
        if option and us < 0.97 * times[0][0]:
            chosen[name] = option
        report(f"{name}: {option or 'closed form'}, {us:.2f} us (closed form {times[0][0]:.2f} us)")

    try:
        for format_name, (rows, k) in itertools.product(formats, shapes):
            fmt = get_format(format_name)
            data = rotating(launch.layout(fmt).packed_bytes(rows, k), device)

            def call(i: int, x: torch.Tensor, precision: int = 0, fmt: Any = fmt, data: torch.Tensor = data, rows: int = rows) -> Any:
                return launch.linear(x, data[i], fmt.ggml_type, rows, None, precision)

            for tokens in (1, 2, 16, 32, 64, 128):
                x = torch.randn(tokens, k, device=device, dtype=torch.bfloat16)
                if tokens <= launch.vector_tokens(x.dtype):
                    for precision in (0, 1):
                        digits = launch._digits(x.dtype, precision)
                        name = launch.key("gemv", fmt.name, rows, k, tokens, digits)
                        best(name, tries("gemv"), partial(call, x=x, precision=precision), len(data))
                else:
                    best(launch.key("gemm", fmt.name, rows, k, tokens), tries("gemm"), partial(call, x=x), len(data))
            above = {}
            for tokens in (256, 512, 1024, 2048):
                x = torch.randn(tokens, k, device=device, dtype=torch.bfloat16)
                for limit in (0, 4096):  # dequantize, fused
                    launch.override = {launch.key("large", fmt.name, rows, k, 0): {"above": limit}}
                    above[tokens, limit] = microseconds(partial(call, x=x), len(data), device)
            fused = [t for t in (256, 512, 1024, 2048) if above[t, 4096] <= above[t, 0]]
            limit = max(fused, default=128)
            chosen[launch.key("large", fmt.name, rows, k, 0)] = {"above": limit}
            report(f"{fmt.name} {rows}x{k}: dequantized above {limit} tokens")
    finally:
        launch.override = None
    path = path or tuning_path(card)
    write(path, card, chosen)
    launch.device_facts.cache_clear()
    return path
