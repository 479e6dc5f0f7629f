"""Time whole training steps against Hugging Face's GroupViT with the same losses, batch and precision.

    python benchmarks/train_bench.py                          official preset, batch 8 on a CPU
    python benchmarks/train_bench.py --compile                torch.compile of both as well
    python benchmarks/train_bench.py --data                   with the loader: decode, crop, tokenise, step
    python benchmarks/train_bench.py --device cuda --precision bf16 --batch-size 1024 --compile

The contenders take turns in one process. Before that, both must give the same loss for the same weights.
The data lies ready unless --data is given.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import stopwatch
import torch
import train_cases
from machine import Row, describe, one_line, timing_rows, value_row, write_result

from groupvit_fast.console import resolve_device, run_command
from groupvit_fast.model.presets import ModelConfig
from groupvit_fast.training.config import TrainConfig
from groupvit_fast.training.distributed import World
from groupvit_fast.training.flops import training_flops
from groupvit_fast.training.precision import DTYPES, autocast
from groupvit_fast.training.recipes import model_config, recipe

NOMINAL = {"H100": 989.5e12, "H200": 989.5e12, "A100": 312e12}
"""Dense bf16 operations a second that the maker states."""


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: auto")
    parser.add_argument("--preset", default="groupvit-gcc-yfcc", help="recipe (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, help="default: 8 on a CPU, 256 on a GPU")
    parser.add_argument("--multi-label", type=int, help="prompts an image (default: the recipe's)")
    parser.add_argument("--precision", choices=DTYPES, help="default: bf16 on a GPU, float32 on a CPU")
    parser.add_argument("--compile", action="store_true", help="torch.compile of both as well")
    parser.add_argument("--data", action="store_true", help="include the loader, on the shapes dataset")
    parser.add_argument("--only-ours", action="store_true", help="leave the baseline out")
    parser.add_argument("--seconds", type=float, default=20.0, help="time of the comparison (default: 20)")
    parser.add_argument("--rounds", type=int, default=5, help="rounds at least (default: 5)")
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's)")
    parser.add_argument("--json", metavar="FILE", type=Path, help="also write the rows as JSON to FILE")
    return parser.parse_args(argv)


def matmul_speed(device: str, dtype: torch.dtype) -> float:
    """Operations a second of a product of the shape that training does most, at its best."""
    rows = 2080 if device == "cpu" else 260 * 256
    x, weight = torch.randn(rows, 384, device=device), torch.randn(1536, 384, device=device)
    with autocast(device, dtype):
        timing = stopwatch.interleaved(
            {"product": lambda: torch.nn.functional.linear(x, weight)}, device, seconds=1.0
        )
    return 2 * rows * 384 * 1536 / (timing["product"].low * 1e-3)


def feeds(
    arguments: argparse.Namespace,
    config: TrainConfig,
    settings: ModelConfig,
    device: str,
    names: Sequence[str],
) -> dict[str, Callable[[], Any]]:
    """What gives each contender its next batch: the same resident one, or a loader of its own."""
    if not arguments.data:
        batch = train_cases.make_batch(settings, config.batch_size, config.multi_label, device)
        return dict.fromkeys(names, lambda: batch)
    # Only here, so that the rest runs where DALI is not installed.
    from groupvit_fast.training.sources import open_loader, shapes_folder

    shards = [str(shapes_folder(config, World()) / "train")]
    loaders = {name: iter(open_loader(config, settings, shards, World(), device)) for name in names}
    return {name: (lambda batches=batches: next(batches)) for name, batches in loaders.items()}


def breakdown(ours: train_cases.Ours, batch: Any, case: str, device: str, seconds: float) -> list[Row]:
    """Seconds of the parts of our step; a backward pass is what remains of a part without its forward."""
    timings = stopwatch.interleaved(train_cases.parts(ours, batch), device, seconds=seconds, rounds=3)
    spent = {name: timing.median * 1e-3 for name, timing in timings.items()}
    for part in ("image", "text"):
        spent[f"{part} backward"] = spent.pop(part) - spent[f"{part} forward"]
    return [value_row(f"part: {name}", case, "ours", value, "s") for name, value in sorted(spent.items())]


def measure(arguments: argparse.Namespace, device: str) -> Iterator[tuple[list[Row], bool]]:
    """Rows of the comparison after each round, and in the end with peak memory; then those of what is left.

    Whether they are final comes with them; until then, later rows of the same name take their place.
    """
    dtype = arguments.precision or ("bf16" if device == "cuda" else "float32")
    config = recipe(arguments.preset)
    prompts = config.multi_label if arguments.multi_label is None else arguments.multi_label
    size = arguments.batch_size or (8 if device == "cpu" else 256)
    config = replace(config, batch_size=size, multi_label=prompts, steps=10**6, quiet=True)
    settings = model_config(config)
    made = train_cases.contenders(settings, config, device, dtype, compiled=arguments.compile)
    batch = train_cases.make_batch(settings, size, prompts, device)
    train_cases.check(made["ours"], made["hugging face"], batch)
    if arguments.only_ours:
        made = {name: step for name, step in made.items() if name.startswith("ours")}
    case = f"{arguments.preset} B{size} {dtype}" + (" with loader" if arguments.data else "")
    feed = feeds(arguments, config, settings, device, list(made))
    calls = {name: (lambda name=name, step=step: step(feed[name]())) for name, step in made.items()}
    if arguments.data:
        calls["data ready"] = lambda: made["ours"](batch)  # the same step without its loader
    flops = step_flops(settings, (batch.texts.argmax(1) + 1).tolist(), size, prompts)
    speed = matmul_speed(device, DTYPES[dtype])

    def compared(samples: dict[str, list[float]], **more: Any) -> list[Row]:
        timings = {name: stopwatch.Timing.of(times) for name, times in samples.items()}
        shares = {name: flops / (timing.median * 1e-3) / speed for name, timing in timings.items()}
        about = {"items": size, "unit": "pairs", "flops": flops, "share_of_matmul": shares}
        return timing_rows("training step", case, timings, **about, **more)

    for samples in stopwatch.turns(calls, device, seconds=arguments.seconds, rounds=arguments.rounds):
        yield compared(samples), False
    peaks = {name: stopwatch.peak_memory(call, device) for name, call in calls.items()}
    steps = compared(samples, peak_bytes=peaks)
    yield steps, True
    yield [value_row("matrix product 2080x384x1536", case, "torch", speed, "flop/s")], True
    yield nominal_rows(steps, case, flops, device), True
    if not arguments.data:
        yield breakdown(made["ours"], batch, case, device, arguments.seconds / 4), True


def step_flops(settings: ModelConfig, lengths: Sequence[int], size: int, prompts: int) -> float:
    """Needed arithmetic of one step: the images, each distinct text once, a projector row a text."""
    texts = training_flops(settings, lengths, size * (1 + prompts))
    return texts + (size - 1) * training_flops(settings, [], 0)


def nominal_rows(rows: Sequence[Row], case: str, flops: float, device: str) -> list[Row]:
    """MFU by the maker's figure, on GPUs whose figure is known."""
    if device != "cuda":
        return []
    peak = next((peak for name, peak in NOMINAL.items() if name in torch.cuda.get_device_name()), None)
    steps = [row for row in rows if row["name"] == "training step"]
    return [
        value_row("mfu", case, row["contender"], flops / row["median_s"] / peak, "of nominal bf16")
        for row in (steps if peak else [])
    ]


COLUMNS = {"contender": "<24", "ms": ">12", "p10 - p90": ">21", "pairs/s": ">12", "x ours": ">10"}
COLUMNS |= {"% matmul": ">12", "peak MB": ">12"}
HEADER = "".join(format(name, width) for name, width in COLUMNS.items())


def line(row: Row) -> str:
    """One aligned line of the table."""
    rate = row["items"] / row["median_s"]
    return (
        f"{row['contender']:<24}{row['median_s'] * 1e3:>12.1f}"
        f"{row['p10_s'] * 1e3:>10.1f} -{row['p90_s'] * 1e3:>9.1f}{rate:>12.2f}{row['ratio']:>10.2f}"
        f"{100 * row['share_of_matmul']:>12.1f}{row['peak_bytes'] / 2**20:>12.0f}"
    )


def show(rows: Sequence[Row]) -> None:
    """Print rows as they are done, the comparison under its head."""
    for number, row in enumerate(rows):
        if "items" in row:
            if number == 0:
                gflop = row["flops"] / 1e9
                print(f"{row['case']}; {gflop:.1f} GFLOP needed a step; medians of interleaved steps")
                print(HEADER)
            print(line(row), flush=True)
        elif row["unit"] == "s":
            print(f"  {row['name']:<30}{row['value'] * 1e3:>10.1f} ms", flush=True)
        else:
            print(f"  {row['name']:<30}{row['value']:.4g} {row['unit']}", flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse(argv)
    device = resolve_device(arguments.device)
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    torch.set_flush_denormal(True)
    print(one_line(describe(device)))
    rows: list[Row] = []
    for found, final in measure(arguments, device):
        if final:
            show(found)
            rows += found
        if arguments.json:  # also what is not final: a run that is cut off keeps what it had
            so_far = rows if final else found
            write_result(arguments.json, "train_bench", so_far, device=device, preset=arguments.preset)
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
