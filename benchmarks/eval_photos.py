"""What the evaluation benchmark looks at: photos of VOC's sizes, and a model whose groups follow colours."""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from itertools import cycle, islice, pairwise
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from groupvit_fast.model import GroupEncoding
from groupvit_fast.segmentation.prompts import ClassText

# Height and width of the first photos of VOC 2012's validation split, and how many regions they have here.
SIZES = ((366, 500), (375, 500), (335, 500), (333, 500), (500, 375), (375, 500), (500, 334), (281, 500))
REGIONS = 12


def make_photos(root: Path, count: int, *, sizes: Sequence[tuple[int, int]] = SIZES, seed: int = 0) -> None:
    """A folder in VOC layout, background and 20 classes: regions with colour, gradient and texture."""
    rng = np.random.default_rng(seed)
    names = (Path(__file__).parents[1] / "groupvit_fast/segmentation/classes/voc21.txt").read_text()
    colours = rng.integers(20, 236, (21, 3))
    for folder in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    keys = [f"2007_{number:06d}" for number in range(count)]
    for key, (height, width) in zip(keys, islice(cycle(sizes), count), strict=True):
        mask = _regions(height, width, rng)
        slope = np.linspace(-30, 30, width)[None, :, None] * rng.uniform(-1, 1, 3)
        texture = np.kron(rng.normal(0, 9, (-(-height // 2), -(-width // 2), 3)), np.ones((2, 2, 1)))
        photo = colours[mask] + slope + texture[:height, :width]
        photo = Image.fromarray(photo.clip(0, 255).astype(np.uint8))
        photo.save(root / f"JPEGImages/{key}.jpg", quality=90)
        border = (mask != np.roll(mask, 1, 0)) | (mask != np.roll(mask, 1, 1))
        picture = Image.fromarray(np.where(border, 255, mask).astype(np.uint8), mode="P")
        picture.putpalette(rng.integers(0, 256, 768, dtype=np.uint8).tobytes())
        picture.save(root / f"SegmentationClass/{key}.png")
    (root / "ImageSets/Segmentation/val.txt").write_text("\n".join(keys) + "\n")
    (root / "classes.txt").write_text(names)


def _regions(height: int, width: int, rng: np.random.Generator) -> np.ndarray:
    """Class of each pixel [height, width]: that of the nearest of some points, distances bent by waves."""
    y, x = np.mgrid[:height, :width].astype(np.float32)
    y, x = y + 12 * np.sin(x / 31), x + 12 * np.sin(y / 23)
    points = rng.uniform(0, 1, (REGIONS, 2)) * (height, width)
    distance = [(y - row) ** 2 + (x - column) ** 2 for row, column in points]
    return rng.integers(0, 21, REGIONS)[np.argmin(distance, axis=0)]


class ColourGroups(nn.Module):
    """A model at its full cost whose maps and group features are replaced by ones that follow colours."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.model, self.config = model, model.config
        self.logit_scale = model.logit_scale
        groups = self.config.image.output_groups
        self.prototypes = nn.Parameter(torch.randn(groups[0], 3, generator=generator) * 4)
        self.merges = nn.ParameterList(
            torch.randn(more, fewer, generator=generator).T * 4 for more, fewer in pairwise(groups)
        )
        self.features = nn.Parameter(torch.randn(groups[-1], 3, self.config.embed_dim, generator=generator))
        self.requires_grad_(False)

    def encode_text(self, tokens: Tensor) -> Tensor:
        # Random weights give every name nearly the same embedding; noise by name tells them apart.
        encoded = self.model.encode_text(tokens)
        seeds = tokens.double() @ torch.arange(1.0, tokens.shape[1] + 1, dtype=torch.float64).to(
            tokens.device
        )
        phase = torch.arange(1, encoded.shape[1] + 1, device=tokens.device) * seeds[:, None]
        return encoded * 0.01 + torch.sin(phase).to(encoded)

    def encode_groups(self, pixels: Tensor) -> GroupEncoding:
        encoding = self.model.encode_groups(pixels)
        colours = F.avg_pool2d(pixels, self.config.image.patch_size).flatten(2)
        maps = [torch.einsum("gc,bcl->bgl", self.prototypes, colours).softmax(dim=1)]
        maps += [merge.softmax(dim=0).expand(len(pixels), -1, -1) for merge in self.merges]
        members = reduce(lambda below, above: above @ below, maps)
        means = torch.einsum("bgl,bcl->bgc", members, colours) / members.sum(dim=2, keepdim=True)
        groups = torch.einsum("bgc,gcd->bgd", means, self.features)
        return GroupEncoding(groups, groups.mean(dim=1), tuple(maps), encoding.grid)


class Replay(nn.Module):
    """A model that has the encodings of some windows ready: `all` at once, or one after the other."""

    def __init__(self, model: nn.Module, windows: Sequence[Tensor]) -> None:
        super().__init__()
        self.config, self.logit_scale = model.config, model.logit_scale
        with torch.no_grad():
            self.all = model.encode_groups(torch.stack(list(windows)))
            self.each = [model.encode_groups(window[None]) for window in windows]
        self.answers: list[GroupEncoding] = []

    def twice(self) -> Replay:
        """Ready for one image: the released code asks twice for each window."""
        self.answers = [encoding for encoding in reversed(self.each) for _ in range(2)]
        return self

    def encode_groups(self, pixels: Tensor) -> GroupEncoding:
        return self.answers.pop()


def random_text(classes: int, dim: int) -> ClassText:
    """Embeddings of `classes` names, far from each other."""
    generator = torch.Generator().manual_seed(2)
    return ClassText(
        F.normalize(torch.randn(classes, dim, generator=generator), dim=1), torch.arange(classes)
    )
