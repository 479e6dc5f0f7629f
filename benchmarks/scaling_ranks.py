"""The global contrastive loss in 1, 2, 4, 8 gloo processes on this machine, each with the same batch.

More processes than cores take turns, so what is timed is processor time, that of the busiest process, and
the two kinds of its threads are told apart:

- the thread that computes: own rows against those of W processes, linear in W, which is the claim;
- the threads in which gloo sends and receives. These have W - 1 messages to pass on, from 2 to 8 processes 7
  times as many and not 4 times, and where they share cores each wakes with cold caches. Added to the
  arithmetic they made it look like a power of 1.2. They are reported beside it, without an exponent.
"""

from __future__ import annotations

import os
import socket
import sys
import time

import torch
import torch.multiprocessing as mp
from stopwatch import Timing

ARITHMETIC, MESSAGES = "contrastive loss, arithmetic of a process", "contrastive loss, threads of gloo"
WORLDS = (1, 2, 4, 8)
BATCH, WIDTH, ROUNDS = 256, 256, 21


def measure(worlds: tuple[int, ...] = WORLDS) -> tuple[dict[int, Timing], dict[int, Timing]]:
    """Timings of forward and backward by the number of processes: the arithmetic, and the threads of gloo."""
    rounds = {size: _in_processes(size) for size in worlds}
    arithmetic = {size: Timing.of([own for own, _ in spent]) for size, spent in rounds.items()}
    messages = {size: Timing.of([rest for _, rest in spent]) for size, spent in rounds.items() if size > 1}
    return arithmetic, messages


def _in_processes(size: int) -> list[tuple[float, float]]:
    """Milliseconds of both parts in each round, of the process that was busiest in it."""
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
    rounds = zip(*(results.get() for _ in processes), strict=True)
    return [(max(own for own, _ in spent), max(rest for _, rest in spent)) for spent in rounds]


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
            everything, own = time.process_time(), time.thread_time()
            torch.autograd.grad(contrastive_loss(image, text, scale), (image, text, scale))
            own, everything = time.thread_time() - own, time.process_time() - everything
            if number >= 2:
                spent.append((own * 1e3, max(everything - own, 0.0) * 1e3))
    results.put(spent)
