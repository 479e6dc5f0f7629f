"""How a run goes on after anything: saving in the background, resuming, rewinding to the last good moment."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from groupvit_fast.training import checkpoint
from groupvit_fast.training.checkpoint import Snapshot
from groupvit_fast.training.distributed import from_main, on_main
from groupvit_fast.training.sharding import whole_state

if TYPE_CHECKING:
    from groupvit_fast.training.trainer import Trainer


class BackgroundWork:
    """One piece of work at a time in a thread; its error is raised by the next call of any method."""

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None

    def start(self, work: Callable[[], Any]) -> None:
        """Wait for the work before, then begin."""
        self.wait()
        # A daemon: a program that must end at once does not wait, and the disk shows nothing half-written.
        self._thread = threading.Thread(target=self._run, args=(work,), name="checkpoint", daemon=True)
        self._thread.start()

    def wait(self) -> None:
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self.check()

    def check(self) -> None:
        """Raise what went wrong, if anything did so far; never waits."""
        error, self._error = self._error, None
        if error is not None:
            raise error

    def _run(self, work: Callable[[], Any]) -> None:
        try:
            work()
        except Exception as error:  # handed to the training thread
            self._error = error


class Recovery:
    """The checkpoints of one trainer.

    `checkpoint` is the newest one, which may still be on its way to the disk; `saved_step` its step.
    """

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer
        self.root = trainer.output / "checkpoints"
        self.work = BackgroundWork()
        self.checkpoint: Path | None = None
        self.saved_step = -1
        self.rewinds = 0

    def __enter__(self) -> Recovery:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Let a write in progress end, unless the program is told to end at once."""
        if kind is None:
            self.work.wait()
        elif issubclass(kind, Exception) and self.work._thread is not None:
            self.work._thread.join()

    def save(self) -> None:
        """Write a checkpoint of this moment; every process takes part with its own position in the data.

        Training waits for the copy to host memory (and for the write before, if that still runs), not for
        the disk. The error of a write is raised at the next step.
        """
        trainer = self.trainer
        ranks = on_main({"loader": trainer.loader.state_dict(), "means": trainer.means.sums.cpu()})
        trainer.journal.saved = time.monotonic()
        snapshot = self._snapshot(ranks)
        if snapshot:
            best = self.best_step()
            keep = trainer.config.keep_checkpoints
            self.work.start(lambda: checkpoint.save(self.root, snapshot, keep=keep, best=best))
        self.checkpoint = checkpoint.step_folder(self.root, trainer.step)
        self.saved_step = trainer.step

    def best_step(self) -> int | None:
        """The step with the best evaluation of this run so far, the one before the first step apart."""
        scores = {step: score(result) for step, result in self.trainer.evaluations.items() if step > 0}
        return max(scores, key=scores.__getitem__) if scores else None

    def keep_best(self) -> None:
        """After an evaluation: if it was the best, keep the weights of this step as `checkpoints/best`."""
        step = self.trainer.step
        if self.best_step() != step:
            return
        if self.saved_step != step:
            self.save()
        if self.trainer.world.is_main:
            self.work.start(lambda: checkpoint.mark_best(self.root, step))

    def resume(self, folder: Path, warn: Callable[[str], None]) -> None:
        """Continue from a step folder: weights, optimiser, data, counters."""
        trainer = self.trainer
        state = self._restore(folder)
        self.rewinds = state["rewinds"]
        trainer.evaluations = {int(step): result for step, result in json.loads(state["evaluations"]).items()}
        ranks, size = state["ranks"], trainer.world.size
        if state["world_size"] == size:
            own = ranks[trainer.world.rank]
            trainer.loader.load_state_dict(own["loader"])
            trainer.means.sums = own["means"].to(trainer.device)
        else:
            trainer.loader.load_state_dict(merged([rank["loader"] for rank in ranks]))
            warn(
                f"warning: {folder} was saved by {state['world_size']} processes, this run has {size}: "
                "weights, optimiser and the order of the data continue; noise and drop path are per process "
                "and differ, and a step now takes "
                f"{trainer.config.batch_size * trainer.config.accum_freq * size} pairs"
            )
        self.checkpoint, self.saved_step = folder, trainer.step

    def rewind(self) -> Path | None:
        """Go back to the newest checkpoint that was not in trouble, with the data that would come next.

        Returns None, with nothing changed, if there is no such checkpoint. What was tried since is deleted
        and the new position saved, so that a crash does not lead back into it.
        """
        trainer = self.trainer
        self.work.wait()
        folder = from_main(self._newest_good() if trainer.world.is_main else None)
        if folder is None:
            return None
        bad_steps = trainer.optimizer.bad_steps
        self._restore(folder)
        trainer.optimizer.bad_steps = bad_steps
        trainer.means.take()
        trainer.evaluations = {s: result for s, result in trainer.evaluations.items() if s <= trainer.step}
        self.rewinds += 1
        self.save()
        return folder

    def _newest_good(self) -> Path | None:
        for folder in reversed(checkpoint.list_steps(self.root)):
            if checkpoint.find_damage(folder) is None:
                state = checkpoint.load_state(folder)
                if not state["optimizer"]["bad_in_a_row"].item():
                    return folder
        return None

    def _restore(self, folder: Path) -> dict[str, Any]:
        """Weights, averaged weights, optimiser and step of a folder; returns the whole state."""
        trainer = self.trainer
        checkpoint.load_weights(folder, trainer.model)
        state = checkpoint.load_state(folder)
        trainer.optimizer.load_state_dict(state["optimizer"])
        trainer.step = state["step"]
        if trainer.ema and not checkpoint.load_weights(folder, trainer.ema.model, ema=True):
            trainer.ema.model.load_state_dict(trainer.model.state_dict())
        return state

    def _snapshot(self, ranks: list[dict[str, Any]]) -> Snapshot | None:
        """What is written, on the main process; the others hand in their shares and get nothing."""
        trainer = self.trainer
        weights = whole_state(trainer.model)
        averaged = whole_state(trainer.ema.model) if trainer.ema else None
        optimizer = trainer.optimizer.state_dict()
        if not trainer.world.is_main:
            return None
        state = {
            "step": trainer.step,
            "world_size": trainer.world.size,
            "dtype": trainer.dtype,
            "optimizer": optimizer,
            "evaluations": json.dumps(trainer.evaluations),
            "rewinds": self.rewinds,
            "ranks": ranks,
        }
        about = {"preset": trainer.config.preset, "step": trainer.step}
        weights, state, averaged = copied(weights), copied(state), copied(averaged)
        return Snapshot(trainer.step, trainer.model.config, weights, state, about, averaged)


def score(result: dict[str, Any]) -> float:
    """What makes an evaluation the best one: the mIoU of the weights that will be used."""
    return result.get("ema", result)["miou"]


def merged(loaders: list[dict[str, Any]]) -> dict[str, Any]:
    """One loader state out of those of all processes: the position is common, bad samples are added up."""
    state = dict(loaders[0])
    if "quarantined" in state:
        state["quarantined"] = sorted({sample for loader in loaders for sample in loader["quarantined"]})
    return state


def copied(value: Any) -> Any:
    """A copy in host memory of all tensors in a nest of dicts, lists and tuples."""
    if isinstance(value, torch.Tensor):
        return value.detach().to("cpu", copy=True).contiguous()
    if isinstance(value, dict):
        return {key: copied(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(copied(item) for item in value)
    return value
