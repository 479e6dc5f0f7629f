"""The plain parts both encoders are made of: the transformer block, drop path, the projector.

Shape letters of this package: B batch, N tokens, S groups (queries), L image tokens (keys), C width, H heads,
D size of a head or of the shared embedding.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from torch import Tensor, nn
from torch.nn.attention.varlen import varlen_attn

from groupvit_fast import ops
from groupvit_fast.model.linear import Activation, Linear
from groupvit_fast.model.mlp import GELU, MLP
from groupvit_fast.model.packing import PackedTexts
from groupvit_fast.ops import library


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


class AttentionPattern(NamedTuple):
    """Which tokens of packed rows [R,T] see each other: the same text, not later.

    visible bool [R,1,T,T], or `bounds` and `longest` of a single row (see `PackedTexts`); ends [R,Q].
    """

    visible: Tensor | None
    ends: Tensor
    bounds: Tensor | None
    longest: int

    @classmethod
    def of(cls, texts: PackedTexts) -> AttentionPattern:
        visible = texts.visible() if texts.bounds is None else None
        return cls(visible, texts.ends, texts.bounds, texts.longest)


class SelfAttention(nn.Module):
    """Multi-head self-attention with one fused projection; `causal` hides later tokens."""

    def __init__(self, width: int, heads: int, *, causal: bool = False) -> None:
        super().__init__()
        self.heads = heads
        self.causal = causal
        self.qkv = Linear(width, 3 * width)
        self.out = Linear(width, width)

    def forward(self, x: Tensor, pattern: AttentionPattern | None = None) -> Tensor:
        """x [B,N,C] -> [B,N,C]; with a pattern, x are packed rows."""
        # Split along the last axis: the three gradients then join to one contiguous matrix.
        query, key, value = (part.unflatten(-1, (self.heads, -1)) for part in self.qkv(x).chunk(3, dim=-1))
        if pattern is None:
            x = attend(query, key, value, is_causal=self.causal)
        elif pattern.bounds is None:
            x = attend(query, key, value, attn_mask=pattern.visible)
        else:
            bounds, longest = pattern.bounds, pattern.longest
            x = varlen_attn(
                query[0], key[0], value[0], bounds, bounds, longest, longest, window_size=(-1, 0)
            )[None]
        return self.out(x.flatten(2))

    def at_ends(self, x: Tensor, pattern: AttentionPattern) -> Tensor:
        """The rows of `forward(x, pattern)` [R,T,C] where texts end, [R,Q,C]: no other query is made."""
        width = x.shape[-1]
        weight, bias = self.qkv.weight, self.qkv.bias
        query = F.linear(x.flatten(0, 1)[pattern.ends], weight[:width], bias[:width])
        query = query.unflatten(-1, (self.heads, -1))
        key, value = (
            part.unflatten(-1, (self.heads, -1))
            for part in F.linear(x, weight[width:], bias[width:]).chunk(2, dim=-1)
        )
        if pattern.bounds is None:
            visible = pattern.visible.flatten(0, 2)[pattern.ends][:, None]
            x = attend(query, key, value, attn_mask=visible)
        else:
            bounds = pattern.bounds
            one_each = torch.arange(len(bounds), dtype=bounds.dtype, device=bounds.device)
            x = varlen_attn(query[0], key[0], value[0], one_each, bounds, 1, pattern.longest)[None]
        return self.out(x.flatten(2))


def attend(
    query: Tensor, key: Tensor, value: Tensor, *, attn_mask: Tensor | None = None, is_causal: bool = False
) -> Tensor:
    """Scaled dot-product attention of [B,N,H,D] tensors, in that order of axes, with PyTorch's masks.

    On a CPU our operator takes the place of PyTorch's where there is no mask. With one, PyTorch's is asked in
    float32: its backward pass in bfloat16 takes up to four times as long.
    """
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    mask = {"attn_mask": attn_mask, "is_causal": is_causal}
    if query.device.type == "cpu" and library.runs_native(query):
        if attn_mask is None and not is_causal:
            return ops.group_attention(query, key, value).transpose(1, 2)
        if query.dtype == torch.bfloat16:
            with torch.autocast("cpu", enabled=False):
                inputs = (x.float() for x in (query, key, value))
                return F.scaled_dot_product_attention(*inputs, **mask).transpose(1, 2).to(query.dtype)
    return F.scaled_dot_product_attention(query, key, value, **mask).transpose(1, 2)


class TransformerBlock(nn.Module):
    """Pre-norm transformer layer: x + attention(norm1(x)), then x + mlp(norm2(x))."""

    def __init__(
        self,
        width: int,
        heads: int,
        *,
        mlp_ratio: float = 4.0,
        causal: bool = False,
        activation: Activation = GELU,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attention = SelfAttention(width, heads, causal=causal)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = MLP(width, int(mlp_ratio * width), width, activation)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor, pattern: AttentionPattern | None = None) -> Tensor:
        x = x + self.drop_path(self.attention(self.norm1(x), pattern))
        return x + self.drop_path(self.mlp(self.norm2(x)))

    def at_ends(self, x: Tensor, pattern: AttentionPattern) -> Tensor:
        """The rows of `forward(x, pattern)` where texts end, [R,Q,C]; for layers without drop path."""
        x = x.flatten(0, 1)[pattern.ends] + self.attention.at_ends(self.norm1(x), pattern)
        return x + self.mlp(self.norm2(x))


def run_block(block: nn.Module, *inputs: Any, checkpointing: bool) -> Tensor:
    """Call `block`; with `checkpointing` its activations are thrown away and computed again when needed."""
    if not checkpointing or not torch.is_grad_enabled():
        return block(*inputs)
    return torch.utils.checkpoint.checkpoint(block, *inputs, use_reentrant=False)


class Projector(nn.Module):
    """Into the shared space, [..., inputs] -> [..., outputs]: the paper's two-layer MLP, or one Linear.

    With two layers the batch norm sees every leading index as one row, so in training its statistics are
    those of all rows together.
    """

    def __init__(self, inputs: int, hidden: int, outputs: int, layers: int) -> None:
        super().__init__()
        self.hidden = Linear(inputs, hidden) if layers == 2 else None
        self.norm = nn.BatchNorm1d(hidden) if layers == 2 else None
        self.out = Linear(hidden if layers == 2 else inputs, outputs)

    def forward(self, x: Tensor) -> Tensor:
        if self.hidden is None:
            return self.out(x)
        rows = self.norm(self.hidden(x.flatten(0, -2)))
        return self.out(F.relu(rows)).unflatten(0, x.shape[:-1])
