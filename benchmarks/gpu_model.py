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
    context: int = 2304

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
    """One sequence: `forward` decodes a token or reads a prompt. Caches are written in place, shapes never change.

    `compile` compiles what layers share, once for all of them; graphs over the whole are the caller's.

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
        cache = (shape.kv_heads, shape.context, shape.head)
        self.caches = [
            (torch.zeros(cache, device=device, dtype=dtype), torch.zeros(cache, device=device, dtype=dtype)) for _ in self.layers
        ]
        angle = torch.arange(shape.context, device=device)[:, None] / 5e5 ** (torch.arange(0, shape.head, 2, device=device) / shape.head)
        self.cos, self.sin = angle.cos().to(dtype), angle.sin().to(dtype)

    def _rotate(self, v: Tensor, positions: Tensor) -> Tensor:
        a, b = v.chunk(2, -1)
        cos, sin = self.cos[positions], self.sin[positions]
        return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)

    def _attend(self, q: Tensor, keys: Tensor, values: Tensor, seen: Tensor) -> Tensor:
        """`q [heads, T, head]`, caches `[kv_heads, context, head]`, `seen [T, context]` -> `[T, heads * head]`.

        The query heads of a group are rows of one product: masked attention of PyTorch with `enable_gqa` would copy the caches for each.
        """
        s, count = self.shape, q.shape[1]
        q = q.reshape(s.kv_heads, -1, s.head)
        seen = seen.repeat(s.heads // s.kv_heads, 1)
        if count == 1:
            scores = (q @ keys.transpose(1, 2) * s.head**-0.5).masked_fill(~seen, float("-inf"))
            mixed = scores.softmax(-1) @ values
        else:
            mixed = F.scaled_dot_product_attention(q[None], keys[None], values[None], attn_mask=seen)[0]
        return mixed.reshape(s.heads, count, s.head).transpose(0, 1).reshape(count, -1)

    def compile(self, **options: object) -> None:
        """`torch.compile` with these options, for each number of tokens by itself."""
        self._layer = torch.compile(self._layer, fullgraph=True, dynamic=False, **options)  # type: ignore[call-overload, method-assign]

    def forward(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """Tokens `[T]` at int64 positions `[T]` -> logits `[vocabulary]` of the last."""
        x = self.embedding[tokens]
        seen = torch.arange(self.shape.context, device=x.device)[None, :] <= positions[:, None]
        for layer, (keys, values) in zip(self.layers, self.caches, strict=True):
            x = self._layer(x, positions, seen, keys, values, **layer)
        return F.linear(F.rms_norm(x[-1:], (self.shape.hidden,)), self.head)[0]

    def _layer(
        self,
        x: Tensor,
        positions: Tensor,
        seen: Tensor,
        keys: Tensor,
        values: Tensor,
        qkv: Tensor,
        out: Tensor,
        gate_up: Tensor,
        down: Tensor,
    ) -> Tensor:
        s, count = self.shape, x.shape[0]
        heads = F.linear(F.rms_norm(x, (s.hidden,)), qkv).view(count, -1, s.head).transpose(0, 1)
        q, k, v = heads.split([s.heads, s.kv_heads, s.kv_heads])
        keys.index_copy_(1, positions, self._rotate(k, positions))
        values.index_copy_(1, positions, v)
        x = x + F.linear(self._attend(self._rotate(q, positions), keys, values, seen), out)
        gate, up = F.linear(F.rms_norm(x, (s.hidden,)), gate_up).chunk(2, -1)
        return x + F.linear(F.silu(gate) * up, down)
