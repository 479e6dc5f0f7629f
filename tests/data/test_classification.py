import io

import numpy as np
import pytest
import torch
from PIL import Image

from groupvit_fast.console import UserError
from groupvit_fast.data.classification import ClassFolders, LabelledShards, evaluation_batches
from groupvit_fast.data.images import IMAGENET_MEAN, IMAGENET_STD

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
SIZES = [(40, 30), (31, 57), (64, 64), (33, 200), (500, 333)]


def pillow_crop(data, resize, crop):
    """torchvision's Resize, CenterCrop, ToTensor and Normalize, with Pillow alone."""
    with Image.open(io.BytesIO(data)) as image:
        image = image.convert("RGB")
    short = min(image.size)
    image = image.resize([side * resize // short for side in image.size], Image.Resampling.BILINEAR)
    left, top = (round((side - crop) / 2) for side in image.size)
    pixels = np.asarray(image.crop((left, top, left + crop, top + crop)), np.float32) / 255
    return torch.from_numpy((pixels - IMAGENET_MEAN) / IMAGENET_STD).permute(2, 0, 1).float()


@pytest.fixture
def folders(tmp_path, noise_image):
    for number, (width, height) in enumerate(SIZES):
        path = tmp_path / "val" / f"n{number % 2}" / f"picture {number}.JPEG"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(noise_image(number, width, height, "PNG"))
    (tmp_path / "val" / "n0" / "readme.txt").write_text("not an image")
    return tmp_path / "val"


@pytest.mark.parametrize("device", DEVICES)
def test_pixels_equal_those_of_torchvision(folders, device):
    images = ClassFolders(folders)
    assert images.classes == ["n0", "n1"]
    assert len(images) == len(SIZES)
    batches = list(evaluation_batches(images, batch_size=2, resize=32, crop=28, device=device, num_threads=1))
    assert [len(pixels) for pixels, _ in batches] == [2, 2, 1]
    assert torch.cat([labels for _, labels in batches]).tolist() == [0, 0, 0, 1, 1]
    pixels = torch.cat([pixels for pixels, _ in batches]).cpu()
    expected = torch.stack([pillow_crop(image.data, 32, 28) for image in images])
    step = 1 / 255 / min(IMAGENET_STD)
    assert (pixels - expected).abs().max() < 2.01 * step


def test_default_is_a_crop_of_224_from_256(folders):
    ((pixels, labels),) = evaluation_batches(ClassFolders(folders), num_threads=1)
    assert pixels.shape == (5, 3, 224, 224)
    assert pixels.dtype == torch.float32
    assert labels.dtype == torch.int64


def test_labelled_shards(tmp_path, write_tar, noise_image):
    members = [m for n in range(3) for m in ((f"{n}.jpg", noise_image(n)), (f"{n}.cls", b"%d" % (7 * n)))]
    tar = write_tar(tmp_path / "val.tar", [*members, ("lonely.cls", b"3")])
    batches = list(evaluation_batches(LabelledShards([tar]), resize=16, crop=16, num_threads=1))
    assert [labels.tolist() for _, labels in batches] == [[0, 7, 14]]
    bad = write_tar(tmp_path / "bad.tar", [("a.jpg", noise_image(0)), ("a.cls", b"cat")])
    with pytest.raises(UserError, match=r"bad.tar:a: no class number"):
        list(evaluation_batches(LabelledShards([bad]), num_threads=1))


def test_a_broken_image_is_named(folders, hollow_image):
    bad = folders / "n1" / "picture 3.JPEG"
    bad.write_bytes(hollow_image)
    with pytest.raises(UserError, match=r"picture 3.JPEG: cannot be decoded"):
        list(evaluation_batches(ClassFolders(folders), num_threads=1))
    bad.write_bytes(b"<html>")
    with pytest.raises(UserError, match=r"picture 3.JPEG: HTML file, not a JPEG"):
        list(evaluation_batches(ClassFolders(folders), num_threads=1))


def test_bad_folders_and_sizes_are_one_line(tmp_path, folders):
    with pytest.raises(UserError, match="no such folder"):
        ClassFolders(tmp_path / "nothing")
    with pytest.raises(UserError, match="no images in class folders"):
        ClassFolders(folders / "n0")
    with pytest.raises(UserError, match="crop 300"):
        next(evaluation_batches(ClassFolders(folders), resize=256, crop=300))
