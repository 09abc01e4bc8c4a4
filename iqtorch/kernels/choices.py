"""The closed-form choice of tiles, and how a card's tuned choices take their place (see tuning.py). No Triton here."""

from __future__ import annotations

import dataclasses
import logging
from dataclasses import dataclass
from functools import lru_cache
from typing import TypeVar

import torch

from .layout import Scheme
from .library import INTERPRETED
from .tuning import Choices, TuningError, read, tuning_path

logger = logging.getLogger("iqtorch")


@dataclass(frozen=True)
class Device:
    """What the choices depend on.

    Attributes:
        processors: number of them.
        asm: NVIDIA: inline PTX instead of its plain twins.
        tuned: measured choices that replace fields of the closed-form ones, by `key`.
    """

    processors: int
    asm: bool
    tuned: Choices = dataclasses.field(default_factory=dict)


@lru_cache
def device_facts(device: torch.device) -> Device:
    if device.type != "cuda":
        return Device(1, False)
    card = torch.cuda.get_device_properties(device)
    return Device(card.multi_processor_count, torch.version.hip is None and not INTERPRETED, load_tuned(card.name))


def load_tuned(card: str) -> Choices:
    """The tuned choices of a card, if there are any. A file that cannot be used is named in a warning; the closed forms remain."""
    path = tuning_path(card)
    if not path.exists():
        return {}
    try:
        choices = read(path, card)
    except TuningError as error:
        logger.warning("tuned kernel choices are not used: %s", error)
        return {}
    logger.info("%d tuned kernel choices for %s from %s", len(choices), card, path)
    return choices


def key(kernel: str, name: str, rows: int, k: int, tokens: int, digits: int = 0) -> str:
    """Name of a choice: kernel, format, shape of the matrix, bucket of tokens, digits of the activations (`gemv` only)."""
    return f"{kernel} {name} {rows}x{k} tokens {tokens}" + (f" digits {digits}" if digits else "")


def power_of_two(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()


@dataclass(frozen=True)
class GemvTile:
    rows: int
    passes: int
    runs: int
    warps: int


def gemv_tile(rows: int, runs: int, programs: int, processors: int, s: Scheme, digits: int = 1, tokens: int = 1) -> GemvTile:
    """Tile of a vector product: `programs` of them run beside each other for other tokens.

    A warp's 32 threads take neighbouring runs of the same rows. Sixteen rows (eight for grids and for three digits, which take
    more registers; fewer for several tokens), in two passes, share one reading and rounding of the activations; fewer where
    processors would be left idle.
    `programs` counts in powers of two, so that not every number of tokens compiles a kernel of its own.
    """
    warps = 4 if runs >= 128 else 2 if runs >= 64 else 1
    most = max((8 if s.family == "grid" or digits == 3 else 16) // tokens, 2)
    tile_rows = most
    while tile_rows > 1 and -(-rows // tile_rows) * power_of_two(programs) < 3 * processors:
        tile_rows //= 2
    passes = 2 if tile_rows == most else 1
    return GemvTile(tile_rows // passes, passes, min(power_of_two(runs), 32 * warps), warps)


def all_registers(asm: bool) -> dict[str, int]:
    """Compiler options: all registers, or ptxas spills a few to fit one more program on a processor."""
    return {"maxnreg": 255} if asm else {}


@dataclass(frozen=True)
class GemmTile:
    rows: int
    tokens: int
    split: int
    warps: int
    stages: int


def gemm_tile(rows: int, tokens: int, steps: int, processors: int) -> GemmTile:
    """Tile of a matrix product over `steps` steps along K.

    64 rows per warp group of 4 (one tensor-core instruction high), tokens padded to a power of two; the sum over K is split
    until two programs per processor run, but not below four steps per part. Only the power of two at or above `tokens` counts.
    """
    padded = power_of_two(tokens)
    tile_tokens = min(max(padded, 16), 128)
    tile_rows, warps = (128, 8) if tile_tokens == 128 else (64, 4)
    tiles = -(-rows // tile_rows) * -(-padded // tile_tokens)
    split = max(1, min(steps // 4, -(-2 * processors // tiles)))
    return GemmTile(tile_rows, tile_tokens, split, warps, 3)


Tile = TypeVar("Tile", GemvTile, GemmTile)


def tuned(tile: Tile, facts: Device, *what: str | int) -> Tile:
    """The tile with the fields that were tuned for `key(*what)` on this card."""
    if facts.tuned:
        return dataclasses.replace(tile, **facts.tuned.get(key(*what), {}))  # type: ignore[arg-type]
    return tile
