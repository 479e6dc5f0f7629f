"""Two gloo processes must agree with one process that has the whole batch."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from groupvit_fast.training import distributed
from groupvit_fast.training.losses import contrastive_loss, multi_label_loss, text_labels

IMAGES, PROMPTS, WIDTH, PROCESSES = 6, 3, 5, 2


def problem():
    """A linear "model" and a batch in which prompts repeat within images, across images and processes."""
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(WIDTH, 4, generator=generator)
    pixels = torch.randn(IMAGES, WIDTH, generator=generator)
    vocabulary = torch.randint(1, 50, (7, 6), generator=generator)
    words = torch.randint(7, (IMAGES, 1 + PROMPTS), generator=generator)
    return weight, pixels, vocabulary, words


def loss_and_gradient(rows: slice):
    weight, pixels, vocabulary, words = problem()
    weight.requires_grad_()
    scale = torch.tensor(2.0, requires_grad=True)
    texts, index = torch.unique(vocabulary[words[rows]].flatten(0, 1), dim=0, return_inverse=True)
    index = index.view(-1, 1 + PROMPTS)
    embedded = torch.nn.functional.one_hot(texts, 50).float().sum(1) @ torch.linspace(-1, 1, 200).view(50, 4)
    image, text = pixels[rows] @ weight, embedded[index] * weight.mean(0)
    labels = text_labels(texts, index)
    loss = contrastive_loss(image, text[:, 0], scale, labels=labels[:, 0])
    loss = loss + multi_label_loss(image, text[:, 1:], labels[:, 1:], scale)
    groups = image[:, None] * torch.linspace(-1, 2, 12).view(3, 4)
    loss = loss + multi_label_loss(groups, text[:, 1:], labels[:, 1:], scale)
    loss.backward()
    return torch.cat([loss.detach()[None], weight.grad.flatten(), scale.grad[None]])


def work(folder: str) -> None:
    """What one of the processes does: this file run as a program."""
    rank = int(os.environ["RANK"])
    with distributed.session("cpu") as world:
        share = IMAGES // PROCESSES
        numbers = loss_and_gradient(slice(rank * share, (rank + 1) * share))
        distributed.sum_over_processes(numbers)
        stop = distributed.StopAgreement()
        stopped_after = next(step for step in range(9) if stop.reached(rank == 1 and step >= 2))
        everything = distributed.on_main(
            (world.rank, distributed.from_main(f"from {rank}"), stopped_after, numbers / PROCESSES)
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
    expected = loss_and_gradient(slice(None))
    for *_, numbers in result:
        torch.testing.assert_close(numbers, expected, atol=1e-6, rtol=1e-6)


def test_objects_reach_and_leave_the_main_process(result):
    assert [(rank, text) for rank, text, *_ in result] == [(0, "from 0"), (1, "from 0")]


def test_all_processes_stop_after_the_same_step(result):
    """Rank 1 asks at step 2; everyone learns of it one step later."""
    assert [step for _, _, step, _ in result] == [3, 3]


def test_alone_everything_is_the_identity():
    tensor = torch.arange(3.0, requires_grad=True)
    with distributed.session("cpu") as world:
        assert world == distributed.World()
        assert world.is_main
    assert distributed.gather(tensor) is tensor
    assert distributed.gather_with_grad(tensor) is tensor
    assert distributed.on_main("x") == ["x"]
    assert distributed.from_main("x") == "x"
    assert distributed.StopAgreement().reached(True)


if __name__ == "__main__":
    work(sys.argv[1])
