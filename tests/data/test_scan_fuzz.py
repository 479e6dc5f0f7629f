"""Random damage: both scans agree, nothing crashes or hangs, good samples are delivered, bad ones named."""

import io
import os
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image

from groupvit_fast.data import scan as scan_module
from groupvit_fast.data.decode import undecodable
from groupvit_fast.data.text import clean

MUTATIONS = 1000


@pytest.fixture(scope="module")
def images(noise_image, encode_image):
    exif = Image.Exif()
    exif[0x0112] = 6
    pixels = np.asarray(Image.open(io.BytesIO(noise_image(9))))
    return [
        noise_image(0),
        encode_image(pixels, progressive=True, exif=exif.tobytes()),
        noise_image(2, kind="PNG"),
        noise_image(3, kind="WEBP"),
        encode_image(pixels, icc_profile=bytes(3000)),
        noise_image(5),
    ]


def good_shard(images, format):
    """(bytes of a tar, {key: [(first byte of headers, of data, size) of image and caption]})."""
    buffer, places = io.BytesIO(), {}
    with tarfile.open(fileobj=buffer, mode="w", format=format) as archive:
        for n, image in enumerate(images):
            key = f"{n:03d}" if n % 2 else f"dir/{'long ' * 25}{n}"
            for extension, data in (("jpg", image), ("txt", b"a caption, number %d" % n), ("json", b"{}")):
                header = tarfile.TarInfo(f"{key}.{extension}")
                header.size = len(data)
                start = archive.offset
                archive.addfile(header, io.BytesIO(data))
                data_start = archive.offset - (len(data) + 511) // 512 * 512
                places.setdefault(key, []).append((start, data_start, len(data)))
    return buffer.getvalue(), places


def both_scans(path):
    handle = os.open(path, os.O_RDONLY)
    try:
        python = scan_module._scan_python(handle)
        native = scan_module._scan_native(handle) if scan_module.native_module("scan_shard") else python
    finally:
        os.close(handle)
    for name in python._fields:
        assert np.array_equal(getattr(python, name), getattr(native, name)), name
    return python


def change_bytes(data, random):
    for place in random.integers(0, len(data), random.integers(1, 20)):
        data[place] = random.integers(0, 256)


def shift_bytes(data, random):
    """Delete or insert a run of bytes: every header behind it moves."""
    start, length = random.integers(0, len(data)), random.integers(1, 2000)
    if random.random() < 0.5:
        del data[start : start + length]
    else:
        data[start:start] = random.bytes(length)


def wipe_bytes(data, random):
    start, length = random.integers(0, len(data)), random.integers(1, 4000)
    data[start : start + length] = bytes(len(data[start : start + length]))


def cut_off(data, random):
    del data[random.integers(1, len(data)) :]


@pytest.mark.parametrize("format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_shards_with_changed_bytes_deliver_every_good_sample(images, format, tmp_path):
    data, places = good_shard(images, format)
    random = np.random.default_rng(format)
    looked_at, questions = 0, []  # (image, why the index leaves it out)
    for _ in range(MUTATIONS // 2):
        mutated = bytearray(data)
        change_bytes(mutated, random)
        if random.random() < 0.2:
            wipe_bytes(mutated, random)
        (tmp_path / "s.tar").write_bytes(mutated)
        index = scan_module.scan(tmp_path / "s.tar")
        both_scans(tmp_path / "s.tar")
        keys = [index.key(n) for n in range(len(index))]
        assert len(set(keys)) == len(keys), "none is delivered twice"
        rejected = dict(index.rejected)
        for key, (image, caption, _) in places.items():
            looked_at += 1
            if any(mutated[start:first] != data[start:first] for start, first, _ in (image, caption)):
                assert key in keys or key in rejected or "s.tar" in rejected, "a bad one is named"
                continue
            encoded = bytes(mutated[image[1] : image[1] + image[2]])
            written = bytes(mutated[caption[1] : caption[1] + caption[2]]).decode("utf-8", "replace")
            if key in keys:
                n = keys.index(key)
                place = index.image_offset[n], index.image_size[n]
                assert (*place, index.caption_offset[n]) == (image[1], image[2], caption[1])
                assert clean(written)
            else:
                assert key in rejected, "what is not delivered is named"
                if clean(written):
                    questions.append((encoded, rejected[key]))
    assert looked_at == MUTATIONS // 2 * len(places)
    refused = set(
        undecodable([np.frombuffer(image, np.uint8) for image, _ in questions], torch.device("cpu"))
    )
    wrong = [questions[n] for n in range(len(questions)) if n not in refused]
    # The decoder may draw a JPEG whose end marker is gone; such a file is damaged all the same.
    assert [reason for image, reason in wrong if b"\xff\xd9" in image] == []
    assert questions, "some images were left out"


@pytest.mark.parametrize("damage", [shift_bytes, cut_off, wipe_bytes])
def test_other_damage_ends_the_scan_in_order(images, damage, tmp_path):
    random = np.random.default_rng(1)
    shards = [good_shard(images, format)[0] for format in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)]
    for number in range(MUTATIONS // 5):
        mutated = bytearray(shards[number % 2])
        damage(mutated, random)
        (tmp_path / "s.tar").write_bytes(mutated)
        table = both_scans(tmp_path / "s.tar").table
        assert (table[:, :4] >= [-1, 0, -1, 0]).all()
        assert (table[:, 0] + table[:, 1] <= len(mutated)).all()
        assert (table[:, 2] + table[:, 3] <= len(mutated)).all()


def test_random_bytes_are_no_tar(tmp_path):
    random = np.random.default_rng(2)
    for size in (1, 100, 511, 512, 513, 20_000):
        (tmp_path / "s.tar").write_bytes(random.bytes(size))
        assert not both_scans(tmp_path / "s.tar").is_tar
