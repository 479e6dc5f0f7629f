"""What plain PyTorch code does in place of the operators: the baselines of the benchmark.

`assign` and `attention` follow the published training code step by step, `decode` the published evaluation of
one window: correct, readable, and one kernel per line. The blocks put them between plain layers that read
the weights of ours.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from groupvit_fast.model.grouping import CrossAttention, GroupingBlock, TokenAssignment
from groupvit_fast.model.mlp import MLP


def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Softmax attention written out, [B,H,S,D] x [B,H,L,D]."""
    logits = query @ key.transpose(-2, -1) * query.shape[-1] ** -0.5
    return logits.softmax(dim=-1) @ value


def assign(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    tau: float = 1.0,
    eps: float = 1.0,
    noise: Tensor | None = None,
) -> Tensor:
    """Straight-through Gumbel-softmax over the groups, then the mean of each group; noise None: drawn."""
    logits = query @ key.transpose(-2, -1) * query.shape[-1] ** -0.5
    if noise is None:
        zero, one = (torch.tensor(number, device=logits.device, dtype=logits.dtype) for number in (0.0, 1.0))
        noise = torch.distributions.gumbel.Gumbel(zero, one).sample(logits.shape)
    soft = ((logits + noise) / tau).softmax(dim=-2)
    index = soft.max(dim=-2, keepdim=True)[1]
    hard = torch.zeros_like(logits).scatter_(-2, index, 1.0)
    share = hard - soft.detach() + soft
    share = share / (share.sum(dim=-1, keepdim=True) + eps)
    return share @ value


def assign_block(
    block: TokenAssignment, tokens: Tensor, image: Tensor, noise: Tensor | None = None
) -> Tensor:
    """Projections of query, key and value, the assignment, the projection of the output: [B,S,C]."""
    query, key, value = linear(block.query, tokens), linear(block.key, image), linear(block.value, image)
    return linear(block.out, assign(query, key, value, block.tau, block.eps, noise))


def grouping_block(
    block: GroupingBlock, tokens: Tensor, image: Tensor, noise: Tensor | None = None
) -> Tensor:
    """The whole grouping block: group tokens [B,T,C] and image tokens [B,L,C] -> groups [B,S,C]."""
    image = block.norm_image(image)
    mixed = mlp(block.token_mixer, block.norm_tokens(tokens).transpose(1, 2)).transpose(1, 2)
    tokens = block.norm_mixed(mixed)
    before = block.pre_assign
    tokens = tokens + cross_attention(before.attention, tokens, image)
    tokens = before.norm_post(tokens + mlp(before.mlp, before.norm2(tokens)))
    tokens = tokens + assign_block(block.assignment, tokens, image, noise)
    return tokens + mlp(block.mlp, block.norm_groups(tokens))


def cross_attention(block: CrossAttention, tokens: Tensor, image: Tensor) -> Tensor:
    """Multi-head attention of the group tokens to the image tokens, with its projections."""
    query = linear(block.query, tokens).unflatten(-1, (block.heads, -1)).transpose(1, 2)
    key, value = linear(block.key_value, image).unflatten(-1, (2, block.heads, -1)).permute(2, 0, 3, 1, 4)
    return linear(block.out, attention(query, key, value).transpose(1, 2).flatten(2))


def mlp(block: MLP, x: Tensor) -> Tensor:
    return linear(block.fc2, F.gelu(linear(block.fc1, x)))


def linear(layer: nn.Linear, x: Tensor) -> Tensor:
    return F.linear(x, layer.weight, layer.bias)


def upsample(maps: Tensor, size: tuple[int, int]) -> Tensor:
    return F.interpolate(maps, size=size, mode="bilinear", align_corners=False)


def decode(stages: list[Tensor], scores: Tensor, size: tuple[int, int], threshold: float) -> Tensor:
    """Evaluation of one window: maps of all stages resized, class scores of every pixel, background, argmax.

    stages [B, G_i, h, w] of every stage (the last one is read), scores [B, G, K] -> labels [B, H, W].
    """
    resized = [upsample(maps, size) for maps in stages]
    winner = resized[-1].argmax(dim=1)
    one_hot = F.one_hot(winner, resized[-1].shape[1]).to(scores.dtype)
    pixel_scores = torch.einsum("bhwg,bgk->bkhw", one_hot, scores)
    background = (pixel_scores.amax(dim=1, keepdim=True) < threshold).to(scores.dtype)
    pixel_scores = torch.cat([background, pixel_scores], dim=1)
    return upsample(pixel_scores, size).softmax(dim=1).argmax(dim=1)


def lean_decode(maps: Tensor, scores: Tensor, size: tuple[int, int], threshold: float) -> Tensor:
    """The shortest way in plain PyTorch: resize the maps of the last stage, argmax, look the label up."""
    winner = upsample(maps, size).argmax(dim=1)
    best, label = scores.max(dim=-1)
    label = torch.where(best >= threshold, label + 1, 0)
    return label.gather(1, winner.flatten(1)).view_as(winner)
