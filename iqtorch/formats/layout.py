"""Bit positions that several formats share: `RunSpec`s of the element index (see `base.bits`).

`j` is a weight in its block, `g` a group of weights with one scale.
"""

from __future__ import annotations

from .base import RunSpec


def bit(byte: int, step: int = 1) -> RunSpec:
    """One bit per element, `step` bits apart."""
    return (lambda g: 8 * byte + step * g, 1)


def codes8(byte: int) -> RunSpec:
    """Eight bits per element, in order."""
    return (lambda j: 8 * (byte + j), 8)


def codes2(byte: int) -> RunSpec:
    """Two bits per weight: weights j, j+32, j+64, j+96 of each 128 share a byte."""
    return (lambda j: 8 * (byte + 32 * (j // 128) + j % 32) + 2 * (j // 32 % 4), 2)


def high1(byte: int) -> RunSpec:
    """One high bit per weight: byte j % 32, bit number j // 32."""
    return (lambda j: 8 * (byte + j % 32) + j // 32, 1)


def codes4(byte: int, half: int) -> RunSpec:
    """Four bits per weight: weights i and i + half of each 2 * half share a byte."""
    return (lambda j: 8 * (byte + half * (j // (2 * half)) + j % half) + 4 * (j // half % 2), 4)


def nibbles(byte: int) -> RunSpec:
    """Scale nibbles in order: groups 2i and 2i+1 share byte i."""
    return (lambda g: 8 * byte + 4 * g, 4)


def nibbles_by(half: int, byte: int) -> RunSpec:
    """Scale nibbles of 2 * half groups: groups g and g + half share byte g."""
    return (lambda g: 8 * (byte + g % half) + 4 * (g // half), 4)


def pairs(byte: int) -> RunSpec:
    """Two bits per scale in order: groups 4i .. 4i+3 share byte i."""
    return (lambda g: 8 * byte + 2 * g, 2)


def offset(width: int, by: int) -> tuple[int, ...]:
    """The integers of `width` bits minus `by`."""
    return tuple(v - by for v in range(1 << width))


def signed_bytes() -> tuple[int, ...]:
    """What the 256 byte values mean as two's complement."""
    return tuple(range(128)) + tuple(range(-128, 0))
