"""The training loop.

Everything random in a step - noise, drop path, and in the loader order, crops and prompts - is a function
of (seed, step, rank), so a run that was killed and resumed gives the same bits as one that was not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from groupvit_fast.model.groupvit import Features, GroupViT, TrainingOutput
from groupvit_fast.model.packing import send
from groupvit_fast.training import accumulation, guard, parallel, sharding
from groupvit_fast.training.config import TrainConfig
from groupvit_fast.training.distributed import StopAgreement, World, from_main
from groupvit_fast.training.ema import WeightAverage
from groupvit_fast.training.interruption import Interrupted, Interruption
from groupvit_fast.training.journal import Journal
from groupvit_fast.training.metrics import RunningMeans, group_statistics
from groupvit_fast.training.objective import Objective, packed
from groupvit_fast.training.optim import GuardedAdamW, Schedule, freeze, number_of_steps
from groupvit_fast.training.precision import DTYPES, autocast
from groupvit_fast.training.profiling import StepProfiler
from groupvit_fast.training.recovery import Recovery
from groupvit_fast.training.watchdog import Watchdog

PARTS = (
    "loss", "contrastive", "multi_label", "grad_norm", "groups_in_use", "group_entropy", "largest_group",
)  # fmt: skip
"""What is averaged on the device between two lines of metrics.jsonl."""
WARM_UP_STEPS = 3
"""First steps of a process, which may take long: kernels are compiled and memory is found."""


class Batch(Protocol):
    """images float32 [B,3,H,W]; texts int64 [U,T], distinct rows; text_index int64 [B,1+K], caption first."""

    images: Tensor
    texts: Tensor
    text_index: Tensor


class Loader(Protocol):
    """An endless source of batches; its state is the position right after the last batch handed out.

    `bad_samples` counts those left out on the way, `sample_names` names those of the last batch.
    """

    steps_per_epoch: int
    bad_samples: int

    def __iter__(self) -> Iterator[Batch]: ...
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: dict[str, Any]) -> None: ...
    def sample_names(self) -> list[str]: ...


class Trainer:
    """Train `model` on `loader` as `config` says, in the run folder `output`.

    `evaluate(model)` returns JSON-able results with a `miou`; it is called before, every `eval_every` steps
    and after, on the main process and in evaluation mode, and after it `picture(model, path)`. `dtype` is a
    key of `precision.DTYPES`. After `fit`, `step`, `evaluations` (by step) and `journal.last_record` (of
    metrics.jsonl) tell what happened.
    """

    def __init__(
        self,
        model: GroupViT,
        loader: Loader,
        config: TrainConfig,
        *,
        output: Path,
        device: str = "cpu",
        world: World | None = None,
        dtype: str = "float32",
        evaluate: Callable[[GroupViT], dict[str, Any]] | None = None,
        picture: Callable[[GroupViT, Path], None] | None = None,
    ) -> None:
        self.model, self.loader, self.config, self.output = model.to(device).train(), loader, config, output
        self.world = world or World()
        self.device, self.dtype, self.evaluate = device, dtype, evaluate
        self.steps_per_epoch = max(1, loader.steps_per_epoch // config.accum_freq)
        self.steps = number_of_steps(config, self.steps_per_epoch, self.world.size)
        self.schedule = Schedule.of(
            config, steps=self.steps, steps_per_epoch=self.steps_per_epoch, world_size=self.world.size
        )
        freeze(self.model, config.freeze)
        parallel.prepare(self.model, config, self.world)
        self.ema = WeightAverage(self.model, config.model_ema_decay) if config.model_ema else None
        self.forward = parallel.wrapped(self.model, config, self.world, device)
        if self.ema and sharding.wanted(config):
            sharding.shard(self.ema.model, config, device)
        self.objective = Objective(self.model, config)
        self.optimizer = GuardedAdamW(model, config, loss_scaling=dtype == "fp16")
        self.left_to_average = parallel.left_to_average(config, self.optimizer.parameters)
        self.noise_key = torch.tensor([mix(config.seed, self.world.rank), 0], device=device)
        self.means = RunningMeans(PARTS, device)
        self.step = 0
        self.evaluations: dict[int, dict[str, Any]] = {}
        self.last_batch: Batch | None = None
        self.journal = Journal(self, picture)
        self.recovery = Recovery(self)
        self.profiler = StepProfiler(
            config.profile_steps,
            output / "profile",
            self.world.rank,
            lambda line: self.journal.progress.say(line),
        )

    def fit(self) -> int | None:
        """Train to the last step or until a signal, which is returned; either way the state is saved."""
        self.interruption = Interruption()
        self.watchdog = Watchdog(
            self.world,
            self.config.timeout_seconds,
            last_checkpoint=lambda: self.recovery.checkpoint,
            signal=lambda: self.interruption.signal,
        )
        first = self.step
        with (
            self.interruption,
            self.journal,
            self.watchdog,
            closing(iter(self.loader)) as batches,
            self.recovery,
        ):
            stream = accumulation.joined(batches, self.config.accum_freq)
            stop = StopAgreement()
            going = self.evaluate_if_due()
            self.journal.clock.restart()
            while going and self.step < self.steps and not stop.reached(self.interruption):
                warm = self.step >= first + WARM_UP_STEPS
                self.watchdog.at(self.step, "data" if warm else "warm-up")
                batch = self.journal.clock.next(stream)
                self.watchdog.at(self.step, "step" if warm else "warm-up")
                with self.profiler.step(self.step):
                    self.train_step(batch)
                going = self.after_step()
            if self.recovery.saved_step != self.step:
                self.recovery.save()
            self.profiler.close()
        return self.interruption.signal if self.step < self.steps or not going else None

    def train_step(self, batch: Batch) -> None:
        """One step of optimisation. The host starts work and never waits for a result."""
        self.last_batch = batch
        self.optimizer.start_step()
        if self.config.accum_freq > 1:
            losses, areas = self.accumulate(batch)
        else:
            losses, encoded = self.forward_pass(batch, self.forward, self.step)
            areas = encoded.areas
            self.optimizer.backward(losses[0])
        parallel.average_gradients(self.left_to_average)
        norm, bad = self.optimizer.update(losses[0], self.schedule.rate(self.step))
        values = [*(loss.detach() for loss in losses), norm, *group_statistics(areas)]
        self.means.add(values, bad)
        if self.ema:
            self.ema.update(self.model, bad, self.step)
        self.step += 1

    def forward_pass(
        self, batch: Batch, forward: nn.Module, step: int
    ) -> tuple[tuple[Tensor, Tensor, Tensor], TrainingOutput]:
        """Losses and encodings of a batch as in step `step`: everything random depends on its number."""
        noise_key = self.start_noise(step)
        with autocast(self.device, DTYPES[self.dtype]):
            encoded = forward(
                batch.images,
                packed(batch.texts, self.device, DTYPES[self.dtype]),
                send(batch.text_index, self.device),
                noise_key,
                return_groups=self.objective.match_groups,
            )
        return self.losses(encoded, batch), encoded

    def start_noise(self, step: int, *part: int) -> Tensor | None:
        """Make drop path and noise depend on seed, rank, step and part of a batch; returns the noise key."""
        # after a rewind a step is done again with other data: with other noise as well
        again = [self.recovery.rewinds] if self.recovery.rewinds else []
        torch.manual_seed(mix(self.config.seed, self.world.rank, step, *again, *part))
        self.noise_key[0].fill_(mix(self.config.seed, self.world.rank, *again, *part))
        self.noise_key[1].fill_(step)
        return self.noise_key if self.config.gumbel else None

    def accumulate(self, batch: Batch) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor]:
        """Gradients of a batch of several, in the memory of one; losses and group areas."""

        def encode(piece: accumulation.Piece) -> Features:
            noise_key = self.start_noise(self.step, *([piece.number] if piece.number else []))
            with autocast(self.device, DTYPES[self.dtype]):
                return self.model.encode(piece.images, piece.texts, noise_key)

        def rest(features: Features) -> tuple[tuple[tuple[Tensor, Tensor, Tensor], Tensor], Tensor]:
            with autocast(self.device, DTYPES[self.dtype]):
                index, groups = send(batch.text_index, self.device), self.objective.match_groups
                losses = self.losses(self.model.project(features, index, return_groups=groups), batch)
            return (losses, features.areas), self.optimizer.scaled(losses[0])

        parts = accumulation.pieces(
            batch.images,
            batch.texts,
            self.config.accum_freq,
            lambda texts: packed(texts, self.device, DTYPES[self.dtype]),
        )
        return accumulation.backward_in_pieces(parts, encode, rest)

    def after_step(self) -> bool:
        """What is due after a step besides training; returns whether to go on."""
        config, last = self.config, self.step == self.steps
        self.recovery.work.check()
        self.journal.progress.advance()
        save = self.step % config.save_every == 0 or last
        if self.step % config.log_every == 0 or last:
            save |= self.journal.log()
            guard.check(self, int(self.optimizer.bad_in_a_row.item()))
        paused = self.journal.clock.pause()
        if save and self.recovery.saved_step != self.step:
            self.watchdog.at(self.step, "save")
            self.recovery.save()
        going = self.evaluate_if_due()
        self.journal.clock.proceed(paused)
        return going

    def losses(self, encoded: TrainingOutput, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """The total and its two parts, 0-dim; the multi-label part is 0 without prompts."""
        return self.objective(encoded, batch.texts, batch.text_index)

    def evaluate_if_due(self) -> bool:
        """Evaluate before the first step, every `eval_every`, and after the last, each once.

        Returns False if a signal ended the evaluation, on every process.
        """
        every = self.config.eval_every
        due = self.step in (0, self.steps) or (every is not None and self.step % every == 0)
        if self.evaluate is None or not due or self.step in self.evaluations:
            return True
        self.watchdog.at(self.step, "evaluation")
        self.whole = self._whole_models()
        results = from_main(self._evaluated() if self.world.is_main else None)
        if isinstance(results, int):
            self.interruption.signal = results
            return False
        self.evaluations[self.step] = results
        self.journal.evaluation(results)
        if self.step < self.steps:
            self.whole = None
        self.recovery.keep_best()
        return True

    @property
    def evaluated_model(self) -> GroupViT:
        """The weights that count in the end: the averaged ones if there are any."""
        return self.whole[-1]

    def _whole_models(self) -> list[GroupViT]:
        """The model and its average, if there is one; gathered from all processes if they are sharded."""
        return [sharding.whole_model(one) for one in (self.model, self.ema and self.ema.model) if one]

    def _evaluated(self) -> dict[str, Any] | int:
        """The results, those of averaged weights under `ema`; or the signal that came meanwhile."""
        model, *average = self.whole
        model.eval()
        try:
            with torch.no_grad(), self.interruption.ends():
                results = self.evaluate(model)
                return results | {"ema": self.evaluate(average[0])} if average else results
        except Interrupted:
            return self.interruption.signal
        finally:
            model.train()

    def resume(self, folder: Path, warn: Callable[[str], None]) -> None:
        """Continue from a step folder: weights, optimiser, data, counters. Call before `fit`."""
        self.recovery.resume(folder, warn)


def mix(*values: int) -> int:
    """A well-spread number below 2^63 from a few integers (splitmix64 steps): the seed of one step."""
    mask = 2**64 - 1
    state = 0
    for value in values:
        state = (state + value + 0x9E3779B97F4A7C15) & mask
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & mask
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & mask
        state ^= state >> 31
    return state >> 1
