"""Where the public benchmarks keep their images and masks, and how the masks are to be read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace


@dataclass(frozen=True)
class Layout:
    """Where a dataset keeps its files, relative to its root, and how its masks are to be read.

    "{split}" in a path stands for the split: "val" if nothing else is asked for.
    """

    images: str
    masks: str
    image_suffix: str | tuple[str, ...] = ".jpg"
    mask_suffix: str = ".png"
    keys: str | None = None
    """File with one key a line; None: every image in `images`, also in folders below it."""
    zero_is_ignored: bool = False
    """Mask value 0 is left out and value k is class k - 1; otherwise value k is class k."""
    ignored: int | None = None
    """Mask value of pixels that do not count; None: 255, or 65535 where there are more than 254 classes."""
    colour_masks: bool = False
    """Masks are RGB images with value = red + 256 x green."""
    split_names: Mapping[str, str] = field(default_factory=dict)
    """What the splits are called on disk, where not "val" and "train"."""

    def of_split(self, split: str) -> Layout:
        """The layout with the name of a split filled in."""
        name = self.split_names.get(split, split)
        paths = {key: getattr(self, key) for key in ("images", "masks", "keys")}
        return replace(self, **{key: path and path.replace("{split}", name) for key, path in paths.items()})


def voc_layout(**changes: object) -> Layout:
    return Layout("JPEGImages", "SegmentationClass", keys="ImageSets/Segmentation/{split}.txt", **changes)


def _context_layout(**changes: object) -> Layout:
    keys = "ImageSets/SegmentationContext/{split}.txt"
    return Layout("JPEGImages", "SegmentationClassContext", keys=keys, **changes)


def _coco_layout(suffix: str) -> Layout:
    return Layout("images/{split}2017", "annotations/{split}2017", mask_suffix=suffix)


BENCHMARKS = {
    "voc21": voc_layout(),
    "voc20": voc_layout(zero_is_ignored=True),
    "context60": _context_layout(),
    "context59": _context_layout(zero_is_ignored=True),
    "coco_object": _coco_layout("_instanceTrainIds.png"),
    "coco_stuff": _coco_layout("_labelTrainIds.png"),
    "cityscapes": Layout(
        "leftImg8bit/{split}", "gtFine/{split}", "_leftImg8bit.png", "_gtFine_labelTrainIds.png"
    ),
    "ade20k": Layout(
        "images/{split}", "annotations/{split}", zero_is_ignored=True,
        split_names={"val": "validation", "train": "training"},
    ),
}  # fmt: skip
"""Public benchmarks; the class list of each is `classes/NAME.txt`, which also names its source."""

IMAGENET_S = Layout(
    "{split}", "{split}-segmentation", ".JPEG", ignored=1000, colour_masks=True,
    split_names={"val": "validation", "train": "train-semi"},
)  # fmt: skip
"""ImageNet-S (50, 300 or 919 classes); mask value 0 is everything else, and the class list is the user's."""
