"""Labelled images for zero-shot classification: class folders or shards in, ImageNet's crops out.

The transform is the one that CLIP, timm and the GroupViT paper evaluate ImageNet with: shorter side to 256
bilinearly, centre crop of 224, normalised.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from nvidia.dali import fn, pipeline_def, types

from groupvit_fast.console import UserError
from groupvit_fast.data.decode import (
    default_threads,
    normalized,
    numbered_device,
    to_torch,
    undecodable,
)
from groupvit_fast.data.images import MAX_PIXELS
from groupvit_fast.data.probe import InMemory, probe_image
from groupvit_fast.data.scan import IMAGE_EXTENSIONS


class LabelledImage(NamedTuple):
    """One image file with its class number."""

    name: str  # for messages: a path, or shard and key
    data: bytes
    label: int


class ClassFolders:
    """Images in one folder a class, as `val/n01440764/*.JPEG`; classes in the order of their names.

    `classes` are the folder names; label i is the folder classes[i]. Iterating reads the files in order.
    """

    def __init__(self, root: str | Path):
        root = Path(root)
        if not root.is_dir():
            raise UserError(f"{root}: no such folder; name the folder that holds one folder a class")
        self.classes = sorted(path.name for path in root.iterdir() if path.is_dir() and path.name[0] != ".")
        self.files = [
            (path, label)
            for label, name in enumerate(self.classes)
            for path in sorted((root / name).rglob("*"))
            if path.suffix[1:].lower() in IMAGE_EXTENSIONS and path.is_file()
        ]
        if not self.files:
            raise UserError(
                f"{root}: no images in class folders (looked for {root}/CLASS/*.jpg, .png, .webp)"
            )

    def __len__(self) -> int:
        return len(self.files)

    def __iter__(self) -> Iterator[LabelledImage]:
        for path, label in self.files:
            yield LabelledImage(str(path), path.read_bytes(), label)


class LabelledShards:
    """Images with a class number in a `.cls` member, as the usual ImageNet shards have it."""

    def __init__(self, shards: Iterable[str | Path]):
        self.shards = [str(shard) for shard in shards]

    def __iter__(self) -> Iterator[LabelledImage]:
        import webdataset

        for sample in webdataset.WebDataset(self.shards, shardshuffle=False, empty_check=False):
            name = f"{sample['__url__']}:{sample['__key__']}"
            image = next((sample[kind] for kind in IMAGE_EXTENSIONS if kind in sample), None)
            if image is None:
                continue
            try:
                yield LabelledImage(name, image, int(sample["cls"]))
            except (KeyError, ValueError):
                raise UserError(f"{name}: no class number; expected a .cls member beside the image") from None


def evaluation_batches(
    images: Iterable[LabelledImage],
    *,
    batch_size: int = 64,
    resize: int = 256,
    crop: int = 224,
    device: str | torch.device = "cpu",
    num_threads: int | None = None,
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Pairs (float32 [B, 3, crop, crop] on `device`, int64 labels [B] on the CPU); the last may be smaller.

    A file that is no image, or breaks while it is decoded, is a UserError that names it: an accuracy over
    fewer images would be another number.
    """
    if not 0 < crop <= resize:
        raise UserError(f"crop {crop} must lie between 1 and the resized shorter side, {resize}")
    device = numbered_device(device)
    on_gpu = device.type == "cuda"
    stream, ahead = iter(images), deque()

    def source() -> tuple:
        """The next batch; the pipeline asks for it while an earlier one is still being decoded."""
        if not (batch := list(islice(stream, batch_size))):
            raise StopIteration
        ahead.append(batch)
        return _encoded(batch), *_geometry(batch, resize, crop)

    pipeline = _evaluation_pipeline(
        source,
        crop,
        "mixed" if on_gpu else "cpu",
        batch_size=batch_size,
        num_threads=num_threads or default_threads(),
        device_id=device.index if on_gpu else None,
    )
    pipeline.build()
    while True:
        try:
            (pixels,) = pipeline.run()
        except StopIteration:
            return
        except RuntimeError as error:
            suspects = [image for batch in ahead for image in batch]
            found = undecodable(_encoded(suspects), device)
            if not found:
                raise
            raise UserError(f"{suspects[found[0]].name}: cannot be decoded; repair or remove it") from error
        yield to_torch(pixels, device), torch.tensor([image.label for image in ahead.popleft()])


@pipeline_def(enable_conditionals=False)
def _evaluation_pipeline(source, crop: int, decoder_device: str):
    encoded, size, corner = fn.external_source(source=source, num_outputs=3, batch=True)
    pixels = fn.decoders.image(encoded, device=decoder_device, output_type=types.RGB)
    pixels = fn.resize(pixels, size=size, interp_type=types.INTERP_LINEAR, antialias=True)
    return normalized(fn.slice(pixels, corner, [crop, crop], axis_names="HW"))


def _encoded(batch: list[LabelledImage]) -> list[np.ndarray]:
    return [np.frombuffer(image.data, np.uint8) for image in batch]


def _geometry(batch: list[LabelledImage], resize: int, crop: int) -> tuple[np.ndarray, np.ndarray]:
    """Size after resizing and corner of the crop, float32 and int32 [B, 2] as (height, width).

    The long side is cut down to an integer and the corner rounded, as torchvision does.
    """
    sizes = []
    for image in batch:
        width, height, fault = probe_image(InMemory(image.data), MAX_PIXELS)
        if fault:
            raise UserError(f"{image.name}: {fault}")
        sizes.append((height, width))
    shape = np.array(sizes)
    size = resize * shape // shape.min(1, keepdims=True)
    return size.astype(np.float32), np.rint((size - crop) / 2).astype(np.int32)
