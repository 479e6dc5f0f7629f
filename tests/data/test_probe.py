"""The look at an image's header agrees with Pillow on sound files and with the decoder on cut ones."""

import io
import os

import numpy as np
import pytest
import torch
from PIL import Image

from groupvit_fast.data import scan as scan_module
from groupvit_fast.data.decode import undecodable
from groupvit_fast.data.probe import FileSlice, probe_image
from groupvit_fast.data.scan import scan

pytestmark = pytest.mark.usefixtures("scanner")


def picture(mode="RGB", size=(30, 20)):
    small = np.random.default_rng(1).integers(0, 255, (4, 4, 3), dtype=np.uint8)
    image = Image.fromarray(small).resize(size, Image.Resampling.BILINEAR)
    if mode == "I;16":
        return Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) << 8)
    return image.convert(mode)


def exif(orientation, thumbnail=b""):
    block = Image.Exif()
    block[0x0112] = orientation
    block[0x010E] = "x" * 300  # an entry before it, so that the directory is searched
    return block.tobytes() + thumbnail


@pytest.fixture
def look(write_tar, tmp_path):
    def look(data):
        """(width, height) by the index, or the reason for leaving the image out."""
        index = scan(write_tar(tmp_path / "s.tar", [("k.jpg", data), ("k.txt", b"a cat")]))
        return (int(index.width[0]), int(index.height[0])) if len(index) else index.rejected[0][1]

    return look


@pytest.mark.parametrize(
    ("kind", "mode", "options"),
    [
        ("JPEG", "RGB", {}),
        ("JPEG", "RGB", {"progressive": True}),
        ("JPEG", "RGB", {"restart_marker_blocks": 1}),
        ("JPEG", "CMYK", {}),
        ("JPEG", "L", {}),
        ("JPEG", "RGB", {"icc_profile": bytes(200_000), "comment": "x" * 60_000}),
        ("PNG", "RGB", {}),
        ("PNG", "RGBA", {}),
        ("PNG", "P", {}),
        ("PNG", "1", {}),
        ("PNG", "I;16", {}),
        ("WEBP", "RGB", {}),
        ("WEBP", "RGB", {"lossless": True}),
        ("WEBP", "RGBA", {}),
        ("WEBP", "RGB", {"icc_profile": bytes(500)}),
    ],
)
@pytest.mark.parametrize("size", [(1, 1), (30, 20), (2000, 3)])
def test_size_is_that_of_pillow(look, encode_image, kind, mode, options, size):
    assert look(encode_image(picture(mode, size), kind, **options)) == size


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("orientation", range(9))
def test_exif_turns_the_size(look, encode_image, kind, orientation):
    expected = (20, 30) if orientation >= 5 else (30, 20)
    assert look(encode_image(picture(), kind, exif=exif(orientation))) == expected


def test_20000_by_20_pixels_and_the_limit(look, encode_image, monkeypatch):
    wide = encode_image(picture(size=(20_000, 20)))
    assert look(wide) == (20_000, 20)
    monkeypatch.setattr(scan_module, "MAX_PIXELS", 399_999)
    assert look(wide) == "20000 x 20 pixels is above the limit of 399999"


def test_sizes_whose_product_overflows_are_above_the_limit(look, encode_image):
    png = bytearray(encode_image(picture(), "PNG"))
    png[16:24] = b"\xff" * 8
    assert look(bytes(png)) == "4294967295 x 4294967295 pixels is above the limit of 67108864"


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "thumbnail"])
def test_an_image_cut_at_any_tenth_byte_is_left_out(tmp_path, write_tar, encode_image, kind):
    """The thumbnail is a whole JPEG inside the header, whose end marker must not count."""
    if kind == "thumbnail":
        small = encode_image(picture(size=(8, 8)))
        image = encode_image(picture(size=(90, 60)), "JPEG", exif=exif(1, small))
        assert image.count(b"\xff\xd9") >= 2
    else:
        image = encode_image(picture(size=(90, 60)), kind)
    cuts = range(0, len(image), 10)
    members = [
        (f"{cut}.{extension}", data)
        for cut in cuts
        for extension, data in (("jpg", image[:cut]), ("txt", b"a"))
    ]
    index = scan(write_tar(tmp_path / "s.tar", members))
    assert len(index) == 0
    assert [key for key, _ in index.rejected] == [str(cut) for cut in cuts]


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_garbage_behind_the_end_is_harmless(look, encode_image, kind):
    image = encode_image(picture(), kind) + bytes(range(256)) * 20
    assert undecodable([np.frombuffer(image, np.uint8)], torch.device("cpu")) == []
    assert look(image) == (30, 20)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty image"),
        (b"\0", "not a JPEG, PNG or WebP image"),
        (bytes(range(256)) * 9, "not a JPEG, PNG or WebP image"),
        (b"\n <!doctype html><html></html>", "HTML file, not a JPEG, PNG or WebP image"),
        (b"<html><body>404", "HTML file, not a JPEG, PNG or WebP image"),
        (b"%PDF-1.4", "PDF file, not a JPEG, PNG or WebP image"),
        (b"\xff\xd8\xff\xd9", "damaged JPEG header"),
        (b"\xff\xd8\xff" + b"\xff" * 5000, "damaged JPEG header"),
        (b"\xff\xd8\xff\xe0\0\0" + bytes(99), "damaged JPEG header"),
        (b"\x89PNG\r\n\x1a\n" + bytes(99), "damaged PNG header"),
        (b"RIFF\x50\0\0\0WEBPVP8X" + b"\0" * 10, "damaged WebP header"),
        (b"RIFF\x50\0\0\0WEBPXXXX" + b"\0" * 99, "damaged WebP header"),
    ],
)
def test_what_is_no_image_is_said(look, data, reason):
    assert look(data) == reason


@pytest.mark.parametrize("kind", ["GIF", "BMP", "TIFF"])
def test_other_kinds_are_named(look, encode_image, kind):
    assert look(encode_image(picture(), kind)) == f"{kind} file, not a JPEG, PNG or WebP image"


def test_a_slice_shows_nothing_outside(tmp_path, encode_image):
    image = encode_image(picture())
    (tmp_path / "f").write_bytes(b"before" + image + b"\xff\xd9")
    with open(tmp_path / "f", "rb") as file:
        part = FileSlice(file.fileno(), 6, len(image) - 2)
        assert part.view(len(image) - 3, 9) == image[-3:-2]
        assert part.view(0, 10**9) == image[:-2]
        assert probe_image(part, 10**9).fault == "truncated JPEG (no end marker)"
        os.truncate(tmp_path / "f", 20)
        with pytest.raises(OSError, match="Input/output"):
            part.view(0, 30)


def test_pillow_would_say_the_same(encode_image):
    data = encode_image(picture(), "WEBP", exif=exif(6))
    assert Image.open(io.BytesIO(data)).getexif()[0x0112] == 6, "the tests above do write an orientation"
