import numpy as np
import pytest
from PIL import Image

from groupvit_fast.console import UserError
from groupvit_fast.data.images import read_image


def test_rgb_comes_back_unchanged(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    assert np.array_equal(read_image(tmp_path / "a.png"), pixels)
    assert read_image(str(tmp_path / "a.png")).dtype == np.uint8


@pytest.mark.parametrize(
    ("mode", "value", "name", "expected"),
    [
        ("L", 100, "a.png", (100, 100, 100)),
        ("1", 1, "a.png", (255, 255, 255)),
        ("RGBA", (10, 20, 30, 255), "a.png", (10, 20, 30)),
        ("RGBA", (10, 20, 30, 0), "a.png", (255, 255, 255)),
        ("LA", (0, 0), "a.png", (255, 255, 255)),
        ("CMYK", (0, 255, 255, 0), "a.tif", (255, 0, 0)),
        ("I;16", 200 << 8, "a.png", (200, 200, 200)),
        ("I", 200 << 8, "a.tif", (200, 200, 200)),
    ],
)
def test_other_modes_become_rgb(tmp_path, mode, value, name, expected):
    image = Image.new(mode, (4, 3), value)
    image.save(tmp_path / name)
    pixels = read_image(tmp_path / name)
    assert pixels.shape == (3, 4, 3)
    assert tuple(pixels[0, 0].tolist()) == expected


def test_palette_with_transparency_is_laid_on_white(tmp_path):
    image = Image.new("P", (2, 1))
    image.putpalette([9, 9, 9, 50, 60, 70])
    image.putpixel((1, 0), 1)
    image.save(tmp_path / "a.png", transparency=0)
    assert read_image(tmp_path / "a.png").tolist() == [[[255, 255, 255], [50, 60, 70]]]


def test_exif_orientation_is_applied(tmp_path):
    pixels = np.zeros((2, 6, 3), np.uint8)
    pixels[:, :2] = 255
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(pixels).save(tmp_path / "a.png", exif=exif)
    upright = read_image(tmp_path / "a.png")
    assert upright.shape == (6, 2, 3)
    assert upright[:, 0, 0].tolist() == [255, 255, 0, 0, 0, 0]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no such image file"),
        (b"", "cannot be read as an image"),
        (b"<html></html>", "cannot be read as an image"),
        ("truncated", "cannot be read as an image"),
        ("folder", "is a folder"),
        ("large", "above the limit of 100"),
    ],
)
def test_bad_files_are_named(tmp_path, noise_image, content, message):
    path = tmp_path / "odd.jpg"
    if content == "folder":
        path.mkdir()
    elif content == "large":
        path.write_bytes(noise_image(0, 20, 16))
    elif content == "truncated":
        path.write_bytes(noise_image(0, 64, 64)[:400])
    elif content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=rf"odd.jpg.*{message}"):
        read_image(path, max_pixels=100 if content == "large" else 10**6)
