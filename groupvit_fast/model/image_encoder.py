"""The image encoder: a vision transformer whose stages end in grouping blocks (GroupViT paper, section 3.1).

Shapes: B batch, H and W image size, h and w patch grid, L = h * w, T group tokens and S groups of a stage,
G groups of the last, C width.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from groupvit_fast.model.grouping import Grouping, GroupingBlock
from groupvit_fast.model.layers import TransformerBlock, run_block
from groupvit_fast.model.mlp import TokenMixer
from groupvit_fast.model.presets import ImageConfig


class ImageEncoding(NamedTuple):
    """Result of `ImageEncoder`.

    groups [B,G,C] after the final norm; pooled [B,C], their mean; maps, per grouping stage the assignment
    without noise [B,S_i,L_i] with L_0 = h * w and L_i = S_(i-1) (empty unless asked for); counts, per stage
    the number of tokens that each group received [B,S_i]; areas [B,G], the patches that end in each group.
    """

    groups: Tensor
    pooled: Tensor
    maps: tuple[Tensor, ...]
    counts: tuple[Tensor, ...]
    areas: Tensor


class PatchEmbedding(nn.Module):
    """Patches to normalised tokens plus position embedding; any image of at least one patch is allowed.

    Pixels beyond the last whole patch are not looked at. A grid other than the training one gets the
    position embedding resized by bicubic interpolation.
    """

    def __init__(self, config: ImageConfig) -> None:
        super().__init__()
        self.grid_size = config.grid_size
        self.projection = nn.Conv2d(3, config.width, config.patch_size, config.patch_size)
        self.norm = nn.LayerNorm(config.width)
        self.position = nn.Parameter(torch.empty(1, config.grid_size**2, config.width))

    def forward(self, pixels: Tensor) -> Tensor:
        x = self.projection(pixels.to(self.projection.weight.dtype))
        height, width = x.shape[-2:]
        return self.norm(x.flatten(2).transpose(1, 2)) + self.resized_position(height, width)

    def resized_position(self, height: int, width: int) -> Tensor:
        # An exported graph must serve every size; interpolation to the same size is the identity.
        if not torch.compiler.is_exporting() and height == width == self.grid_size:
            return self.position
        grid = self.position.unflatten(1, (self.grid_size, self.grid_size)).permute(0, 3, 1, 2)
        grid = F.interpolate(grid, size=(height, width), mode="bicubic", align_corners=False)
        return grid.flatten(2).transpose(1, 2)


class GroupProjector(nn.Module):
    """Carry the group tokens of one stage over to the next: [B,T_prev,C] -> [B,T,C]."""

    def __init__(self, width: int, previous_tokens: int, group_tokens: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.mixer = TokenMixer(previous_tokens, width // 2, group_tokens)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.mixer(self.norm(tokens))


class Stage(nn.Module):
    """Transformer layers over image and group tokens together, then a grouping block.

    The last stage of the encoder has layers only. `checkpointing`: layers are computed again in the backward
    pass.
    """

    checkpointing = False

    def __init__(self, config: ImageConfig, number: int, drop_path: list[float]) -> None:
        super().__init__()
        self.group_tokens = self.group_projector = self.grouping = None
        if number < len(config.group_tokens):
            tokens = config.group_tokens[number]
            self.group_tokens = nn.Parameter(torch.empty(1, tokens, config.width))
            self.grouping = GroupingBlock(config, tokens, config.output_groups[number])
            if number > 0:
                self.group_projector = GroupProjector(config.width, config.group_tokens[number - 1], tokens)
        self.blocks = nn.ModuleList(
            TransformerBlock(config.width, config.heads, mlp_ratio=config.mlp_ratio, drop_path=rate)
            for rate in drop_path
        )

    def transform(self, x: Tensor, previous: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Run the layers on image tokens x [B,L,C] and this stage's group tokens; return both, those [B,T,C].

        `previous` are the group tokens that the stage before ended with.
        """
        length = x.shape[1]
        if self.group_tokens is not None:
            tokens = self.group_tokens.expand(x.shape[0], -1, -1)
            if self.group_projector is not None:
                tokens = tokens + self.group_projector(previous)
            x = torch.cat([x, tokens.to(x.dtype)], dim=1)
        for block in self.blocks:
            x = run_block(block, x, checkpointing=self.checkpointing)
        return x[:, :length], x[:, length:]


class ImageEncoder(nn.Module):
    """Images to segment tokens; see `ImageEncoding`."""

    def __init__(self, config: ImageConfig) -> None:
        super().__init__()
        self.config = config
        layers = sum(config.depths)
        rates = [config.drop_path * layer / max(layers - 1, 1) for layer in range(layers)]
        self.patch_embedding = PatchEmbedding(config)
        self.stages = nn.ModuleList()
        for number, depth in enumerate(config.depths):
            first = sum(config.depths[:number])
            self.stages.append(Stage(config, number, rates[first : first + depth]))
        self.norm = nn.LayerNorm(config.width)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the parameters as the paper's training did.

        Only the first stage's group tokens start apart from each other; later ones start at zero, because
        the group projector already hands them different content.
        """
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)
        nn.init.trunc_normal_(self.patch_embedding.position, std=0.02)
        nn.init.trunc_normal_(self.stages[0].group_tokens, std=0.02)
        for stage in self.stages[1:-1]:
            nn.init.zeros_(stage.group_tokens)

    def grid(self, pixels: Tensor) -> tuple[int, int]:
        """Patch grid (h, w) of an image batch [B,3,H,W]; ValueError if it is no such batch."""
        patch = self.config.patch_size
        if pixels.dim() != 4 or pixels.shape[1] != 3:
            raise ValueError(f"pixels must be [B,3,H,W], got {list(pixels.shape)}")
        if min(pixels.shape[-2:]) < patch:
            raise ValueError(
                f"pixels must be at least {patch} on a side (one patch), got {list(pixels.shape)}"
            )
        return pixels.shape[-2] // patch, pixels.shape[-1] // patch

    def set_absorb(self, absorb: bool) -> None:
        """Choose whether assignments absorb their key and value projections (the default) or compute them."""
        for stage in self.stages[:-1]:
            stage.grouping.assignment.absorb = absorb

    def forward(
        self, pixels: Tensor, *, noise_key: Tensor | None = None, return_maps: bool = False
    ) -> ImageEncoding:
        """Encode images [B,3,H,W], normalised with ImageNet mean and standard deviation.

        noise_key (int64 [2]: key, offset) switches the Gumbel noise of the assignments on; each stage gets
        an offset of its own, so consecutive offsets never share noise.
        """
        self.grid(pixels)
        x, tokens, groupings = self.patch_embedding(pixels), None, []
        for number, stage in enumerate(self.stages):
            x, tokens = stage.transform(x, tokens)
            if stage.grouping is not None:
                key = stage_noise_key(noise_key, number, len(self.stages) - 1)
                groupings.append(stage.grouping(x, tokens, noise_key=key, return_map=return_maps))
                x = groupings[-1].groups
        groups = self.norm(x)
        maps = tuple(grouping.map for grouping in groupings) if return_maps else ()
        counts = tuple(grouping.count for grouping in groupings)
        return ImageEncoding(groups, groups.mean(dim=1), maps, counts, patches_per_group(groupings))


def patches_per_group(groupings: list[Grouping]) -> Tensor:
    """How many patches end in each final group [B,G]; those of an earlier group go where the group goes."""
    areas = groupings[0].count
    for grouping in groupings[1:]:
        groups = torch.arange(grouping.count.shape[1], device=areas.device)
        # a sum, not a scatter: the same bits every time, on a GPU too
        areas = ((grouping.index[..., None] == groups) * areas[..., None]).sum(dim=1)
    return areas


def stage_noise_key(noise_key: Tensor | None, stage: int, num_stages: int) -> Tensor | None:
    """(key, offset) -> (key, offset * num_stages + stage), without a look at the values on the host."""
    if noise_key is None:
        return None
    return torch.stack((noise_key[0], noise_key[1] * num_stages + stage))
