"""Command line: train a GroupViT from captions alone, and measure the segments it learnt."""

from __future__ import annotations

import os

# A step has hundreds of short parallel regions; with other work on the machine, threads that spin at the
# end of each made it three times slower than threads that sleep.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import json
import shlex
import shutil
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch

from groupvit_fast.console import UserError, resolve_device, run_command, write_json, write_text_atomically
from groupvit_fast.model.groupvit import create_model
from groupvit_fast.model.presets import ModelConfig
from groupvit_fast.segmentation import Evaluation, protocol
from groupvit_fast.segmentation.held_out import HeldOut
from groupvit_fast.training import distributed, options, plan, report_page, run_folder
from groupvit_fast.training.config import TrainConfig
from groupvit_fast.training.distributed import World
from groupvit_fast.training.precision import choose_dtype
from groupvit_fast.training.recipes import model_config
from groupvit_fast.training.recovery import score
from groupvit_fast.training.seeds import seed_summary, seed_table
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
report.html, examples.png, pictures/ of each evaluation and checkpoints/step_NNNNNNNN (checkpoints/best is
the one with the best evaluation), and can be given to every command that takes a checkpoint.

Ctrl-C or SIGTERM: the step is finished, a checkpoint saved, and the exit status is 130 or 143; a second one
ends the program at once. Bad input: one line and status 1. A process that is dead, frozen or stands still is
named, all end with status 75, and `torchrun --max-restarts 3 ... --output RUN --resume auto` goes on.
"""


def main(argv: Sequence[str] | None = None) -> int:
    given = options.parse(argv, program=PROGRAM, description=DESCRIPTION, epilog=EPILOG)
    if getattr(given, "report", None):
        print(f"report: {report_page.write(given.report)}")
        return 0
    config = options.resolve(given, run_folder.saved_options(given))
    if getattr(given, "print_config", False):
        print(options.to_yaml(config), end="")
        return 0
    if config.dry_run:
        print(plan.text(plan.make_plan(config), config))
        return 0
    device = resolve_device(config.device)
    _set_up_torch(config, device)
    with distributed.session(device) as world:
        if config.seed_sweep:
            return _sweep(config, device, world)
        return _run(config, device, world)


def _sweep(config: TrainConfig, device: str, world: World) -> int:
    """One run after another, each with its own seed and folder; then how much their results differ."""
    root, results = run_folder.choose_output(config), {}
    for seed in range(config.seed, config.seed + config.seed_sweep):
        folder = root / f"seed_{seed}"
        one = replace(config, seed=seed, output=folder, seed_sweep=None, json=None)
        status = _run(one, device, world)
        if status:
            return status
        if world.is_main:
            results[seed] = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    if world.is_main:
        summary = seed_summary(results)
        for path in filter(None, (root / "seed_sweep.json", config.json)):
            write_json(path, summary)
        print(seed_table(summary))
    return 0


def _run(config: TrainConfig, device: str, world: World) -> int:
    """Open everything that can fail first; only then write to the run folder."""
    start = time.perf_counter()
    say = _say(config, world)
    model_settings = model_config(config)
    output = run_folder.choose_output(config)
    found = run_folder.checkpoint_to_resume(config, output, world, say)
    shards, held_out = _data(config, model_settings, world, device)
    loader = open_loader(config, model_settings, shards, world, device, output)
    # measured on a CPU, so one process decides for all
    dtype, remark = distributed.from_main(
        choose_dtype(config.amp, config.amp_dtype, device, model_settings.image.width)
    )
    if remark:
        say(remark)
    model = create_model(model_settings, seed=config.seed)
    trainer = Trainer(
        model, loader, config, output=output, device=device, world=world, dtype=dtype,
        evaluate=held_out.evaluate if held_out else None,
        picture=(lambda model, path: held_out.picture(model, path.stem, path, 4)) if held_out else None,
    )  # fmt: skip
    if found:
        trainer.resume(found, say)
        say(f"continuing {found}")
    if world.is_main:
        write_text_atomically(output / "config.yaml", options.to_yaml(run_folder.as_saved(config, dtype)))
    say(_headline(config, trainer, loader.samples_per_epoch))
    stopped_by = trainer.fit()
    if not world.is_main:
        return 128 + stopped_by if stopped_by else 0
    if stopped_by:
        return _report_stop(trainer, stopped_by)
    _report(config, trainer, held_out, time.perf_counter() - start)
    return 0


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


def _data(
    config: TrainConfig, model: ModelConfig, world: World, device: str
) -> tuple[list[str], HeldOut | None]:
    """Training shards and the held-out set: those that were named, else the built-in dataset."""
    shards, places = config.data, config.eval_data
    if not shards:
        folder = shapes_folder(config, world)
        shards, places = [str(folder / "train")], places or [str(folder / "voc")]
    if not places:
        return shards, None
    small = model.image.image_size < 128
    chosen = protocol(config.eval_protocol or ("shapes" if small else "official"))
    threshold = config.eval_background_threshold
    return shards, HeldOut.open(places, config.eval_dataset, chosen, threshold, device)


def _headline(config: TrainConfig, trainer: Trainer, samples: int) -> str:
    parameters = sum(parameter.numel() for parameter in trainer.model.parameters())
    batch = config.batch_size * config.accum_freq * trainer.world.size
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
        title = f"{config.preset}: mIoU {after.get('ema', after)['miou']:.3f}"
        held_out.picture(trainer.evaluated_model, title, picture)
        print(f"picture: {picture}")
        result = {**after, "miou_before": None, "picture": str(picture)}
        if before:
            result |= {f"{name}_before": before[name] for name in ("miou", "oracle_miou", "per_class")}
    result["training"] = {
        "preset": config.preset, "steps": trainer.steps, "seed": config.seed, "seconds": round(seconds, 1),
        "checkpoint": str(trainer.recovery.checkpoint), **trainer.journal.last_record,
    }  # fmt: skip
    best = trainer.recovery.best_step()
    if best is not None:
        result["best"] = {"step": best, "miou": score(trainer.evaluations[best])}
    for path in filter(None, (trainer.output / "result.json", config.json)):
        write_json(path, result)
    print(f"report: {report_page.write(trainer.output)}")
    print(f"run folder: {trainer.output}  ({seconds / 60:.1f} minutes)")
    print(f"try it: python -m groupvit_fast.demo {shlex.quote(str(trainer.output))}")


if __name__ == "__main__":
    sys.exit(run_command(main))
