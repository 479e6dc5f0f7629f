"""GroupViT: image encoder, text encoder and the projectors into their shared space.

Shapes: B images, N texts, U distinct texts, K prompts per image, T tokens, G groups, D shared space.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from groupvit_fast.model.checkpoint_write import write_checkpoint
from groupvit_fast.model.image_encoder import ImageEncoder
from groupvit_fast.model.layers import Projector
from groupvit_fast.model.packing import PackedTexts
from groupvit_fast.model.presets import ModelConfig, preset
from groupvit_fast.model.text_encoder import TextEncoder


class GroupEncoding(NamedTuple):
    """What segmentation needs of a batch of images.

    groups [B,G,D] and image [B,D], projected and not normalised; maps, per grouping stage the assignment as
    probabilities [B,S_i,L_i] (see `ops.compose_assignments`); grid (h, w), the patch grid with h * w = L_0.
    """

    groups: Tensor
    image: Tensor
    maps: tuple[Tensor, ...]
    grid: tuple[int, int]


class TrainingOutput(NamedTuple):
    """What the losses need: image [B,D] and text [B,1+K,D], projected and not normalised; areas [B,G], how
    many patches of an image each of its groups got.

    groups [B,G,D], projected, is None unless asked for.
    """

    image: Tensor
    text: Tensor
    areas: Tensor
    groups: Tensor | None = None


class Features(NamedTuple):
    """What the encoders give before the projectors: groups [B,G,C], text [U,Ct] and areas [B,G]."""

    groups: Tensor
    text: Tensor
    areas: Tensor


class GroupViT(nn.Module):
    """The model of "GroupViT: Semantic Segmentation Emerges from Text Supervision" (Xu et al., CVPR 2022).

    `logit_scale` and `multi_label_logit_scale` are logarithms; `logit_bias` is what SigLIP's loss adds. The
    last two are None if the configuration has none.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        sizes = config.projector_hidden, config.embed_dim, config.projector_layers
        self.image_encoder = ImageEncoder(config.image)
        self.text_encoder = TextEncoder(config.text)
        self.image_projector = Projector(config.image.width, *sizes)
        self.text_projector = Projector(config.text.width, *sizes)
        self.logit_scale = nn.Parameter(torch.tensor(config.logit_scale_init))
        self.multi_label_logit_scale = (
            nn.Parameter(torch.tensor(config.logit_scale_init)) if config.multi_label_logit_scale else None
        )
        bias = config.logit_bias_init
        self.logit_bias = None if bias is None else nn.Parameter(torch.tensor(bias))

    def encode_image(self, pixels: Tensor) -> Tensor:
        """pixels [B,3,H,W], normalised with ImageNet statistics -> [B,D], projected and not normalised."""
        return self.image_projector(self.image_encoder(pixels).pooled)

    def encode_text(self, tokens: Tensor) -> Tensor:
        """tokens int64 [N,T], zero-padded -> [N,D], projected and not normalised."""
        return self.text_projector(self.text_encoder(tokens))

    def segment(self, images: Any, labels: Sequence[str], **options: Any) -> list[Tensor]:
        """Zero-shot segmentation of uint8 RGB images [H, W, 3] into the classes named by `labels`.

        Options (protocol, background_threshold), result and errors: `segmentation.photos.segment_photos`.
        """
        # By name, when called: this one method leads upwards, and the model must be importable without it.
        photos = importlib.import_module("groupvit_fast.segmentation.photos")
        return photos.segment_photos(self, images, labels, **options)

    def save_pretrained(self, directory: str | Path, *, about: Mapping[str, Any] | None = None) -> None:
        """Write model.safetensors, config.json and a model card; `load_model(directory)` reads them back.

        `about` may tell data, recipe and results for the card. A directory with an older checkpoint is
        replaced as a whole; CheckpointError, with nothing changed, if anything else is in it.
        """
        write_checkpoint(self.state_dict(), self.config, directory, about=about)

    def encode_groups(self, pixels: Tensor) -> GroupEncoding:
        """pixels [B,3,H,W] -> `GroupEncoding`. RuntimeError in training mode: batch norm would mix images."""
        if self.training:
            raise RuntimeError("encode_groups needs evaluation mode; call model.eval() first")
        encoding = self.image_encoder(pixels, return_maps=True)
        return GroupEncoding(
            self.image_projector(encoding.groups),
            self.image_projector(encoding.pooled),
            encoding.maps,
            self.image_encoder.grid(pixels),
        )

    def forward(
        self,
        pixels: Tensor,
        texts: Tensor | PackedTexts,
        text_index: Tensor,
        noise_key: Tensor | None = None,
        *,
        return_groups: bool = False,
    ) -> TrainingOutput:
        """One training forward of everything, so that one wrapper (DDP, FSDP, compile) sees one call.

        pixels [B,3,H,W]; texts int64 [U,T], distinct rows, or the same packed; text_index int64 [B,1+K],
        which of them belong to each image (the caption first); noise_key int64 [2] or None for no
        noise. With `return_groups` every group is projected too; RuntimeError if the projector has
        batch norm, which is for images.
        """
        features = self.encode(pixels, texts, noise_key)
        return self.project(features, text_index, return_groups=return_groups)

    def encode(
        self, pixels: Tensor, texts: Tensor | PackedTexts, noise_key: Tensor | None = None
    ) -> Features:
        """The part of `forward` that looks at each image and each text on its own."""
        encoding = self.image_encoder(pixels, noise_key=noise_key)
        return Features(encoding.groups, self.text_encoder(texts), encoding.areas)

    def project(
        self, features: Features, text_index: Tensor, *, return_groups: bool = False
    ) -> TrainingOutput:
        """The part of `forward` that looks at the batch as a whole: projectors and their batch norm."""
        if return_groups and self.config.projector_layers > 1:
            raise RuntimeError("return_groups needs projector_layers=1: batch norm takes images, not groups")
        # Rows are repeated before the projector: its batch norm must weigh a text as often as it occurs.
        text = self.text_projector(features.text[text_index])
        groups = self.image_projector(features.groups) if return_groups else None
        image = self.image_projector(features.groups.mean(dim=1))
        return TrainingOutput(image, text, features.areas, groups)


def create_model(name_or_config: str | ModelConfig, *, seed: int | None = None) -> GroupViT:
    """A freshly initialised model of a preset or configuration, in training mode on the CPU.

    With a seed the weights depend on nothing else, and the global random state is left as it was.
    """
    config = preset(name_or_config) if isinstance(name_or_config, str) else name_or_config
    if seed is None:
        return GroupViT(config)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return GroupViT(config)
