"""Blocks of the model in the kernel benchmark: the operators between their projections, in training.

assign_block    `TokenAssignment`: the projections of query, key and value, `gumbel_assign`, the projection of
                its output
grouping_block  `GroupingBlock`, all of a grouping stage: norms, token mixer, cross-attention of the group
                tokens to the image and its MLP, the assign block, the last MLP
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import eager
import torch
from cases import Case, tolerance_of
from torch import Tensor, nn

from groupvit_fast import ops
from groupvit_fast.console import UserError
from groupvit_fast.model.grouping import Grouping, GroupingBlock
from groupvit_fast.model.presets import ImageConfig

Own = Callable[[nn.Module, Tensor, Tensor, Tensor], Grouping]
Eager = Callable[..., Tensor]


def assign_block_case(
    batch: int, groups: int, tokens: int, channels: int, device: str, dtype: torch.dtype
) -> Case:
    def own(block: nn.Module, query: Tensor, image: Tensor, noise_key: Tensor) -> Grouping:
        return block(query, image, noise_key, False)

    block = _block(groups, channels).assignment
    sizes = (batch, groups, tokens, channels)
    return _case("assign_block", block, own, eager.assign_block, sizes, device, dtype)


def grouping_block_case(
    batch: int, groups: int, tokens: int, channels: int, device: str, dtype: torch.dtype
) -> Case:
    def own(block: nn.Module, query: Tensor, image: Tensor, noise_key: Tensor) -> Grouping:
        return block(image, query, noise_key=noise_key)

    block = _block(groups, channels)
    sizes = (batch, groups, tokens, channels)
    # Compiling all of it takes half a minute a shape and tells nothing of the operators.
    return _case("grouping_block", block, own, eager.grouping_block, sizes, device, dtype, compilable=False)


def official_blocks(device: str, dtype: torch.dtype) -> list[Callable[[], Case]]:
    """Both blocks at both stages of 224 px."""
    batch = 256 if device == "cuda" else 32
    shapes = [(batch, 64, 196, 384), (batch, 8, 64, 384)]
    return [
        partial(case, *shape, device, dtype)
        for case in (assign_block_case, grouping_block_case)
        for shape in shapes
    ]


def _block(groups: int, channels: int) -> GroupingBlock:
    """Of the paper, with biases that are not zero: a bias that a block forgets must show."""
    config = ImageConfig(width=channels, heads=max(channels // 64, 1))
    block = GroupingBlock(config, groups, groups)
    for name, parameter in block.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter, std=0.1)
    return block


def _case(
    name: str,
    block: nn.Module,
    own: Own,
    plain: Eager,
    sizes: tuple[int, int, int, int],
    device: str,
    dtype: torch.dtype,
    *,
    compilable: bool = True,
) -> Case:
    batch, groups, tokens, channels = sizes
    block = block.to(device, dtype)
    query, image = (
        torch.randn(batch, rows, channels, device=device, dtype=dtype, requires_grad=True)
        for rows in (groups, tokens)
    )
    noise_key = torch.tensor([7, 1], device=device)
    gradient = torch.randn_like(query)
    return Case(
        operator=name,
        shape=f"B{batch} {groups}x{tokens} C{channels}",
        candidates={
            "eager": lambda: plain(block, query, image),
            "ours": lambda: own(block, query, image, noise_key).groups,
        },
        check=partial(_check, name, block, own, plain, (query, image, noise_key, gradient)),
        read=[query, image, *block.parameters()],
        written=[gradient],
        leaves=[query, image, *block.parameters()],
        compilable=(lambda: plain(block, query, image)) if compilable else None,
        gradient=gradient,
    )


def _check(name: str, block: nn.Module, own: Own, plain: Eager, tensors: tuple[Tensor, ...]) -> None:
    """Output and every gradient in float32, with the same noise, against the plain code in float64.

    Ours may err three times as far as the plain code does in float32. Lower precision is not compared:
    there, rounding alone decides between the best groups of many tokens. Where it does so in float32, the
    sample is left out by an output's gradient of 0. Gradients are compared on the scale of the output's at
    least: that of a bias which a norm takes away again is a sum of such terms that cancel.
    """
    query, image, noise_key, gradient = tensors
    noise = ops.gumbel_noise(noise_key, (*query.shape[:2], image.shape[1]))
    single, double = (_Problem.of(block, query, image, dtype) for dtype in (torch.float32, torch.float64))
    with torch.no_grad(), ops.use_backend("reference"):
        wanted_index = own(*double, noise_key).index
    with torch.no_grad():
        same = (own(*single, noise_key).index == wanted_index).all(dim=1)
    if same.double().mean() < 0.9:
        raise UserError(f"{name}: the indices differ from those of the reference")
    gradient = gradient * same[:, None, None]
    results = (
        single.results(own(*single, noise_key).groups, gradient, same),
        single.results(plain(*single, noise), gradient, same),
        double.results(plain(*double, noise), gradient, same),
    )
    parts = ("output", "tokens", "image", *(name for name, _ in block.named_parameters()))
    for part, one, other, wanted in zip(parts, *results, strict=True):
        error, plain_error = ((r.double() - wanted).abs().max().item() for r in (one, other))
        scale = wanted.abs().max().item()
        if part != "output":
            scale = max(scale, gradient.abs().max().item())
        allowed = 3 * plain_error + tolerance_of(torch.float32) * scale
        if not error <= allowed:
            raise UserError(f"{name} {part}: error {error:.3g}, allowed {allowed:.3g}")


class _Problem(NamedTuple):
    """A block and its inputs in one precision."""

    block: nn.Module
    query: Tensor
    image: Tensor

    @classmethod
    def of(cls, block: nn.Module, query: Tensor, image: Tensor, dtype: torch.dtype) -> _Problem:
        tensors = (tensor.detach().to(dtype).requires_grad_() for tensor in (query, image))
        return cls(copy.deepcopy(block).to(dtype), *tensors)

    def results(self, output: Tensor, gradient: Tensor, same: Tensor) -> list[Tensor]:
        """The output of the samples that count, then the gradients of inputs and parameters."""
        leaves = (self.query, self.image, *self.block.parameters())
        return [output[same], *torch.autograd.grad(output, leaves, gradient.to(output.dtype))]
