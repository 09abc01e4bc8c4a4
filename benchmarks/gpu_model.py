"""A decoder in the shape of Llama 3 8B with random weights, for benchmarks/gpu.py: the same code on packed and on bfloat16 weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

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
    """One sequence. Caches are written in place, shapes never change: `forward` can be captured in a CUDA graph.

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
        self.before, self.after = self._before, self._after

    def compile(self, **options: Any) -> None:
        """What lies between two attentions is compiled once for all layers: they differ in their weights alone."""
        self.before = torch.compile(self._before, fullgraph=True, dynamic=False, **options)
        self.after = torch.compile(self._after, fullgraph=True, dynamic=False, **options)

    def _before(self, x: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Hidden states `[T, H]` -> queries `[heads, T, head]`; keys and values go into their places."""
        s = self.shape
        qkv = F.linear(F.rms_norm(x, (s.hidden,)), weight).view(x.shape[0], -1, s.head).transpose(0, 1)
        q, k, v = qkv.split([s.heads, s.kv_heads, s.kv_heads])

        def rotate(t: Tensor) -> Tensor:
            a, b = t.chunk(2, -1)
            return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)

        keys.copy_(rotate(k))
        values.copy_(v)
        return rotate(q)

    def _after(self, x: Tensor, mixed: Tensor, out: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
        x = x + F.linear(mixed.transpose(0, 1).reshape(x.shape), out)
        gate, up = F.linear(F.rms_norm(x, (self.shape.hidden,)), gate_up).chunk(2, -1)
        return x + F.linear(F.silu(gate) * up, down)

    def plain(self, tokens: Tensor, past: int) -> Tensor:
        """`forward`, not compiled."""
        compiled = self.before, self.after
        self.before, self.after = self._before, self._after
        try:
            return self.forward(tokens, past)
        finally:
            self.before, self.after = compiled

    def forward(self, tokens: Tensor, past: int) -> Tensor:
        """Tokens `[T]`, one or a prompt from the start, behind `past` others -> logits `[vocabulary]` of the last."""
        count = tokens.shape[0]
        x = self.embedding[tokens]
        cos, sin = self.cos[past : past + count], self.sin[past : past + count]
        for layer, (keys, values) in zip(self.layers, self.caches, strict=True):
            new = slice(past, past + count)
            q = self.before(x, layer["qkv"], cos, sin, keys[0, :, new], values[0, :, new])
            seen = slice(0, past + count)
            mixed = F.scaled_dot_product_attention(q[None], keys[:, :, seen], values[:, :, seen], is_causal=count > 1, enable_gqa=True)
            x = self.after(x, mixed[0], layer["out"], layer["gate_up"], layer["down"])
        return F.linear(F.rms_norm(x[-1:], (self.shape.hidden,)), self.head)[0]
