"""Multi-head latent attention (DeepSeek) whose `kv_b_proj` is kept in two halves, as GGUF files hold it since 2025.

Half of each head's rows make keys, the other half values. Files hold the key half transposed within each head, because their
programs multiply queries by it; its rows are then columns of `kv_b_proj`, and packed rows cannot be transposed. So each half stays as
it is stored, and its product is the one that this takes.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .tensor import IQTensor

__all__ = ["HeadLinear", "SplitKV"]


class HeadLinear(nn.Module):
    """A linear layer without bias for each head: `[.., K]` -> `[.., heads, N]`.

    Args:
        weight: `[heads, N, K]`; a packed one may be stored transposed (rows along K).
    """

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        weight: Tensor = self.weight
        return torch.stack([F.linear(x, weight[head]) for head in range(weight.shape[0])], dim=-2)

    def extra_repr(self) -> str:
        heads, n, k = self.weight.shape
        fmt = f", format={self.weight.format.name!r}" if isinstance(self.weight, IQTensor) else ""
        return f"heads={heads}, in_features={k}, out_features={n}{fmt}"


class SplitKV(nn.Module):
    """In the place of an `nn.Linear` without bias whose rows are, head by head, `keys` and then values.

    Attributes:
        k_b_proj: the rows of keys.
        v_b_proj: the rows of values, `[heads * values, in_features]`.
    """

    def __init__(self, layer: nn.Linear, heads: int, keys: int) -> None:
        super().__init__()
        self.in_features, self.out_features = layer.in_features, layer.out_features
        device, dtype = layer.weight.device, layer.weight.dtype
        self.k_b_proj = HeadLinear(torch.empty(heads, keys, self.in_features, device=device, dtype=dtype))
        self.v_b_proj = nn.Linear(self.in_features, self.out_features - heads * keys, bias=False, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """`[.., in_features]` -> `[.., out_features]`."""
        keys = self.k_b_proj(x)
        values = self.v_b_proj(x).unflatten(-1, (keys.shape[-2], -1))
        return torch.cat([keys, values], dim=-1).flatten(-2)

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The plain weight `[out_features, in_features]` of the layer in whose place this is."""
        weights = (self.k_b_proj.weight, self.v_b_proj.weight)
        k, v = (w.dequantize(dtype) if isinstance(w, IQTensor) else w.to(dtype or w.dtype) for w in weights)
        return torch.cat([k, v.unflatten(0, (k.shape[0], -1))], dim=1).flatten(0, 1)
