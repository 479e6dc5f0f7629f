"""Time the training loader, and its parts, against Pillow, torch's DataLoader and webdataset.

    python benchmarks/data_bench.py                two minutes on two cores
    python benchmarks/data_bench.py --seconds 2    a look

Photos of 500 x 375 pixels and some 65 kB are drawn and packed into shards, which every contender reads. Parts
are rated by processor time, threads added up, so that one thread is compared with one thread; index and whole
loader by the time that passes, with as many threads or workers as there are cores. Contenders take turns in
one process. The recipe is the paper's: 224 pixels, RandAugment, random erasing, three prompts.
"""

from __future__ import annotations

import argparse
import io
import os
import random
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from pathlib import Path

import data_baseline as baseline
import numpy as np
import stopwatch
import torch
from machine import Row, describe, one_line, timing_rows, write_result
from PIL import Image, ImageDraw
from stopwatch import Timing
from train_cases import captions

from groupvit_fast.console import resolve_device, run_command
from groupvit_fast.data import sampling, text
from groupvit_fast.data.augment import Augmentation, Layers, RandAugment
from groupvit_fast.data.decode import DecodeInput, ImageDecoder, numbered_device, window_fractions
from groupvit_fast.data.index import over_shards, read_indexes
from groupvit_fast.data.pipeline import TrainLoader
from groupvit_fast.data.scan import scan
from groupvit_fast.data.shards import Pair, write_shards

WIDTH, HEIGHT, SIZE, PROMPTS = 500, 375, 224, 3
AUGMENT = Augmentation(RandAugment.parse("rand-m9-mstd0.5-inc1"), erase=0.25)
BATCH = 64
STEADY = 6  # batches before the clock starts: what loaders make ahead
IDLE_SECONDS = 1.0


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: auto")
    parser.add_argument("--seconds", type=float, default=8.0, help="time per row (default: 8)")
    parser.add_argument(
        "--samples", type=int, default=4096, metavar="N", help="captioned photos, in four shards"
    )
    parser.add_argument("--batches", type=int, default=12, metavar="N", help="of the whole loader, a turn")
    parser.add_argument("--only", metavar="NAME", help="only the rows whose name contains NAME")
    parser.add_argument("--json", metavar="FILE", type=Path, help="also write the rows as JSON to FILE")
    return parser.parse_args(argv)


def photo(seed: int) -> bytes:
    """A JPEG as large and as hard to decode as a photo: smooth colours, some shapes, noise of a sensor."""
    rng = np.random.default_rng(seed)
    picture = np.full((HEIGHT, WIDTH, 3), 128, np.float32)
    for cells, strength in ((3, 90), (9, 50), (30, 22), (110, 12)):
        grid = rng.normal(0, strength, (max(2, cells * HEIGHT // WIDTH), cells, 3)).astype(np.float32)
        grid = 0.75 * grid.mean(2, keepdims=True) + 0.25 * grid
        for channel in range(3):
            layer = Image.fromarray(grid[..., channel]).resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC)
            picture[..., channel] += np.asarray(layer)
    image = Image.fromarray(picture.clip(0, 255).astype(np.uint8))
    draw = ImageDraw.Draw(image)
    for _ in range(12):
        x, y, r = rng.integers(0, WIDTH), rng.integers(0, HEIGHT), int(rng.integers(8, 90))
        shape = draw.ellipse if rng.random() < 0.5 else draw.rectangle
        shape((x - r, y - r // 2, x + r, y + r // 2), fill=tuple(rng.integers(0, 255, 3).tolist()))
    noise = rng.normal(0, 6, (HEIGHT, WIDTH, 1)) + rng.normal(0, 3, (HEIGHT, WIDTH, 3))
    buffer = io.BytesIO()
    Image.fromarray((np.asarray(image) + noise).clip(0, 255).astype(np.uint8)).save(
        buffer, "JPEG", quality=90
    )
    return buffer.getvalue()


class Photos:
    """Shards in a folder, and one batch of their photos in memory."""

    def __init__(self, folder: Path, samples: int):
        different = [photo(seed) for seed in range(min(samples, 128))]
        self.captions = captions(samples)
        pairs = (Pair(different[n % len(different)], "jpg", self.captions[n]) for n in range(samples))
        self.shards = write_shards(pairs, folder, samples_per_shard=max(1, samples // 4))
        self.batch = [different[n % len(different)] for n in range(BATCH)]
        self.mean_bytes = sum(map(len, different)) / len(different)


# ---- parts ------------------------------------------------------------------------------------------------


def decode_inputs(batch: list[bytes], augment: Augmentation) -> Iterator[DecodeInput]:
    """Endless inputs of the decoder for one batch of files, cropped and augmented differently each time."""
    encoded = [np.frombuffer(data, np.uint8) for data in batch]
    width, height = np.full(len(batch), WIDTH), np.full(len(batch), HEIGHT)
    position = 0
    while True:
        words = sampling.draws(0, position, len(batch))
        windows = sampling.crop_windows(width, height, words, 0.08)
        mirror = (sampling.uniform(words[:, sampling.FLIP_DRAW]) < 0.5).astype(np.int32)
        layers, erased = augment.draw(0, position, len(batch), SIZE)
        fractions = window_fractions(windows, width, height)
        yield DecodeInput(
            encoded, *fractions, mirror, layers if augment.layers else Layers.none(len(batch)), erased
        )
        position += len(batch)


def decoder(batch: list[bytes], augment: Augmentation, device: str) -> Callable[[], torch.Tensor]:
    source = decode_inputs(batch, augment)
    made = ImageDecoder(
        lambda: next(source),
        batch_size=len(batch),
        image_size=SIZE,
        device=numbered_device(device),
        layers=augment.layers,
        prefetch=1,
    )
    return made.next


def picture_rows(photos: Photos, device: str, seconds: float) -> Iterator[Row]:
    """Decoding with crop, resize, flip and normalisation; then the same with augmentation."""
    rng = random.Random(0)
    for name, augment in (("decode and crop", Augmentation()), ("decode, crop and augment", AUGMENT)):
        candidates = {
            "pillow": lambda augmented=augment is AUGMENT: torch.stack(
                [baseline.picture(data, rng, augment=augmented) for data in photos.batch]
            ),
            "ours": decoder(photos.batch, augment, device),
        }
        clock = "cpu" if device == "cpu" else "wall"
        timings = stopwatch.interleaved(candidates, "cpu", seconds=seconds, clock=clock)
        yield from timing_rows(name, _case(photos), timings, items=BATCH, unit="images", clock=clock)


def text_rows(photos: Photos, seconds: float) -> Iterator[Row]:
    """Captions and three prompts each to tokens; nothing is remembered from call to call."""
    lines = photos.captions[:256]
    known = [text.nouns(line) for line in lines]

    def forget() -> None:
        text.token_row.cache_clear()
        text._tagged.cache_clear()

    def theirs() -> torch.Tensor:
        forget()
        rng = random.Random(0)
        return torch.stack([baseline.texts(line, PROMPTS, rng) for line in lines])

    def ours() -> torch.Tensor:
        """As the loader does with the nouns that the index keeps."""
        forget()
        rows = []
        for number, (line, nouns) in enumerate(zip(lines, known, strict=True)):
            line = text.clean(line)
            rows.append([line, *text.draw_prompts(line, PROMPTS, random.Random(number), words=nouns)])
        return text.unique_rows(rows)[0]

    timings = stopwatch.interleaved(
        {"nouns while loading": theirs, "ours": ours}, "cpu", seconds=seconds, clock="cpu"
    )
    yield from timing_rows(
        "text", "1 caption, 3 prompts", timings, items=len(lines), unit="samples", clock="cpu"
    )


def index_rows(photos: Photos, seconds: float) -> Iterator[Row]:
    """Finding the samples of the shards: ours checks every image's head and end and every caption as well.

    Shards of a thousand samples, the least that web-scale datasets have: neither side's fixed costs count.
    """
    import wds2idx

    folder = photos.shards[0].parent

    def stock() -> None:
        for shard in photos.shards:
            with wds2idx.IndexCreator(str(shard), str(folder / "stock.idx"), verbose=False) as creator:
                creator.create_index()

    candidates = {"wds2idx": stock, "ours": lambda: over_shards(scan, photos.shards, "", quiet=True)}
    timings = stopwatch.interleaved(candidates, "cpu", seconds=seconds)
    shards, samples = len(photos.shards), len(photos.captions)
    case = f"{shards} x {samples // shards} of {photos.mean_bytes / 1e3:.0f} kB"
    yield from timing_rows("index", case, timings, items=samples, unit="samples")


# ---- whole ------------------------------------------------------------------------------------------------


def our_batches(photos: Photos, device: str) -> Iterator:
    loader = TrainLoader(
        photos.shards,
        batch_size=BATCH,
        image_size=SIZE,
        num_prompts=PROMPTS,
        augment=AUGMENT,
        device=device,
        quiet=True,
    )
    return iter(loader)


def their_batches(photos: Photos) -> Iterator:
    workers = len(os.sched_getaffinity(0))
    return baseline.batches(photos.shards, batch_size=BATCH, workers=workers, prompts=PROMPTS)


def steady(batches: Iterator, count: int, device: str) -> float:
    """Milliseconds of `count` batches, those that were made ahead not counted."""
    for _ in range(STEADY):
        next(batches)
    start = time.perf_counter()
    for _ in range(count):
        next(batches)
    if device == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - start) * 1e3


def loader_rows(photos: Photos, device: str, seconds: float, count: int) -> Iterator[Row]:
    """From shards to batches. In our turn the workers of the other have filled their queues and wait."""
    theirs = their_batches(photos)  # its processes are forked before any thread of ours exists
    read_indexes(photos.shards, quiet=True)
    samples: dict[str, list[float]] = {"dataloader": [], "ours": []}
    end = time.perf_counter() + 3 * seconds
    while len(samples["ours"]) < 3 or time.perf_counter() < end:
        samples["dataloader"].append(steady(theirs, count, "cpu"))
        time.sleep(IDLE_SECONDS)
        with closing(our_batches(photos, device)) as ours:
            samples["ours"].append(steady(ours, count, device))
    timings = {name: Timing.of(times) for name, times in samples.items()}
    yield from timing_rows(
        "whole loader", _case(photos), timings, items=BATCH * count, unit="images", clock="wall"
    )


def _case(photos: Photos) -> str:
    return f"{WIDTH}x{HEIGHT} JPEG of {photos.mean_bytes / 1e3:.0f} kB"


HEADER = f"{'part':<28}{'case':<26}{'contender':<22}{'per second':>12}{'ms an item':>12}{'x ours':>8}"


def line(row: Row) -> str:
    rate = row["items"] / row["median_s"]
    names = f"{row['name']:<28}{row['case']:<26}{row['contender']:<22}"
    return f"{names}{rate:>12.0f}{1e3 / rate:>12.3f}{row['ratio']:>8.2f}"


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse(argv)
    device = resolve_device(arguments.device)
    torch.set_num_threads(1)
    print(one_line(describe(device)))
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        photos = Photos(Path(folder), arguments.samples)
        print(HEADER)
        parts = {
            "whole loader": lambda: loader_rows(photos, device, arguments.seconds, arguments.batches),
            "index": lambda: index_rows(photos, arguments.seconds),
            "decode": lambda: picture_rows(photos, device, arguments.seconds),
            "text": lambda: text_rows(photos, arguments.seconds / 2),
        }
        for name, part in parts.items():
            if arguments.only and arguments.only not in name:
                continue
            for row in part():
                print(line(row), flush=True)
                rows.append(row)
            if arguments.json:  # after each part: a run that is cut off keeps what it had
                settings = {"samples": arguments.samples, "seconds": arguments.seconds, "size": SIZE}
                write_result(arguments.json, "data_bench", rows, device=device, **settings)
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
