"""The built-in dataset: scenes written as webdataset shards for training and as a VOC folder for evaluation.

    root/train/shapes-000000.tar ...            JPEG + txt, read by the same loader as web-scale shards
    root/voc/JPEGImages/000000000.jpg           the held-out scenes, read by the same evaluator as Pascal VOC,
    root/voc/SegmentationClass/000000000.png    with their exact masks (palette PNG: label = index),
    root/voc/ImageSets/Segmentation/val.txt     their keys,
    root/voc/classes.txt                        and the name of each label, one a line

Nothing of the masks or of the list of classes reaches the training shards.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from groupvit_fast.data.shapes_scenes import CLASS_NAMES, Scene, draw_scene
from groupvit_fast.data.shards import Pair, write_shards

SCENE_SIZE = 96
TRAIN, HELD_OUT = 0, 1


class ShapesPaths(NamedTuple):
    """Where `write_shapes` put things."""

    shards: list[Path]
    voc_root: Path
    class_names: tuple[str, ...]


def write_shapes(
    root: str | Path,
    *,
    train_samples: int = 12_000,
    val_samples: int = 200,
    seed: int = 0,
    progress: Callable[[int], None] | None = None,
) -> ShapesPaths:
    """Draw the dataset under `root`; `progress(1)` is called after every scene.

    Scene i of a split depends on (seed, split, i) alone, so a larger dataset begins with the smaller one.
    Errors: OSError where `root` can not be written.
    """
    root = Path(root)
    pairs = _pairs(seed, train_samples, progress)
    shards = write_shards(pairs, root / "train", prefix="shapes-", samples_per_shard=4000)
    _write_voc(root / "voc", seed, val_samples, progress)
    return ShapesPaths(shards, root / "voc", CLASS_NAMES)


def _scenes(seed: int, split: int, count: int, progress: Callable[[int], None] | None) -> Iterator[Scene]:
    for number in range(count):
        yield draw_scene(np.random.default_rng([seed, split, number]), SCENE_SIZE)
        if progress:
            progress(1)


def _pairs(seed: int, count: int, progress: Callable[[int], None] | None) -> Iterator[Pair]:
    for scene in _scenes(seed, TRAIN, count, progress):
        yield Pair(_jpeg(scene.image), "jpg", scene.caption)


def _jpeg(image: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    # Full colour resolution: the patterns alternate hues every few pixels.
    Image.fromarray(image).save(buffer, "JPEG", quality=90, subsampling=0)
    return buffer.getvalue()


def _write_voc(root: Path, seed: int, count: int, progress: Callable[[int], None] | None) -> None:
    folders = [root / name for name in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation")]
    for folder in folders:
        folder.mkdir(parents=True, exist_ok=True)
    images, masks, lists = folders
    for number, scene in enumerate(_scenes(seed, HELD_OUT, count, progress)):
        (images / f"{number:09d}.jpg").write_bytes(_jpeg(scene.image))
        mask = Image.fromarray(scene.mask)
        mask.putpalette(_palette())
        mask.save(masks / f"{number:09d}.png")
    (lists / "val.txt").write_text("".join(f"{number:09d}\n" for number in range(count)), encoding="utf-8")
    (root / "classes.txt").write_text("\n".join(CLASS_NAMES) + "\n", encoding="utf-8")


def _palette() -> bytes:
    """A colour a label, only so that a mask can be looked at."""
    colours = np.random.default_rng(0).integers(40, 256, (len(CLASS_NAMES), 3), dtype=np.uint8)
    return colours.tobytes()
