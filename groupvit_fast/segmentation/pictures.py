"""Pictures of segmentations with Pillow and numpy: colours, overlays, labels on regions, legends, grids.

Everything is a pure function of its input, so the same result gives the same picture. Label maps are integer
arrays [H, W]; colours are uint8 [N, 3], row k for label k. Photos are enlarged smoothly, label maps by
repeating pixels, so that a small image stays honest about its resolution.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from groupvit_fast.console import write_bytes_atomically
from groupvit_fast.segmentation.colours import class_colours, group_colours

PAPER = (255, 255, 255)
INK = (32, 33, 36)
QUIET = (110, 114, 120)
TILE = 208
MIN_SIDE = 480
MAX_SIDE = 1920
GAP = 8
MARGIN = 20
TITLES = ("input", "truth", "prediction", "final groups")


@dataclass(frozen=True)
class Example:
    """One row of the grid: image uint8 [H, W, 3] and label maps [H, W]; 255 in the truth is no label."""

    image: np.ndarray
    prediction: np.ndarray
    groups: np.ndarray
    truth: np.ndarray | None = None


def paint(labels: np.ndarray, colours: np.ndarray) -> np.ndarray:
    """Labels [H, W] to colours uint8 [H, W, 3]; labels without a colour (255, ignored) become paper."""
    known = (labels >= 0) & (labels < len(colours))
    return np.where(known[..., None], colours[np.where(known, labels, 0)], np.uint8(255)).astype(np.uint8)


def borders(labels: np.ndarray, width: int = 1) -> np.ndarray:
    """bool [H, W]: pixels within `width` of a change of label, on both sides of it."""
    edge = np.zeros(labels.shape, bool)
    for labels_, edge_ in ((labels, edge), (labels.T, edge.T)):
        change = labels_[1:] != labels_[:-1]
        for step in range(min(width, len(change))):
            edge_[: len(change) - step] |= change[step:]
            edge_[step + 1 :] |= change[: len(change) - step]
    return edge


def overlay(
    image: np.ndarray,
    labels: np.ndarray,
    colours: np.ndarray,
    *,
    opacity: float = 0.6,
    clear: int | None = None,
    line: int = 1,
) -> np.ndarray:
    """Lay label colours over the grey photo and draw white lines along the borders.

    The photo loses its own colours where it is covered, so that a colour means its label and nothing else.

    image uint8 [H, W, 3] and labels [H, W] of the same size; clear: a label that is left as it is
    (background); line: half the thickness of the lines, 0 for none.
    """
    share = np.full(labels.shape, opacity, np.float32)
    if clear is not None:
        share[labels == clear] = 0
    grey = image @ np.float32([0.299, 0.587, 0.114])
    under = np.where(share[..., None] > 0, grey[..., None], image)
    mixed = under * (1 - share[..., None]) + paint(labels, colours) * share[..., None]
    if line:
        mixed[borders(labels, line)] = PAPER
    return mixed.round().astype(np.uint8)


def enlarge(image: np.ndarray, size: tuple[int, int], *, smooth: bool) -> np.ndarray:
    """Resize to (height, width): photos bicubic, label maps by repeating pixels."""
    picture = Image.fromarray(image.astype(np.uint8 if smooth else np.int32))
    method = Image.Resampling.BICUBIC if smooth else Image.Resampling.NEAREST
    return np.asarray(picture.resize(size[::-1], method))


def deepest_point(mask: np.ndarray) -> tuple[int, int, int]:
    """(row, column, depth) of the pixel farthest from the outside of `mask`: where a label fits best.

    Distances count steps to the four neighbours; the border of the array is outside.
    """
    depth, inside = 0, np.pad(mask, 1)
    while True:
        core = inside.copy()
        core[1:-1, 1:-1] &= inside[:-2, 1:-1] & inside[2:, 1:-1] & inside[1:-1, :-2] & inside[1:-1, 2:]
        if not core.any():
            break
        inside, depth = core, depth + 1
    rows, columns = np.nonzero(inside)
    middle = np.argmin((rows - rows.mean()) ** 2 + (columns - columns.mean()) ** 2)
    return int(rows[middle]) - 1, int(columns[middle]) - 1, depth


def write_names(
    picture: Image.Image, labels: np.ndarray, names: Sequence[str], *, text_size: int = 14
) -> None:
    """Write each label's name onto its region, in place; regions too small for the name get none.

    labels: [h, w], any size with the picture's proportions; names[k] belongs to label k, "" is not written.
    """
    draw, font = ImageDraw.Draw(picture, "RGBA"), ImageFont.load_default(size=text_size)
    step = max(1, max(labels.shape) // 160)
    coarse = labels[::step, ::step]
    scale = picture.width / coarse.shape[1]
    for label in np.unique(coarse):
        if not 0 <= label < len(names) or not names[label]:
            continue
        row, column, depth = deepest_point(coarse == label)
        x, y = (column + 0.5) * scale, (row + 0.5) * scale
        left, top, right, bottom = draw.textbbox((x, y), names[label], font=font, anchor="mm")
        if (2 * depth + 1) * scale < 1.5 * text_size:
            continue
        dx = max(7 - left, 0) + min(picture.width - 7 - right, 0)
        box = (left + dx - 4, top - 3, right + dx + 4, bottom + 3)
        draw.rounded_rectangle(box, radius=4, fill=(*INK, 170))
        draw.text((x + dx, y), names[label], font=font, anchor="mm", fill=PAPER)


def legend(names: Sequence[str], colours: np.ndarray, width: int, *, text_size: int = 15) -> Image.Image:
    """Swatches with names, wrapped to `width` pixels."""
    font = ImageFont.load_default(size=text_size)
    swatch, row_height, places, x, y = text_size, text_size + 10, [], 0, 0
    for name in names:
        length = swatch + 7 + int(font.getlength(name)) + 20
        if x and x + length - 20 > width:
            x, y = 0, y + row_height
        places.append((x, y))
        x += length
    picture = Image.new("RGB", (width, y + row_height), PAPER)
    draw = ImageDraw.Draw(picture)
    for name, colour, (x, y) in zip(names, colours, places, strict=True):
        middle = y + row_height // 2
        box = (x, middle - swatch // 2, x + swatch, middle + swatch // 2)
        draw.rounded_rectangle(box, radius=3, fill=tuple(map(int, colour)))
        draw.text((x + swatch + 7, middle), name, font=font, anchor="lm", fill=INK)
    return picture


def shown_size(size: tuple[int, int]) -> tuple[int, int]:
    """(height, width) at which a photo of `size` is drawn: large enough to read, at most `MAX_SIDE`."""
    factor = min(max(1.0, MIN_SIDE / min(size)), MAX_SIDE / max(size))
    return max(1, round(size[0] * factor)), max(1, round(size[1] * factor))


def labelled_overlay(
    image: np.ndarray, labels: np.ndarray, names: Sequence[str], *, background: bool = False
) -> Image.Image:
    """The picture of one segmented photo: overlay, names on the regions, legend of the classes that occur.

    Small photos are enlarged so that names can be read, very large ones reduced to `MAX_SIDE` pixels.
    background: label 0 is background, which is left uncoloured and unnamed.
    """
    size = shown_size(image.shape[:2])
    colours = class_colours(len(names), background=background)
    large = enlarge(labels, size, smooth=False)
    mixed = overlay(enlarge(image, size, smooth=True), large, colours, clear=0 if background else None)
    photo = Image.fromarray(mixed)
    text_size = max(14, min(size) // 28)
    write_names(photo, large, ["" if background and k == 0 else name for k, name in enumerate(names)],
                text_size=text_size)  # fmt: skip
    present = [k for k in np.unique(labels) if k or not background] or [0]
    key = legend([names[k] for k in present], colours[present], size[1], text_size=text_size)
    picture = Image.new("RGB", (size[1], size[0] + 10 + key.height), PAPER)
    picture.paste(photo, (0, 0))
    picture.paste(key, (8, size[0] + 6))
    return picture


def grid_picture(
    examples: Sequence[Example],
    names: Sequence[str],
    *,
    background: bool = False,
    title: str = "",
    across: int | None = None,
    tile: int = TILE,
) -> Image.Image:
    """`input | truth | prediction | final groups` for each example, with titles above and a legend below.

    across: examples side by side; by default two from four examples on. The column of the truth is left out
    when no example has one.
    """
    across = across or (2 if len(examples) >= 4 else 1)
    titles = [name for name in TITLES if name != "truth" or any(item.truth is not None for item in examples)]
    step = tile + GAP
    block = len(titles) * step + 2 * GAP
    width = 2 * MARGIN + across * block - 3 * GAP
    colours = class_colours(len(names), background=background)
    key = legend(names, colours, width - 2 * MARGIN)
    head = MARGIN + (34 if title else 0)
    height = head + 26 + -(-len(examples) // across) * step + GAP + key.height + MARGIN // 2
    picture = Image.new("RGB", (width, height), PAPER)
    draw = ImageDraw.Draw(picture)
    draw.text((MARGIN, MARGIN + 4), title, font=ImageFont.load_default(size=20), anchor="lm", fill=INK)
    small = ImageFont.load_default(size=15)
    for index, item in enumerate(examples):
        y = head + 26 + index // across * step
        for column, part in enumerate(_tiles(item, names, colours, titles, background, tile)):
            x = MARGIN + index % across * block + column * step
            if index < across:
                draw.text((x, head + 10), titles[column], font=small, anchor="lm", fill=QUIET)
            picture.paste(part, (x + (tile - part.width) // 2, y + (tile - part.height) // 2))
    picture.paste(key, (MARGIN, height - MARGIN // 2 - key.height))
    return picture


def _tiles(
    item: Example,
    names: Sequence[str],
    colours: np.ndarray,
    titles: Sequence[str],
    background: bool,
    tile: int,
) -> list[Image.Image]:
    """The pictures of one example, none larger than `tile` on a side, in the order of `titles`."""
    factor = tile / max(item.image.shape[:2])
    size = tuple(max(1, round(side * factor)) for side in item.image.shape[:2])
    photo = enlarge(item.image, size, smooth=True)
    shown = ["" if background and k == 0 else name for k, name in enumerate(names)]
    parts = {"input": Image.fromarray(photo)}
    for title, labels in (("truth", item.truth), ("prediction", item.prediction)):
        if labels is None:
            parts[title] = Image.new("RGB", size[::-1], PAPER)
            continue
        large = enlarge(labels, size, smooth=False)
        parts[title] = Image.fromarray(overlay(photo, large, colours, opacity=0.68))
        write_names(parts[title], large, shown, text_size=12)
    groups = enlarge(item.groups, size, smooth=False)
    palette = group_colours(int(item.groups.max()) + 1)
    parts["final groups"] = Image.fromarray(overlay(photo, groups, palette, opacity=0.75))
    return [parts[title] for title in titles]


def mask_picture(labels: np.ndarray, colours: np.ndarray) -> Image.Image:
    """Labels as a palette image whose indices are the labels; above 256 labels a 16-bit grey image."""
    if len(colours) > 256:
        return Image.fromarray(labels.astype(np.uint16))
    picture = Image.fromarray(labels.astype(np.uint8), mode="P")
    picture.putpalette(colours.tobytes())
    return picture


def save_atomically(picture: Image.Image, path: Path) -> None:
    """Write a PNG so that a reader sees the old file or the new one, never a part."""
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG")
    write_bytes_atomically(path, buffer.getvalue())
