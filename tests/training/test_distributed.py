"""Two gloo processes must agree with one process that has the whole batch."""

from __future__ import annotations

import itertools
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from groupvit_fast.training import distributed
from groupvit_fast.training.losses import (
    Gathering,
    contrastive_loss,
    multi_label_loss,
    sigmoid_loss,
    text_labels,
)

IMAGES, PROMPTS, WIDTH, PROCESSES = 6, 3, 5, 2


def problem():
    """A linear "model" and a batch in which prompts repeat within images, across images and processes."""
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(WIDTH, 4, generator=generator)
    pixels = torch.randn(IMAGES, WIDTH, generator=generator)
    vocabulary = torch.randint(1, 50, (7, 6), generator=generator)
    words = torch.randint(7, (IMAGES, 1 + PROMPTS), generator=generator)
    return weight, pixels, vocabulary, words


def loss_and_gradient(rows: slice, gathering: Gathering = Gathering()):  # noqa: B008
    weight, pixels, vocabulary, words = problem()
    weight.requires_grad_()
    scale = torch.tensor(2.0, requires_grad=True)
    texts, index = torch.unique(vocabulary[words[rows]].flatten(0, 1), dim=0, return_inverse=True)
    index = index.view(-1, 1 + PROMPTS)
    embedded = torch.nn.functional.one_hot(texts, 50).float().sum(1) @ torch.linspace(-1, 1, 200).view(50, 4)
    image, text = pixels[rows] @ weight, embedded[index] * weight.mean(0)
    labels = text_labels(texts, index)
    loss = contrastive_loss(image, text[:, 0], scale, labels=labels[:, 0], gathering=gathering)
    loss = loss + multi_label_loss(image, text[:, 1:], labels[:, 1:], scale, gathering=gathering)
    groups = image[:, None] * torch.linspace(-1, 2, 12).view(3, 4)
    loss = loss + multi_label_loss(groups, text[:, 1:], labels[:, 1:], scale, gathering=gathering)
    bias = scale - 5
    loss = loss + 0.1 * sigmoid_loss(image, text[:, 1:], labels[:, 1:], scale, bias, gathering=gathering)
    loss.backward()
    return torch.cat([loss.detach()[None], weight.grad.flatten(), scale.grad[None]])


def work(folder: str) -> None:
    """What one of the processes does: this file run as a program."""
    rank = int(os.environ["RANK"])
    with distributed.session("cpu") as world:
        share = IMAGES // PROCESSES
        numbers = []
        for local, with_grad in itertools.product((True, False), repeat=2):
            rows = slice(rank * share, (rank + 1) * share)
            found = loss_and_gradient(rows, Gathering(local, with_grad))
            numbers.append(distributed.sum_over_processes(found) / PROCESSES)
        stop = distributed.StopAgreement()
        wish = SimpleNamespace(signal=None)
        for step in range(9):
            wish.signal = signal.SIGTERM if rank == 1 and step >= 2 else None
            if stop.reached(wish):
                break
        stopped_after = step, int(wish.signal)
        everything = distributed.on_main(
            (world.rank, distributed.from_main(f"from {rank}"), stopped_after, numbers)
        )
        distributed.barrier()
        if world.is_main:
            torch.save(everything, Path(folder) / "result.pt")
    assert not torch.distributed.is_initialized()


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gloo")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    package = str(Path(distributed.__file__).parents[2])
    common = {
        **os.environ,
        "WORLD_SIZE": str(PROCESSES),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": package,
    }
    processes = [
        subprocess.Popen([sys.executable, __file__, str(folder)], env=common | {"RANK": str(rank)})
        for rank in range(PROCESSES)
    ]
    assert [process.wait(timeout=100) for process in processes] == [0] * PROCESSES
    return torch.load(folder / "result.pt", weights_only=True)


def test_loss_and_gradients_equal_those_of_the_whole_batch(result):
    """With gradient through the gather, whether each process compares its own rows or everybody's."""
    expected = loss_and_gradient(slice(None))
    for *_, (local, _, everybody, _) in result:
        torch.testing.assert_close(local, expected, atol=1e-6, rtol=1e-6)
        torch.testing.assert_close(everybody, expected, atol=2e-6, rtol=1e-6)


def test_without_gradient_through_the_gather_the_loss_is_the_same_and_the_gradient_is_not(result):
    expected = loss_and_gradient(slice(None))
    for *_, (_, local, _, everybody) in result:
        for found in (local, everybody):
            torch.testing.assert_close(found[0], expected[0], atol=1e-6, rtol=1e-6)
            assert (found[1:-1] - expected[1:-1]).abs().max() > 1e-3


def test_objects_reach_and_leave_the_main_process(result):
    assert [(rank, text) for rank, text, *_ in result] == [(0, "from 0"), (1, "from 0")]


def test_all_processes_stop_after_the_same_step(result):
    """Rank 1 gets a signal at step 2; everyone learns of it, and which it was, one step later."""
    assert [stopped for _, _, stopped, _ in result] == [(3, signal.SIGTERM)] * 2


def test_alone_everything_is_the_identity():
    tensor = torch.arange(3.0, requires_grad=True)
    with distributed.session("cpu") as world:
        assert world == distributed.World()
        assert world.is_main
    assert distributed.gather(tensor) is tensor
    assert distributed.gather_with_grad(tensor) is tensor
    assert distributed.on_main("x") == ["x"]
    assert distributed.from_main("x") == "x"
    assert distributed.StopAgreement().reached(SimpleNamespace(signal=signal.SIGINT))
    assert not distributed.StopAgreement().reached(SimpleNamespace(signal=None))


SLURM = {
    "SLURM_STEP_NUM_TASKS": "16",
    "SLURM_PROCID": "9",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_NODELIST": "gpu[003-004]",
    "SLURM_JOB_ID": "123456",
}


def test_a_slurm_step_says_who_is_who(monkeypatch):
    monkeypatch.setattr(distributed.shutil, "which", lambda program: None)
    environment = dict(SLURM)
    assert distributed.world_of(environment) == distributed.World(9, 16, 1)
    assert environment["MASTER_ADDR"] == "gpu003"
    assert environment["MASTER_PORT"] == str(20_000 + 123456 % 20_000)
    assert (environment["RANK"], environment["WORLD_SIZE"], environment["LOCAL_RANK"]) == ("9", "16", "1")
    named = SLURM | {"MASTER_ADDR": "head", "MASTER_PORT": "1"}
    distributed.world_of(named)
    assert (named["MASTER_ADDR"], named["MASTER_PORT"]) == ("head", "1")


def test_torchrun_has_the_last_word_and_a_batch_script_is_alone():
    torchrun = {"WORLD_SIZE": "8", "RANK": "3", "LOCAL_RANK": "3"}
    assert distributed.world_of(SLURM | torchrun) == distributed.World(3, 8, 3)
    script = {"SLURM_NTASKS": "16", "SLURM_PROCID": "0", "SLURM_JOB_ID": "1"}
    assert distributed.world_of(script) == distributed.World()
    assert distributed.world_of({}) == distributed.World()


@pytest.mark.parametrize(
    ("names", "first"),
    [
        ("node7", "node7"),
        ("a,b", "a"),
        ("gpu[003-007,12],head", "gpu003"),
        ("rack[1-2]-gpu[05,9]", "rack1-gpu05"),
        ("n[4]", "n4"),
        ("login,gpu[1-2]", "login"),
    ],
)
def test_the_first_machine_without_scontrol(monkeypatch, names, first):
    monkeypatch.setattr(distributed.shutil, "which", lambda program: None)
    assert distributed.first_machine(names) == first


def test_scontrol_is_asked_where_it_is(monkeypatch, tmp_path):
    program = tmp_path / "scontrol"
    program.write_text('#!/bin/sh\n[ "$1 $2" = "show hostnames" ] && printf "from-%s\\nother\\n" "$3"\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    assert distributed.first_machine("x[1-2]") == "from-x[1-2]"


if __name__ == "__main__":
    work(sys.argv[1])
