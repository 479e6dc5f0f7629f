"""A small stand-in for the model, and small datasets on disk."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from groupvit_fast.model import GroupEncoding, ModelConfig
from groupvit_fast.model.presets import ImageConfig, TextConfig


class FakeModel(torch.nn.Module):
    """Groups by colour, names at random: many regions and classes, which untrained weights never give."""

    def __init__(self, groups: int = 6, dim: int = 12, patch: int = 4, image_size: int = 32, seed: int = 0):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        stages = (2 * groups, groups)
        image = ImageConfig(
            image_size=image_size,
            patch_size=patch,
            group_tokens=stages,
            output_groups=stages,
            depths=(1, 1, 1),
        )
        self.config = ModelConfig(image=image, text=TextConfig(context_length=16))
        self.logit_scale = torch.nn.Parameter(torch.tensor(3.0))
        self.first = torch.nn.Parameter(torch.randn(stages[0], 3, generator=generator) * 3)
        self.second = torch.nn.Parameter(torch.randn(groups, stages[0], generator=generator))
        self.names = torch.nn.Parameter(torch.randn(groups, 3, dim, generator=generator))
        self.words = torch.nn.Parameter(torch.randn(997, dim, generator=generator))
        self.windows_encoded = 0
        self.requires_grad_(False)

    def encode_groups(self, pixels: torch.Tensor) -> GroupEncoding:
        assert not self.training
        self.windows_encoded += len(pixels)
        patches = F.avg_pool2d(pixels, self.config.image.patch_size)
        colours = patches.flatten(2)
        first = torch.einsum("gc,bcl->bgl", self.first, colours).softmax(dim=1)
        second = self.second.expand(len(pixels), -1, -1).softmax(dim=1)
        members = second @ first
        means = torch.einsum("bgl,bcl->bgc", members, colours) / members.sum(dim=2, keepdim=True)
        groups = torch.einsum("bgc,gcd->bgd", means, self.names) + self.names.sum(dim=1)
        return GroupEncoding(groups, groups.mean(dim=1), (first, second), tuple(patches.shape[-2:]))

    def encode_text(self, tokens: torch.Tensor) -> torch.Tensor:
        place = torch.arange(tokens.shape[1]) + 1
        return (self.words[tokens % 997] * torch.cos(place)[:, None]).sum(dim=1)


@pytest.fixture
def fake_model() -> FakeModel:
    return FakeModel().eval()


def blobs(height: int, width: int, rng: np.random.Generator) -> np.ndarray:
    """A smooth random photo, uint8 [height, width, 3]."""
    small = rng.integers(0, 256, (max(3, height // 8), max(3, width // 8), 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC))


def make_voc(root: Path, *, sizes=((32, 32),) * 5, names=("sky", "sea", "sand", "boat"), seed=0) -> Path:
    """A folder in VOC layout with random photos and masks; 255 lies along the mask's left edge."""
    rng = np.random.default_rng(seed)
    for folder in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation"):
        (root / folder).mkdir(parents=True)
    keys = [f"photo_{index:03d}" for index in range(len(sizes))]
    for key, (height, width) in zip(keys, sizes, strict=True):
        Image.fromarray(blobs(height, width, rng)).save(root / f"JPEGImages/{key}.jpg", quality=95)
        coarse = rng.integers(0, len(names), (4, 4)).astype(np.uint8)
        mask = Image.fromarray(coarse).resize((width, height), Image.Resampling.NEAREST)
        mask = np.array(mask)
        mask[:, 0] = 255
        picture = Image.fromarray(mask, mode="P")
        picture.putpalette(rng.integers(0, 256, 768, dtype=np.uint8).tobytes())
        picture.save(root / f"SegmentationClass/{key}.png")
    (root / "ImageSets/Segmentation/val.txt").write_text("\n".join(keys) + "\n")
    (root / "classes.txt").write_text("\n".join(names) + "\n")
    return root


@pytest.fixture
def voc(tmp_path) -> Path:
    return make_voc(tmp_path / "voc")


@pytest.fixture
def tools() -> SimpleNamespace:
    """The helpers above, for tests that need them with other arguments."""
    return SimpleNamespace(FakeModel=FakeModel, blobs=blobs, make_voc=make_voc, replace=replace)
