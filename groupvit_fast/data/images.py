"""Reading image files as pixels."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from groupvit_fast.console import UserError

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
"""ImageNet statistics of red, green and blue, values 0-1: what the models are trained with."""
MAX_PIXELS = 1 << 26  # 67 megapixels: 200 MB of RGB; anything larger is a mistake or an attack
_PILLOW_ERRORS = (
    UnidentifiedImageError,
    OSError,
    SyntaxError,
    ValueError,
    Image.DecompressionBombError,
    Image.DecompressionBombWarning,
)


def read_image(path: str | Path, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """Read any image file Pillow knows as uint8 RGB [H, W, 3], turned upright by its EXIF orientation.

    Grey, palette, CMYK and 16-bit images are converted; transparency is laid on white. A file that is
    missing, broken or above `max_pixels` is a UserError.
    """
    path = Path(path)
    try:
        with open(path, "rb") as file:
            return decode_image(file, max_pixels)
    except FileNotFoundError:
        raise UserError(f"{path}: no such image file") from None
    except IsADirectoryError:
        raise UserError(f"{path}: is a folder, expected an image file") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from None
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def decode_image(
    file: BinaryIO, max_pixels: int = MAX_PIXELS, formats: Sequence[str] | None = None
) -> np.ndarray:
    """`read_image` for an open file, which errors do not name; formats: those of Pillow that are let in."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # of damage that does not hinder Pillow
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image = Image.open(file, formats=formats)
            if image.width * image.height > max_pixels:
                raise UserError(
                    f"{image.width} x {image.height} pixels is above the limit of {max_pixels}; "
                    "make the image smaller"
                )
            return np.asarray(_to_rgb(ImageOps.exif_transpose(image)))
    except UnidentifiedImageError:  # whose text names an object in memory
        raise UserError("cannot be read as an image (unknown or damaged format)") from None
    except UserError:
        raise
    # A damaged file can raise anything in Pillow's decoders, KeyError and struct.error included.
    except Exception as error:
        words = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"cannot be read as an image ({words})") from None


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16-bit grey, which Pillow's own conversion would clip
        values = np.asarray(image).astype(np.int64)
        return Image.fromarray((values.clip(0, 65535) >> 8).astype(np.uint8)).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        canvas = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(canvas, image).convert("RGB")
    return image.convert("RGB")
