"""What a run tells while it goes on: metrics.jsonl, the progress display, trackers, pictures."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from groupvit_fast.console import write_json
from groupvit_fast.model.groupvit import GroupViT
from groupvit_fast.training.distributed import sum_over_processes
from groupvit_fast.training.flops import text_flops, training_flops
from groupvit_fast.training.losses import similarity_scale
from groupvit_fast.training.metrics import Clock, MetricsFile, ProgressLine, memory_gb, peak_flops
from groupvit_fast.training.trackers import Trackers, check_names

if TYPE_CHECKING:
    from groupvit_fast.training.trainer import Trainer


class Journal:
    """Keeps the record of one trainer; on other processes than the main one it only takes part in sums.

    `picture(model, path)` draws the groups of some fixed images.
    """

    def __init__(self, trainer: Trainer, picture: Callable[[GroupViT, Path], None] | None) -> None:
        self.trainer, self.picture = trainer, picture
        check_names(trainer.config.report_to)
        self.clock = Clock()
        self.last_record: dict[str, Any] = {}

    def __enter__(self) -> Journal:
        """What only a run that really starts needs."""
        trainer, config = self.trainer, self.trainer.config
        quiet = config.quiet or not trainer.world.is_main
        self.progress = ProgressLine(total=trainer.steps, done=trainer.step, quiet=quiet)
        names = config.report_to if trainer.world.is_main else "none"
        self.trackers = Trackers(names, trainer.output, _plain(config), trainer.step)
        self.peak = peak_flops(trainer.device, trainer.dtype)
        self.saved = time.monotonic()
        self.restart()
        return self

    def __exit__(self, *_: object) -> None:
        self.progress.close()
        self.trackers.close()

    def restart(self) -> None:
        """Continue metrics.jsonl and the progress display from the current step."""
        path, step = self.trainer.output / "metrics.jsonl", self.trainer.step
        self.metrics = MetricsFile(path, resume_from=step) if self.trainer.world.is_main else None
        self.progress.restart(step)
        self.clock.restart()

    def log(self) -> bool:
        """One line for everybody; the one place where the host waits.

        Returns whether --save-every-minutes asks for a checkpoint, the same on every process.
        """
        trainer = self.trainer
        minutes = trainer.config.save_every_minutes
        wants = minutes is not None and trainer.world.is_main and time.monotonic() - self.saved > 60 * minutes
        sums = torch.tensor([float(trainer.loader.bad_samples), float(wants)], dtype=torch.float64)
        bad_samples, wanted = sum_over_processes(sums).tolist()
        model, rates = trainer.model, self.clock.take()
        record = {
            "step": trainer.step,
            **trainer.means.take(),
            "lr": trainer.schedule.rate(trainer.step - 1),
            "logit_scale": similarity_scale(model.logit_scale.detach()).item(),
        }
        if model.multi_label_logit_scale is not None:
            scale = similarity_scale(model.multi_label_logit_scale.detach())
            record["multi_label_logit_scale"] = scale.item()
        record |= {
            "bad_steps": int(trainer.optimizer.bad_steps.item()),
            "rewinds": trainer.recovery.rewinds,
            "bad_samples": int(bad_samples),
            "epoch": round(trainer.step / trainer.steps_per_epoch, 4),
            **rates,
            **self._arithmetic(rates["images_per_s"]),
            "memory_gb": memory_gb(trainer.device),
        }
        self.last_record = record
        if self.metrics:
            self.metrics.write(record)
            self.trackers.metrics(trainer.step, record)
        self.progress.show(record)
        if wanted:
            self.saved = time.monotonic()
        return wanted > 0

    def evaluation(self, results: dict[str, Any]) -> None:
        """Write down the results of an evaluation at the current step and draw its picture."""
        trainer, picture = self.trainer, None
        if not trainer.world.is_main:
            return
        write_json(trainer.output / "evaluations.json", trainer.evaluations)
        text = f"step {trainer.step}: zero-shot mIoU {results['miou']:.3f}"
        if "ema" in results:
            text += f", of averaged weights {results['ema']['miou']:.3f}"
        others = results.get("others", {})
        self.progress.say(text + "".join(f", {name} {other['miou']:.3f}" for name, other in others.items()))
        if self.picture:
            picture = trainer.output / "pictures" / f"step_{trainer.step:08d}.png"
            picture.parent.mkdir(exist_ok=True)
            self.picture(trainer.evaluated_model, picture)
        self.trackers.evaluation(trainer.step, results, picture)

    def _arithmetic(self, images_per_s: float) -> dict[str, float]:
        """Needed arithmetic a second over all processes, and its share of what the devices could do."""
        trainer, batch = self.trainer, self.trainer.last_batch
        config, images = trainer.model.config, batch.images.shape[0]
        lengths = (batch.texts != 0).sum(dim=1).tolist()
        flops = training_flops(config, [], batch.text_index.shape[1])
        flops += 3 * text_flops(config.text, lengths) / images
        done = flops * images_per_s
        arithmetic = {"tflops": done / 1e12}
        if self.peak:
            arithmetic["mfu"] = done / (self.peak * trainer.world.size)
        return arithmetic


def _plain(config: Any) -> dict[str, Any]:
    values = dataclasses.asdict(config)
    return {name: str(value) if isinstance(value, Path) else value for name, value in values.items()}
