"""What the demo does, without the web: keep encoded photos, label them with class lists that people edit.

Every photo is encoded once and every name embedded once, so that an edit costs a table of scores and a blend.
Safe to call from several threads; the model runs in one at a time.
"""

from __future__ import annotations

import hashlib
import io
import itertools
import threading
import time
from collections import OrderedDict
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image

from groupvit_fast.console import UserError
from groupvit_fast.data.images import decode_image
from groupvit_fast.data.shapes_scenes import CLASS_NAMES, draw_scene
from groupvit_fast.segmentation.datasets import BENCHMARKS, benchmark_classes
from groupvit_fast.segmentation.explore import EncodedPhoto, TextBank, encode_photo, score_photo
from groupvit_fast.segmentation.page import data_url, label_part, photo_part, picture_bytes
from groupvit_fast.segmentation.prompts import (
    BACKGROUND,
    check_classes,
    foreground_classes,
    synonyms,
)
from groupvit_fast.segmentation.protocols import Protocol

MOST_BYTES = 25 << 20
MOST_PIXELS = 50_000_000  # a photo of 8000 x 6000
MOST_CLASSES = 10_000
MOST_PHOTOS = 12
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF")
SAMPLES = 8
SAMPLE_SIZE = 96


class UnknownPhoto(UserError):
    """The photo was dropped from memory, or never came."""


class Kept(NamedTuple):
    """An encoded photo, and what the page needs of it."""

    encoded: EncodedPhoto
    part: dict[str, Any]


class Studio:
    """One model and protocol, and the photos that were opened last.

    protocol: not resolved yet; background is switched on and off by each request.
    """

    def __init__(
        self, model: torch.nn.Module, protocol: Protocol, *, name: str, classes: str | None = None
    ) -> None:
        self.model, self.protocol, self.name = model.eval(), protocol, name
        self.classes = classes or ", ".join(CLASS_NAMES if protocol.name.startswith("shapes") else _voc())
        self.bank = TextBank(model, protocol)
        self._photos: OrderedDict[str, Kept] = OrderedDict()
        self._colours: dict[str, int] = {}
        self._lock = threading.Lock()

    def resolved(self, background: float | None = None) -> Protocol:
        return self.protocol.resolve(
            dataset="your classes",
            background=background is not None,
            image_size=self.model.config.image.image_size,
            threshold=background,
        )

    def info(self) -> dict[str, Any]:
        """What the page must know before the first photo."""
        config = self.model.config.image
        lists = {name: ", ".join(_without_background(benchmark_classes(name))) for name in BENCHMARKS}
        return {
            "facts": [self.name, f"protocol {self.protocol.name}", f"{config.output_groups[-1]} groups"],
            "classes": self.classes,
            "vocabularies": {"shapes": ", ".join(CLASS_NAMES), **lists},
            "samples": SAMPLES,
            "most_bytes": MOST_BYTES,
        }

    def add_photo(self, data: bytes) -> dict[str, Any]:
        """Encode an image file, once; its part of the result with an `id`. UserError for anything else."""
        key = hashlib.sha256(data).hexdigest()[:24]
        kept = self._find(key)
        if kept is None:
            image = decode_image(io.BytesIO(data), MOST_PIXELS, FORMATS)
            with self._lock:
                encoded = encode_photo(self.model, torch.tensor(image), self.resolved())
                part = photo_part("photo", encoded, data_url(*picture_bytes(image)))
                kept = self._photos[key] = Kept(encoded, {"id": key, **part})
                while len(self._photos) > MOST_PHOTOS:
                    self._photos.popitem(last=False)
        return kept.part

    def segment(self, key: str, classes: str, background: float | None = None) -> dict[str, Any]:
        """Label a photo that was added: the part of the result that class names decide, and `ms` it took.

        classes: names between commas or lines, "|" between synonyms; background: threshold, None for none.
        """
        start = time.perf_counter()
        kept = self._find(key)
        if kept is None:
            raise UnknownPhoto("this photo is no longer kept; open it again")
        entries = read_class_text(classes)
        protocol = self.resolved(background)
        names = [BACKGROUND] * (background is not None) + [synonyms(entry)[0] for entry in entries]
        with self._lock:
            text = self.bank.encode(protocol.entries(entries))
            scores = score_photo(self.model, kept.encoded, text, protocol)
            colours = self._colour_numbers(names[background is not None :])
            part = label_part(
                scores, kept.encoded.size, names, background=background is not None, colour_numbers=colours
            )
        return {**part, "ms": round(1000 * (time.perf_counter() - start), 1)}

    def _colour_numbers(self, names: list[str]) -> list[int]:
        """Names of the list before keep their colours, new ones take the first that are free."""
        kept = {name: self._colours[name] for name in names if name in self._colours}
        taken = set(kept.values())
        free = (number for number in itertools.count() if number not in taken)
        self._colours = {name: kept[name] if name in kept else next(free) for name in names}
        return list(self._colours.values())

    def _find(self, key: str) -> Kept | None:
        with self._lock:
            if key in self._photos:
                self._photos.move_to_end(key)
            return self._photos.get(key)


def read_class_text(text: str) -> list[str]:
    """Class entries of a text in work: empty places between commas or lines do not count."""
    pieces = [piece.strip(" \t|") for piece in text.replace("\n", ",").split(",")]
    entries = [" ".join(piece.split()) for piece in pieces if piece]
    if not entries:
        raise UserError("name at least one class")
    return foreground_classes(check_classes(entries, "the class list"), MOST_CLASSES)


def sample_image(number: int) -> bytes:
    """A scene like those of the built-in dataset, as a PNG; in no split of it."""
    image = draw_scene(np.random.default_rng([2026, number]), SAMPLE_SIZE).image
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG")
    return buffer.getvalue()


def _voc() -> list[str]:
    return _without_background(benchmark_classes("voc21"))


def _without_background(entries: list[str]) -> list[str]:
    return [entry for entry in entries if entry.lower() != BACKGROUND]
