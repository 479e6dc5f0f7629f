"""Timing of several candidates against each other in one process, and what the machine itself can do."""

from __future__ import annotations

import ctypes
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

Candidates = dict[str, Callable[[], object]]

# "wall": what passes; "cpu": the processor time of this process, where others keep the machine busy (its
# threads are added up, so it compares candidates on one thread only).
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


@dataclass(frozen=True)
class Timing:
    """Milliseconds of one call."""

    median: float
    low: float  # tenth percentile
    high: float  # ninetieth percentile
    calls: int

    @classmethod
    def of(cls, samples: list[float]) -> Timing:
        ordered = sorted(samples)
        tenth = len(ordered) // 10
        return cls(ordered[len(ordered) // 2], ordered[tenth], ordered[-1 - tenth], len(ordered))


def interleaved(
    candidates: Candidates, device: str, *, seconds: float, rounds: int = 7, clock: str = "wall"
) -> dict[str, Timing]:
    """Time all candidates in turn, round after round, so that a busy moment of the machine hits them alike.

    Runs at least `rounds` rounds, then until `seconds` are spent. On a CPU a call follows one of the same
    candidate that is not counted; on a GPU events are timed, and the second-level cache is overwritten
    before every call.
    """
    *_, samples = turns(candidates, device, seconds=seconds, rounds=rounds, clock=clock)
    return {name: Timing.of(times) for name, times in samples.items()}


def turns(
    candidates: Candidates, device: str, *, seconds: float, rounds: int = 7, clock: str = "wall"
) -> Iterator[dict[str, list[float]]]:
    """The milliseconds of all calls so far, after each round of `interleaved`."""
    measure = _on_gpu(device) if device == "cuda" else _on_cpu(CLOCKS[clock])
    for candidate in candidates.values():
        candidate()
    samples: dict[str, list[float]] = {name: [] for name in candidates}
    end = time.perf_counter() + seconds
    while len(samples[next(iter(samples))]) < rounds or time.perf_counter() < end:
        for name, candidate in candidates.items():
            samples[name].append(measure(candidate))
        yield samples


def _on_cpu(now: Callable[[], float]) -> Callable[[Callable[[], object]], float]:
    """Milliseconds of a call that follows one of its own; a short one is repeated: the clock is not free.

    The C library may give back what one contender freed while the next one runs: 77 MB of the other's heap
    cost 4 ms inside a call of 2 ms (`strace -e brk`). The first call of a turn takes that on itself and is
    not counted, unless it is so long that it does not matter.
    """
    least, long = 0.5, 300.0

    def run(candidate: Callable[[], object], repeats: int) -> float:
        start = now()
        for _ in range(repeats):
            candidate()
        return (now() - start) * 1e3

    def measure(candidate: Callable[[], object]) -> float:
        spent = run(candidate, 1)
        if spent >= long:
            return spent
        repeats = 1
        while (spent := run(candidate, repeats)) < least:
            repeats = max(2 * repeats, int(repeats * least / max(spent, 1e-3)) + 1)
        return spent / repeats

    return measure


def _on_gpu(device: str) -> Callable[[Callable[[], object]], float]:
    flush = torch.empty(256 << 20, dtype=torch.int8, device=device)

    def measure(candidate: Callable[[], object]) -> float:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        flush.zero_()  # also keeps the GPU busy while the host catches up, so that launches are not timed
        start.record()
        candidate()
        end.record()
        end.synchronize()
        return start.elapsed_time(end)

    return measure


def copy_bandwidth(device: str, clock: str = "wall") -> float:
    """Bytes per second of a copy of 256 MiB, read and written: the best of several."""
    source = torch.ones(64 << 20, device=device)
    target = torch.empty_like(source)
    timing = interleaved({"copy": lambda: target.copy_(source)}, device, seconds=0.3, clock=clock)["copy"]
    return 2 * source.nbytes / (timing.low * 1e-3)


def keep_released_memory() -> bool:
    """Keep what tensors release for the next ones instead of giving it back to the kernel; glibc only.

    Returns whether that was possible. For the rest of the process: page faults are then no part of a time.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return False
    trim_threshold, mmap_max = -1, -4  # M_TRIM_THRESHOLD and M_MMAP_MAX of malloc.h
    return bool(mallopt(trim_threshold, 2**31 - 1) and mallopt(mmap_max, 0))


def peak_memory(candidate: Callable[[], object], device: str) -> int:
    """Bytes that tensors made by a call take at most, beside those that were there before."""
    candidate()
    if device == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        candidate()
        return torch.cuda.max_memory_allocated() - before
    peak = now = 0
    for size in memory_events(candidate):
        now += size
        peak = max(peak, now)
    return peak


def memory_events(candidate: Callable[[], object]) -> list[int]:
    """Bytes of every allocation (positive) and release (negative) of a call on the CPU, in order."""
    with _silent(), torch.profiler.profile(profile_memory=True) as profiler:
        candidate()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    return [event.nbytes() for event in sorted(events, key=lambda e: e.start_ns())]


def saved_bytes(candidate: Callable[[], torch.Tensor], inputs: Sequence[torch.Tensor]) -> int:
    """Bytes that a call keeps for its backward, beside its inputs and its result."""
    kept = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = candidate()
    for tensor in (*inputs, result):
        kept.pop(tensor.untyped_storage().data_ptr(), None)
    return sum(kept.values())


class _HostReads(TorchDispatchMode):
    """Counts operators whose result the host must know: on a GPU it waits for each."""

    WAITING = (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default)
    count = 0

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), keywords: Any = None) -> Any:
        self.count += function in self.WAITING
        return function(*arguments, **(keywords or {}))


def host_reads(candidate: Callable[[], object]) -> int:
    """How often a call reads a value of a tensor on the host (`item`, a condition, `nonzero`)."""
    with _HostReads() as reads:
        candidate()
    return reads.count


@contextmanager
def _silent() -> Iterator[None]:
    """The profiler reports its start and end on the standard error, from C++."""
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def once(candidate: Callable[[], object], device: str, clock: str = "wall") -> tuple[float, Any]:
    """Seconds of one call, finished on the device too, and what it returns."""
    now = CLOCKS[clock]
    if device == "cuda":
        torch.cuda.synchronize()
    start = now()
    result = candidate()
    if device == "cuda":
        torch.cuda.synchronize()
    return now() - start, result
