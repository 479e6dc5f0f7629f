import io
import itertools

import numpy as np
import pytest
import torch
from PIL import Image

from groupvit_fast.data.decode import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    DecodeInput,
    ImageDecoder,
    default_threads,
    numbered_device,
    undecodable,
    window_fractions,
)

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
MEAN = torch.tensor(IMAGENET_MEAN).view(3, 1, 1)
STD = torch.tensor(IMAGENET_STD).view(3, 1, 1)


def decode(image, size, window=None, mirror=0, device="cpu"):
    """Decode one image to [3, size, size]; `window` is x, y, width, height on the upright picture."""
    with Image.open(io.BytesIO(image)) as opened:
        width, height = opened.size
        if opened.getexif().get(0x0112, 1) >= 5:
            width, height = height, width
    windows = np.array([window or (0, 0, width, height)])
    anchor, extent = window_fractions(windows, np.array([width]), np.array([height]))
    batch = DecodeInput([np.frombuffer(image, np.uint8)], anchor, extent, np.array([mirror], np.int32))
    decoder = ImageDecoder(lambda: batch, batch_size=1, image_size=size, device=numbered_device(device))
    return decoder.next()[0].cpu()


def as_bytes(pixels):
    """Undo the normalisation: [3, H, W] to float [H, W, 3] in 0 .. 255."""
    return (255 * (pixels * STD + MEAN)).permute(1, 2, 0).numpy()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("colour", [(0, 0, 0), (255, 255, 255), (10, 200, 99)])
def test_constant_colour_is_normalised_exactly(encode_image, colour, device):
    image = encode_image(np.full((20, 30, 3), colour, np.uint8), "PNG")
    expected = (torch.tensor(colour, dtype=torch.float32).view(3, 1, 1) / 255 - MEAN) / STD
    torch.testing.assert_close(
        decode(image, 16, device=device), expected.expand(3, 16, 16), rtol=0, atol=1e-5
    )


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("window", [(0, 0, 96, 80), (5, 7, 60, 61), (30, 20, 33, 32), (90, 70, 6, 10)])
def test_crop_and_resize_equal_pillow(noise_image, window, device):
    image = noise_image(1, 96, 80, kind="PNG")
    x, y, width, height = window
    with Image.open(io.BytesIO(image)) as opened:
        expected = opened.crop((x, y, x + width, y + height)).resize((32, 32), Image.Resampling.BILINEAR)
    assert np.abs(as_bytes(decode(image, 32, window, device=device)) - np.asarray(expected)).max() <= 1.01


@pytest.mark.parametrize("device", DEVICES)
def test_mirror_flips_left_and_right(noise_image, device):
    image = noise_image(2, 40, 40)
    assert torch.equal(decode(image, 24, device=device).flip(2), decode(image, 24, mirror=1, device=device))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_window_is_that_of_the_upright_picture(encode_image, orientation, device):
    """The upper left quarter of the upright picture is white, whatever way the camera was held."""
    upright = np.zeros((40, 64, 3), np.uint8)
    upright[:20, :32] = 255
    turns = {1: 0, 3: 2, 6: 1, 8: 3}[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = np.ascontiguousarray(np.rot90(upright, turns))
    image = encode_image(stored, exif=exif.tobytes(), quality=100, subsampling=0)
    assert as_bytes(decode(image, 8, (0, 0, 28, 16), device=device)).min() > 250
    assert as_bytes(decode(image, 8, (36, 0, 28, 16), device=device)).max() < 5


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("mode", ["L", "CMYK", "RGBA", "I;16", "P"])
def test_every_pixel_format_comes_out_as_three_channels(encode_image, mode, device):
    kind = "JPEG" if mode in ("L", "CMYK") else "PNG"
    image = Image.new("L", (20, 20), 128)
    if mode == "I;16":
        image = Image.fromarray(np.full((20, 20), 128 << 8, np.uint16))
    elif mode != "L":
        image = image.convert("RGB").convert(mode)
    values = as_bytes(decode(encode_image(image, kind), 8, device=device))
    assert np.abs(values - 128).max() < 6


@pytest.mark.parametrize("device", DEVICES)
def test_undecodable_images_are_found_among_good_ones(noise_image, device):
    good = [np.frombuffer(noise_image(n), np.uint8) for n in range(6)]
    broken = [good[0][:-40], np.frombuffer(b"<html>", np.uint8), np.zeros(0, np.uint8)]
    images = [broken[0], good[0], good[1], broken[1], good[2], broken[2], broken[0], good[3]]
    assert undecodable(images, numbered_device(device)) == [0, 3, 5, 6]
    assert undecodable(good, numbered_device(device)) == []
    assert undecodable([], numbered_device(device)) == []


def test_threads_are_shared_between_the_ranks_of_a_machine(monkeypatch):
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(16)))
    assert default_threads() == 16
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert default_threads() == 4
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "64")
    assert default_threads() == 1


def test_memory_of_a_batch_is_used_again_once_it_is_dropped(noise_image):
    """A batch that is still held, if only by a view of it, keeps its pixels."""
    encoded = [np.frombuffer(noise_image(n, 40, 40), np.uint8) for n in range(4)]
    whole = np.zeros((1, 2), np.float32), np.ones((1, 2), np.float32), np.zeros(1, np.int32)
    images = itertools.cycle(encoded)
    decoder = ImageDecoder(
        lambda: DecodeInput([next(images)], *whole),
        batch_size=1,
        image_size=16,
        device=torch.device("cpu"),
    )
    held = [decoder.next()[0, 1] for _ in range(4)]
    before = [view.clone() for view in held]
    places = {decoder.next().data_ptr() for _ in range(40)}
    assert len(places) <= 2
    assert not places & {view.untyped_storage().data_ptr() for view in held}
    assert all(torch.equal(view, copy) for view, copy in zip(held, before, strict=True))
    many = [decoder.next() for _ in range(12)]
    assert len({batch.data_ptr() for batch in many}) == 12
