"""Encoders: float weights to the canonical bytes of any format. See `encode`."""

from __future__ import annotations

from .encoder import Objective, Speed, encode

__all__ = ["Objective", "Speed", "encode"]
