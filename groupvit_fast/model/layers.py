"""The plain parts both encoders are made of: MLPs, the transformer block, drop path, the projector.

Shape letters of this package: B batch, N tokens, S groups (queries), L image tokens (keys), C width, H heads,
D size of a head or of the shared embedding.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def quick_gelu(x: Tensor) -> Tensor:
    """The approximation of GELU that CLIP's text transformer was trained with."""
    return x * torch.sigmoid(1.702 * x)


class MLP(nn.Module):
    """Two Linear layers with an activation between; works on the last dimension."""

    def __init__(
        self, inputs: int, hidden: int, outputs: int, activation: Callable[[Tensor], Tensor] = F.gelu
    ) -> None:
        super().__init__()
        self.fc1 = nn.Linear(inputs, hidden)
        self.fc2 = nn.Linear(hidden, outputs)
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.activation(self.fc1(x)))


class TokenMixer(MLP):
    """An MLP over the token dimension, as in MLP-Mixer: [B,N,C] -> [B,outputs,C]."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.transpose(1, 2)).transpose(1, 2)


class DropPath(nn.Module):
    """Stochastic depth: drop a residual branch for whole samples and scale the others up to keep the mean."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.rate == 0.0:
            return x
        keep = 1.0 - self.rate
        mask = torch.empty(x.shape[0], *[1] * (x.dim() - 1), dtype=x.dtype, device=x.device)
        return x * mask.bernoulli_(keep).div_(keep)

    def extra_repr(self) -> str:
        return f"rate={self.rate:.3f}"


class SelfAttention(nn.Module):
    """Multi-head self-attention with one fused projection; `causal` hides later tokens."""

    def __init__(self, width: int, heads: int, *, causal: bool = False) -> None:
        super().__init__()
        self.heads = heads
        self.causal = causal
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        x = F.scaled_dot_product_attention(query, key, value, is_causal=self.causal)
        return self.out(x.transpose(1, 2).flatten(2))


class TransformerBlock(nn.Module):
    """Pre-norm transformer layer: x + attention(norm1(x)), then x + mlp(norm2(x))."""

    def __init__(
        self,
        width: int,
        heads: int,
        *,
        mlp_ratio: float = 4.0,
        causal: bool = False,
        activation: Callable[[Tensor], Tensor] = F.gelu,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attention = SelfAttention(width, heads, causal=causal)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = MLP(width, int(mlp_ratio * width), width, activation)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path(self.attention(self.norm1(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class Projector(nn.Module):
    """Into the shared space, [..., inputs] -> [..., outputs]: the paper's two-layer MLP, or one Linear.

    With two layers the batch norm sees every leading index as one row, so in training its statistics are
    those of all rows together.
    """

    def __init__(self, inputs: int, hidden: int, outputs: int, layers: int) -> None:
        super().__init__()
        self.hidden = nn.Linear(inputs, hidden) if layers == 2 else None
        self.norm = nn.BatchNorm1d(hidden) if layers == 2 else None
        self.out = nn.Linear(hidden if layers == 2 else inputs, outputs)

    def forward(self, x: Tensor) -> Tensor:
        if self.hidden is None:
            return self.out(x)
        rows = self.norm(self.hidden(x.flatten(0, -2)))
        return self.out(F.relu(rows)).unflatten(0, x.shape[:-1])
