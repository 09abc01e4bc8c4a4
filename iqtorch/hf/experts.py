"""Mixtures of experts of transformers models, on packed weights."""

from __future__ import annotations

from typing import Any


def use_packed_experts(model: Any) -> None:
    """Lets the experts of a model run on their packed weights."""
