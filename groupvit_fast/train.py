"""Command line: train a GroupViT from captions alone, and measure the segments it learnt."""

from __future__ import annotations

import os

# A step has hundreds of short parallel regions; with other work on the machine, threads that spin at the
# end of each made it three times slower than threads that sleep.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import argparse
import shlex
import shutil
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from groupvit_fast.console import UserError, resolve_device, run_command, write_json, write_text_atomically
from groupvit_fast.data.index import expand_shards
from groupvit_fast.model.groupvit import GroupViT, create_model
from groupvit_fast.model.presets import ModelConfig
from groupvit_fast.segmentation import (
    Evaluation,
    Protocol,
    SegmentationDataset,
    evaluate,
    open_dataset,
    protocol,
)
from groupvit_fast.segmentation.evaluation import examples_picture
from groupvit_fast.segmentation.pictures import save_atomically
from groupvit_fast.training import checkpoint, distributed, options
from groupvit_fast.training.config import TrainConfig
from groupvit_fast.training.distributed import World
from groupvit_fast.training.precision import choose_dtype
from groupvit_fast.training.recipes import model_config
from groupvit_fast.training.sources import open_loader, shapes_folder
from groupvit_fast.training.trainer import Trainer

PROGRAM = "python -m groupvit_fast.train"
DESCRIPTION = f"""\
Train a GroupViT from images and captions. Without --data it draws the built-in shapes dataset, trains the
tiny preset in minutes, and shows how well it segments before and after.

  {PROGRAM} --amp
  {PROGRAM} --amp --preset groupvit-gcc-yfcc --data '/data/cc12m/{{000000..001943}}.tar'
  torchrun --nproc-per-node 8 -m groupvit_fast.train --amp --preset groupvit-gcc-yfcc --data /data/cc12m
  {PROGRAM} --resume runs/tiny-20260102-030405
"""
EPILOG = """\
Every option can stand in a YAML file (--config) under the same name; the command line has the last word.
The defaults shown are those of the preset named on the same command line.

The run folder holds config.yaml, metrics.jsonl (one object a logged step), evaluations.json, result.json,
examples.png and checkpoints/step_NNNNNNNN, and can be given to every command that takes a checkpoint.

Ctrl-C or SIGTERM: the step is finished, a checkpoint saved, and the exit status is 130 or 143; a second one
ends the program at once. Bad input: one line and status 1.
"""


@dataclass(frozen=True)
class HeldOut:
    """What segmentation is measured on, and how."""

    dataset: SegmentationDataset
    protocol: Protocol
    background_threshold: float | None
    device: str

    def evaluate(self, model: GroupViT) -> dict[str, Any]:
        options = {"device": self.device, "background_threshold": self.background_threshold}
        return evaluate(model, self.dataset, self.protocol, **options).to_json()

    def picture(self, model: GroupViT, title: str, path: Path) -> None:
        options = {"device": self.device, "background_threshold": self.background_threshold}
        save_atomically(examples_picture(model, self.dataset, self.protocol, title=title, **options), path)


def main(argv: Sequence[str] | None = None) -> int:
    given = options.parse(argv, program=PROGRAM, description=DESCRIPTION, epilog=EPILOG)
    config = options.resolve(given, _saved_options(given))
    if getattr(given, "print_config", False):
        print(options.to_yaml(config), end="")
        return 0
    device = resolve_device(config.device)
    _set_up_torch(config, device)
    with distributed.session(device) as world:
        return _run(config, device, world)


def _run(config: TrainConfig, device: str, world: World) -> int:
    """Open everything that can fail first; only then write to the run folder."""
    start = time.perf_counter()
    say = _say(config, world)
    model_settings = model_config(config)
    output = _output_folder(config, world)
    found = _checkpoint_to_resume(config, output, world, say)
    shards, held_out = _data(config, model_settings, world, device)
    loader = open_loader(config, model_settings, shards, world, device)
    dtype, remark = choose_dtype(config.amp, config.amp_dtype, device, model_settings.image.width)
    if remark:
        say(remark)
    model = create_model(model_settings, seed=config.seed)
    trainer = Trainer(
        model, loader, config, output=output, device=device, world=world, dtype=dtype,
        evaluate=held_out.evaluate if held_out else None,
    )  # fmt: skip
    if found:
        trainer.resume(found, say)
        say(f"continuing {found}")
    if world.is_main:
        write_text_atomically(output / "config.yaml", options.to_yaml(_as_saved(config, dtype)))
    say(_headline(config, trainer, loader.samples_per_epoch))
    stopped_by = trainer.fit()
    if not world.is_main:
        return 128 + stopped_by if stopped_by else 0
    if stopped_by:
        return _report_stop(trainer, stopped_by)
    _report(config, trainer, held_out, time.perf_counter() - start)
    return 0


def _saved_options(given: argparse.Namespace) -> dict[str, Any] | None:
    """The options of the run that is continued, so that `--resume DIR` alone continues it as it was."""
    resume = getattr(given, "resume", None)
    place = getattr(given, "output", None) if resume == "auto" else resume
    if place is None:
        return None
    run = _run_folder(Path(place).expanduser())
    if not (run / "config.yaml").is_file() or not checkpoint.list_steps(run / "checkpoints"):
        return None
    saved = options.read_yaml(run / "config.yaml")
    preset = getattr(given, "preset", None)
    if preset not in (None, saved["preset"]):
        raise UserError(
            f"{run} was trained with --preset {saved['preset']}, not {preset}; leave --preset out"
        )
    return saved | {"output": str(getattr(given, "output", run))}


def _run_folder(place: Path) -> Path:
    """The run that a run folder or one of its step folders belongs to."""
    place = place.resolve()
    return place.parent.parent if checkpoint.STEP_NAME.fullmatch(place.name) else place


def _as_saved(config: TrainConfig, dtype: str) -> TrainConfig:
    """The options to continue or repeat the run with, from any folder."""
    data = ["::".join(os.path.abspath(part) for part in spec.split("::")) for spec in config.data]
    paths = {name: getattr(config, name) for name in ("data_root", "eval_data", "json")}
    paths = {name: path and path.absolute() for name, path in paths.items()}
    return replace(config, **paths, data=data, amp_dtype=dtype, output=None, resume=None)


def _set_up_torch(config: TrainConfig, device: str) -> None:
    if config.compile and not shutil.which(os.environ.get("CXX", "g++")):
        raise UserError("--compile needs a C++ compiler at run time: install g++ or leave --compile out")
    # A sharp softmax has denormal gradients, which some CPUs compute with slowly. Set before the first
    # parallel region: torch's worker threads inherit it.
    torch.set_flush_denormal(True)
    if device == "cuda" and config.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = False


def _say(config: TrainConfig, world: World) -> Callable[[str], None]:
    """Print a line for people: on the main process, unless quiet."""
    return lambda line: None if config.quiet or not world.is_main else print(line, file=sys.stderr)


def _output_folder(config: TrainConfig, world: World) -> Path:
    """The run folder, not made yet; that it can be made, and the --json file written, is checked."""
    default = Path("runs") / f"{config.preset}-{time.strftime('%Y%m%d-%H%M%S')}"
    output = distributed.from_main(config.output or default)
    for path in (output, config.json.parent if config.json else output):
        existing = next(parent for parent in [path, *path.absolute().parents] if parent.exists())
        if not existing.is_dir():
            raise UserError(f"cannot write to {path}: {existing} is not a folder")
        if not os.access(existing, os.W_OK):
            raise UserError(f"cannot write to {path}: no permission in {existing}")
    return output


def _checkpoint_to_resume(
    config: TrainConfig, output: Path, world: World, say: Callable[[str], None]
) -> Path | None:
    """The step folder to continue from. A folder that holds a run is never started over by accident."""
    place = output if config.resume in (None, "auto") else Path(config.resume).expanduser()
    if config.resume == "auto" and config.output is None:
        raise UserError("--resume auto needs --output: the run folder to look into")
    if config.resume is None:
        if checkpoint.list_steps(output / "checkpoints"):
            raise UserError(f"{output} holds a run already; add --resume auto or name another --output")
        return None
    if config.resume != "auto" and not place.is_dir():
        raise UserError(f"--resume {place}: no such folder; name a run folder or one of its step folders")
    found = distributed.from_main(checkpoint.find(place, say) if world.is_main else None)
    if found is None and config.resume != "auto":
        raise UserError(f"--resume {place}: no usable checkpoint there (looked for checkpoints/step_*)")
    return found


def _data(
    config: TrainConfig, model: ModelConfig, world: World, device: str
) -> tuple[list[str], HeldOut | None]:
    """Training shards and the held-out set: those that were named, else the built-in dataset."""
    shards, root = [str(path) for path in expand_shards(config.data)] if config.data else [], config.eval_data
    if not shards:
        folder = shapes_folder(config, world)
        shards, root = [str(folder / "train")], root or folder / "voc"
    if root is None:
        return shards, None
    small = model.image.image_size < 128
    chosen = protocol(config.eval_protocol or ("shapes" if small else "official"))
    dataset = open_dataset(config.eval_dataset, root)
    return shards, HeldOut(dataset, chosen, config.eval_background_threshold, device)


def _headline(config: TrainConfig, trainer: Trainer, samples: int) -> str:
    parameters = sum(parameter.numel() for parameter in trainer.model.parameters())
    batch = config.batch_size * trainer.world.size
    return (
        f"preset {config.preset}: {parameters / 1e6:.1f} M parameters, {samples} pairs, batch {batch}, "
        f"{trainer.steps} steps ({trainer.steps * batch / samples:.1f} epochs), {trainer.dtype} on "
        f"{trainer.device}; run folder {trainer.output}"
    )


def _report_stop(trainer: Trainer, number: int) -> int:
    print(
        f"stopped by {signal.Signals(number).name} after step {trainer.step} of {trainer.steps}; "
        f"saved {trainer.recovery.checkpoint}; "
        f"continue with: {PROGRAM} --resume {shlex.quote(str(trainer.output))}",
        file=sys.stderr,
    )
    return 128 + number


def _report(config: TrainConfig, trainer: Trainer, held_out: HeldOut | None, seconds: float) -> None:
    """Table and picture for people, result.json (and --json) for programs."""
    result: dict[str, Any] = {}
    if held_out:
        before, after = trainer.evaluations.get(0), trainer.evaluations[trainer.steps]
        table = Evaluation.from_json(after).table(Evaluation.from_json(before) if before else None)
        print(table, end="\n\n")
        picture = trainer.output / "examples.png"
        held_out.picture(trainer.model, f"{config.preset}: mIoU {after['miou']:.3f}", picture)
        print(f"picture: {picture}")
        result = {**after, "miou_before": None, "picture": str(picture)}
        if before:
            result |= {f"{name}_before": before[name] for name in ("miou", "oracle_miou", "per_class")}
    result["training"] = {
        "preset": config.preset, "steps": trainer.steps, "seed": config.seed, "seconds": round(seconds, 1),
        "checkpoint": str(trainer.recovery.checkpoint), **trainer.last_record,
    }  # fmt: skip
    for path in filter(None, (trainer.output / "result.json", config.json)):
        write_json(path, result)
    print(f"run folder: {trainer.output}  ({seconds / 60:.1f} minutes)")


if __name__ == "__main__":
    sys.exit(run_command(main))
