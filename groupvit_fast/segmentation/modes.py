"""The pictures of one segmented photo, by name: the seven of the public code, soft maps, legend and mask."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from groupvit_fast.console import UserError
from groupvit_fast.segmentation import pictures
from groupvit_fast.segmentation.colours import class_colours, group_colours
from groupvit_fast.segmentation.explore import (
    EncodedPhoto,
    Scores,
    encode_photo,
    label_photo,
    score_photo,
    soft_maps,
    stage_groups,
)
from groupvit_fast.segmentation.prompts import ClassText
from groupvit_fast.segmentation.protocols import Protocol

HEAT_TILE = 240
MOST_HEAT_TILES = 32
GLOW = np.float32([255, 176, 46])


@dataclass(frozen=True)
class View:
    """What there is to draw: the photo, its labels at full size, and the groups behind them.

    image: uint8 [H, W, 3]; labels: integers [H, W], label k is `names[k]`; background: label 0 is background.
    """

    image: np.ndarray
    labels: np.ndarray
    names: Sequence[str]
    background: bool
    photo: EncodedPhoto
    scores: Scores

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) of the pictures; the mask alone has the size of the photo."""
        return pictures.shown_size(self.image.shape[:2])

    @property
    def colours(self) -> np.ndarray:
        return class_colours(len(self.names), background=self.background)

    def shown_image(self) -> np.ndarray:
        return pictures.enlarge(self.image, self.size, smooth=True)

    def shown_labels(self) -> np.ndarray:
        return pictures.enlarge(self.labels, self.size, smooth=False)

    def shown_groups(self, stage: int) -> np.ndarray:
        return stage_groups(self.photo, stage, self.size).cpu().numpy()


def view_photo(
    model: torch.nn.Module, image: np.ndarray, text: ClassText, protocol: Protocol, names: Sequence[str]
) -> View:
    """Segment one photo (uint8 [H, W, 3]) under a resolved protocol; names[k] belongs to label k."""
    photo = encode_photo(model, torch.tensor(image), protocol)
    scores = score_photo(model, photo, text, protocol)
    labels = label_photo(scores, photo.size).int().cpu().numpy()
    return View(image, labels, names, protocol.background_threshold is not None, photo, scores)


def save_modes(view: View, modes: Sequence[str], path: Path) -> dict[str, str]:
    """Write PATH_MODE.png for each mode; returns the file of each."""
    files = {mode: path.with_name(f"{path.name}_{mode}.png") for mode in modes}
    for mode, file in files.items():
        pictures.save_atomically(MODES[mode](view), file)
    return {mode: str(file) for mode, file in files.items()}


def draw_input(view: View) -> Image.Image:
    """The photo."""
    return Image.fromarray(view.shown_image())


def draw_prediction(view: View) -> Image.Image:
    """The colours of the classes alone."""
    return Image.fromarray(pictures.paint(view.shown_labels(), view.colours))


def draw_overlay(view: View) -> Image.Image:
    """The colours of the classes over the photo."""
    clear = 0 if view.background else None
    return Image.fromarray(
        pictures.overlay(view.shown_image(), view.shown_labels(), view.colours, clear=clear)
    )


def draw_labelled(view: View) -> Image.Image:
    """The same with names on the regions and a legend."""
    return pictures.labelled_overlay(view.image, view.labels, view.names, background=view.background)


def draw_groups(view: View, stage: int) -> Image.Image:
    """The groups of one stage over the photo; each has its own colour, which means nothing else."""
    groups = view.shown_groups(stage)
    colours = group_colours(int(groups.max()) + 1)
    return Image.fromarray(pictures.overlay(view.shown_image(), groups, colours, opacity=0.75))


def draw_all_groups(view: View) -> Image.Image:
    """The groups of every stage side by side, first to last."""
    parts = [draw_groups(view, stage) for stage in range(view.photo.stages)]
    return titled_row(parts, [f"groups of stage {stage + 1}" for stage in range(len(parts))])


def draw_legend(view: View) -> Image.Image:
    """Swatches and names of the classes that occur."""
    present = np.unique(view.labels)
    names = [view.names[label] for label in present]
    return pictures.legend(names, view.colours[present], max(480, view.size[1]))


def draw_mask(view: View) -> Image.Image:
    """Labels of the photo's own size, as a palette image."""
    return pictures.mask_picture(view.labels, view.colours)


def draw_heat(view: View) -> Image.Image:
    """How strongly each final group claims each place (its soft map), the largest groups first."""
    factor = HEAT_TILE / max(view.image.shape[:2])
    size = tuple(max(1, round(side * factor)) for side in view.image.shape[:2])
    grey = pictures.enlarge(view.image, size, smooth=True) @ np.float32([0.299, 0.587, 0.114])
    owners = stage_groups(view.photo, view.photo.stages - 1, size).cpu().numpy()
    groups = np.argsort(-np.bincount(owners.flatten()), kind="stable")
    groups = groups[: min(MOST_HEAT_TILES, len(np.unique(owners)))]
    maps = soft_maps(view.photo)
    tiles, titles = [], []
    for group in groups.tolist():
        share = soft_map_on(maps, view.photo, group, size)[..., None] * 0.85
        tile = (0.5 * grey[..., None] * (1 - share) + GLOW * share).round().astype(np.uint8)
        tiles.append(Image.fromarray(tile))
        titles.append(f"{group + 1}: {best_class(view, group)}")
    return grid(tiles, titles)


def soft_map_on(maps: Tensor, photo: EncodedPhoto, group: int, size: tuple[int, int]) -> np.ndarray:
    """Soft map of `group` (window * G + group) as float32 [*size]; 0 outside its window."""
    window, number = divmod(group, maps.shape[1])
    box, height = photo.boxes[window], max(box.bottom for box in photo.boxes)
    width = max(box.right for box in photo.boxes)
    top, bottom = (round(edge * size[0] / height) for edge in (box.top, box.bottom))
    left, right = (round(edge * size[1] / width) for edge in (box.left, box.right))
    bottom, right = max(bottom, top + 1), max(right, left + 1)
    small = Image.fromarray(maps[window, number].cpu().numpy())
    result = np.zeros(size, np.float32)
    part = np.asarray(small.resize((right - left, bottom - top), Image.Resampling.BILINEAR))
    result[top:bottom, left:right] = part[: size[0] - top, : size[1] - left]
    return result


def best_class(view: View, group: int) -> str:
    """Name and score of the class that fits a final group best."""
    score, label = view.scores.groups.flatten(0, 1)[group].max(dim=0)
    return f"{view.names[int(label) + view.background]} {score:.2f}"


def titled_row(parts: Sequence[Image.Image], titles: Sequence[str]) -> Image.Image:
    """Pictures of one size beside each other, wide ones below each other, each under its title."""
    across = len(parts) if parts[0].width <= 1.5 * parts[0].height else 1
    return grid(parts, titles, across=across, text_size=18)


def grid(
    parts: Sequence[Image.Image], titles: Sequence[str], *, across: int | None = None, text_size: int = 15
) -> Image.Image:
    """Pictures of one size in rows, each under its title; by default about as wide as high."""
    width, height = parts[0].size
    head = text_size + 12
    across = min(len(parts), across or max(1, round((len(parts) * (height + head) / width) ** 0.5)))
    step_x, step_y = width + pictures.GAP, height + head + pictures.GAP
    rows = -(-len(parts) // across)
    sheet = Image.new("RGB", (across * step_x + pictures.GAP, rows * step_y + pictures.GAP), pictures.PAPER)
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=text_size)
    for index, (part, title) in enumerate(zip(parts, titles, strict=True)):
        x, y = pictures.GAP + index % across * step_x, index // across * step_y
        while len(title) > 1 and font.getlength(title) > width:
            title = title[:-2].rstrip() + "…"
        draw.text((x, y + head // 2 + 2), title, font=font, anchor="lm", fill=pictures.INK)
        sheet.paste(part, (x, y + head))
    return sheet


MODES: dict[str, Callable[[View], Image.Image]] = {
    "input": draw_input,
    "pred": draw_prediction,
    "input_pred": draw_overlay,
    "input_pred_label": draw_labelled,
    "first_group": lambda view: draw_groups(view, 0),
    "final_group": lambda view: draw_groups(view, view.photo.stages - 1),
    "all_groups": draw_all_groups,
    "heat": draw_heat,
    "legend": draw_legend,
    "mask": draw_mask,
}


def parse_modes(text: str) -> list[str]:
    """`"pred, mask"` to names of modes; `all` stands for every one, an unknown name is an error."""
    wanted = [part.strip() for part in text.split(",")]
    if wanted == ["all"]:
        return list(MODES)
    for name in wanted:
        if name not in MODES:
            nearest = difflib.get_close_matches(name, MODES, n=1)
            hint = f"did you mean {nearest[0]}? " if nearest else ""
            raise UserError(f"unknown picture {name!r}: {hint}choose from {', '.join(MODES)} or all")
    return list(dict.fromkeys(wanted))
