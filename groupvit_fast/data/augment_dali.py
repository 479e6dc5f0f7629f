"""The augmentation layers as DALI operators, for GPU and CPU: one graph, per-sample choices and strengths.

DALI's own RandAugment draws inside the pipeline, so its pictures would depend on the batches before; and its
equalisation, border and fill are not Pillow's. Here every number comes from outside.
"""

from __future__ import annotations

import numpy as np
from nvidia.dali import fn, types

from groupvit_fast.data.augment import FILL, Operation

_SMOOTH = np.array([[1, 1, 1], [1, 5, 1], [1, 1, 1]], np.float32) / 13


def augmented(pixels, operation, value, matrix, *, layers: int, size: int, gpu: bool):
    """`pixels` uint8 [size, size, 3] after its layers; the other inputs as in `Layers`, on the CPU."""
    for layer in range(layers):
        chosen = operation[layer]
        strength = value[layer].gpu() if gpu else value[layer]
        if chosen == int(Operation.NONE):
            pixels = pixels
        elif chosen == int(Operation.AFFINE):
            pixels = _affine(pixels, matrix[layer], size, gpu)
        elif chosen <= int(Operation.INVERT):
            pixels = _without_strength(pixels, chosen)
        elif chosen <= int(Operation.SOLARIZE_ADD):
            pixels = _by_value(pixels, chosen, strength)
        else:
            pixels = _blended(pixels, chosen, strength, size, gpu)
    return pixels


def _affine(pixels, matrix, size: int, gpu: bool):
    """Bilinear inside, FILL outside; Pillow decides which it is by the nearest pixel, so a mask does too."""
    device = "gpu" if gpu else "cpu"
    moved = fn.warp_affine(pixels, matrix=matrix, interp_type=types.INTERP_LINEAR)
    ones = types.Constant(np.ones((size, size, 1), np.uint8), device=device, layout="HWC")
    inside = fn.warp_affine(ones, matrix=matrix, interp_type=types.INTERP_NN, fill_value=0)
    fill = types.Constant(np.array(FILL, np.uint8).reshape(1, 1, 3), device=device)
    return fn.cast(inside * moved + (1 - inside) * fill, dtype=types.UINT8)


def _without_strength(pixels, chosen):
    if chosen == int(Operation.INVERT):
        result = fn.cast(255 - pixels, dtype=types.UINT8)
    elif chosen == int(Operation.EQUALIZE):
        # DALI follows OpenCV, which counts the pixels up to a value; Pillow counts those below it. Seen in
        # the negative picture the one is the other.
        equalized = fn.equalize(fn.cast(255 - pixels, dtype=types.UINT8))
        result = fn.cast(255 - equalized, dtype=types.UINT8)
    else:
        low = fn.reductions.min(pixels, axis_names="HW", keep_dims=True)
        high = fn.reductions.max(pixels, axis_names="HW", keep_dims=True)
        spread = fn.cast(high, dtype=types.FLOAT) - low
        flat = spread < 0.5  # a channel of one value stays as it is
        result = (fn.cast(pixels, dtype=types.FLOAT) - low) * (255.0 / (spread + flat)) * (flat ^ True)
        result = fn.cast(result + pixels * flat, dtype=types.UINT8)
    return result


def _by_value(pixels, chosen, strength):
    whole = fn.cast(strength, dtype=types.INT32)
    wide = fn.cast(pixels, dtype=types.INT32)
    if chosen == int(Operation.POSTERIZE):
        result = wide & whole
    elif chosen == int(Operation.SOLARIZE):
        result = wide * (wide < whole) + (255 - wide) * (wide >= whole)
    else:
        result = wide + whole * (wide < 128)
    return fn.cast(result, dtype=types.UINT8)  # saturates


def _blended(pixels, chosen, strength, size: int, gpu: bool):
    """Pillow's ImageEnhance: away from, or towards, a picture that lacks the quality in question."""
    wide = fn.cast(pixels, dtype=types.FLOAT)
    if chosen == int(Operation.BRIGHTNESS):
        result = wide * strength
    elif chosen == int(Operation.SHARPNESS):
        smooth = _smooth(pixels, size, gpu)
        result = smooth + (wide - smooth) * strength
    else:
        grey = fn.cast(
            fn.color_space_conversion(pixels, image_type=types.RGB, output_type=types.GRAY),
            dtype=types.FLOAT,
        )
        if chosen == int(Operation.CONTRAST):
            mean = fn.reductions.mean(grey, axis_names="HW", keep_dims=True)
            middle = fn.cast(fn.cast(mean, dtype=types.INT32), dtype=types.FLOAT)
        else:
            middle = grey
        result = middle + (wide - middle) * strength
    return fn.cast(result, dtype=types.UINT8)


def _smooth(pixels, size: int, gpu: bool):
    """Pillow's SMOOTH filter, which leaves the outermost pixels alone."""
    device = "gpu" if gpu else "cpu"
    inner = np.zeros((size, size, 1), np.float32)
    inner[1:-1, 1:-1] = 1
    inner = types.Constant(inner, device=device, layout="HWC")
    kernel = types.Constant(_SMOOTH, device=device)
    blurred = fn.cast(fn.filter(pixels, kernel), dtype=types.FLOAT)
    return blurred * inner + pixels * (1 - inner)
