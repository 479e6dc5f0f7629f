"""The grouping block: group tokens look at the image, then every image token joins one group.

GroupViT paper, section 3.1. Shapes: B batch, T group tokens, S output groups, L image tokens, C width.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from groupvit_fast import ops
from groupvit_fast.model.linear import Linear
from groupvit_fast.model.mlp import MLP, TokenMixer
from groupvit_fast.model.presets import ImageConfig


class Grouping(NamedTuple):
    """What a grouping block gives.

    groups [B,S,C]; map [B,S,L], the assignment without noise as probabilities over S, or None when it was
    not asked for; count [B,S], how many image tokens each group received; index [B,L], the group of each.
    """

    groups: Tensor
    map: Tensor | None
    count: Tensor
    index: Tensor


class CrossAttention(nn.Module):
    """Multi-head attention of the group tokens to the image tokens."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query = Linear(width, width)
        self.key_value = Linear(width, 2 * width)
        self.out = Linear(width, width)

    def forward(self, tokens: Tensor, image: Tensor) -> Tensor:
        query = self.query(tokens).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        key, value = self.key_value(image).unflatten(-1, (2, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return self.out(ops.group_attention(query, key, value).transpose(1, 2).flatten(2))


class CrossAttentionBlock(nn.Module):
    """Cross-attention and MLP with residuals: no norm before the attention, one after everything."""

    def __init__(self, width: int, heads: int, mlp_ratio: float) -> None:
        super().__init__()
        self.attention = CrossAttention(width, heads)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = MLP(width, int(mlp_ratio * width), width)
        self.norm_post = nn.LayerNorm(width)

    def forward(self, tokens: Tensor, image: Tensor) -> Tensor:
        tokens = tokens + self.attention(tokens, image)
        tokens = tokens + self.mlp(self.norm2(tokens))
        return self.norm_post(tokens)


class TokenAssignment(nn.Module):
    """Give every image token to one group and average the members of each group.

    With keys k = Wk x + bk the logits are (q Wk) x + q bk: the keys themselves need never be made, because
    the softmax runs over the queries of a single head. Nor need the values: the average of Wv x + bv is
    Wv (average of x) + bv n / (n + eps). In training, where the groups of a batch are more rows than a
    weight has, Wq^T Wk and Wo Wv are multiplied first, so that each side has one product of a batch instead
    of two and keeps nothing between them. `absorb = False` selects the plain form; all read the same
    parameters.
    """

    def __init__(self, config: ImageConfig) -> None:
        super().__init__()
        width = config.width
        self.query = Linear(width, width)
        self.key = Linear(width, width)
        self.value = Linear(width, width)
        self.out = Linear(width, width)
        self.scale = config.logit_factor
        self.tau = config.tau
        self.hard = config.hard_assignment
        self.eps = config.assign_eps
        self.absorb = True

    def forward(self, tokens: Tensor, image: Tensor, noise_key: Tensor | None, return_map: bool) -> Grouping:
        if self.absorb:
            query, bias = self._absorbed_query(tokens)
            key = value = image.to(query.dtype)
        else:
            query, bias, key, value = self.query(tokens), None, self.key(image), self.value(image)
        logits = {"bias": bias, "scale": self.scale, "tau": self.tau}
        groups, index, count = ops.gumbel_assign(
            query, key, value, hard=self.hard, noise_key=noise_key, eps=self.eps, **logits
        )
        assignment = ops.soft_assignment(query, key, **logits) if return_map else None
        groups = self._absorbed_output(groups, count) if self.absorb else self.out(groups)
        return Grouping(groups, assignment, count.detach(), index)

    def _weights_first(self, rows: Tensor) -> bool:
        return torch.is_grad_enabled() and rows.shape[0] * rows.shape[1] >= rows.shape[2]

    def _absorbed_query(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """(q Wk [B,S,C], q bk [B,S]) of q = Wq t + bq."""
        query, key = self.query, self.key
        if not self._weights_first(tokens):
            projected = query(tokens)
            return projected @ key.weight.to(projected.dtype), projected @ key.bias.to(projected.dtype)
        weight, bias = key.weight.T @ query.weight, query.bias @ key.weight
        return F.linear(tokens, weight, bias), tokens @ (key.bias @ query.weight) + query.bias @ key.bias

    def _absorbed_output(self, groups: Tensor, count: Tensor) -> Tensor:
        """Wo (Wv m + bv n / (n + eps)) + bo of the averages m [B,S,C] and counts n [B,S]."""
        value, out = self.value, self.out
        share = (count / (count + self.eps)).to(groups.dtype)[..., None]
        if not self._weights_first(groups):
            return out(F.linear(groups, value.weight) + share * value.bias)
        return F.linear(groups, out.weight @ value.weight, out.bias) + share * (out.weight @ value.bias)


class GroupingBlock(nn.Module):
    """Mix T group tokens into S, let them attend to the image, and group the image tokens by them."""

    def __init__(self, config: ImageConfig, group_tokens: int, output_groups: int) -> None:
        super().__init__()
        width = config.width
        self.token_residual = config.token_residual
        self.norm_tokens = nn.LayerNorm(width)
        self.token_mixer = TokenMixer(group_tokens, width // 2, output_groups)
        self.norm_mixed = nn.LayerNorm(width)
        self.norm_image = nn.LayerNorm(width)
        self.pre_assign = None
        if config.pre_assign_attention:
            self.pre_assign = CrossAttentionBlock(width, config.heads, config.mlp_ratio)
        self.assignment = TokenAssignment(config)
        self.norm_groups = nn.LayerNorm(width)
        self.mlp = MLP(width, 4 * width, width)

    def forward(
        self, image: Tensor, tokens: Tensor, *, noise_key: Tensor | None = None, return_map: bool = False
    ) -> Grouping:
        """image [B,L,C] and group tokens [B,T,C] -> `Grouping` with groups [B,S,C]."""
        image = self.norm_image(image)
        tokens = self.norm_mixed(self.token_mixer(self.norm_tokens(tokens)))
        if self.pre_assign is not None:
            tokens = self.pre_assign(tokens, image)
        groups, *rest = self.assignment(tokens, image, noise_key, return_map)
        if self.token_residual:
            groups = groups + tokens
        groups = groups + self.mlp(self.norm_groups(groups))
        return Grouping(groups, *rest)
