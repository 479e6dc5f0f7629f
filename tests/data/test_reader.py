import os

import numpy as np
import pytest

from groupvit_fast.console import UserError
from groupvit_fast.data.reader import SampleReader


def test_samples_of_all_shards_under_one_numbering(make_shards, noise_image):
    reader = SampleReader(make_shards(7, per_shard=3))
    assert len(reader) == 7
    images, captions = reader.read(np.array([6, 0, 3]))
    assert captions == ["picture number 6", "picture number 0", "picture number 3"]
    assert images[2].tobytes() == noise_image(3, 16 + 3, 18)
    assert reader.width[[0, 6]].tolist() == [16, 22]
    assert reader.name(4).endswith("shards/000001.tar:000000004")


def test_files_are_closed_at_the_limit_and_at_the_end(make_shards):
    reader = SampleReader(make_shards(6, per_shard=1))
    reader._max_handles = 2
    before = len(os.listdir("/proc/self/fd"))
    _, captions = reader.read(np.array([0, 1, 2, 3, 4, 5, 0]))
    assert captions[-1] == "picture number 0"
    assert len(os.listdir("/proc/self/fd")) == before + 2
    reader.close()
    assert len(os.listdir("/proc/self/fd")) == before


def test_quarantined_samples_are_replaced_by_the_next_good_one(make_shards):
    reader = SampleReader(make_shards(6, per_shard=3))
    for sample in (1, 2, 5):
        reader.quarantine(sample)
    asked = np.array([0, 1, 2, 5, 4])
    assert reader.usable(asked).tolist() == [0, 3, 3, 0, 4]
    assert asked.tolist() == [0, 1, 2, 5, 4], "the order itself is left alone"
    assert reader.quarantined == [1, 2, 5]
    for sample in range(6):
        reader.quarantine(sample)
    with pytest.raises(UserError, match="every sample"):
        reader.usable(asked)


def test_shard_that_shrinks_is_named(make_shards):
    (tar,) = make_shards(3)
    reader = SampleReader([tar])
    os.truncate(tar, 1024)
    with pytest.raises(UserError, match=r"000000.tar: became shorter"):
        reader.read(np.array([2]))


def test_fingerprint_follows_the_samples_not_the_place(make_shards):
    first = SampleReader(make_shards(5)).fingerprint
    assert SampleReader(make_shards(5, folder="moved")).fingerprint == first
    assert SampleReader(make_shards(6, folder="more")).fingerprint != first
    assert SampleReader(make_shards(5, folder="text", caption="another {}")).fingerprint != first
