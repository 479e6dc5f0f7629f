"""Labelled images for evaluation: the folder layouts of the public benchmarks and of any VOC-like folder.

A dataset lists (image, mask) pairs and turns mask values into labels 0..K-1, with 255 for pixels that do not
count. What is wrong with the whole dataset is an error at once; what is wrong with one pair is an error when
that pair is read, so that an evaluation can name it, leave it out and go on.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from groupvit_fast.console import UserError
from groupvit_fast.data.images import read_image
from groupvit_fast.segmentation.metrics import IGNORE
from groupvit_fast.segmentation.prompts import BACKGROUND, read_class_file

CLASS_LISTS = Path(__file__).parent / "classes"
_OUT_OF_RANGE = 254
MAX_CLASSES = _OUT_OF_RANGE


@dataclass(frozen=True)
class Layout:
    """Where a dataset keeps its files, relative to its root, and how its masks are to be read."""

    images: str
    masks: str
    image_suffix: str = ".jpg"
    mask_suffix: str = ".png"
    split: str | None = None
    """File with one key a line; None: every image in `images`, also in folders below it."""
    zero_is_ignored: bool = False
    """Mask value 0 is left out and value k is class k - 1; otherwise value k is class k."""


@dataclass(frozen=True)
class Item:
    """One pair; `key` names it in reports."""

    key: str
    image: Path
    mask: Path


class SegmentationDataset:
    """Pairs of images and masks with a class list.

    class_names: entry k is label k; synonyms are separated by `|`.
    background: whether label 0 is background, which is predicted by a rule and never by its name.
    """

    def __init__(self, name: str, root: Path | str, layout: Layout, class_names: list[str]) -> None:
        if len(class_names) > MAX_CLASSES:
            raise UserError(
                f"dataset {name}: {len(class_names)} classes; 8-bit masks hold at most {MAX_CLASSES}"
            )
        self.name = name
        self.root = Path(root)
        self.layout = layout
        self.class_names = class_names
        self.background = class_names[0].lower() == BACKGROUND
        if self.background and len(class_names) == 1:
            raise UserError(f"dataset {name}: the class list has nothing but background")
        self.items = _list_items(name, self.root, layout)
        first = 1 if layout.zero_is_ignored else 0
        self._label_of_value = np.full(256, _OUT_OF_RANGE, dtype=np.uint8)
        self._label_of_value[first : first + len(class_names)] = np.arange(len(class_names))
        self._label_of_value[[0, IGNORE] if layout.zero_is_ignored else IGNORE] = IGNORE

    @property
    def foreground(self) -> list[str]:
        """The class entries that are compared with groups, in label order."""
        return self.class_names[1:] if self.background else self.class_names

    def __len__(self) -> int:
        return len(self.items)

    def read(self, item: Item) -> tuple[Tensor, Tensor]:
        """Image uint8 [H, W, 3] and labels uint8 [H, W]; UserError if this pair cannot be used."""
        image = torch.tensor(read_image(item.image))
        target = self._read_mask(item)
        if tuple(image.shape[:2]) != target.shape:
            raise UserError(
                f"{item.mask}: mask is {target.shape[1]} x {target.shape[0]} pixels but its image is "
                f"{image.shape[1]} x {image.shape[0]}"
            )
        return image, torch.from_numpy(target)

    def _read_mask(self, item: Item) -> np.ndarray:
        values = read_mask(item.mask)
        labels = self._label_of_value[values.clip(0, 255)]
        wrong = (labels == _OUT_OF_RANGE) | (values > 255) | (values < 0)
        if wrong.any():
            raise UserError(
                f"{item.mask}: mask value {values[wrong].flat[0]} is out of range for "
                f"{len(self.class_names)} classes; check the class list of dataset {self.name}"
            )
        return labels


class VocFolder(SegmentationDataset):
    """Any folder in the layout of Pascal VOC with a `classes.txt`, line k naming label k.

    root/JPEGImages/KEY.jpg, root/SegmentationClass/KEY.png, root/ImageSets/Segmentation/SPLIT.txt
    """

    def __init__(self, root: Path | str, split: str = "val") -> None:
        root = Path(root)
        _require_folder("voc-folder", root)
        super().__init__("voc-folder", root, _voc_layout(split), read_class_file(root / "classes.txt"))


def _voc_layout(split: str = "val", **changes: object) -> Layout:
    return Layout("JPEGImages", "SegmentationClass", split=f"ImageSets/Segmentation/{split}.txt", **changes)


def _context_layout(**changes: object) -> Layout:
    split = "ImageSets/SegmentationContext/val.txt"
    return Layout("JPEGImages", "SegmentationClassContext", split=split, **changes)


_COCO = "val2017"
BENCHMARKS = {
    "voc21": _voc_layout(),
    "voc20": _voc_layout(zero_is_ignored=True),
    "context60": _context_layout(),
    "context59": _context_layout(zero_is_ignored=True),
    "coco_object": Layout(f"images/{_COCO}", f"annotations/{_COCO}", mask_suffix="_instanceTrainIds.png"),
    "coco_stuff": Layout(f"images/{_COCO}", f"annotations/{_COCO}", mask_suffix="_labelTrainIds.png"),
    "cityscapes": Layout("leftImg8bit/val", "gtFine/val", "_leftImg8bit.png", "_gtFine_labelTrainIds.png"),
    "ade20k": Layout("images/validation", "annotations/validation", zero_is_ignored=True),
}
"""Public benchmarks; the class list of each is `classes/NAME.txt`, which also names its source."""

DATASETS = ("voc-folder", *BENCHMARKS)


def open_dataset(name: str, root: Path | str) -> SegmentationDataset:
    """The dataset called `name` in the folder `root`; an unknown name is an error with the nearest one."""
    if name == "voc-folder":
        return VocFolder(root)
    if name not in BENCHMARKS:
        nearest = difflib.get_close_matches(name, DATASETS, n=1)
        hint = f"did you mean {nearest[0]}? " if nearest else ""
        raise UserError(f"unknown dataset {name!r}: {hint}choose one of {', '.join(DATASETS)}")
    return SegmentationDataset(name, root, BENCHMARKS[name], benchmark_classes(name))


def benchmark_classes(name: str) -> list[str]:
    """The class entries of a public benchmark."""
    return read_class_file(CLASS_LISTS / f"{name}.txt")


def read_mask(path: Path) -> np.ndarray:
    """Integer [H, W] values of a label image: palette indices or grey values, never colours."""
    try:
        with Image.open(path) as image:
            if image.mode not in ("P", "L", "I;16", "I"):
                raise UserError(f"{path}: mask has mode {image.mode}; labels must be a palette or grey image")
            return np.asarray(image)
    except FileNotFoundError:
        raise UserError(f"{path}: the image has no mask there") from None
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise UserError(f"{path}: not a readable mask ({error})") from None


def _require_folder(name: str, folder: Path) -> None:
    if not folder.is_dir():
        raise UserError(f"dataset {name}: {folder} is not a folder; check --root")


def _list_items(name: str, root: Path, layout: Layout) -> list[Item]:
    _require_folder(name, root)
    images, masks = root / layout.images, root / layout.masks
    _require_folder(name, images)
    _require_folder(name, masks)
    if layout.split is not None:
        keys = _read_split(name, root / layout.split)
    else:
        found = images.rglob(f"*{layout.image_suffix}")
        keys = sorted(path.relative_to(images).as_posix().removesuffix(layout.image_suffix) for path in found)
        if not keys:
            raise UserError(f"dataset {name}: no *{layout.image_suffix} in {images}")
    return [
        Item(key, images / f"{key}{layout.image_suffix}", masks / f"{key}{layout.mask_suffix}")
        for key in keys
    ]


def _read_split(name: str, path: Path) -> list[str]:
    try:
        keys = path.read_text(encoding="utf-8").split()
    except FileNotFoundError:
        raise UserError(f"dataset {name}: no split file {path}; it lists one image key a line") from None
    except UnicodeDecodeError:
        raise UserError(f"dataset {name}: split file {path} is not a UTF-8 text file") from None
    if not keys:
        raise UserError(f"dataset {name}: split file {path} lists no image")
    if len(set(keys)) < len(keys):
        twice = next(key for number, key in enumerate(keys) if key in keys[:number])
        raise UserError(f"dataset {name}: split file {path} lists {twice} twice, which would count it twice")
    return keys
