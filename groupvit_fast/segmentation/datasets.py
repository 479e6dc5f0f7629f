"""Labelled images for evaluation: the folder layouts of the public benchmarks and of folders of one's own.

A dataset lists (image, mask) pairs and turns mask values into labels 0..K-1, and into
`metrics.ignored_label` for pixels that do not count. What is wrong with the whole dataset is an error at
once; what is wrong with one pair is an error when that pair is read, so that an evaluation can name it, leave
it out and go on.
"""

from __future__ import annotations

import difflib
import json
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from groupvit_fast.console import UserError
from groupvit_fast.data.images import read_image
from groupvit_fast.segmentation.layouts import BENCHMARKS, IMAGENET_S, Layout, voc_layout
from groupvit_fast.segmentation.metrics import ignored_label
from groupvit_fast.segmentation.prompts import BACKGROUND, check_classes, read_class_file

CLASS_LISTS = Path(__file__).parent / "classes"
MOST_CLASSES = 65534
_OUT_OF_RANGE = -1


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

    def __init__(
        self, name: str, root: Path | str, layout: Layout, class_names: list[str], split: str = "val"
    ) -> None:
        if len(class_names) > MOST_CLASSES:
            raise UserError(
                f"dataset {name}: {len(class_names)} classes; 16-bit masks hold at most {MOST_CLASSES}"
            )
        self.name = name
        self.root = Path(root)
        self.layout = layout.of_split(split)
        self.split = split
        self.class_names = class_names
        self.background = class_names[0].lower() == BACKGROUND
        if self.background and len(class_names) == 1:
            raise UserError(f"dataset {name}: the class list has nothing but background")
        self.items = _list_items(name, self.root, self.layout)
        self.ignored = ignored_label(len(class_names))
        first = 1 if layout.zero_is_ignored else 0
        self._label_of_value = np.full(1 << 16, _OUT_OF_RANGE, dtype=np.int32)
        self._label_of_value[first : first + len(class_names)] = np.arange(len(class_names))
        left_out = self.ignored if layout.ignored is None else layout.ignored
        self._label_of_value[[0, left_out] if layout.zero_is_ignored else left_out] = self.ignored

    @property
    def foreground(self) -> list[str]:
        """The class entries that are compared with groups, in label order."""
        return self.class_names[1:] if self.background else self.class_names

    def __len__(self) -> int:
        return len(self.items)

    def read(self, item: Item) -> tuple[Tensor, Tensor]:
        """Image uint8 [H, W, 3] and labels [H, W], uint8 (int32 where there are more than 254 classes).

        UserError if this pair cannot be used.
        """
        image = torch.tensor(read_image(item.image))
        target = self._read_mask(item)
        if tuple(image.shape[:2]) != target.shape:
            raise UserError(
                f"{item.mask}: mask is {target.shape[1]} x {target.shape[0]} pixels but its image is "
                f"{image.shape[1]} x {image.shape[0]}"
            )
        return image, torch.from_numpy(target)

    def _read_mask(self, item: Item) -> np.ndarray:
        values = read_mask(item.mask, colour=self.layout.colour_masks)
        labels = self._label_of_value[values.clip(0, 65535)]
        wrong = (labels == _OUT_OF_RANGE) | (values > 65535) | (values < 0)
        if wrong.any():
            raise UserError(
                f"{item.mask}: mask value {values[wrong].flat[0]} is out of range for "
                f"{len(self.class_names)} classes; check the class list of dataset {self.name}"
            )
        return labels if self.ignored > 255 else labels.astype(np.uint8)


class VocFolder(SegmentationDataset):
    """Any folder in the layout of Pascal VOC with a `classes.txt`, line k naming label k.

    root/JPEGImages/KEY.jpg, root/SegmentationClass/KEY.png, root/ImageSets/Segmentation/SPLIT.txt
    """

    def __init__(self, root: Path | str, split: str = "val", classes: list[str] | None = None) -> None:
        root = Path(root)
        _require_folder("voc-folder", root)
        classes = classes or read_class_file(root / "classes.txt")
        super().__init__("voc-folder", root, voc_layout(), classes, split)


class FolderPair(SegmentationDataset):
    """A folder of images and one of masks with the same names, as Hugging Face datasets are unpacked.

    root/images/KEY.(jpg|png|...), root/masks/KEY.png (or annotations, labels, segmentations), both also below
    root/SPLIT; the classes in root/classes.txt, or in root/id2label.json as a model's configuration has it.
    """

    def __init__(self, root: Path | str, split: str = "val", classes: list[str] | None = None) -> None:
        root = Path(root)
        _require_folder("folder-pair", root)
        base = next((name for name in (split, *_OTHER_NAMES.get(split, ())) if (root / name).is_dir()), "")
        masks = next((name for name in MASK_FOLDERS if (root / base / name).is_dir()), MASK_FOLDERS[0])
        layout = Layout(f"{base}/images".lstrip("/"), f"{base}/{masks}".lstrip("/"), IMAGE_SUFFIXES)
        super().__init__("folder-pair", root, layout, classes or _own_classes(root), split)


MASK_FOLDERS = ("masks", "annotations", "labels", "segmentations")
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".JPEG", ".JPG", ".png", ".webp")
_OTHER_NAMES = {"val": ("validation",), "train": ("training",)}


def _own_classes(root: Path) -> list[str]:
    """The class list that lies in a dataset's folder."""
    table = root / "id2label.json"
    if (root / "classes.txt").exists() or not table.exists():
        return read_class_file(root / "classes.txt")
    try:
        names = {int(number): name for number, name in json.loads(table.read_text(encoding="utf-8")).items()}
    except (ValueError, AttributeError):
        raise UserError(f"{table}: not a table of numbers and names") from None
    if sorted(names) != list(range(len(names))) or not names:
        raise UserError(f"{table}: the numbers must be 0 to {max(len(names) - 1, 0)}, each once")
    return check_classes([names[number] for number in range(len(names))], str(table))


DATASETS = ("voc-folder", "folder-pair", *BENCHMARKS, "imagenet_s")


def open_dataset(
    name: str, root: Path | str, split: str = "val", classes: list[str] | None = None
) -> SegmentationDataset:
    """The dataset called `name` in the folder `root`; an unknown name is an error with the nearest one.

    classes: other names (synonyms, background) for the labels of the dataset, as many as it has.
    """
    if name == "voc-folder":
        return VocFolder(root, split, classes)
    if name == "folder-pair":
        return FolderPair(root, split, classes)
    if name == "imagenet_s":
        return _imagenet_s(Path(root), split, classes)
    if name not in BENCHMARKS:
        nearest = difflib.get_close_matches(name, DATASETS, n=1)
        hint = f"did you mean {nearest[0]}? " if nearest else ""
        raise UserError(f"unknown dataset {name!r}: {hint}choose one of {', '.join(DATASETS)}")
    known = benchmark_classes(name)
    if classes and len(classes) != len(known):
        raise UserError(f"dataset {name} has {len(known)} classes, the class file {len(classes)}")
    if classes and (classes[0].lower() == BACKGROUND) != (known[0].lower() == BACKGROUND):
        raise UserError(f"dataset {name}: the first line of the class file must be {known[0]!r}")
    return SegmentationDataset(name, root, BENCHMARKS[name], classes or known, split)


def _imagenet_s(root: Path, split: str, classes: list[str] | None) -> SegmentationDataset:
    _require_folder("imagenet_s", root)
    classes = classes or read_class_file(root / "classes.txt")
    without = classes[0].lower() != BACKGROUND
    layout = replace(IMAGENET_S, zero_is_ignored=without)
    return SegmentationDataset("imagenet_s", root, layout, classes, split)


def benchmark_classes(name: str) -> list[str]:
    """The class entries of a public benchmark."""
    return read_class_file(CLASS_LISTS / f"{name}.txt")


def read_mask(path: Path, *, colour: bool = False) -> np.ndarray:
    """Integer [H, W] values of a label image: palette index or grey; with `colour`, red + 256 x green."""
    try:
        with Image.open(path) as image:
            if colour and image.mode == "RGB":
                values = np.asarray(image).astype(np.int32)
                return values[..., 0] + 256 * values[..., 1]
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
    if layout.keys is not None:
        suffix = layout.image_suffix
        files = [(key, images / f"{key}{suffix}") for key in _read_keys(name, root / layout.keys)]
    else:
        suffixes = (layout.image_suffix,) if isinstance(layout.image_suffix, str) else layout.image_suffix
        files = _find_images(name, images, suffixes)
    return [Item(key, path, masks / f"{key}{layout.mask_suffix}") for key, path in files]


def _find_images(name: str, folder: Path, suffixes: tuple[str, ...]) -> list[tuple[str, Path]]:
    """(key, path) of every image in a folder and below, in the order of the keys."""
    found: dict[str, Path] = {}
    for path in sorted(folder.rglob("*")):
        suffix = next((suffix for suffix in suffixes if path.name.endswith(suffix)), None)
        if suffix is not None:
            key = path.relative_to(folder).as_posix().removesuffix(suffix)
            if key in found:
                raise UserError(f"dataset {name}: {found[key]} and {path.name} would have the same mask")
            found[key] = path
    if not found:
        raise UserError(f"dataset {name}: no {', '.join(f'*{suffix}' for suffix in suffixes)} in {folder}")
    return sorted(found.items())


def _read_keys(name: str, path: Path) -> list[str]:
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
