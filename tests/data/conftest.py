"""Tiny shards made on the spot."""

import io
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from groupvit_fast.data import scan as scan_module
from groupvit_fast.data.shards import Pair, write_shards
from groupvit_fast.data.text import token_row

sys.path.insert(0, str(Path(__file__).parent))

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture(params=["native", "python"])
def scanner(request, monkeypatch):
    """The test runs with the compiled scan, and with the one in Python."""
    if request.param == "python":
        monkeypatch.setattr(scan_module, "native_module", lambda function: None)
    elif scan_module.native_module("scan_shard") is None:
        pytest.skip("the package is not compiled")
    return request.param


@pytest.fixture(scope="session")
def encode_image():
    def encode(pixels, kind="JPEG", **options):
        """Encode an array [H, W, 3] or a Pillow image."""
        image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
        buffer = io.BytesIO()
        image.save(buffer, kind, **options)
        return buffer.getvalue()

    return encode


@pytest.fixture(scope="session")
def noise_image(encode_image):
    def make(number, width=20, height=16, kind="JPEG"):
        """A smooth random picture that differs for each number."""
        small = np.random.default_rng(number).integers(0, 255, (4, 4, 3), dtype=np.uint8)
        return encode_image(Image.fromarray(small).resize((width, height), Image.Resampling.BILINEAR), kind)

    return make


@pytest.fixture(scope="session")
def hollow_image(noise_image):
    """A PNG with a sound head and end but damaged pixels: it passes the index and fails in the decoder."""
    data = bytearray(noise_image(0, 64, 64, "PNG"))
    start = data.index(b"IDAT") + 20
    data[start : start + 100] = bytes(100)
    return bytes(data)


@pytest.fixture
def make_shards(tmp_path, noise_image, hollow_image):
    def make(samples, per_shard=20, folder="shards", caption="picture number {}", hollow=()):
        """Shards of `samples` pictures, the number of each in its caption; `hollow` ones do not decode."""

        def image(n):
            return hollow_image if n in hollow else noise_image(n, 16 + n % 9, 18)

        pairs = (Pair(image(n), "jpg", caption.format(n)) for n in range(samples))
        return write_shards(pairs, tmp_path / folder, samples_per_shard=per_shard)

    return make


@pytest.fixture
def write_tar():
    def write(path, members, **options):
        """Write (name, bytes) members as they are, in order."""
        with tarfile.open(path, "w", **options) as archive:
            for name, data in members:
                header = tarfile.TarInfo(name)
                header.size = len(data)
                archive.addfile(header, io.BytesIO(data))
        return path

    return write


@pytest.fixture(scope="session")
def sample_numbers():
    rows = {token_row(f"picture number {n}").tobytes(): n for n in range(1000)}

    def numbers(batch):
        """Which samples a batch of `make_shards` pictures holds, in order."""
        captions = batch.texts[batch.text_index[:, 0]].cpu()
        return [rows[row[row != 0].numpy().tobytes()] for row in captions]

    return numbers
