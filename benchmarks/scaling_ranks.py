"""The global contrastive loss in 1, 2, 4, 8 gloo processes on this machine, each with the same batch.

More processes than cores take turns, so what is timed is the processor time of the busiest process.
"""

from __future__ import annotations

import os
import socket
import sys
import time

import torch
import torch.multiprocessing as mp
from stopwatch import Timing

NAME = "contrastive loss, CPU time of a process"
WORLDS = (1, 2, 4, 8)
BATCH, WIDTH, ROUNDS = 256, 256, 9


def measure(worlds: tuple[int, ...] = WORLDS) -> dict[int, Timing]:
    """Timings of forward and backward by the number of processes."""
    return {size: Timing.of(_in_processes(size)) for size in worlds}


def _in_processes(size: int) -> list[float]:
    """Milliseconds of each round, of the process that was busiest in it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = mp.get_context("spawn")
    results = context.SimpleQueue()
    processes = [context.Process(target=_work, args=(rank, size, port, results)) for rank in range(size)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    if any(process.exitcode for process in processes):
        raise RuntimeError(f"{size} gloo processes: one ended with an error, see above")
    return [max(spent) for spent in zip(*(results.get() for _ in processes), strict=True)]


def _work(rank: int, size: int, port: int, results) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    sys.stderr.flush()
    torch.set_num_threads(1)
    from groupvit_fast.training.distributed import session
    from groupvit_fast.training.losses import contrastive_loss

    torch.manual_seed(rank)
    image, text = (torch.randn(BATCH, WIDTH, requires_grad=True) for _ in range(2))
    scale = torch.tensor(2.0, requires_grad=True)
    spent = []
    with session("cpu"):
        for number in range(ROUNDS + 2):
            start = time.process_time()
            torch.autograd.grad(contrastive_loss(image, text, scale), (image, text, scale))
            if number >= 2:
                spent.append((time.process_time() - start) * 1e3)
    results.put(spent)
