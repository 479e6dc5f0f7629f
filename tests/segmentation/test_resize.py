"""The resize equals OpenCV's, value by value; the numbers below came from cv2.resize 4.5.5 and 5.0.0."""

import zlib

import numpy as np
import pytest
import torch

from groupvit_fast.segmentation.resize import resize_photo

SMALL = [[247, 54, 74, 218], [242, 13, 232, 55], [62, 201, 224, 138], [6, 68, 106, 146], [142, 116, 201, 163],
         [14, 116, 209, 148], [2, 87, 54, 168], [56, 84, 32, 1], [205, 220, 242, 19]]  # fmt: skip
SMALL_BY_CV2 = [[208, 101, 126], [25, 103, 141], [29, 151, 157], [116, 123, 25]]


def test_values_of_a_small_image():
    image = torch.tensor(SMALL, dtype=torch.uint8)[..., None].expand(-1, -1, 3)
    resized = resize_photo(image, (4, 3))
    assert resized.dtype == torch.float32
    for channel in resized:
        assert channel.int().tolist() == SMALL_BY_CV2


@pytest.mark.parametrize(
    ("source", "wanted", "checksum"),
    [
        ((375, 500), (448, 597), 2674787294),
        ((640, 480), (597, 448), 1720105190),
        ((896, 1194), (448, 597), 1234698887),
        ((3, 3), (64, 64), 1897104830),
        ((100, 130), (33, 43), 2538794016),
        ((11, 64), (11, 31), 4159580129),
    ],
)
def test_checksum_of_larger_images(source, wanted, checksum):
    image = np.random.RandomState(7).randint(0, 256, (*source, 3)).astype(np.uint8)
    resized = resize_photo(torch.tensor(image), wanted)
    assert resized.shape == (3, *wanted)
    assert zlib.crc32(resized.permute(1, 2, 0).contiguous().byte().numpy().tobytes()) == checksum


def test_same_size_is_the_same_image():
    image = torch.randint(0, 256, (5, 9, 3), dtype=torch.uint8)
    assert torch.equal(resize_photo(image, (5, 9)).permute(1, 2, 0).byte(), image)


def test_one_pixel_fills_the_result():
    image = torch.tensor([[[3, 90, 255]]], dtype=torch.uint8)
    assert torch.equal(
        resize_photo(image, (4, 2)), torch.tensor([3.0, 90, 255])[:, None, None].expand(3, 4, 2)
    )
