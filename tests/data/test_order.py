"""Every good sample once an epoch, whatever the ranks, shards, sources, interruptions and world sizes."""

import hashlib
import itertools
import json
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from loading import make_loader, take

from groupvit_fast.console import UserError
from groupvit_fast.data import sampling
from groupvit_fast.data.augment import Augmentation, RandAugment

ROOT = Path(__file__).resolve().parent.parent.parent


@pytest.mark.parametrize("per_shard", [1, 7, 45])
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_one_epoch_visits_each_sample_once(make_shards, world_size, per_shard):
    """45 samples in 45, 7 or 1 shards over 1, 2 or 4 ranks: three epochs, counted."""
    shards = make_shards(45, per_shard=per_shard)
    loaders = [make_loader(shards, batch_size=5, rank=r, world_size=world_size) for r in range(world_size)]
    stride = 5 * world_size
    stream = [
        number
        for step in range(-(-3 * 45 // stride))
        for loader in loaders
        for number in loader._maker.samples_at(step * stride).tolist()
    ]
    for epoch in range(3):
        assert Counter(stream[45 * epoch : 45 * (epoch + 1)]) == Counter(range(45))
    assert stream == [n for e in range(4) for n in sampling.epoch_order(45, 0, e)][: len(stream)]


def test_another_number_of_ranks_continues_the_same_sequence(make_shards, sample_numbers):
    """Resumed 2 -> 1 -> 4 ranks at a global batch of 24: its batches are those of one rank, in order."""
    shards = make_shards(60)
    expected = [sample_numbers(batch) for batch in take(make_loader(shards, batch_size=24), 9)]
    seen, states = [], None
    for ranks in (2, 1, 4):
        batches, next_states = [], []
        for rank in range(ranks):
            loader = make_loader(shards, batch_size=24 // ranks, rank=rank, world_size=ranks)
            if states:
                loader.load_state_dict(states[0])
            batches.append([sample_numbers(batch) for batch in take(loader, 3)])
            next_states.append(loader.state_dict())
        assert all(state == next_states[0] for state in next_states), "the position is common to all ranks"
        states = next_states
        seen += [[*itertools.chain(*parts)] for parts in zip(*batches, strict=True)]
    assert seen == expected


# ---- several sources -------------------------------------------------------------------------------------


def test_weights_repeat_and_thin_out_sources(make_shards, sample_numbers):
    """Weights 1, 2 and 0.5: an epoch has 20 + 2 * 10 + 6 samples, and half a source alternates."""
    sources = [
        make_shards(n, folder=f"source{n}", caption=text)[0].parent
        for n, text in ((20, "picture number {}"), (10, "picture number 1{}0"), (12, "picture number 30{}"))
    ]
    loader = make_loader(sources, batch_size=23, weights=[1, 2, 0.5])
    assert loader.samples_per_epoch == 46
    assert loader.steps_per_epoch == 2
    samples_at = loader._maker.samples_at
    shown = [[*samples_at(46 * epoch), *samples_at(46 * epoch + 23)] for epoch in range(4)]
    for epoch in shown:
        counts = Counter(epoch)
        assert all(counts[n] == 1 for n in range(20))
        assert all(counts[n] == 2 for n in range(20, 30))
        assert sum(counts[n] for n in range(30, 42)) == 6
    for first, second in ((shown[0], shown[1]), (shown[2], shown[3])):
        assert Counter(n for n in first + second if n >= 30) == Counter(range(30, 42))
    assert shown[0] != shown[1]
    assert sorted(sample_numbers(take(loader, 1)[0])) == sorted(
        n if n < 20 else 100 + 10 * (n - 20) if n < 30 else int(f"30{n - 30}") for n in shown[0][:23]
    )


def test_equal_weights_change_nothing(make_shards):
    sources = [make_shards(20, folder="one")[0], make_shards(20, folder="two")[0]]
    plain, weighted = make_loader(sources), make_loader(sources, weights=[1, 1])
    assert plain._maker.samples_at(0).tolist() == weighted._maker.samples_at(0).tolist()


def test_a_small_epoch_spans_several_in_one_batch(make_shards):
    loader = make_loader(make_shards(20), batch_size=5, weights=[0.25])
    maker = loader._maker
    assert loader.samples_per_epoch == 5
    stream = [n for step in range(4) for n in maker.samples_at(5 * step).tolist()]
    assert Counter(stream) == Counter(range(20)), "a quarter each epoch, all after four"


def test_weights_are_checked_and_belong_to_the_state(make_shards):
    shards = make_shards(40)
    for weights, message in (([1], "1 data weights for 2"), ([1, -1], "must be numbers"),
                             ([1, float("nan")], "must be numbers"), ([0, 0], "hold 0 usable")):  # fmt: skip
        with pytest.raises(UserError, match=message):
            make_loader(shards, weights=weights)
    state = make_loader(shards, weights=[1, 2]).state_dict()
    make_loader(shards, weights=[1, 2]).load_state_dict(state)
    with pytest.raises(UserError, match=r"data weights \[1.0, 2.0\], this one \[1.0, 1.5\]"):
        make_loader(shards, weights=[1, 1.5]).load_state_dict(state)


def test_missing_shards_are_an_error_unless_allowed(make_shards, caplog):
    (shard, *_) = make_shards(40)
    spec = f"{shard.parent}/{{000000..000003}}.tar"
    with pytest.raises(UserError, match=r"missing shards: .*000002.tar"):
        make_loader(spec)
    assert make_loader(spec, allow_missing=True).samples_per_epoch == 40
    assert "2 of 4 shards are missing, first" in caplog.text
    with pytest.raises(UserError, match="missing shards"):
        make_loader(f"{shard.parent}/{{7..9}}.tar", allow_missing=True)


# ---- killed ----------------------------------------------------------------------------------------------

CHILD = """
import sys, json, os, hashlib
from groupvit_fast.data.augment import Augmentation, RandAugment
from groupvit_fast.data.pipeline import TrainLoader
shard, place, rank, ranks = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
loader = TrainLoader(shard, batch_size=8, image_size=16, num_threads=1, num_prompts=2, quiet=True,
                     rank=rank, world_size=ranks, augment=Augmentation(RandAugment(9, 2, 0.5), erase=0.25))
if os.path.exists(place):
    loader.load_state_dict(json.load(open(place)))
for batch in loader:
    digest = hashlib.sha256(b"".join(t.numpy().tobytes() for t in vars(batch).values())).hexdigest()
    with open(place + ".new", "w") as file:
        json.dump(loader.state_dict(), file)
    os.replace(place + ".new", place)
    print(digest, flush=True)
"""


def digests(loader, count):
    return [
        hashlib.sha256(b"".join(t.numpy().tobytes() for t in vars(batch).values())).hexdigest()
        for batch in take(loader, count)
    ]


def killed_after(steps, shard, place, rank, ranks):
    """Run the child until it has printed `steps` lines, then kill it; returns the lines."""
    command = [sys.executable, "-c", CHILD, str(shard), str(place), str(rank), str(ranks)]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    lines = [child.stdout.readline().strip() for _ in range(steps)]
    child.send_signal(signal.SIGKILL)
    child.wait()
    child.stdout.close()
    return lines


@pytest.mark.parametrize("ranks", [1, pytest.param(4, marks=pytest.mark.slow)])
def test_batches_after_a_kill_are_byte_equal(make_shards, tmp_path, ranks):
    """45 samples: with one rank an epoch ends in step 6, with four in step 2. Killed in step 3 and in step 7.

    What the child did after its last saved state is lost, as in a real crash, and done again.
    """
    shard = make_shards(45, per_shard=45, hollow=[7])[0]
    augment = Augmentation(RandAugment(9, 2, 0.5), erase=0.25)
    for rank in range(ranks):
        options = {"num_prompts": 2, "rank": rank, "world_size": ranks, "augment": augment}
        expected = digests(make_loader(shard, **options), 12)
        place = tmp_path / f"state{rank}.json"
        for _ in range(3):
            start = json.loads(place.read_text())["position"] // (8 * ranks) if place.exists() else 0
            lines = killed_after(3, shard, place, rank, ranks)
            assert lines == expected[start : start + 3]
            assert json.loads(place.read_text())["position"] // (8 * ranks) >= start + 3
