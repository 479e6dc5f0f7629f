"""What a browser needs to show a segmented photo: compact JSON, and one self-contained page around it.

The page and the demo share the viewer in `web/`. Label maps travel as base64 of deflated integers, which a
browser inflates by itself; nothing is ever loaded from elsewhere.
"""

from __future__ import annotations

import base64
import html
import io
import json
import re
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from groupvit_fast.segmentation import pictures
from groupvit_fast.segmentation.colours import class_colours, group_colours
from groupvit_fast.segmentation.explore import (
    EncodedPhoto,
    Scores,
    label_photo,
    score_of_labels,
    soft_maps,
    stage_groups,
)

WEB = Path(__file__).with_name("web")
SHOWN_SIDE = 960
"""Longest side of a photo in the page; larger ones are reduced."""
LOSSLESS_SIDE = 256
CLASSES_OF_GROUP = 4
STAGE_TITLES = {1: ("Groups",), 2: ("First groups", "Final groups")}


def page_size(size: tuple[int, int]) -> tuple[int, int]:
    """(height, width) of a photo of `size` in the page."""
    factor = min(1.0, SHOWN_SIDE / max(size))
    return max(1, round(size[0] * factor)), max(1, round(size[1] * factor))


def picture_bytes(image: np.ndarray) -> tuple[str, bytes]:
    """(media type, encoded file) of a photo as the page shows it; small ones keep every pixel."""
    picture = Image.fromarray(pictures.enlarge(image, page_size(image.shape[:2]), smooth=True))
    small, buffer = max(picture.size) <= LOSSLESS_SIDE, io.BytesIO()
    picture.save(buffer, "PNG" if small else "JPEG", **({} if small else {"quality": 86}))
    return f"image/{'png' if small else 'jpeg'}", buffer.getvalue()


def data_url(kind: str, data: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def packed(values: np.ndarray) -> dict[str, Any]:
    """Integers >= 0 in the smallest type that holds them, deflated, as JSON."""
    kinds = (("u1", 255), ("u2", 65535), ("u4", 2**32 - 1))
    kind = next(kind for kind, most in kinds if values.size == 0 or values.max() <= most)
    data = zlib.compress(np.ascontiguousarray(values, f"<{kind}").tobytes(), 9)
    return {"type": kind, "shape": list(values.shape), "data": base64.b64encode(data).decode()}


def photo_part(name: str, photo: EncodedPhoto, picture: str) -> dict[str, Any]:
    """The part of a result that class names do not change; `picture` is the URL of the photo."""
    size, last = page_size(photo.size), photo.stages - 1
    titles = STAGE_TITLES.get(photo.stages) or [f"Stage {stage + 1} groups" for stage in range(photo.stages)]
    height, width = (max(getattr(box, edge) for box in photo.boxes) for edge in ("bottom", "right"))
    stages = []
    for stage, title in enumerate(titles):
        groups = stage_groups(photo, stage, size).cpu().numpy()
        parents = None if stage == last else _parents(photo, stage)
        count = photo.encodings[0].maps[stage].shape[1] * len(photo.boxes)
        colours = [_hex(colour) for colour in group_colours(count)]
        stages.append({"title": title, "groups": packed(groups), "colours": colours, "parents": parents})
    heat = (soft_maps(photo) * 255).round().byte().cpu().numpy()
    return {
        "name": name,
        "width": photo.size[1],
        "height": photo.size[0],
        "shown": list(size),
        "picture": picture,
        "stages": stages,
        "heat": packed(heat),
        "boxes": [
            [box.top / height, box.left / width, box.bottom / height, box.right / width]
            for box in photo.boxes
        ],
    }


def _parents(photo: EncodedPhoto, stage: int) -> list[int]:
    """For each group of a stage (window * S + group) the group of the next that takes most of it."""
    parents = []
    for window, encoding in enumerate(photo.encodings):
        above = encoding.maps[stage + 1][0]
        parents += (above.argmax(dim=0) + window * above.shape[0]).tolist()
    return parents


def label_part(
    scores: Scores,
    size: tuple[int, int],
    names: Sequence[str],
    *,
    background: bool,
    shares: Sequence[float] | None = None,
    colour_numbers: Sequence[int] | None = None,
) -> dict[str, Any]:
    """The part of a result that class names decide.

    size: (H, W) of the photo; names[k] belongs to label k; shares: of each label, if they were counted at
    full size; colour_numbers: which of `class_colours` each class has (not background), by default the k-th.
    """
    labels = label_photo(scores, page_size(size))
    own = (score_of_labels(scores, labels).clamp(0, 1) * 255).round().byte()
    labels = labels.cpu().numpy()
    if shares is None:
        shares = (np.bincount(labels.flatten(), minlength=len(names)) / labels.size).tolist()
    tables = scores.groups.flatten(0, 1)
    best = tables.topk(min(CLASSES_OF_GROUP, tables.shape[1]), dim=1)
    best_labels = (best.indices + background).cpu().numpy()
    used = np.union1d(np.unique(labels), best_labels)
    used = used[np.argsort([-shares[label] for label in used], kind="stable")]
    index = np.zeros(len(names), np.int64)
    index[used] = np.arange(len(used))
    numbers = np.arange(len(names) - background) if colour_numbers is None else np.array(colour_numbers)
    colours = class_colours(int(numbers.max()) + 1 + background, background=background)
    colours = colours[np.concatenate([[0] * background, numbers + background]).astype(int)]
    return {
        "classes": [
            {"name": names[label], "colour": _hex(colours[label]), "share": shares[label]}
            for label in used.tolist()
        ],
        "background": int(index[0]) if background and 0 in used else None,
        "total": len(names),
        "labels": packed(index[labels]),
        "scores": packed(own.cpu().numpy()),
        "groups": [
            [[int(index[label]), round(score, 4)] for label, score in zip(*pair, strict=True)]
            for pair in zip(best_labels.tolist(), best.values.tolist(), strict=True)
        ],
    }


def _hex(colour: np.ndarray) -> str:
    return "#" + "".join(f"{channel:02x}" for channel in colour.tolist())


def self_contained_page(title: str, about: Sequence[str], results: Sequence[dict[str, Any]]) -> str:
    """One HTML document with scripts, styles, photos and label maps inside.

    about: short facts for the head of the page; results: per photo `photo_part` and `label_part` merged.
    """
    # "<" never occurs in the data, so no class or file name can end the script element it lies in.
    data = json.dumps({"title": title, "about": list(about), "photos": list(results)}, separators=(",", ":"))
    parts = {
        "@TITLE@": html.escape(title),
        "@STYLE@": web_file("style.css"),
        "@SCRIPT@": "\n".join(web_file(name) for name in ("maps.js", "lists.js", "viewer.js", "result.js")),
        "@DATA@": data.replace("<", "\\u003c"),
    }
    return re.sub("@[A-Z]+@", lambda token: parts[token[0]], web_file("result.html"))


def web_file(name: str) -> str:
    return (WEB / name).read_text(encoding="utf-8")
