"""Colours of classes and groups: any number of them, always the same, as different as they can be."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

BACKGROUND_COLOUR = (70, 72, 78)
GOLDEN_ANGLE = 137.508


def class_colours(count: int, *, background: bool = False) -> np.ndarray:
    """Clearly different, equally strong colours, uint8 [count, 3]; with `background` the first is grey.

    Hues step by the golden angle, which never repeats; lightness takes five levels in turn.
    """
    colours = _lch_colours(count - background, (0.68, 0.60, 0.52, 0.83, 0.76), 0.155, start=25.0)
    return np.concatenate([np.array([BACKGROUND_COLOUR], np.uint8), colours]) if background else colours


def group_colours(count: int) -> np.ndarray:
    """Paler colours of other hues than `class_colours`: a group is not a class."""
    return _lch_colours(count, (0.74, 0.64, 0.54, 0.92, 0.83), 0.085, start=230.0)


def _lch_colours(count: int, levels: Sequence[float], chroma: float, start: float) -> np.ndarray:
    """OKLCH colours to sRGB: equal steps there look equal (B. Ottosson, 2020)."""
    index = np.arange(count)
    hue = np.deg2rad(start + GOLDEN_ANGLE * index)
    lightness = np.array(levels)[index % len(levels)]
    a, b = chroma * np.cos(hue), chroma * np.sin(hue)
    long = (lightness + 0.3963377774 * a + 0.2158037573 * b) ** 3
    medium = (lightness - 0.1055613458 * a - 0.0638541728 * b) ** 3
    short = (lightness - 0.0894841775 * a - 1.2914855480 * b) ** 3
    red = 4.0767416621 * long - 3.3077115913 * medium + 0.2309699292 * short
    green = -1.2684380046 * long + 2.6097574011 * medium - 0.3413193965 * short
    blue = -0.0041960863 * long - 0.7034186147 * medium + 1.7076147010 * short
    linear = np.stack([red, green, blue], axis=-1).clip(0, 1)
    gamma = np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)
    return (gamma * 255).round().astype(np.uint8)
