"""Reading ahead: in order, not too far, and batches that stay small where images are large."""

import time

import torch

from groupvit_fast.console import UserError
from groupvit_fast.segmentation import reading


class Slow:
    """A dataset whose images take different times to read."""

    def __init__(self, pixels: int) -> None:
        self.pixels, self.read_count = pixels, 0

    def read(self, item: int):
        self.read_count += 1
        time.sleep(0.002 * (item % 3))
        if item == 5:
            raise UserError("five")
        return torch.zeros(1, 1, 3), torch.full((1, self.pixels), item)


def test_in_order_and_faults_in_their_place():
    dataset = Slow(4)
    found = list(reading.read_ahead(dataset, list(enumerate(range(20))), 6))
    assert [number for number, _, _ in found] == list(range(20))
    for number, item, result in found:
        assert number == item
        assert isinstance(result, UserError) if item == 5 else int(result[1][0, 0]) == item


def test_not_further_than_wanted():
    dataset = Slow(4)
    stream = reading.read_ahead(dataset, list(enumerate(range(50))), 6)
    next(stream)
    time.sleep(0.1)
    assert dataset.read_count <= 7
    stream.close()


def test_large_images_wait(monkeypatch):
    """Two waiting images are over the limit; threads that had begun may finish, and the next one is read."""
    monkeypatch.setattr(reading, "PIXELS_AHEAD", 1000)
    dataset = Slow(600)
    stream = reading.read_ahead(dataset, list(enumerate(range(50))), 40)
    for taken in range(1, 45):
        next(stream)
        time.sleep(0.005)
        assert dataset.read_count <= taken + 2 + reading.readers()
    assert [number for number, *_ in stream] == list(range(44, 50))


def test_an_image_over_the_limit_alone_is_read(monkeypatch):
    monkeypatch.setattr(reading, "PIXELS_AHEAD", 1)
    assert len(list(reading.read_ahead(Slow(600), list(enumerate(range(9))), 4))) == 9


def test_batches_by_count_and_by_pixels(monkeypatch):
    monkeypatch.setattr(reading, "PIXELS_PER_BATCH", 100)
    sizes = [10, 10, 10, 200, 10, 60, 60, 10]
    pairs = [(number, None, (None, torch.zeros(size))) for number, size in enumerate(sizes)]

    def lengths(most: int, resized: int) -> list[int]:
        return [len(batch) for batch in reading.batches(iter(pairs), most, resized)]

    assert lengths(3, 1) == [3, 1, 3, 1]
    assert lengths(100, 1) == [4, 3, 1]
    assert lengths(100, 50) == [2, 2, 2, 2]
    assert lengths(1, 1) == [1] * 8


def test_at_least_two_readers(monkeypatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "64")
    assert reading.readers() == 2
