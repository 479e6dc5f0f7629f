"""Make the label images of a benchmark from the files its authors distribute.

    python -m groupvit_fast.segmentation.prepare coco_object /data/coco_stuff164k

Reads and writes below ROOT, in the folders that `layouts` names; VOC and ADE20K need no conversion.
Each label image is written whole or not at all, and one that exists is kept, so a second run continues the
first.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from groupvit_fast.console import UserError, run_command
from groupvit_fast.segmentation import prepare_context
from groupvit_fast.segmentation.datasets import BENCHMARKS, read_mask
from groupvit_fast.segmentation.metrics import IGNORE
from groupvit_fast.segmentation.pictures import save_atomically

WORKERS = 4
CONTEXT = "context60"  # context59 reads the same label images
_INVALID = 254

COCO_CATEGORY_GAPS = (12, 26, 29, 30, 45, 66, 68, 69, 71, 83, 91)
"""Category numbers 1-91 that COCO lists but never used for an object; the other 80 are the objects."""
CITYSCAPES_TRAINED = (7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33)
"""Label numbers of the 19 classes of the benchmark, in the order of their train numbers."""


@dataclass(frozen=True)
class Conversion:
    """How source label images become ours: their name's ending, where to get them, and the value table."""

    source_suffix: str
    origin: str
    label_of_value: np.ndarray
    """uint8 [256]; 254 marks a value that the source format does not have."""


def coco_object_labels() -> np.ndarray:
    """COCO-Stuff pixel maps (value = category - 1) to background 0 and objects 1-80; stuff is background."""
    table = np.full(256, _INVALID, np.uint8)
    things = [category for category in range(1, 91) if category not in COCO_CATEGORY_GAPS]
    table[[category - 1 for category in things]] = np.arange(1, 81)
    table[91:182] = 0
    table[255] = 0  # unlabelled pixels are background in this benchmark, not ignored
    return table


def coco_stuff_labels() -> np.ndarray:
    """COCO-Stuff pixel maps to 80 objects (0-79) and 91 stuff classes (80-170); unlabelled stays 255."""
    objects = coco_object_labels()
    table = np.where((objects >= 1) & (objects <= 80), objects - 1, objects).astype(np.uint8)
    table[91:182] = np.arange(80, 171)
    table[255] = IGNORE
    return table


def cityscapes_labels() -> np.ndarray:
    """Cityscapes label numbers 0-33 (and 255 for -1) to the 19 train numbers; all others are ignored."""
    table = np.full(256, _INVALID, np.uint8)
    table[:34] = IGNORE
    table[255] = IGNORE
    table[list(CITYSCAPES_TRAINED)] = np.arange(len(CITYSCAPES_TRAINED))
    return table


CONVERSIONS = {
    "coco_object": Conversion(".png", "stuffthingmaps_trainval2017.zip of COCO-Stuff", coco_object_labels()),
    "coco_stuff": Conversion(".png", "stuffthingmaps_trainval2017.zip of COCO-Stuff", coco_stuff_labels()),
    "cityscapes": Conversion(
        "_gtFine_labelIds.png", "gtFine_trainvaltest.zip of Cityscapes", cityscapes_labels()
    ),
}


def prepare(name: str, root: Path, *, split: str = "val", quiet: bool = True) -> tuple[int, int]:
    """Write the label images of benchmark `name` below `root`; returns (written, kept)."""
    if name == CONTEXT:
        pairs, convert = prepare_context.sources(root), prepare_context.convert
    else:
        conversion = CONVERSIONS[name]
        pairs = _sources(name, conversion, root, split)

        def convert(source: Path, target: Path) -> None:
            save_atomically(Image.fromarray(convert_values(source, conversion.label_of_value)), target)

    def make(pair: tuple[Path, Path]) -> bool:
        if pair[1].exists():
            return False
        convert(*pair)
        return True

    from tqdm import tqdm

    with ThreadPoolExecutor(WORKERS) as pool:
        bar = tqdm(pool.map(make, pairs), total=len(pairs), unit=" masks", disable=True if quiet else None)
        written = sum(bar)
    if name == CONTEXT:
        prepare_context.write_splits(root)
    return written, len(pairs) - written


def _sources(name: str, conversion: Conversion, root: Path, split: str) -> list[tuple[Path, Path]]:
    """(original, label image) of every image of a benchmark."""
    layout = BENCHMARKS[name].of_split(split)
    folder = root / layout.masks
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder; unpack {conversion.origin} there")
    ours = {item.mask_suffix for item in BENCHMARKS.values()} - {conversion.source_suffix}
    sources = sorted(
        path
        for path in folder.rglob(f"*{conversion.source_suffix}")
        if not path.name.endswith(tuple(ours - {".png"}))
    )
    if not sources:
        raise UserError(f"no *{conversion.source_suffix} in {folder}; unpack {conversion.origin} there")
    return [
        (path, path.with_name(path.name.removesuffix(conversion.source_suffix) + layout.mask_suffix))
        for path in sources
    ]


def convert_values(source: Path, label_of_value: np.ndarray) -> np.ndarray:
    """The labels uint8 [H, W] of one source image; a value that its format does not have is an error."""
    values = read_mask(source)
    labels = label_of_value[values.clip(0, 255)]
    wrong = (labels == _INVALID) | (values > 255) | (values < 0)
    if wrong.any():
        raise UserError(
            f"{source}: value {values[wrong].flat[0]} is not one of this format; unpack the originals again"
        )
    return labels


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m groupvit_fast.segmentation.prepare",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("name", choices=sorted([*CONVERSIONS, CONTEXT]), help="benchmark")
    parser.add_argument("root", type=Path, metavar="ROOT", help="its folder, as evaluate's --root")
    parser.add_argument("--split", choices=("val", "train"), default="val", help="default: val")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    args = parser.parse_args(argv)
    written, kept = prepare(args.name, args.root, split=args.split, quiet=args.quiet)
    print(f"{args.name}: {written} label images written, {kept} were there")
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
