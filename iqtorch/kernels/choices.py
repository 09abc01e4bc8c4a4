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
        mma: how tensor cores take decoded weights: 3 (Hopper; AMD's CDNA) from registers, for a warp group; 2 (Ampere, Ada, small
            Blackwells; AMD's RDNA) from registers, for each warp; 5 (large Blackwells) from tensor memory.
        warps: the card's own in each of a tile: two on AMD cards with 32 threads per warp, as tiles are made for 64 there.
        ahead: NVIDIA from sm_90 on: a kernel starts while the one before it ends, and asks for its weights (see `asm.prefetch`).
        tuned: measured choices that replace fields of the closed-form ones, by `key`.
    """

    processors: int
    asm: bool
    tuned: Choices = dataclasses.field(default_factory=dict)
    mma: int = 3
    ahead: bool = False
    warps: int = 1

    @property
    def fragments(self) -> bool:
        """Decoded weights are registers, in fragment order; else rows."""
        return self.mma != 5

    @property
    def tile_tokens(self) -> int:
        """Most tokens of a tile: with more, Triton gives `mma` 2 two warps for the same rows, which decode them twice; AMD spills."""
        return 32 if self.mma == 2 else 128 if self.asm else 64

    @property
    def tile_rows(self) -> int:
        """Most rows of a program of `gemv`: the plain twins need more registers, of which threads of RDNA have half as many."""
        return 16 if self.asm else 8 if self.warps == 1 else 2

    @property
    def fused_tokens(self) -> int:
        """Products with more tokens than this dequantize the matrix and use torch.mm, whose tensor-core rate then pays for it.

        On an H200 with 512 tokens: 131 to 149 microseconds instead of 206 to 251 (8192 x 8192)."""
        return 256


#: `Device.mma` by compute capability (major).
MMA = {8: 2, 9: 3, 10: 5, 11: 5}


@lru_cache
def device_facts(device: torch.device) -> Device:
    if device.type != "cuda":
        return Device(1, False)
    card = torch.cuda.get_device_properties(device)
    choices = load_tuned(card.name)
    if torch.version.hip is None and not INTERPRETED:
        return Device(card.multi_processor_count, True, choices, MMA.get(card.major, 2), ahead=card.major >= 9)
    if card.warp_size == 64 or INTERPRETED:
        return Device(card.multi_processor_count, False, choices)
    return rdna(card.multi_processor_count, choices)


def rdna(processors: int, tuned: Choices | None = None) -> Device:
    """An AMD card with 32 threads per warp."""
    return Device(processors, False, tuned or {}, mma=2, warps=2)


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


def gemv_tile(
    rows: int, runs: int, programs: int, processors: int, s: Scheme, digits: int = 1, tokens: int = 1, most: int = 16
) -> GemvTile:
    """Tile of a vector product: `programs` of them run beside each other for other tokens.

    A warp's 32 threads take neighbouring runs of the same rows. Sixteen rows in two passes (half of that where more registers are
    needed, fewer for several tokens; `most`: `Device.tile_rows`) share one reading and rounding of the activations; fewer where processors
    would have less than three programs, or seven warps.
    `programs` counts in powers of two, so that not every number of tokens compiles a kernel of its own.
    """
    warps = 4 if runs >= 128 else 2 if runs >= 64 else 1
    # four passes of a grid's look-ups need fewer registers than two of twice as many rows
    passes = 4 if most == 16 and s.family == "grid" and tokens == 1 else 2
    narrow = s.family == "grid" or digits == 3 or (s.family == "trellis" and digits == 2)
    most = max(min(most, 8 if narrow else 16) // tokens, 1)
    wanted = most
    while wanted > 1 and -(-rows // wanted) * power_of_two(programs) < max(3, 7 // warps) * processors:
        wanted //= 2
    tile_rows = min(wanted, max(most // passes, 1))
    return GemvTile(tile_rows, wanted // tile_rows, min(power_of_two(runs), 32 * warps), warps)


def compiler_options(facts: Device, warps: int, registers: int = 255) -> dict[str, int]:
    """All registers, or ptxas spills a few to fit one more program on a processor; unless that is what `registers` asks for."""
    options = {"num_warps": warps * facts.warps}
    return options | ({"maxnreg": registers} if facts.asm else {}) | ({"launch_pdl": True} if facts.ahead else {})


def gemv_registers(facts: Device, s: Scheme, warps: int, digits: int, tokens: int = 1) -> int:
    """On sm_90, for pairs, one digit and one token, four programs of four warps on a processor: one round of an H200 for 8192 rows.

    They need 164 otherwise, and took a fifth longer. The other formats would spill, or lose more than the third of a round that it saves;
    and so would pairs on sm_110 and sm_120.
    """
    return 128 if facts.ahead and facts.mma == 3 and warps >= 4 and digits == tokens == 1 and s.family == "pairs" else 255


@dataclass(frozen=True)
class GemmTile:
    rows: int
    tokens: int
    split: int
    warps: int
    stages: int


def gemm_tile(rows: int, tokens: int, steps: int, processors: int, most: int = 128) -> GemmTile:
    """Tile of a matrix product over `steps` steps along K.

    64 rows per warp group of 4 (one tensor-core instruction high), tokens padded to a power of two (at most `most`). The sum over K
    is split, not below four steps per part, so that rounds of programs end about together: four per processor with 16 tokens, else
    three, or one of 8 warps. Each part costs writing and reading its sums. Only the power of two at or above `tokens` counts.
    Activations are loaded two stages ahead; one for the largest tile where `most` is 32 (threads decode twice as many weights there, and
    registers would be too few) or 64 (AMD's processors have 64 KiB of shared memory).
    """
    padded = power_of_two(tokens)
    tile_tokens = min(max(padded, 16), most)
    tile_rows, warps = (128, 8) if tile_tokens == 128 else (64, 4)
    tiles = -(-rows // tile_rows) * -(-padded // tile_tokens)
    room = processors * (4 if tile_tokens == 16 else 3 if warps == 4 else 1)
    split = min(range(1, max(1, min(steps // 4, 16)) + 1), key=lambda s: -(-tiles * s // room) / s + 0.01 * s * padded / 16)
    return GemmTile(tile_rows, tile_tokens, split, warps, 2 if tile_tokens == most < 128 else 3)


Tile = TypeVar("Tile", GemvTile, GemmTile)


def tuned(tile: Tile, facts: Device, *what: str | int) -> Tile:
    """The tile with the fields that were tuned for `key(*what)` on this card."""
    if facts.tuned:
        return dataclasses.replace(tile, **facts.tuned.get(key(*what), {}))  # type: ignore[arg-type]
    return tile
