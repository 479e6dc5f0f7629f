import logging
import os
import random
import subprocess
import sys
import threading
from collections import Counter

import pytest
import torch
from loading import make_loader, take

from groupvit_fast.console import UserError
from groupvit_fast.data import batches, sampling, text
from groupvit_fast.data.augment import Augmentation, RandAugment

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


def texts_of(taken):
    """The token rows of each sample, caption first, without padding."""
    lines = [batch.texts[line] for batch in taken for line in batch.text_index]
    return [[row[row != 0].tolist() for row in line] for line in lines]


def assert_equal(taken, expected):
    assert len(taken) == len(expected)
    for batch, other in zip(taken, expected, strict=True):
        assert torch.equal(batch.images, other.images)
        assert torch.equal(batch.texts, other.texts)
        assert torch.equal(batch.text_index, other.text_index)


@pytest.mark.parametrize("device", DEVICES)
def test_batch_holds_pixels_tokens_and_prompt_rows(make_shards, device):
    loader = make_loader(make_shards(20, caption="a cat on sand {}"), num_prompts=2, prompt_templates="noun",
                         device=device)  # fmt: skip
    (batch,) = take(loader, 1)
    assert batch.images.shape == (8, 3, 16, 16)
    assert batch.images.dtype == torch.float32
    assert batch.text_index.shape == (8, 3)
    assert batch.images.device.type == device
    assert {tensor.device.type for tensor in (batch.texts, batch.text_index)} == {"cpu"}
    longest = 1 + len(["a", "cat", "on", "sand"]) + 2 + 1  # a number of two digits is two tokens
    assert batch.texts.shape == (8 + 2, longest), "eight captions, and the prompts 'cat' and 'sand' once"
    prompts = {tuple(row[:3].tolist()) for row in batch.texts[batch.text_index[:, 1:].unique()].cpu()}
    assert prompts == {tuple(text.token_row(word).tolist()) for word in ("cat", "sand")}
    assert (batch.texts[batch.text_index[:, 0]] == text.START_TOKEN).sum() == 8


def test_epoch_visits_each_sample_once_across_ranks_and_shards(make_shards, sample_numbers):
    """Two ranks, 45 samples, steps of 16: epochs end inside batches and nothing is lost or repeated."""
    shards = make_shards(45, per_shard=20)
    ranks = [make_loader(shards, rank=rank, world_size=2) for rank in range(2)]
    seen = [[sample_numbers(batch) for batch in take(rank, 9)] for rank in ranks]
    stream = [number for step in zip(*seen, strict=True) for numbers in step for number in numbers]
    for epoch in range(3):
        assert Counter(stream[45 * epoch : 45 * (epoch + 1)]) == Counter(range(45))
    assert stream[:45] != stream[45:90], "each epoch has its own order"
    assert ranks[0].samples_per_epoch == 45
    assert ranks[0].steps_per_epoch == 2


def test_same_seed_same_batches_whatever_the_threads(make_shards):
    shards = make_shards(30)
    first = take(make_loader(shards, num_prompts=2), 5)
    assert_equal(take(make_loader(shards, num_prompts=2, num_threads=2), 5), first)
    other = take(make_loader(shards, num_prompts=2, seed=1), 5)
    assert not torch.equal(other[0].texts, first[0].texts)


def test_order_crops_and_prompts_do_not_depend_on_batch_size_or_ranks(make_shards):
    shards = make_shards(40)
    one = take(make_loader(shards, batch_size=12, num_prompts=1), 2)
    small = take(make_loader(shards, batch_size=6, num_prompts=1), 4)
    ranks = [take(make_loader(shards, batch_size=6, num_prompts=1, rank=r, world_size=2), 2) for r in (0, 1)]
    turns = [batch for step in zip(*ranks, strict=True) for batch in step]
    for parts in (small, turns):
        assert torch.equal(torch.cat([b.images for b in parts]), torch.cat([b.images for b in one]))
        assert texts_of(parts) == texts_of(one)


def test_crops_and_flips_change_between_epochs(make_shards, sample_numbers):
    loader = make_loader(make_shards(8), min_crop=0.3)
    first, second = (dict(zip(sample_numbers(b), b.images, strict=True)) for b in take(loader, 2))
    assert not any(torch.equal(first[n], second[n]) for n in range(8))


@pytest.mark.parametrize("flip", [False, True])
def test_square_picture_without_crops_is_flipped_or_not(make_shards, sample_numbers, flip):
    """With min_crop 1 each epoch shows the whole of a square picture, on half of the epochs mirrored."""
    square = 2  # picture n is 16 + n wide and 18 high
    loader = make_loader(make_shards(9), batch_size=9, min_crop=1.0, flip=flip)
    shown = [batch.images[sample_numbers(batch).index(square)] for batch in take(loader, 24)]
    mirrored = sum(torch.equal(image, shown[0].flip(2)) for image in shown)
    assert mirrored + sum(torch.equal(image, shown[0]) for image in shown) == 24
    assert (6 <= mirrored <= 18) == flip


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("consumed", [0, 1, 3, 6, 11])
def test_resume_is_exact(make_shards, consumed, world_size, device):
    """45 samples in steps of 8 or 16: the cuts lie at the start, mid-epoch and after several epoch ends."""
    shards = make_shards(45)
    options = {"num_prompts": 2, "rank": world_size - 1, "world_size": world_size, "device": device}
    whole = take(make_loader(shards, **options), consumed + 6)
    interrupted = make_loader(shards, **options)
    take(interrupted, consumed)
    state = interrupted.state_dict()
    resumed = make_loader(shards, **options)
    resumed.load_state_dict(state)
    assert_equal(take(resumed, 6), whole[consumed:])


def test_state_counts_batches_handed_out_not_made_ahead(make_shards):
    loader = make_loader(make_shards(45))
    iterator = iter(loader)
    for step in range(1, 4):
        next(iterator)
        assert loader.state_dict()["position"] == 8 * step
    iterator.close()
    assert_equal(take(loader, 2), take(make_loader(make_shards(45, folder="same")), 5)[3:])


def test_resume_refuses_another_seed_other_shards_and_unknown_versions(make_shards):
    shards = make_shards(20)
    state = make_loader(shards).state_dict()
    with pytest.raises(UserError, match="seed 0, this one 1"):
        make_loader(shards, seed=1).load_state_dict(state)
    with pytest.raises(UserError, match="20 samples then, 21 now"):
        make_loader(make_shards(21, folder="other")).load_state_dict(state)
    with pytest.raises(UserError, match="version 9"):
        make_loader(shards).load_state_dict(state | {"version": 9})


@pytest.mark.parametrize("device", DEVICES)
def test_undecodable_image_is_replaced_named_and_counted(make_shards, sample_numbers, caplog, device):
    """Two broken images, one right after the other, cost no batch; every good sample still comes."""
    loader = make_loader(make_shards(45, hollow=[7, 8]), device=device)
    with caplog.at_level(logging.WARNING, logger="groupvit_fast"):
        taken = take(loader, 6)
    numbers = Counter(number for batch in taken for number in sample_numbers(batch))
    assert set(numbers) == set(range(45)) - {7, 8}
    assert numbers[9] >= 3, "sample 9 stands in for both"
    assert loader.bad_samples == 2
    assert sorted(r.message.split(".tar:")[1][:9] for r in caplog.records) == ["000000007", "000000008"]
    assert all(torch.isfinite(batch.images).all() for batch in taken)


def test_quarantined_samples_are_listed_once_by_all_ranks(make_shards, tmp_path):
    shards, file = make_shards(45, hollow=[7, 30]), tmp_path / "run" / "quarantine.txt"
    for rank in (0, 1):
        loader = make_loader(shards, rank=rank, world_size=2, quarantine_file=file)
        assert not file.exists() or rank == 1, "a clean run leaves no file"
        take(loader, 6)
        assert loader.bad_samples == 2
    lines = file.read_text().splitlines()
    assert sorted(lines) == [f"{shards[0]}:000000007", f"{shards[1]}:000000030"]


def test_undecodable_image_changes_nothing_else(make_shards, sample_numbers):
    good = take(make_loader(make_shards(45)), 6)
    bad = take(make_loader(make_shards(45, folder="bad", hollow=[7])), 6)
    for batch, other in zip(good, bad, strict=True):
        same = [a == b for a, b in zip(sample_numbers(batch), sample_numbers(other), strict=True)]
        assert torch.equal(batch.images[same], other.images[same])
        assert sum(same) >= 7


def test_resume_after_an_undecodable_image_is_exact(make_shards):
    shards = make_shards(45, hollow=[7, 30])
    whole = take(make_loader(shards), 12)
    first = make_loader(shards)
    take(first, 6)
    resumed = make_loader(shards)
    resumed.load_state_dict(first.state_dict())
    assert resumed.bad_samples == 2
    assert_equal(take(resumed, 6), whole[6:])
    unaware = make_loader(shards)
    unaware.load_state_dict(first.state_dict() | {"quarantined": []})
    assert_equal(take(unaware, 6), whole[6:])


def test_too_many_undecodable_images_stop_the_run(make_shards):
    loader = make_loader(make_shards(60, hollow=range(20, 40)))
    with pytest.raises(UserError, match=r"images, over 1 % .*000001.tar:0000000"):
        take(loader, 20)


def test_the_tolerated_rate_is_a_share_of_the_samples_read(make_shards, monkeypatch):
    """The second broken image comes at position 50, where one per cent is still less than two."""
    monkeypatch.setattr(batches, "_TOLERATED", 1)
    order = sampling.epoch_order(60, 0, 0)
    shards = make_shards(60, hollow=[order[0], order[50]])
    with pytest.raises(UserError, match="2 images, over 1 %"):
        take(make_loader(shards), 8)
    monkeypatch.setattr(batches, "_TOLERATED_PERCENT", 10)
    assert len(take(make_loader(shards), 8)) == 8


def test_samples_left_out_of_the_index_are_said(make_shards, caplog):
    with caplog.at_level(logging.WARNING, logger="groupvit_fast"):
        loader = make_loader([*make_shards(20), *make_shards(2, folder="empty", caption="")])
    assert loader.samples_per_epoch == 20
    assert "2 of 22 samples left out" in caplog.text
    assert "empty caption" in caplog.text


def test_prompts_are_a_function_of_the_position(make_shards):
    """The prompts of a batch are those drawn by hand from the same random words."""
    loader = make_loader(make_shards(20, caption="a cat and a dog on sand near water {}"), num_prompts=2)
    (batch,) = take(loader, 1)
    words = sampling.draws(0, 0, 8)[:, sampling.TEXT_DRAW].tolist()
    for sample, row, word in zip(loader._maker.samples_at(0), batch.text_index, words, strict=True):
        caption = f"a cat and a dog on sand near water {sample}"
        expected = [caption, *text.draw_prompts(caption, 2, random.Random(word))]
        assert torch.equal(batch.texts[row], text.tokenize(expected, batch.texts.shape[1]))


def test_thread_and_files_are_gone_after_the_iterator(make_shards):
    loader = make_loader(make_shards(20))
    before = threading.active_count()
    iterator = iter(loader)
    next(iterator)
    assert any(thread.name == "train-loader" for thread in threading.enumerate())
    iterator.close()
    assert threading.active_count() == before
    assert loader.reader._handles == {}


def test_epochs_do_not_leak(make_shards):
    """Many epochs of a small set keep the number of files, threads and orders where they were."""
    loader = make_loader(make_shards(16), image_size=8)
    iterator = iter(loader)
    for _ in range(4):
        next(iterator)
    files, threads = len(os.listdir("/proc/self/fd")), threading.active_count()
    for _ in range(100):
        next(iterator)
    assert len(os.listdir("/proc/self/fd")) <= files
    assert threading.active_count() == threads
    assert len(loader._maker._orders) <= 2
    iterator.close()


def test_fault_of_the_worker_reaches_the_training_thread(make_shards):
    shards = make_shards(20)
    loader = make_loader(shards)
    os.truncate(shards[0], 2048)
    with pytest.raises(UserError, match="became shorter"):
        take(loader, 1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch size"),
        ({"batch_size": 21}, "20 usable samples, fewer than one step of 21"),
        ({"batch_size": 8, "world_size": 3}, "one step of 24"),
        ({"min_crop": 0.0}, "min_crop"),
        ({"rank": 1}, "rank 1"),
        ({"prompt_templates": "nouns"}, "prompt templates 'nouns'"),
        ({"num_prompts": 1, "noun_tags": "verbs"}, "noun tags 'verbs'"),
    ],
)
def test_bad_options_are_refused_at_once(make_shards, options, message):
    with pytest.raises(UserError, match=message):
        make_loader(make_shards(20), **options)


@pytest.mark.parametrize(("ending", "status"), [("exit(3)", 3), ("1 / 0", 1), ("pass", 0)])
def test_process_ends_while_an_iterator_is_open(make_shards, ending, status):
    (shard,) = make_shards(20)
    script = f"""
from groupvit_fast.data.augment import Augmentation, RandAugment
from groupvit_fast.data.pipeline import TrainLoader
iterator = iter(TrainLoader({str(shard)!r}, batch_size=8, image_size=16, num_threads=1))
next(iterator)
{ending}
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, timeout=60, text=True)
    assert done.returncode == status, done.stderr
    assert "Fatal" not in done.stderr


def test_augmented_batches_depend_on_the_position_alone(make_shards):
    """Threads, batch size and a resume change no bit of the augmented pictures."""
    shards = make_shards(40)
    augment = Augmentation(RandAugment(9, 2, 0.5), erase=0.25)
    whole = torch.cat([b.images for b in take(make_loader(shards, augment=augment), 9)])
    plain = torch.cat([b.images for b in take(make_loader(shards), 9)])
    assert 0.4 < (whole != plain).flatten(1).any(1).float().mean() < 0.95
    other = make_loader(shards, augment=augment, batch_size=12, num_threads=2)
    first = torch.cat([b.images for b in take(other, 3)])
    resumed = make_loader(shards, augment=augment, batch_size=12)
    resumed.load_state_dict(other.state_dict())
    assert torch.equal(torch.cat([first, *(b.images for b in take(resumed, 3))]), whole)
