"""What the loader is compared with: webdataset, torch's DataLoader and Pillow, as released recipes use them.

The same recipe, step by step on a picture at a time: random resized crop, flip, RandAugment to timm's rules,
normalise, random erasing. Texts go through the package's own tokenizer, which is faster than the usual one,
and nouns are found while loading, as the released code does.
"""

from __future__ import annotations

import io
import math
import random
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import webdataset
from PIL import Image, ImageEnhance, ImageOps
from torch import Tensor
from torch.utils.data import DataLoader

from groupvit_fast.data import text
from groupvit_fast.data.images import IMAGENET_MEAN, IMAGENET_STD

SIZE = 224
_MEAN, _STD = (torch.tensor(values).view(3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
_BYTES = range(256)


def decode(data: bytes) -> Image.Image:
    """A whole picture."""
    with Image.open(io.BytesIO(data)) as image:
        return image.convert("RGB")


def crop_and_flip(image: Image.Image, rng: random.Random) -> Image.Image:
    """Random resized crop of 8 to 100 % of the area, mirrored half of the time."""
    width, height = image.size
    for _ in range(10):
        area, ratio = (
            width * height * rng.uniform(0.08, 1),
            math.exp(rng.uniform(*map(math.log, (3 / 4, 4 / 3)))),
        )
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if w <= width and h <= height:
            break
    else:
        w = h = min(width, height)
    x, y = rng.randint(0, width - w), rng.randint(0, height - h)
    image = image.crop((x, y, x + w, y + h)).resize((SIZE, SIZE), Image.Resampling.BILINEAR)
    return ImageOps.mirror(image) if rng.random() < 0.5 else image


def rand_augment(image: Image.Image, rng: random.Random) -> Image.Image:
    """timm's rand-m9-mstd0.5-inc1: two layers, each with one of 15 transforms half of the time."""
    for _ in range(2):
        number = rng.randrange(15)
        if rng.random() < 0.5:
            level = min(10.0, max(0.0, rng.gauss(9, 0.5)))
            image = _transform(image, number, level, level if rng.random() < 0.5 else -level)
    return image


def _transform(image: Image.Image, number: int, level: float, signed: float) -> Image.Image:
    factor, outside = max(0.1, 1 + 0.09 * signed), {"resample": Image.Resampling.BILINEAR}
    outside["fillcolor"] = (124, 116, 104)

    def affine(*matrix: float) -> Image.Image:
        return image.transform(image.size, Image.Transform.AFFINE, matrix, **outside)

    def point(values: list[int]) -> Image.Image:
        return image.point(values * 3)

    keep, threshold, add = 256 - (1 << (4 + int(level * 0.4))), 256 - int(level * 25.6), int(level * 11)
    return (
        lambda: ImageOps.autocontrast(image),
        lambda: ImageOps.equalize(image),
        lambda: ImageOps.invert(image),
        lambda: image.rotate(3 * signed, **outside),
        lambda: point([i & keep for i in _BYTES]),
        lambda: point([i if i < threshold else 255 - i for i in _BYTES]),
        lambda: point([min(255, i + add) if i < 128 else i for i in _BYTES]),
        lambda: ImageEnhance.Color(image).enhance(factor),
        lambda: ImageEnhance.Contrast(image).enhance(factor),
        lambda: ImageEnhance.Brightness(image).enhance(factor),
        lambda: ImageEnhance.Sharpness(image).enhance(factor),
        lambda: affine(1, 0.03 * signed, 0, 0, 1, 0),
        lambda: affine(1, 0, 0, 0.03 * signed, 1, 0),
        lambda: affine(1, 0, 0.045 * signed * SIZE, 0, 1, 0),
        lambda: affine(1, 0, 0, 0, 1, 0.045 * signed * SIZE),
    )[number]()


def normalize(image: Image.Image) -> Tensor:
    """torchvision's ToTensor and Normalize."""
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous().float().div_(255)
    return pixels.sub_(_MEAN).div_(_STD)


def erase(pixels: Tensor, rng: random.Random) -> Tensor:
    """timm's random erasing with noise, a quarter of the time."""
    if rng.random() < 0.25:
        for _ in range(10):
            area = SIZE * SIZE * rng.uniform(0.02, 1 / 3)
            ratio = math.exp(rng.uniform(*map(math.log, (0.3, 1 / 0.3))))
            h, w = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            if h < SIZE and w < SIZE:
                y, x = rng.randint(0, SIZE - h), rng.randint(0, SIZE - w)
                pixels[:, y : y + h, x : x + w] = torch.randn(3, h, w)
                break
    return pixels


def picture(data: bytes, rng: random.Random, *, augment: bool = True) -> Tensor:
    """From a file to a training picture [3, 224, 224]."""
    image = crop_and_flip(decode(data), rng)
    return erase(normalize(rand_augment(image, rng)), rng) if augment else normalize(image)


def texts(caption: str, prompts: int, rng: random.Random) -> Tensor:
    """Tokens [1 + prompts, 77] of a caption and of prompts around its nouns, found now."""
    caption = text.clean(caption)
    return text.tokenize([caption, *text.draw_prompts(caption, prompts, rng)])


def batches(
    shards: list[Path], *, batch_size: int, workers: int, prompts: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless batches of pictures and tokens, made by `workers` processes."""
    rng = random.Random(0)

    def sample(pair: tuple[bytes, bytes]) -> tuple[Tensor, Tensor]:
        return picture(pair[0], rng), texts(pair[1].decode(), prompts, rng)

    pipeline = webdataset.WebDataset(
        [str(shard) for shard in shards], resampled=True, shardshuffle=False, nodesplitter=None
    )
    pipeline = pipeline.shuffle(1000, initial=100).to_tuple("jpg", "txt").map(sample)
    pipeline = pipeline.batched(batch_size, partial=False)
    loader = DataLoader(
        pipeline, batch_size=None, num_workers=workers, worker_init_fn=lambda _: torch.set_num_threads(1)
    )
    return iter(loader)
