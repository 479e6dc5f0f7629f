"""No run hangs in silence: a process that died, froze or stands still is named, and all of them end.

Each process tells the others where it is through the store that they met at, and watches its neighbour. The
first to notice something writes it down there; everybody reads it and leaves with status `GONE`, so that
`torchrun --max-restarts` (or whoever started them) begins again from the last checkpoint.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from typing import Any, NoReturn

import torch.distributed as dist

from groupvit_fast.training.distributed import World, barrier

GONE = 75
"""Exit status when a process is dead, frozen or stands still (EX_TEMPFAIL: trying again may help)."""
PATIENCE_AFTER_SIGNAL = 20.0
"""Seconds in which a step must end after Ctrl-C or SIGTERM; then the program ends without saving."""
BEAT, VERDICT = "groupvit_fast/beat/", "groupvit_fast/verdict"
PHASES = ("data", "step", "save", "evaluation", "warm-up", "done")
WORDS = {"data": "waiting for data", "step": "in the step", "save": "saving", "done": "at the end"}
UNLIMITED = ("evaluation", "warm-up", "done")  # these may take long; only silence counts as a fault


class Watchdog:
    """Active inside a `with`. `seconds` of silence or standstill are a fault; 0 switches it off.

    `last_checkpoint` and `signal` are asked for the checkpoint to continue from and for a pending signal.
    """

    def __init__(
        self,
        world: World,
        seconds: float,
        *,
        last_checkpoint: Callable[[], Any] = lambda: None,
        signal: Callable[[], int | None] = lambda: None,
    ) -> None:
        self.world, self.seconds = world, seconds
        self.interval = min(5.0, max(seconds, 0.1) / 10)
        self.last_checkpoint, self.signal = last_checkpoint, signal
        self.neighbour = (world.rank + 1) % world.size
        self.verdict: str | None = None
        self._over, self._failed, self._leaving = threading.Event(), False, False
        self._threads: list[threading.Thread] = []
        self.at(0, "warm-up")

    def at(self, step: int, phase: str) -> None:
        """This process does `phase` of `step` from now on."""
        self.place, self.moved = (step, phase), time.monotonic()

    def __enter__(self) -> Watchdog:
        self.moved = self._heard = self._talked = time.monotonic()
        self._beats, self._last_beat, self._neighbour_done = 0, "", False
        if self.seconds:
            if self.world.size > 1:
                # a connection of its own: the training thread may wait inside the other one
                self._store = dist.distributed_c10d._get_default_store().clone()
                self._beat()
                self._start(self._talk, "watchdog-store")
            self._start(self._watch, "watchdog")
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Leave together, as the store lives in the first process; or tell who is gone, if somebody is."""
        several = self.seconds and self.world.size > 1
        if several:
            if kind is None:
                self._meet()
            elif issubclass(kind, RuntimeError):
                self._let_find_out()
            self.at(self.place[0], "done")
        self._over.set()
        for thread in self._threads:
            thread.join(timeout=5)
        if several and kind is None:
            barrier()  # until here a thread of somebody may have asked the store

    def _start(self, work: Callable[[], None], name: str) -> None:
        self._threads.append(threading.Thread(target=work, name=name, daemon=True))
        self._threads[-1].start()

    def _meet(self) -> None:
        """Wait for the others at the end, still watched."""
        self.at(self.place[0], "done")
        try:
            self._beat()
            barrier()
        except RuntimeError:
            self._let_find_out()
            raise

    def _let_find_out(self) -> None:
        """A connection is broken: give the threads time to find out why, whereupon they end the program."""
        self._failed = True
        time.sleep(3 * self.interval + 5)
        if self._leaving:
            threading.Event().wait()

    def _beat(self) -> None:
        self._beats += 1
        beat = [self._beats, *self.place, os.getpid(), socket.gethostname()]
        self._store.set(f"{BEAT}{self.world.rank}", json.dumps(beat))

    def _talk(self) -> None:
        """Tell where we are and hear of the neighbour; a connection that fails is left as silence."""
        while not self._over.wait(self.interval):
            try:
                self._beat()
                if self._store.check([VERDICT]):
                    self.verdict = self._store.get(VERDICT).decode()
                if self._store.check([f"{BEAT}{self.neighbour}"]):
                    beat = self._store.get(f"{BEAT}{self.neighbour}").decode()
                    if beat != self._last_beat:
                        self._last_beat, self._heard = beat, time.monotonic()
                        self._neighbour_done = json.loads(beat)[2] == "done"
                self._talked = time.monotonic()
            except Exception:
                if not self._over.is_set():
                    self._leave("rank 0, where the processes met, is gone")
                return

    def _watch(self) -> None:
        while not self._over.wait(self.interval / 2):
            now, (_, phase) = time.monotonic(), self.place
            patience = 3 * self.interval if self._failed else self.seconds
            if self.verdict:
                self._leave("", speak=False)
            if self.signal() and phase in ("data", "step") and now - self.moved > PATIENCE_AFTER_SIGNAL:
                self._leave(f"stopped {self._where(self.place)} without saving", status=128 + self.signal())
            if self.world.size > 1:
                if now - self._talked > patience:
                    self._leave(f"rank 0, where the processes met, has been silent for {patience:.0f} s")
                if now - self._heard > patience and not self._neighbour_done:
                    self._accuse(self._silent(patience))
            if now - self.moved > self.seconds and phase not in UNLIMITED:
                self._accuse(self._stuck())

    def _silent(self, patience: float) -> str:
        if not self._last_beat:
            return f"rank {self.neighbour} was never heard of in {patience:.0f} s"
        _, step, phase, process, host = json.loads(self._last_beat)
        return (
            f"rank {self.neighbour} (process {process} on {host}) has been silent for {patience:.0f} s, last "
            f"{self._where((step, phase))}: it is dead or frozen"
        )

    def _stuck(self) -> str:
        """Everybody is alive and nothing moves: the ranks furthest behind are what the others wait for."""
        still = f"stands still for {self.seconds:.0f} s"
        if self.world.size == 1:
            return f"training {still} {self._where(self.place)}"
        beats = {}
        for rank in range(self.world.size):
            if self._store.check([f"{BEAT}{rank}"]):
                _, step, phase, process, host = json.loads(self._store.get(f"{BEAT}{rank}"))
                beats[rank] = (step, PHASES.index(phase)), phase, process, host
        behind = min(place for place, *_ in beats.values())
        ranks = [rank for rank, (place, *_) in beats.items() if place == behind]
        _, phase, process, host = beats[ranks[0]]
        who = f"rank {ranks[0]} (process {process} on {host})"
        if len(ranks) > 1:
            who = f"each of ranks {', '.join(map(str, ranks[:8]))}{' ...' if len(ranks) > 8 else ''}"
        return f"{who} {still} {self._where((behind[0], phase))}"

    @staticmethod
    def _where(place: tuple[int, str]) -> str:
        return f"{WORDS.get(place[1], 'in the ' + place[1])} after step {place[0]}"

    def _accuse(self, text: str) -> NoReturn:
        """Tell the others, unless somebody was faster, and leave."""
        first = True
        try:
            if self.world.size > 1:
                mine = f"rank {self.world.rank}: {text}"
                first = self._store.compare_set(VERDICT, "", mine).decode() == mine
        finally:
            self._leave(text, speak=first)

    def _leave(self, text: str, *, status: int = GONE, speak: bool = True) -> NoReturn:
        self._leaving = True
        if speak:
            kept = self.last_checkpoint()
            remedy = f"; the last checkpoint is {kept}, continue with --resume" if kept else ""
            print(f"error: {text}{remedy}", file=sys.stderr, flush=True)
        if self.world.rank == 0 and self.world.size > 1:
            time.sleep(3 * self.interval)  # the store may live here: let the others read the verdict
        os._exit(status)
