"""A decoder in the shape of Llama 3 8B with random weights, for benchmarks/gpu.py: the same code on packed and on bfloat16 weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Shape:
    layers: int = 32
    hidden: int = 4096
    inner: int = 14336
    heads: int = 32
    kv_heads: int = 8
    head: int = 128
    vocabulary: int = 128256
    context: int = 4096

    def matrices(self) -> dict[str, tuple[int, int]]:
        """Name -> `(rows, k)` of each layer's matrices; query, key and value, and gate and up, are one matrix each."""
        return {
            "qkv": ((self.heads + 2 * self.kv_heads) * self.head, self.hidden),
            "out": (self.hidden, self.heads * self.head),
            "gate_up": (2 * self.inner, self.hidden),
            "down": (self.hidden, self.inner),
        }


#: For rehearsals.
TINY = Shape(1, 64, 64, 2, 1, 32, 64, 8)


class Model:
    """One sequence; `step` decodes a token, `prefill` reads a prompt. Caches are written in place, shapes never change.

    Args:
        shape: sizes.
        make: `make(rows, k)` gives a weight matrix, packed or plain.
        device, dtype: of the activations.
    """

    def __init__(self, shape: Shape, make: Callable[[int, int], Tensor], device: torch.device, dtype: torch.dtype) -> None:
        self.shape = shape
        self.layers = [{name: make(*size) for name, size in shape.matrices().items()} for _ in range(shape.layers)]
        self.head = make(shape.vocabulary, shape.hidden)
        self.embedding = torch.randn(shape.vocabulary, shape.hidden, device=device, dtype=dtype)
        cache = (1, shape.kv_heads, shape.context, shape.head)
        self.caches = [
            (torch.zeros(cache, device=device, dtype=dtype), torch.zeros(cache, device=device, dtype=dtype)) for _ in self.layers
        ]
        angle = torch.arange(shape.context, device=device)[:, None] / 5e5 ** (torch.arange(0, shape.head, 2, device=device) / shape.head)
        self.cos, self.sin = angle.cos().to(dtype), angle.sin().to(dtype)

    def _rotate(self, v: Tensor, positions: Tensor) -> Tensor:
        a, b = v.chunk(2, -1)
        cos, sin = self.cos[positions], self.sin[positions]
        return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)

    def forward(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """Tokens `[T]` at int64 positions `[T]` -> logits `[vocabulary]` of the last."""
        s = self.shape
        count = tokens.shape[0]
        x = self.embedding[tokens]
        seen = torch.arange(s.context, device=x.device)[None, :] <= positions[:, None]
        for layer, (keys, values) in zip(self.layers, self.caches, strict=True):
            qkv = F.linear(F.rms_norm(x, (s.hidden,)), layer["qkv"]).view(count, -1, s.head).transpose(0, 1)
            q, k, v = qkv.split([s.heads, s.kv_heads, s.kv_heads])
            keys.index_copy_(2, positions, self._rotate(k, positions)[None])
            values.index_copy_(2, positions, v[None])
            mixed = F.scaled_dot_product_attention(self._rotate(q, positions)[None], keys, values, attn_mask=seen, enable_gqa=True)
            x = x + F.linear(mixed[0].transpose(0, 1).reshape(count, -1), layer["out"])
            gate, up = F.linear(F.rms_norm(x, (s.hidden,)), layer["gate_up"]).chunk(2, -1)
            x = x + F.linear(F.silu(gate) * up, layer["down"])
        return F.linear(F.rms_norm(x[-1:], (s.hidden,)), self.head)[0]
