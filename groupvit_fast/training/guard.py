"""What happens after many bad steps in a row: go back and try other data, in the end stop and say why.

That a step was bad is found on the device, and the optimiser skips it there (`optim.GuardedAdamW`). Only at
log points does the host look at how many came in a row; and only once it stops are the questions asked whose
answers cost time: the last step is repeated piece by piece on every process.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from groupvit_fast.console import UserError
from groupvit_fast.model.groupvit import GroupViT
from groupvit_fast.training.distributed import from_main, on_main
from groupvit_fast.training.sharding import whole_model

if TYPE_CHECKING:
    from groupvit_fast.training.trainer import Batch, Trainer

PIXELS, OUTPUT, LOSS, GRADIENT = range(4)
PARTS = ("the loss", "the contrastive loss", "the multi-label loss")


@dataclass(frozen=True)
class Finding:
    """The first thing of a step that was not finite on one process: `place` in words, None if all is well.

    `order` says how early in a step that is: pixels, outputs of modules, losses, gradients.
    """

    rank: int
    place: str | None
    order: int = 0
    samples: tuple[str, ...] = ()
    bundle: str | None = None


def check(trainer: Trainer, in_a_row: int) -> None:
    """Every process calls this with the same number of bad steps in a row, after the last of them."""
    config, recovery = trainer.config, trainer.recovery
    if in_a_row < config.max_bad_steps:
        return
    last = trainer.step
    if recovery.rewinds < config.max_rewinds:
        folder = recovery.rewind()
        if folder is not None:
            trainer.journal.restart()
            trainer.journal.progress.say(
                f"step {last}: {in_a_row} steps in a row were not finite; back to step {trainer.step} with "
                f"the data that comes next (rewind {recovery.rewinds} of {config.max_rewinds})"
            )
            return
    raise UserError(_message(trainer, in_a_row, diagnose(trainer)))


def diagnose(trainer: Trainer) -> list[Finding]:
    """Repeat the last step on every process; the findings, in order of rank, reach all of them."""
    model = whole_model(trainer.model)
    finding = find(trainer, trainer.last_batch, model)
    everyone = from_main(on_main(finding))
    culprits = [one.rank for one in earliest(everyone)] or [0]
    if trainer.world.rank in culprits:
        finding = dataclasses.replace(finding, bundle=str(save_bundle(trainer, model)))
    return from_main(on_main(finding))


def earliest(findings: list[Finding]) -> list[Finding]:
    """Those that came first in the step: what other processes found later is their consequence."""
    bad = [one for one in findings if one.place]
    return [one for one in bad if one.order == min(other.order for other in bad)]


def find(trainer: Trainer, batch: Batch, model: GroupViT) -> Finding:
    """Look for the first number that is not finite: pixels, then modules, loss parts and gradients in turn.

    Every process goes all the way, because losses wait for each other. The gradients are those of this
    process alone, before they are averaged.
    """
    rank, names = trainer.world.rank, trainer.loader.sample_names()
    rows = (~batch.images.flatten(1).isfinite().all(1)).nonzero().flatten().tolist()
    model.zero_grad(set_to_none=True)
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    with _watched(model) as seen:
        losses = trainer.forward_pass(batch, model, trainer.step - 1)[0]
        for part, value in zip(reversed(PARTS), reversed(losses), strict=True):
            seen(value, part, LOSS)
        losses[0].backward()
    for buffer, before in buffers:
        buffer.copy_(before)
    if rows:
        chosen = tuple(names[row] if row < len(names) else f"row {row}" for row in rows)
        return Finding(rank, f"the pixels of sample {chosen[0]}", PIXELS, chosen)
    place, order = seen.places[0] if seen.places else (None, 0)
    return Finding(rank, place, order, tuple(names))


class _Seen:
    def __init__(self) -> None:
        self.places: list[tuple[str, int]] = []

    def __call__(self, value: Any, place: str, order: int) -> None:
        """Note the place if `value`, or a tensor in it, has a number that is not finite."""
        values = value if isinstance(value, (tuple, list)) else [value]
        for one in values:
            if isinstance(one, Tensor) and one.is_floating_point() and not one.isfinite().all():
                self.places.append((place, order))


@contextmanager
def _watched(model: nn.Module) -> Iterator[_Seen]:
    """While active, the outputs of all modules and the gradients of all parameters are looked at."""
    seen = _Seen()

    def output_of(name: str) -> Callable[..., None]:
        return lambda module, arguments, output: seen(output, f"the output of {name}", OUTPUT)

    def gradient_of(name: str) -> Callable[[Tensor], None]:
        return lambda parameter: seen(parameter.grad, f"the gradient of {name}", GRADIENT)

    handles = [
        module.register_forward_hook(output_of(name)) for name, module in model.named_modules() if name
    ]
    handles += [
        parameter.register_post_accumulate_grad_hook(gradient_of(name))
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    ]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def save_bundle(trainer: Trainer, model: GroupViT) -> Path:
    """Everything that the last step depends on, in one file that `replay.replay` runs again."""
    batch, world = trainer.last_batch, trainer.world
    folder = trainer.output / "replay"
    folder.mkdir(exist_ok=True)
    path = folder / f"step_{trainer.step - 1:08d}_rank_{world.rank}.pt"
    config = dataclasses.asdict(trainer.config)
    torch.save(
        {
            "step": trainer.step - 1,
            "rank": world.rank,
            "rewinds": trainer.recovery.rewinds,
            "dtype": trainer.dtype,
            "config": {name: str(v) if isinstance(v, Path) else v for name, v in config.items()},
            "model": model.config.to_dict(),
            "weights": {name: value.cpu() for name, value in model.state_dict().items()},
            "batch": {name: getattr(batch, name).cpu() for name in ("images", "texts", "text_index")},
            "samples": list(trainer.loader.sample_names()),
        },
        path,
    )
    return path


def _message(trainer: Trainer, in_a_row: int, findings: list[Finding]) -> str:
    bad = earliest(findings)
    if bad:
        where = "; ".join(
            f"first in {one.place}" + (f" on rank {one.rank}" if trainer.world.size > 1 else "")
            for one in bad[:4]
        )
    else:
        where = "repeated, the last step is finite: a fault that comes and goes"
    tried = f" after {trainer.recovery.rewinds} rewinds" if trainer.recovery.rewinds else ""
    kept = f"the weights of step {trainer.step - in_a_row} are kept"
    if trainer.recovery.checkpoint:
        kept += f", the last checkpoint is {trainer.recovery.checkpoint}"
    bundles = ", ".join(finding.bundle for finding in findings if finding.bundle)
    return (
        f"training stopped at step {trainer.step}{tried}: {in_a_row} steps in a row gave numbers that are "
        f"not finite ({where}); {kept}. Try a lower --lr or no --amp, and check the data; "
        f"groupvit_fast.training.replay repeats the step from {bundles}"
    )
