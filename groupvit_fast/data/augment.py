"""Training augmentation as DeiT and the GroupViT paper use it: RandAugment, colour jitter, random erasing.

What happens to a sample is drawn here, as a function of (seed, position); the pixels are computed by
`augment_dali` or by the compiled CPU code, both to the formulas of Pillow that timm calls.

timm's `rand-m9-mstd0.5-inc1`: two layers; each picks one of 15 transforms and applies it with probability
one half, its strength drawn from a normal distribution around 9 of 10 with standard deviation 0.5. Colour
jitter is what timm does where no RandAugment is asked for: brightness, contrast and saturation in random
order. Random erasing replaces a rectangle of the normalised picture by standard normal noise.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from enum import IntEnum
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch

from groupvit_fast.console import UserError
from groupvit_fast.data import sampling

FILL = (124, 116, 104)  # ImageNet's mean colour: what shows where a picture was moved away


class Operation(IntEnum):
    """What one layer does to a uint8 picture; the numbers are shared with the compiled code."""

    NONE = 0
    AUTO_CONTRAST = 1
    EQUALIZE = 2
    INVERT = 3
    POSTERIZE = 4  # value: the bits to keep, as a mask; none of them at the full strength
    SOLARIZE = 5  # value: threshold
    SOLARIZE_ADD = 6  # value: what is added below 128
    COLOR = 7  # value of this and the next three: 1 changes nothing
    CONTRAST = 8
    BRIGHTNESS = 9
    SHARPNESS = 10
    AFFINE = 11  # matrix: output to input coordinates, centres of pixels at halves


RAND_TRANSFORMS = (
    "AutoContrast", "Equalize", "Invert", "Rotate", "PosterizeIncreasing", "SolarizeIncreasing",
    "SolarizeAdd", "ColorIncreasing", "ContrastIncreasing", "BrightnessIncreasing", "SharpnessIncreasing",
    "ShearX", "ShearY", "TranslateXRel", "TranslateYRel",
)  # fmt: skip
"""The transforms of timm's "inc1", by its names."""
_LEVELS = 10.0  # timm's scale of strength
_WORDS_PER_LAYER = 5
_JITTER = (Operation.BRIGHTNESS, Operation.CONTRAST, Operation.COLOR)
_JITTER_ORDERS = np.array(list(itertools.permutations(range(3))))
_ERASE_WORD = 16  # the first of the words of erasing; those before belong to the layers
_ERASE_ATTEMPTS = 10
_ERASE_AREA = (0.02, 1 / 3)
_ERASE_RATIO = (0.3, 1 / 0.3)
_NOISE_STREAM = 4
_LEAST_NOISE = 1 << 20


class Layers(NamedTuple):
    """What happens to the pictures of a batch, layer by layer."""

    operation: np.ndarray  # int32 [B, L], values of Operation
    value: np.ndarray  # float32 [B, L]
    matrix: np.ndarray  # float32 [B, L, 2, 3]

    @classmethod
    def none(cls, batch_size: int) -> Layers:
        return cls.empty(batch_size, 0)

    @classmethod
    def empty(cls, batch_size: int, layers: int) -> Layers:
        identity = np.array([[1, 0, 0], [0, 1, 0]], np.float32)
        matrix = np.tile(identity, (batch_size, layers, 1, 1))
        shape = (batch_size, layers)
        return cls(np.zeros(shape, np.int32), np.zeros(shape, np.float32), matrix)


@dataclass(frozen=True)
class RandAugment:
    """The parts of timm's name `rand-mM-nN-mstdS-pP-inc1`."""

    magnitude: float = 10.0
    layers: int = 2
    deviation: float = 0.0
    probability: float = 0.5

    @classmethod
    def parse(cls, name: str) -> RandAugment:
        """Read a name as timm spells it; the order of the parts is free."""
        fields = {"m": "magnitude", "n": "layers", "mstd": "deviation", "p": "probability"}
        values, increasing = {}, False
        first, *parts = name.split("-")
        for part in parts:
            key = part.rstrip("0123456789.")
            try:
                number = float(part[len(key) :])
                values[fields[key]] = int(number) if key == "n" else number
            except (KeyError, ValueError):
                if part != "inc1":
                    raise UserError(f"--aa {name}: part {part!r} is unknown; {_AA_HELP}") from None
                increasing = True
        policy = cls(**values)
        if first != "rand" or not increasing:
            raise UserError(f"--aa {name}: only the increasing set of RandAugment is built in; {_AA_HELP}")
        if not (0 <= policy.magnitude <= _LEVELS and 1 <= policy.layers <= 3 and policy.deviation >= 0):
            raise UserError(f"--aa {name}: m must lie in 0..10, n in 1..3, mstd must not be negative")
        if not 0 <= policy.probability <= 1:
            raise UserError(f"--aa {name}: p must lie in 0..1")
        return policy


_AA_HELP = "write it as rand-m9-mstd0.5-inc1"


@dataclass(frozen=True)
class Augmentation:
    """What is done to the training crops beside flipping; nothing by default."""

    rand: RandAugment | None = None
    color_jitter: float = 0.0  # used where `rand` is None, as in timm
    erase: float = 0.0  # probability of random erasing

    def __post_init__(self):
        if self.color_jitter < 0 or not 0 <= self.erase <= 1:
            raise UserError("colour jitter must be 0 or more, the probability of erasing in 0..1")

    @property
    def layers(self) -> int:
        return self.rand.layers if self.rand else 3 if self.color_jitter else 0

    def draw(self, seed: int, first: int, count: int, size: int) -> tuple[Layers, np.ndarray]:
        """Layers and erased rectangles of the positions first .. first+count-1, for pictures of `size` px.

        Rectangles are int64 [count, 5]: top, left, height, width, start in the noise; height 0: none.
        """
        if not (self.layers or self.erase):
            return Layers.none(count), np.zeros((count, 5), np.int64)
        words = sampling.uniform(sampling.augment_draws(seed, first, count))
        if self.rand:
            layers = draw_rand_augment(self.rand, words, size)
        else:
            layers = draw_color_jitter(self.color_jitter, words) if self.layers else Layers.none(count)
        return layers, draw_rectangles(self.erase, words[:, _ERASE_WORD:], size)


def draw_rand_augment(policy: RandAugment, words: np.ndarray, size: int) -> Layers:
    """timm's RandAugment; `words` are uniform numbers, at least five a layer."""
    layers = Layers.empty(len(words), policy.layers)
    for layer in range(policy.layers):
        which, applied, radius, angle, sign = words[:, layer * _WORDS_PER_LAYER :].T[:_WORDS_PER_LAYER]
        normal = np.sqrt(-2 * np.log1p(-radius)) * np.cos(2 * math.pi * angle)  # Box and Muller
        level = np.clip(policy.magnitude + policy.deviation * normal, 0, _LEVELS)
        signed = np.where(sign < 0.5, -level, level)
        names = (which * len(RAND_TRANSFORMS)).astype(int)
        for row in np.flatnonzero(applied < policy.probability):
            step = transform(RAND_TRANSFORMS[names[row]], level[row], signed[row], size)
            layers.operation[row, layer], layers.value[row, layer] = step[:2]
            if len(step) == 3:
                layers.matrix[row, layer] = step[2]
    return layers


def transform(name: str, level: float, signed: float, size: int) -> tuple:
    """One transform at a strength `level` in 0..10 (`signed`: the same with a random sign).

    Returns (operation, value) or (operation, 0, matrix). Formulas: timm's "increasing" level functions.
    """
    share = signed / _LEVELS
    factor = max(0.1, 1 + 0.9 * share)
    simple = {
        "AutoContrast": (Operation.AUTO_CONTRAST, 0),
        "Equalize": (Operation.EQUALIZE, 0),
        "Invert": (Operation.INVERT, 0),
        "PosterizeIncreasing": (Operation.POSTERIZE, 256 - (1 << (4 + int(level / _LEVELS * 4)))),
        "SolarizeIncreasing": (Operation.SOLARIZE, 256 - int(level / _LEVELS * 256)),
        "SolarizeAdd": (Operation.SOLARIZE_ADD, int(level / _LEVELS * 110)),
        "ColorIncreasing": (Operation.COLOR, factor),
        "ContrastIncreasing": (Operation.CONTRAST, factor),
        "BrightnessIncreasing": (Operation.BRIGHTNESS, factor),
        "SharpnessIncreasing": (Operation.SHARPNESS, factor),
    }
    return simple[name] if name in simple else (Operation.AFFINE, 0, _matrix(name, share, size))


def _matrix(name: str, share: float, size: int) -> np.ndarray:
    """The affine map, output to input, of a square picture of `size` px."""
    shear, shift = 0.3 * share, 0.45 * share * size
    if name == "Rotate":  # about the centre, counter-clockwise for positive degrees
        angle = -math.radians(30 * share)
        cos, sin, centre = math.cos(angle), math.sin(angle), size / 2
        return np.array([[cos, sin, centre * (1 - cos - sin)], [-sin, cos, centre * (1 - cos + sin)]])
    return {
        "ShearX": np.array([[1, shear, 0], [0, 1, 0]]),
        "ShearY": np.array([[1, 0, 0], [shear, 1, 0]]),
        "TranslateXRel": np.array([[1, 0, shift], [0, 1, 0]]),
        "TranslateYRel": np.array([[1, 0, 0], [0, 1, shift]]),
    }[name]


def draw_color_jitter(strength: float, words: np.ndarray) -> Layers:
    """torchvision's ColorJitter of brightness, contrast and saturation, in random order."""
    layers = Layers.empty(len(words), 3)
    order = _JITTER_ORDERS[(words[:, 0] * len(_JITTER_ORDERS)).astype(int)]
    low, high = max(0.0, 1 - strength), 1 + strength
    layers.operation[:] = np.array(_JITTER)[order]
    layers.value[:] = low + (high - low) * words[:, 1:4]
    return layers


def draw_rectangles(probability: float, words: np.ndarray, size: int) -> np.ndarray:
    """timm's RandomErasing: ten tries of an area of 2 to 33 % and a log-uniform aspect ratio.

    `words` are uniform numbers [B, 42]; returns int64 [B, 5] as `Augmentation.draw` does.
    """
    tries = words[:, 2 : 2 + 4 * _ERASE_ATTEMPTS].reshape(len(words), _ERASE_ATTEMPTS, 4)
    area = size * size * (_ERASE_AREA[0] + (_ERASE_AREA[1] - _ERASE_AREA[0]) * tries[..., 0])
    low, high = map(math.log, _ERASE_RATIO)
    ratio = np.exp(low + (high - low) * tries[..., 1])
    height = np.rint(np.sqrt(area * ratio)).astype(np.int64)
    width = np.rint(np.sqrt(area / ratio)).astype(np.int64)
    fits = (height < size) & (width < size)
    rows, first = np.arange(len(words)), fits.argmax(axis=1)
    height, width = height[rows, first], width[rows, first]
    erased = fits.any(axis=1) & (words[:, 0] < probability)
    top = np.floor(tries[rows, first, 2] * (size - height + 1)).astype(np.int64)
    left = np.floor(tries[rows, first, 3] * (size - width + 1)).astype(np.int64)
    start = np.floor(words[:, 1] * (noise_length(size) - 3 * height * width)).astype(np.int64)
    return np.where(erased[:, None], np.stack([top, left, height, width, start], axis=1), 0)


def noise_length(size: int) -> int:
    """Numbers in the noise that rectangles of pictures of `size` px are filled from."""
    return max(_LEAST_NOISE, 4 * size * size)


@lru_cache(maxsize=2)
def noise(size: int, device: str) -> torch.Tensor:
    """Standard normal numbers, the same in every run; each rectangle takes a stretch of them at random."""
    half = noise_length(size) // 2
    raw = np.random.Philox(key=[0, _NOISE_STREAM]).random_raw(2 * half).reshape(2, half)
    radius, angle = np.sqrt(-2 * np.log1p(-sampling.uniform(raw[0]))), 2 * math.pi * sampling.uniform(raw[1])
    values = np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])
    return torch.from_numpy(values.astype(np.float32)).to(device)


def erase(images: torch.Tensor, rectangles: np.ndarray) -> None:
    """Overwrite the rectangles of normalised `images` [B, 3, S, S] with noise, in place."""
    erased = np.flatnonzero(rectangles[:, 2])
    if len(erased):
        source = noise(images.shape[-1], str(images.device))
        for image, (top, left, height, width, start) in zip(erased, rectangles[erased].tolist(), strict=True):
            patch = source[start : start + 3 * height * width].view(3, height, width)
            images[image, :, top : top + height, left : left + width] = patch
