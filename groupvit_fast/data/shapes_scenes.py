"""Scenes of the built-in dataset: named, patterned objects standing on two named grounds.

A class is told by its outline, its pattern and the pair of hues that alternate in it. Every hue belongs to
five classes, so the colour of a single pixel does not name its class (a test measures what a classifier of
single pixels, trained on the masks, would reach). Masks are exact because image and mask come from the same
implicit functions.

Coordinates are in pixels of the canvas, y downwards; an object's own frame (u, v) is rotated, centred on it
and scaled so that its outline fits the unit square [-1, 1]^2.
"""

from __future__ import annotations

import colorsys
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

Field = np.ndarray  # [H, W] float32
OBJECTS = ("ball", "box", "flag", "kite", "star", "ring", "leaf", "clover", "heart", "tent")
GROUNDS = ("sky", "grass", "sand", "water", "wall")
CLASS_NAMES = OBJECTS + GROUNDS


@dataclass(frozen=True)
class Scene:
    """One drawn scene: image uint8 [S, S, 3], mask uint8 [S, S] of `CLASS_NAMES` indices, its caption."""

    image: np.ndarray
    mask: np.ndarray
    caption: str


# ---------------------------------------------------------------------------------------------- outlines


def _star(u: Field, v: Field) -> np.ndarray:
    angle, radius = np.arctan2(u, -v), np.hypot(u, v)
    sector = np.abs((angle / (2 * np.pi) * 5 + 0.5) % 1 - 0.5) * 2  # 0 on a tip, 1 between two tips
    return radius < 1.05 - 0.55 * sector


def _heart(u: Field, v: Field) -> np.ndarray:
    x, y = 1.15 * u, -1.2 * v + 0.1
    bulge = x * x + y * y - 0.75
    return bulge * bulge * bulge < 1.1 * x * x * y * y * y


OUTLINES: dict[str, Callable[[Field, Field], np.ndarray]] = {
    "ball": lambda u, v: u**2 + v**2 < 0.9,
    "box": lambda u, v: np.maximum(np.abs(u), np.abs(v)) < 0.82,
    "flag": lambda u, v: (np.abs(u) < 1.0) & (np.abs(v) < 0.62),
    "kite": lambda u, v: np.abs(u) * 1.3 + np.abs(v) < 1.0,
    "star": _star,
    "ring": lambda u, v: np.abs(np.hypot(u, v) - 0.7) < 0.3,
    "leaf": lambda u, v: (np.abs(u) + 0.55) ** 2 + v**2 < 1.1,
    "clover": lambda u, v: np.hypot(np.abs(u) - 0.45, np.abs(v) - 0.45) < 0.5,
    "heart": _heart,
    "tent": lambda u, v: (v < 0.8) & (np.abs(u) < 0.55 * (v + 1.0)),
}

# ---------------------------------------------------------------------------------------------- patterns
# Each maps pixel coordinates to [0, 1], the share of the second colour; `p` is the period in pixels.


def _wave(t: Field) -> Field:
    return 0.5 + 0.5 * np.sin(2 * np.pi * t)


def _square(t: Field) -> Field:
    return (t % 1.0 < 0.5).astype(np.float32)


def _dots(x: Field, y: Field, p: float, radius: float) -> Field:
    return (np.hypot((x / p) % 1 - 0.5, (y / p) % 1 - 0.5) < radius).astype(np.float32)


def _bricks(x: Field, y: Field, p: float) -> Field:
    row = np.floor(y / p)
    joint = ((y / p) % 1 < 0.22) | (((x / p + row) / 2) % 1 < 0.13)
    return joint.astype(np.float32)


def _speckle(x: Field, y: Field, rng: np.random.Generator) -> Field:
    return (rng.random(x.shape) < 0.3).astype(np.float32)


def _clouds(x: Field, y: Field, rng: np.random.Generator) -> Field:
    a, b, c = rng.random(3)
    return _wave(x / 61 + 0.25 * np.sin(y / 17 + 6 * a) + b) * (0.6 + 0.4 * _wave(y / 47 + c))


def _blades(x: Field, y: Field, p: float, rng: np.random.Generator) -> Field:
    row = np.floor(y / (2 * p)).astype(int)
    shift = rng.random(row.max() - row.min() + 1)[row - row.min()]
    lean = 0.15 * np.sin(6.28 * shift)
    return _square(x / p + shift + lean * y / p) * (0.35 + 0.65 * ((y / (2 * p)) % 1))


PATTERNS: dict[str, Callable[[Field, Field, float, np.random.Generator], Field]] = {
    "ball": lambda x, y, p, r: _dots(x, y, 1.6 * p, 0.3),
    "box": lambda x, y, p, r: np.abs(_square(x / (2 * p)) - _square(y / (2 * p))),
    "flag": lambda x, y, p, r: _square(y / (1.4 * p)),
    "kite": lambda x, y, p, r: np.maximum(_square((x + y) / (2 * p)), _square((x - y) / (2 * p))),
    "star": lambda x, y, p, r: _square(np.arctan2(x, -y) / (2 * np.pi) * 10),
    "ring": lambda x, y, p, r: _square(np.hypot(x, y) / (1.2 * p)),
    "leaf": lambda x, y, p, r: _square((np.abs(x) + y) / (1.4 * p)),
    "clover": lambda x, y, p, r: 1 - _dots(x, y, 1.5 * p, 0.42),
    "heart": lambda x, y, p, r: _wave(x / (1.5 * p)) * _wave(y / (1.5 * p)),
    "tent": lambda x, y, p, r: _square(x / (1.4 * p)),
    "sky": lambda x, y, p, r: _clouds(x, y, r),
    "grass": lambda x, y, p, r: _blades(x, y, 0.8 * p, r),
    "sand": lambda x, y, p, r: _speckle(x, y, r),
    "water": lambda x, y, p, r: _wave(y / (1.3 * p) + 0.35 * np.sin(x / (0.8 * p))),
    "wall": lambda x, y, p, r: _bricks(x, y, 1.5 * p),
}


# Every class alternates two of six hues, and every hue belongs to five classes: the pair names the class,
# the colour of one pixel does not.
_HUE = {"red": 0.0, "yellow": 1 / 6, "green": 2 / 6, "cyan": 3 / 6, "blue": 4 / 6, "magenta": 5 / 6}
HUES = {
    "sky": ("blue", "cyan"),
    "grass": ("green", "yellow"),
    "sand": ("yellow", "red"),
    "water": ("green", "blue"),
    "wall": ("red", "magenta"),
    "ball": ("red", "cyan"),
    "box": ("red", "green"),
    "flag": ("red", "blue"),
    "kite": ("yellow", "magenta"),
    "star": ("yellow", "blue"),
    "ring": ("cyan", "magenta"),
    "leaf": ("green", "cyan"),
    "clover": ("blue", "magenta"),
    "heart": ("green", "magenta"),
    "tent": ("yellow", "cyan"),
}


def _colours(name: str, rng: np.random.Generator) -> list[np.ndarray]:
    """The class's two hues in random order, one light and one dark."""
    hues = rng.permutation([_HUE[hue] for hue in HUES[name]]) + rng.normal(0, 0.02, 2)
    values = rng.uniform((0.75, 0.35), (1.0, 0.6))
    saturations = rng.uniform(0.45, 0.9, 2)
    return [
        np.array(colorsys.hsv_to_rgb(h % 1, s, v), np.float32) * 255
        for h, s, v in zip(hues, saturations, rng.permutation(values), strict=True)
    ]


def _paint(
    image: np.ndarray,
    mask: np.ndarray,
    where: np.ndarray,
    name: str,
    pattern: Field,
    rng: np.random.Generator,
) -> None:
    """Give the pixels `where` the pattern in two of the class's colours, and the class's label."""
    first, second = _colours(name, rng)
    share = pattern[where][:, None]
    image[where] = first * (1 - share) + second * share
    mask[where] = CLASS_NAMES.index(name)


# ---------------------------------------------------------------------------------------------- scenes


def _place(rng: np.random.Generator, count: int, size: int) -> list[tuple[float, float, float]]:
    """Draw `count` (x, y, half side) squares that overlap little: the last of eight tries is kept anyway."""
    placed: list[tuple[float, float, float]] = []
    for _ in range(count):
        for _ in range(8):
            half = size * rng.uniform(0.2, 0.3)
            x, y = rng.uniform(0.8 * half, size - 0.8 * half, 2)
            if all(max(abs(x - px), abs(y - py)) > 0.85 * (half + ph) for px, py, ph in placed):
                break
        placed.append((x, y, half))
    return placed


def draw_scene(rng: np.random.Generator, size: int = 96) -> Scene:
    """Draw one scene of 1-3 objects on two grounds, `size` pixels a side."""
    image = np.empty((size, size, 3), np.float32)
    mask = np.empty((size, size), np.uint8)
    upper, lower = (GROUNDS[i] for i in rng.choice(len(GROUNDS), 2, replace=False))
    _draw_grounds(image, mask, upper, lower, rng)
    objects = [OBJECTS[i] for i in rng.choice(len(OBJECTS), rng.integers(1, 4), replace=False)]
    for name, (x, y, half) in zip(objects, _place(rng, len(objects), size), strict=True):
        _draw_object(image, mask, name, x, y, half, rng)
    image += rng.normal(0, 5, image.shape)
    return Scene(image.clip(0, 255).astype(np.uint8), mask, _caption(rng, objects, upper, lower))


def _period(size: int, rng: np.random.Generator) -> float:
    return size / 96 * rng.uniform(6.5, 8.5)


def _draw_grounds(
    image: np.ndarray, mask: np.ndarray, upper: str, lower: str, rng: np.random.Generator
) -> None:
    size = len(mask)
    y, x = np.mgrid[0:size, 0:size].astype(np.float32)
    height, swing, phase = rng.uniform((0.35, -0.1, 0.0), (0.65, 0.1, 6.0))
    above = y < size * (height + swing * np.sin(x / size * 6 + phase))
    for name, where in ((upper, above), (lower, ~above)):
        _paint(image, mask, where, name, PATTERNS[name](x, y, _period(size, rng), rng), rng)


def _draw_object(
    image: np.ndarray,
    mask: np.ndarray,
    name: str,
    centre_x: float,
    centre_y: float,
    half: float,
    rng: np.random.Generator,
) -> None:
    size, turn = len(mask), rng.uniform(-0.3, 0.3)
    reach = 1.45 * half  # a turned square's corners
    top, left = (max(0, int(centre - reach)) for centre in (centre_y, centre_x))
    bottom, right = (min(size, int(centre + reach) + 1) for centre in (centre_y, centre_x))
    box = slice(top, bottom), slice(left, right)
    y, x = np.mgrid[box].astype(np.float32) - np.float32([[[centre_y]], [[centre_x]]])
    u, v = np.cos(turn) * x + np.sin(turn) * y, np.cos(turn) * y - np.sin(turn) * x
    where = OUTLINES[name](u / half, v / half)
    _paint(image[box], mask[box], where, name, PATTERNS[name](u, v, _period(size, rng), rng), rng)


def _caption(rng: np.random.Generator, objects: list[str], upper: str, lower: str) -> str:
    names = [f"a {name}" for name in objects]
    things = names[0] if len(names) == 1 else ", ".join(names[:-1]) + " and " + names[-1]
    sentences = (
        f"{things} between the {upper} and the {lower}",
        f"here we see {things} with {lower} below and {upper} above",
        f"{things} and behind that {upper} and {lower}",
        f"the {upper} over the {lower} with {things}",
        f"{lower} and {upper}, and there is {things}",
    )
    return sentences[rng.integers(len(sentences))]
