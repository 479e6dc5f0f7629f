"""Augmentation against Pillow, operator by operator, and its draws against timm's rules."""

import importlib
import io
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance, ImageOps

from groupvit_fast.console import UserError
from groupvit_fast.data import augment, sampling
from groupvit_fast.data.augment import Augmentation, Layers, Operation, RandAugment
from groupvit_fast.data.decode import DecodeInput, ImageDecoder, numbered_device
from groupvit_fast.data.images import IMAGENET_MEAN, IMAGENET_STD

SIZE = 224
RECIPE = "rand-m9-mstd0.5-inc1"
BYTES = [*range(256)] * 3
ENGINES = ["dali"]
if hasattr(importlib.import_module("groupvit_fast._native"), "finish_pictures"):
    ENGINES.append("native")
if torch.cuda.is_available():
    ENGINES.append("cuda")


def photo(seed=0):
    """Smooth colours, edges, noise, and a large flat part: what equalising and sharpening react to."""
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 200, (6, 6, 3), dtype=np.uint8))
    pixels = np.asarray(small.resize((SIZE, SIZE), Image.Resampling.BICUBIC)).astype(int)
    pixels += rng.integers(-20, 20, pixels.shape)
    pixels[40:120, 50:130] = (30, 180, 90)
    return Image.fromarray(pixels.clip(5, 240).astype(np.uint8))


def pillow(image, name, level, signed):
    """What timm calls for one of its transforms ("increasing" levels, bilinear, mean colour outside)."""
    share = signed / 10
    factor = max(0.1, 1 + 0.9 * share)
    outside = {"resample": Image.Resampling.BILINEAR, "fillcolor": (124, 116, 104)}

    def affine(*matrix):
        return image.transform(image.size, Image.Transform.AFFINE, matrix, **outside)

    add = int(level / 10 * 110)
    return {
        "AutoContrast": lambda: ImageOps.autocontrast(image),
        "Equalize": lambda: ImageOps.equalize(image),
        "Invert": lambda: ImageOps.invert(image),
        "Rotate": lambda: image.rotate(30 * share, **outside),
        # ImageOps.posterize refuses 0 bits since Pillow 12; before, they gave black
        "PosterizeIncreasing": lambda: image.point(
            [i & ~(2 ** (4 + int(level / 10 * 4)) - 1) for i in BYTES]
        ),
        "SolarizeIncreasing": lambda: ImageOps.solarize(image, 256 - min(256, int(level / 10 * 256))),
        "SolarizeAdd": lambda: image.point([min(255, i + add) if i < 128 else i for i in BYTES]),
        "ColorIncreasing": lambda: ImageEnhance.Color(image).enhance(factor),
        "ContrastIncreasing": lambda: ImageEnhance.Contrast(image).enhance(factor),
        "BrightnessIncreasing": lambda: ImageEnhance.Brightness(image).enhance(factor),
        "SharpnessIncreasing": lambda: ImageEnhance.Sharpness(image).enhance(factor),
        "ShearX": lambda: affine(1, 0.3 * share, 0, 0, 1, 0),
        "ShearY": lambda: affine(1, 0, 0, 0.3 * share, 1, 0),
        "TranslateXRel": lambda: affine(1, 0, 0.45 * share * SIZE, 0, 1, 0),
        "TranslateYRel": lambda: affine(1, 0, 0, 0, 1, 0.45 * share * SIZE),
    }[name]()


def layers_of(*rows):
    """Layers from rows of (name, level, signed)."""
    layers = Layers.empty(len(rows), len(rows[0]))
    for row, steps in enumerate(rows):
        for layer, (name, level, signed) in enumerate(steps):
            operation, value, *matrix = augment.transform(name, level, signed, SIZE)
            layers.operation[row, layer], layers.value[row, layer] = operation, value
            if matrix:
                layers.matrix[row, layer] = matrix[0]
    return layers


def run(engine, images, layers, mirror=None, erased=None):
    """The decoder's pictures of SIZE px, as normalised tensors on the CPU."""
    encoded = []
    for image in images:
        buffer = io.BytesIO()
        image.save(buffer, "PNG")
        encoded.append(np.frombuffer(buffer.getvalue(), np.uint8))
    count = len(images)
    corner, extent = np.zeros((count, 2), np.float32), np.ones((count, 2), np.float32)
    mirror = np.zeros(count, np.int32) if mirror is None else mirror
    batch = DecodeInput(encoded, corner, extent, mirror, layers, erased)
    decoder = ImageDecoder(
        lambda: batch,
        batch_size=count,
        image_size=SIZE,
        device=numbered_device("cuda" if engine == "cuda" else "cpu"),
        layers=layers.operation.shape[1],
        native=engine == "native",
    )
    return decoder.next().cpu()


def as_bytes(tensor):
    pixels = tensor.permute(0, 2, 3, 1).numpy() * IMAGENET_STD + IMAGENET_MEAN
    return pixels * 255


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", augment.RAND_TRANSFORMS)
def test_each_transform_equals_pillow(engine, name):
    image = photo()
    levels = [(9.0, 9.0), (9.0, -9.0), (7.3, -7.3), (10.0, 10.0), (0.0, 0.0)]
    shown = as_bytes(run(engine, [image] * len(levels), layers_of(*([(name, *level)] for level in levels))))
    for pixels, level in zip(shown, levels, strict=True):
        expected = np.asarray(pillow(image, name, *level))
        assert np.abs(pixels - expected).max() <= 2.01, level
    if name not in ("Invert", "Equalize", "AutoContrast", "PosterizeIncreasing"):
        assert np.abs(shown[0] - np.asarray(image)).max() > 20, "the strength is felt"


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", ["Equalize", "AutoContrast", "ContrastIncreasing"])
def test_flat_and_two_coloured_pictures(engine, name):
    flat = Image.new("RGB", (SIZE, SIZE), (17, 99, 99))
    halves = flat.copy()
    halves.paste((210, 99, 20), (0, 0, SIZE // 2, SIZE))
    shown = as_bytes(run(engine, [flat, halves], layers_of([(name, 9.0, 9.0)], [(name, 9.0, 9.0)])))
    for pixels, image in zip(shown, (flat, halves), strict=True):
        assert np.abs(pixels - np.asarray(pillow(image, name, 9.0, 9.0))).max() <= 2.01


@pytest.mark.parametrize("engine", ENGINES)
def test_layers_follow_each_other_and_the_mirror_comes_last(engine):
    image = photo(1)
    rows = [
        [("Rotate", 9.0, 9.0), ("ColorIncreasing", 9.0, 9.0)],
        [("ShearX", 9.0, -9.0), ("TranslateYRel", 8.0, 8.0)],
    ]
    shown = as_bytes(run(engine, [image] * 2, layers_of(*rows), mirror=np.array([0, 1], np.int32)))
    for pixels, steps, mirrored in zip(shown, rows, (False, True), strict=True):
        expected = image
        for step in steps:
            expected = pillow(expected, *step)
        expected = ImageOps.mirror(expected) if mirrored else expected
        assert np.abs(pixels - np.asarray(expected)).max() <= 4.01


@pytest.mark.parametrize("engine", [name for name in ENGINES if name != "dali"])
def test_engines_agree_on_random_draws(engine):
    images = [photo(seed) for seed in range(24)]
    layers, erased = Augmentation(RandAugment.parse(RECIPE), erase=0.5).draw(0, 100, 24, SIZE)
    one, other = (run(name, images, layers, erased=erased) for name in ("dali", engine))
    off = (one - other).abs() * 255 * 0.225
    assert (off > 3).float().mean() < 2e-3
    assert sum(map(bool, layers.operation.any(1))) > 12


def test_policies_are_read_as_timm_spells_them():
    assert RandAugment.parse(RECIPE) == RandAugment(magnitude=9, layers=2, deviation=0.5)
    assert RandAugment.parse("rand-n3-m5.5-p0.7-inc1") == RandAugment(5.5, 3, 0.0, 0.7)
    wrong = (
        "rand-m9 augmix-m3-inc1 rand-m9-inc1-w0 rand-m11-inc1 rand-m9-n9-inc1 rand-mx-inc1 rand-m9-p2-inc1"
    )
    for name in wrong.split():
        with pytest.raises(UserError, match=f"--aa {name}"):
            RandAugment.parse(name)


def test_draws_have_timms_distribution():
    """Each layer applies one of the 15 transforms to half of the samples; levels are N(9, 0.5) cut at 10."""
    count = 20_000
    layers, _ = Augmentation(RandAugment.parse(RECIPE)).draw(0, 0, count, SIZE)
    assert layers.operation.shape == (count, 2)
    for layer in (0, 1):
        numbers = Counter(layers.operation[:, layer].tolist())
        assert abs(numbers[Operation.NONE] / count - 0.5) < 0.015
        for operation in Operation:
            if operation != Operation.NONE:
                share = 5 / 30 if operation == Operation.AFFINE else 1 / 30
                assert abs(numbers[operation] / count - share) < 0.15 * share + 0.002, operation
    both = (layers.operation[:, 0] > 0) & (layers.operation[:, 1] > 0)
    assert abs(both.mean() - 0.25) < 0.015, "the layers are independent"
    factors = layers.value[layers.operation == Operation.BRIGHTNESS]
    levels = np.abs(factors - 1) / 0.09  # a negative sign leads to 1 - 0.81, above the floor of 0.1
    assert abs((factors > 1).mean() - 0.5) < 0.06
    upper = levels[factors > 1]
    assert abs(np.median(upper) - 9) < 0.1
    assert abs(np.quantile(upper, 0.8413) - 9.5) < 0.15
    assert abs((upper >= 9.999).mean() - 0.0228) < 0.02


def test_every_transform_is_drawn_with_its_own_matrix():
    words = np.tile([0.0, 0.0, 0.0, 0.0, 0.9, 0.5, 0.9, 0.0, 0.0, 0.0], (15, 1))
    words[:, 0] = (np.arange(15) + 0.5) / 15
    layers = augment.draw_rand_augment(RandAugment.parse(RECIPE), words, SIZE)
    expected = layers_of(*([(name, 9.0, 9.0)] for name in augment.RAND_TRANSFORMS))
    assert np.array_equal(layers.operation[:, :1], expected.operation)
    np.testing.assert_allclose(layers.value[:, :1], expected.value, rtol=1e-6)
    np.testing.assert_allclose(layers.matrix[:, :1], expected.matrix, atol=1e-5)
    assert not layers.operation[:, 1].any()


def test_colour_jitter_is_torchvisions():
    layers, _ = Augmentation(color_jitter=0.4).draw(0, 0, 6000, SIZE)
    orders = Counter(map(tuple, layers.operation.tolist()))
    assert len(orders) == 6
    assert all(abs(number / 6000 - 1 / 6) < 0.03 for number in orders.values())
    assert layers.value.min() >= 0.6
    assert layers.value.max() <= 1.4
    assert np.abs(np.histogram(layers.value, 8, (0.6, 1.4))[0] / layers.value.size - 1 / 8).max() < 0.01
    assert Augmentation(RandAugment(), color_jitter=0.4).layers == 2, "as in timm, RandAugment displaces it"


@pytest.mark.parametrize("engine", ENGINES)
def test_colour_jitter_equals_pillow(engine):
    image = photo(2)
    layers = Layers.empty(1, 3)
    layers.operation[:] = Operation.CONTRAST, Operation.COLOR, Operation.BRIGHTNESS
    layers.value[:] = 0.7, 1.3, 0.8
    expected = ImageEnhance.Contrast(image).enhance(0.7)
    expected = ImageEnhance.Brightness(ImageEnhance.Color(expected).enhance(1.3)).enhance(0.8)
    assert np.abs(as_bytes(run(engine, [image], layers)) - np.asarray(expected)).max() <= 3.01


def test_erased_rectangles_follow_timms_rule():
    _, boxes = Augmentation(erase=0.25).draw(0, 0, 40_000, SIZE)
    erased = boxes[boxes[:, 2] > 0]
    assert abs(len(erased) / len(boxes) - 0.25) < 0.01
    top, left, height, width, start = erased.T
    assert min(top.min(), left.min()) == 0
    assert (top + height).max() == SIZE
    assert (left + width).max() == SIZE
    area, ratio = height * width / SIZE**2, height / width
    assert 0.018 < area.min() < 0.025
    assert 0.32 < area.max() < 0.345
    assert np.abs(np.histogram(area, 4, (0.02, 1 / 3))[0] / len(area) - 0.25).max() < 0.03
    assert abs(np.median(np.log(ratio))) < 0.04
    assert 0.28 < ratio.min() < 0.33
    assert ((start >= 0) & (start + 3 * height * width <= augment.noise_length(SIZE))).all()


@pytest.mark.parametrize("engine", ENGINES)
def test_erasing_fills_with_normal_noise_and_leaves_the_rest(engine):
    image = photo(3)
    boxes = np.array([[10, 20, 100, 60, 1234], [0, 0, 0, 0, 0]])
    shown = run(engine, [image, image], Layers.none(2), erased=boxes)
    patch = shown[0, :, 10:110, 20:80]
    assert abs(patch.mean()) < 0.05
    assert abs(patch.std() - 1) < 0.02
    other = shown[0].clone()
    other[:, 10:110, 20:80] = shown[1, :, 10:110, 20:80]
    assert torch.equal(other, shown[1])
    moved = run(engine, [image, image], Layers.none(2), erased=boxes + np.array([[0, 0, 0, 0, 1], [0] * 5]))
    assert not torch.equal(moved[0], shown[0]), "another start, other noise"


def test_draws_belong_to_positions():
    augmentation = Augmentation(RandAugment.parse(RECIPE), erase=0.25)
    whole, boxes = augmentation.draw(3, 0, 64, SIZE)
    part, part_boxes = augmentation.draw(3, 20, 10, SIZE)
    for one, other in zip(whole, part, strict=True):
        assert np.array_equal(one[20:30], other)
    assert np.array_equal(boxes[20:30], part_boxes)
    assert not np.array_equal(sampling.augment_draws(3, 0, 4), sampling.draws(3, 0, 4))
