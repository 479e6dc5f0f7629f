"""Label images of Pascal Context from the annotations as its authors distribute them: one .mat file an image.

Source of the 59 numbers: MMSegmentation's (Apache-2.0) conversion; the rest of the 459 classes is background.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from groupvit_fast.console import UserError, write_text_atomically
from groupvit_fast.segmentation.pictures import save_atomically

ORIGIN = "trainval.tar.gz of PASCAL-Context (trainval/*.mat)"
NUMBERS = (
    2, 9, 18, 19, 22, 23, 25, 31, 33, 34, 44, 45, 46, 59, 65, 68, 72, 80, 85, 98, 104, 105, 113, 115, 144,
    158, 159, 162, 187, 189, 207, 220, 232, 258, 259, 260, 284, 295, 296, 308, 324, 326, 347, 349, 354, 355,
    360, 366, 368, 397, 415, 416, 420, 424, 427, 440, 445, 454, 458,
)  # fmt: skip
"""Numbers of the 59 classes among the 459, in the order of their labels 1 to 59."""
MOST = 459


def label_table() -> np.ndarray:
    """uint8 [460]: the label of each of the 459 numbers, and 0 for 0."""
    table = np.zeros(MOST + 1, np.uint8)
    table[list(NUMBERS)] = np.arange(1, len(NUMBERS) + 1)
    return table


def convert(source: Path, target: Path) -> None:
    """Write the labels of one annotation file."""
    from scipy.io import loadmat

    try:
        values = loadmat(source)["LabelMap"]
    except (KeyError, ValueError, TypeError, NotImplementedError, EOFError, OSError) as error:
        raise UserError(f"{source}: not an annotation of Pascal Context ({error}); unpack it again") from None
    if values.ndim != 2 or values.min(initial=0) < 0 or values.max(initial=0) > MOST:
        raise UserError(f"{source}: LabelMap holds other numbers than 0 to {MOST}; unpack it again")
    save_atomically(Image.fromarray(label_table()[values]), target)


def sources(root: Path) -> list[tuple[Path, Path]]:
    """(annotation, label image) of every image; UserError if there are none or scipy is missing."""
    try:
        import scipy.io  # noqa: F401
    except ImportError:
        raise UserError("the annotations of Pascal Context are .mat files: pip install scipy") from None
    folder = root / "trainval"
    found = sorted(folder.glob("*.mat"))
    if not found:
        raise UserError(f"no *.mat in {folder}; unpack {ORIGIN} there")
    return [(path, root / "SegmentationClassContext" / f"{path.stem}.png") for path in found]


def write_splits(root: Path) -> None:
    """The lists of VOC2010's images that have a label image, as ImageSets/SegmentationContext/SPLIT.txt."""
    for split in ("train", "val"):
        listed = root / "ImageSets" / "Main" / f"{split}.txt"
        try:
            keys = listed.read_text(encoding="utf-8").split()
        except FileNotFoundError:
            raise UserError(
                f"{listed} is missing; --root must be VOC2010, whose lists Context uses"
            ) from None
        known = [key for key in keys if (root / "SegmentationClassContext" / f"{key}.png").exists()]
        text = "".join(f"{key}\n" for key in known)
        write_text_atomically(root / "ImageSets" / "SegmentationContext" / f"{split}.txt", text)
