"""A run that goes on with another number of processes: command, trainer and loader together.

Each process notes which samples its steps saw.
"""

from __future__ import annotations

import json
import sys

import pytest
import torch
from processes import launch

from groupvit_fast.console import run_command
from groupvit_fast.data.pipeline import TrainLoader
from groupvit_fast.train import main
from groupvit_fast.training.trainer import Trainer

SAMPLES, BATCH = 40, 4
ARGUMENTS = [
    "--shapes-train", SAMPLES, "--shapes-val", 2, "--batch-size", BATCH, "--save-every", 100,
    "--model", "image.width=16", "--model", "image.depths=[1,0]", "--model", "text.width=16",
    "--model", "text.layers=1", "--workers", 1, "--device", "cpu", "--seed", 5, "--quiet", "--resume", "auto",
]  # fmt: skip


def work(notes: str, *arguments: str) -> None:
    """What one of the processes does: this file run as a program."""
    plain = Trainer.train_step

    def noted(trainer, batch):
        with open(f"{notes}/{trainer.world.size}_{trainer.world.rank}", "a") as file:
            file.write(json.dumps(trainer.loader.sample_names()) + "\n")
        plain(trainer, batch)

    Trainer.train_step = noted
    torch.set_num_threads(1)
    sys.exit(run_command(main, list(arguments)))


def run(folder, size, steps, *more):
    """Continue the run in `folder` on `size` processes up to step `steps`; the samples seen, in order."""
    places = ["--data-root", folder / "data", "--output", folder / "run"]
    arguments = [*ARGUMENTS, *places, "--steps", steps, *more]
    notes = folder / "notes"
    notes.mkdir(exist_ok=True)
    processes = launch(__file__, notes, *arguments, count=size)
    said = [process.communicate(timeout=200) for process in processes]
    assert [process.returncode for process in processes] == [0] * size, said
    ranks = [(notes / f"{size}_{rank}").read_text().splitlines() for rank in range(size)]
    seen = []
    for step in zip(*ranks, strict=True):
        seen += [name for names in map(json.loads, step) for name in names]
    return seen


@pytest.mark.parametrize(
    "parts",
    [
        [(2, 3), (1, 7)],
        pytest.param([(2, 3), (1, 5), (4, 8)], marks=pytest.mark.slow),
        pytest.param([(4, 2), (2, 4), (1, 16)], marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_each_sample_once_an_epoch_in_the_same_order(tmp_path, parts):
    """(processes, last step) one after the other, against one process that is never stopped."""
    seen = []
    for number, (size, steps) in enumerate(parts):
        # sharded every other time: that must not matter either
        seen += run(tmp_path, size, steps, "--fsdp" if number % 2 == 0 else "--no-fsdp")
    shards = next((tmp_path / "data").glob("shapes-*/train"))
    loader = TrainLoader(str(shards), batch_size=BATCH, image_size=16, seed=5, num_threads=1, quiet=True)
    batches, wanted = iter(loader), []
    for _ in range(len(seen) // BATCH):
        next(batches)
        wanted += loader.sample_names()
    batches.close()
    assert seen == wanted
    assert len(seen) >= SAMPLES
    for epoch in (seen[first : first + SAMPLES] for first in range(0, len(seen), SAMPLES)):
        assert len(set(epoch)) == len(epoch)


if __name__ == "__main__":
    work(*sys.argv[1:])
