"""Several processes as one: start and stop, gathers with and without gradient, agreement to stop.

Reads the environment that torchrun (RANK, WORLD_SIZE, LOCAL_RANK) or SLURM's srun sets. Alone,
every function is the identity, so callers need no branches.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import subprocess
import time
from collections.abc import Iterator, MutableMapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

TIMEOUT = timedelta(minutes=30)
"""How long a process waits for the others: longer than an evaluation, during which only rank 0 works."""

LETTING_GO = 0.1
"""Seconds before processes part. A thread of gloo still lets go of the last message after the call returned,
and needs the interpreter for it. Sharded weights keep these threads alive to the very end, where that would
abort the program: seen in one of 240 exits on a busy machine."""

# torch 2.13 renamed the two and warns about the old names, which 2.10 needs
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


@dataclass(frozen=True)
class World:
    """Which process this is (`rank` of `size`) and which device of its machine it uses (`local_rank`)."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0

    @property
    def is_main(self) -> bool:
        """True for the one process that logs, evaluates and saves."""
        return self.rank == 0


def world_of(environment: MutableMapping[str, str]) -> World:
    """Which process this is, by the variables of torchrun or of a SLURM job step (`srun`).

    For SLURM, the variables that PyTorch's rendezvous reads are added: the first machine of the step, and a
    port that follows from the job's number.
    """
    if "WORLD_SIZE" in environment:
        size = int(environment["WORLD_SIZE"])
        if size == 1:
            return World()
        return World(int(environment["RANK"]), size, int(environment.get("LOCAL_RANK", 0)))
    # Only inside a step: the script of a batch job has SLURM_PROCID too, and would wait for nobody.
    size = int(environment.get("SLURM_STEP_NUM_TASKS", 1))
    if size == 1 or "SLURM_PROCID" not in environment:
        return World()
    world = World(int(environment["SLURM_PROCID"]), size, int(environment.get("SLURM_LOCALID", 0)))
    job = int(environment.get("SLURM_JOB_ID", 0))
    machines = environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_NODELIST", "localhost")
    environment.setdefault("MASTER_ADDR", first_machine(machines))
    environment.setdefault("MASTER_PORT", str(20_000 + job % 20_000))
    environment["RANK"], environment["WORLD_SIZE"] = str(world.rank), str(world.size)
    environment["LOCAL_RANK"] = str(world.local_rank)
    return world


def first_machine(names: str) -> str:
    """The first of SLURM's list of machines, such as "gpu[003-007,12],head"; scontrol knows, if there."""
    if shutil.which("scontrol"):
        answer = subprocess.run(["scontrol", "show", "hostnames", names], capture_output=True, text=True)
        if answer.returncode == 0 and answer.stdout.strip():
            return answer.stdout.split()[0]
    while found := re.match(r"([^,\[]*)\[([^],-]*)[^]]*\](.*)", names):
        names = "".join(found.groups())
    return names.split(",")[0]


@contextlib.contextmanager
def session(device: str) -> Iterator[World]:
    """Join the processes that torchrun or srun started, for the duration of a `with`; or be alone."""
    world = world_of(os.environ)
    if world.size == 1:
        yield world
        return
    if device == "cuda":
        torch.cuda.set_device(world.local_rank)
    # gloo stays beside NCCL for what lives on the CPU: objects and the agreement to stop
    backend = "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo"
    store, rank, size = next(dist.rendezvous("env://", timeout=TIMEOUT))
    store.set_timeout(TIMEOUT)
    # torchrun's store outlives a restart: without names of its own, a new attempt would read old addresses
    store = dist.PrefixStore(f"attempt_{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=TIMEOUT)
    try:
        yield world
    finally:
        time.sleep(LETTING_GO)
        dist.destroy_process_group()


def world_size() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if world_size() > 1 else 0


def gather(tensor: Tensor) -> Tensor:
    """The tensors of all processes, concatenated along the first axis; no gradient."""
    if world_size() == 1:
        return tensor
    everyone = tensor.new_empty(world_size() * tensor.shape[0], *tensor.shape[1:])
    _all_gather(everyone, tensor.contiguous())
    return everyone


class _GatherWithGrad(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        return gather(tensor)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        """Each process's loss depends on every process's features: sum over the losses, keep our rows."""
        own = gradient.new_empty(gradient.shape[0] // world_size(), *gradient.shape[1:])
        _reduce_scatter(own, gradient.contiguous())
        return own


def gather_with_grad(tensor: Tensor) -> Tensor:
    """Like `gather`, and the gradient flows back to the process that each row came from."""
    return tensor if world_size() == 1 else _GatherWithGrad.apply(tensor)


def gather_own_grad(tensor: Tensor) -> Tensor:
    """Like `gather`; only the rows of this process carry a gradient, and nothing is sent back."""
    if world_size() == 1:
        return tensor
    rows, everyone = tensor.shape[0], gather(tensor.detach())
    return torch.cat([everyone[: rank() * rows], tensor, everyone[(rank() + 1) * rows :]])


def sum_over_processes(tensor: Tensor) -> Tensor:
    """Add up `tensor` over all processes, in place."""
    if world_size() > 1:
        dist.all_reduce(tensor)
    return tensor


def from_main(value: Any) -> Any:
    """The value that the main process passed, on every process."""
    if world_size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def on_main(value: Any) -> list[Any]:
    """The values of all processes in order of rank, on the main process; elsewhere an empty list."""
    if world_size() == 1:
        return [value]
    values = [None] * world_size() if rank() == 0 else None
    dist.gather_object(value, values)
    return values or []


def barrier() -> None:
    """Wait for the other processes, all of them for all."""
    sum_over_processes(torch.zeros(1))


class Wish(Protocol):
    """Which signal told this process to stop, if one did."""

    signal: int | None


class StopAgreement:
    """All processes stop after the same step, although a signal reaches them at different times.

    Each step starts a reduction of one number on the CPU and reads that of the step before: one step of
    delay, and nobody waits.
    """

    def __init__(self) -> None:
        self._pending: tuple[dist.Work, Tensor] | None = None

    def reached(self, wish: Wish) -> bool:
        """Whether all processes stop now; then `wish.signal` is set on those that got none themselves."""
        if world_size() == 1:
            return wish.signal is not None
        if self._pending is not None:
            work, number = self._pending
            work.wait()
            if number.item():
                wish.signal = wish.signal or int(number.item())
                return True
        number = torch.tensor([float(wish.signal or 0)])
        self._pending = (dist.all_reduce(number, dist.ReduceOp.MAX, async_op=True), number)
        return False
