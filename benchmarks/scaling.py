"""How cost grows with size: batch, tokens, groups, classes, pixels, image side, processes, shards.

    python benchmarks/scaling.py --json FILE            a minute on two cores
    python benchmarks/scaling.py --only gumbel_assign

For every curve the exponent is fitted to the upper half of its sizes (log of the time against log of the
size; the time is the tenth percentile) and compared with the largest one that theory allows. All sizes of
a curve are timed in turn in one process. On a CPU the time is that of the processor with one thread,
because cost is meant, and other work on the machine disturbs it less; and memory that a call releases stays
with the process. Otherwise the C library gives it back to the kernel from a few megabytes on, and the next
call pays a page fault for every 4 KiB of its results, which depends on what else lies on the heap and made
`group_attention` look like a power of 1.17.
"""

from __future__ import annotations

import argparse
import math
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import scaling_ranks
import stopwatch
import torch
from cases import assign_case, attention_case, decode_case
from machine import Row, describe, one_line, timing_rows, value_row, write_result
from stopwatch import Timing

from groupvit_fast.console import UserError, resolve_device, run_command
from groupvit_fast.model import create_model

ENCODER, SHARDS = "image encoder, 224 px", "index of 256 samples each"
ALLOWED = 0.15  # above the theory's exponent: noise, and caches that a larger size no longer fits


@dataclass(frozen=True)
class Curve:
    """`make(size)` gives a call; its time may grow as size ** theory, no faster."""

    axis: str
    name: str
    theory: float
    sizes: tuple[int, ...]
    make: Callable[[int], Callable[[], object]]


def operator_curves(device: str) -> list[Curve]:
    """The operators, forward and backward, along each of their sizes."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    wide = 16 if device == "cuda" else 1

    def assign(batch: int, groups: int, tokens: int) -> Callable[[], object]:
        case = assign_case(batch, groups, tokens, 384, device, dtype)
        return case.with_backward(case.candidates["ours"])

    def attend(batch: int, groups: int, tokens: int) -> Callable[[], object]:
        case = attention_case(batch, 6, groups, tokens, 64, device, dtype)
        return case.with_backward(case.candidates["ours"])

    def decode(classes: int, side: int) -> Callable[[], object]:
        return decode_case(wide, classes, (28, 28), (side, side), device, dtype).candidates["ours"]

    batches, tokens = tuple(wide * b for b in (1, 2, 4, 8, 16)), (49, 98, 196, 392, 784)
    groups = (8, 16, 32, 64, 128)
    few = 2 * wide
    return [
        Curve("batch", "gumbel_assign", 1, batches, lambda n: assign(n, 64, 196)),
        Curve("batch", "group_attention", 1, batches, lambda n: attend(n, 64, 196)),
        Curve("tokens", "gumbel_assign", 1, tokens, lambda n: assign(few, 64, n)),
        Curve("tokens", "group_attention", 1, tokens, lambda n: attend(few, 64, n)),
        Curve("groups", "gumbel_assign", 1, groups, lambda n: assign(few, n, 196)),
        Curve("groups", "group_attention", 1, groups, lambda n: attend(few, n, 196)),
        Curve("classes", "decode_masks", 1, (2, 8, 32, 128, 512), lambda n: decode(n, 448)),
        Curve("side of the labels, px", "decode_masks", 2, (112, 224, 448, 896), lambda n: decode(21, n)),
    ]


def model_curves(device: str) -> list[Curve]:
    """The image encoder in evaluation: linear in the batch, at most quadratic in the image's tokens."""
    model = create_model("groupvit-gcc-yfcc", seed=0).eval().to(device)
    wide = 16 if device == "cuda" else 1

    def encode(batch: int, side: int) -> Callable[[], object]:
        pixels = torch.randn(batch, 3, side, side, device=device)

        @torch.inference_mode()
        def call() -> object:
            return model.encode_image(pixels)

        return call

    batches = tuple(wide * b for b in (1, 2, 4, 8))
    return [
        Curve("batch", ENCODER, 1, batches, lambda n: encode(n, 224)),
        Curve("side of the image, px", "image encoder", 4, (112, 224, 320, 448), lambda n: encode(wide, n)),
    ]


def shard_curve(folder: Path) -> Curve:
    """Indexing shards for the first time."""
    from groupvit_fast.data.index import read_indexes
    from groupvit_fast.data.shapes import write_shapes
    from groupvit_fast.data.shards import Pair, write_shards

    sizes = (2, 4, 8, 16)
    shapes = write_shapes(folder / "shapes", train_samples=64, val_samples=1)
    pixels = shapes.shards[0].read_bytes()
    image = pixels[pixels.index(b"\xff\xd8\xff") : pixels.index(b"\xff\xd9") + 2]
    pairs = (Pair(image, "jpg", f"a picture of number {number}") for number in range(sizes[-1] * 256))
    shards = write_shards(pairs, folder / "shards", samples_per_shard=256)

    def make(count: int) -> Callable[[], object]:
        def call() -> None:
            with tempfile.TemporaryDirectory(dir=folder) as cache:
                read_indexes(shards[:count], Path(cache), quiet=True)

        return call

    return Curve("shards", SHARDS, 1, sizes, make)


def exponent(sizes: Sequence[float], times: Sequence[float]) -> float:
    """Slope of log time over log size, least squares, of the upper half (at least three) of the sizes."""
    kept = max(3, math.ceil(len(sizes) / 2))
    x, y = ([math.log(v) for v in values[-kept:]] for values in (sizes, times))
    middle_x, middle_y = sum(x) / kept, sum(y) / kept
    covered = sum((a - middle_x) ** 2 for a in x)
    return sum((a - middle_x) * (b - middle_y) for a, b in zip(x, y, strict=True)) / covered


def point_rows(axis: str, name: str, timings: dict[int, Timing]) -> list[Row]:
    """A row for each size."""
    rows = []
    for size, timing in timings.items():
        rows += timing_rows(name, f"{axis} {size}", {"ours": timing}, axis=axis, size=size)
    return rows


def curve_rows(curve: Curve, timings: dict[int, Timing]) -> list[Row]:
    """A row for each point, and the fitted exponent."""
    rows = point_rows(curve.axis, curve.name, timings)
    fitted = exponent(list(timings), [timing.low for timing in timings.values()])
    more = {"axis": curve.axis, "theory": curve.theory, "excess": fitted - curve.theory}
    return [*rows, value_row(curve.name, curve.axis, "ours", fitted, "exponent", **more)]


def measure(device: str, only: str, seconds: float) -> Iterator[list[Row]]:
    """The rows of every curve whose name contains `only`, as they are known."""
    with tempfile.TemporaryDirectory() as folder:
        makers: list[Callable[[], list[Curve]]] = [lambda: operator_curves(device)]
        if device == "cpu" and only in SHARDS:
            makers.append(lambda: [shard_curve(Path(folder))])
        if only in ENCODER:
            makers.append(lambda: model_curves(device))
        for curve in (curve for make in makers for curve in make() if only in curve.name):
            calls = {size: curve.make(size) for size in curve.sizes}
            timings = stopwatch.interleaved(calls, device, seconds=seconds, rounds=5, clock="cpu")
            yield curve_rows(curve, timings)
    if only in scaling_ranks.ARITHMETIC and device == "cpu":
        yield processes_rows()


def processes_rows() -> list[Row]:
    """The loss in several processes: a curve, and before it how busy the messages keep gloo's threads."""
    curve = Curve("processes", scaling_ranks.ARITHMETIC, 1, scaling_ranks.WORLDS, lambda size: lambda: None)
    arithmetic, messages = scaling_ranks.measure(curve.sizes)
    return [*point_rows(curve.axis, scaling_ranks.MESSAGES, messages), *curve_rows(curve, arithmetic)]


def tell(rows: list[Row]) -> None:
    """One aligned line for a curve."""
    fitted = rows[-1]
    points = [row for row in rows[:-1] if row["name"] == fitted["name"]]
    span = f"{points[0]['median_s'] * 1e3:.3g} to {points[-1]['median_s'] * 1e3:.3g} ms"
    excess = "" if fitted["excess"] <= ALLOWED else "  worse than theory"
    head = (
        f"{fitted['name']:<42}{fitted['axis']:<24}{points[0]['size']:>5} to {points[-1]['size']:<5}{span:>22}"
    )
    print(f"{head}  exponent {fitted['value']:5.2f}, theory at most {fitted['theory']:g}{excess}", flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: auto")
    parser.add_argument("--only", default="", metavar="NAME", help="only the curves whose name contains NAME")
    parser.add_argument("--seconds", type=float, default=1.5, help="time per curve (default: 1.5)")
    parser.add_argument("--json", metavar="FILE", type=Path, help="also write the rows as JSON to FILE")
    arguments = parser.parse_args(argv)
    device = resolve_device(arguments.device)
    torch.manual_seed(0)
    if device == "cpu":
        torch.set_num_threads(1)
        stopwatch.keep_released_memory()
    print(one_line(describe(device)))
    rows: list[Row] = []
    for curve in measure(device, arguments.only, arguments.seconds):
        tell(curve)
        rows += curve
        if arguments.json:
            write_result(arguments.json, "scaling", rows, device=device, seconds=arguments.seconds)
    if not rows:
        raise UserError(f"--only {arguments.only}: no curve has such a name")
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
