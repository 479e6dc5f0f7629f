"""Time a whole zero-shot evaluation against the loop of the released code, on photos of VOC's sizes.

    python benchmarks/eval_bench.py                    a few minutes on two cores
    python benchmarks/eval_bench.py --images 8         a look
    python benchmarks/eval_bench.py --device cuda
    python benchmarks/eval_bench.py --only agreement --checkpoint runs/demo

"reference" is the official way (`segmentation/reference.py`): one image after the other, the encoder twice
for each window, score maps [C, H, W] of every class, a histogram an image. "released" does the same with the
encoder as the released code has it: attention as two products and a softmax, keys and values of every
assignment made. "ours" is `segmentation.evaluate`, in float32 and in bfloat16 where the machine has that.
All read the same JPEGs and masks with the same weights, in turn, some images at a time, in one process.

What bfloat16 changes is told by trained weights alone: with --checkpoint, "agreement" compares the labels and
the mIoU of that checkpoint in both precisions on held-out scenes of the built-in dataset.

The encoder has the paper's size and random weights, which give no regions; so after it has run its maps are
replaced by ones that follow the colours of the photo. Before anything is timed the labels are compared.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import chain
from pathlib import Path

import eval_photos
import stopwatch
import torch
from eval_photos import ColourGroups, Replay
from machine import Row, describe, one_line, timing_rows, value_row, write_result
from stopwatch import Timing
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from groupvit_fast import ops
from groupvit_fast.console import UserError, resolve_device, run_command
from groupvit_fast.data.shapes import write_shapes
from groupvit_fast.model import create_model, load_model
from groupvit_fast.model.presets import preset as model_preset
from groupvit_fast.segmentation import VocFolder, evaluate, protocol, segment_image
from groupvit_fast.segmentation.batch import named, segment_batch
from groupvit_fast.segmentation.decode import decode_windows
from groupvit_fast.segmentation.evaluation import (
    PRECISIONS,
    encode_protocol_classes,
    evaluating,
    resolve_protocol,
)
from groupvit_fast.segmentation.metrics import IGNORE, class_iou
from groupvit_fast.segmentation.prompts import ClassText
from groupvit_fast.segmentation.reference import segment_pixels
from groupvit_fast.segmentation.segment import learnt_scale, prepare, window_boxes
from groupvit_fast.training.precision import cpu_has_fast_bf16

AGREEMENT = 0.9999
SCENES = 200
"""Held-out scenes that the precisions are compared on, as many as a demo run is scored on."""
CLASSES = {"voc21": (20, 0.95), "context59": (59, None), "coco_object": (80, 0.95)}
"""Foreground classes and background threshold of the decoding cases."""


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: auto")
    parser.add_argument("--images", type=int, default=48, metavar="N", help="photos (default: 48)")
    parser.add_argument("--part", type=int, default=16, metavar="N", help="photos of one turn (default: 16)")
    parser.add_argument("--preset", default="groupvit-gcc-yfcc", help="model (default: the paper's)")
    parser.add_argument("--protocol", default="official", help="default: official")
    parser.add_argument("--precision", nargs="+", choices=PRECISIONS, metavar="NAME",
        help="of our encoder (default: fp32, and bf16 where the machine has it)")  # fmt: skip
    parser.add_argument("--checkpoint", type=Path, metavar="RUN", help="trained on shapes, for the agreement")
    parser.add_argument("--only", choices=("decode", "whole", "agreement"), help="one part of the benchmark")
    parser.add_argument("--seconds", type=float, default=3.0, help="time per decoding row (default: 3)")
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's)")
    parser.add_argument(
        "--clock",
        choices=stopwatch.CLOCKS,
        default="wall",
        help="cpu: of this process alone; with --threads 1",
    )
    parser.add_argument("--json", metavar="FILE", type=Path, help="also write the rows as JSON to FILE")
    return parser.parse_args(argv)


def reference_loop(model: torch.nn.Module, dataset: VocFolder, chosen) -> Tensor:
    """The released evaluation: intersection and union of each class, image by image."""
    text = encode_protocol_classes(model, dataset.foreground, chosen)
    device = text.embeddings.device
    classes = len(dataset.class_names)
    areas = torch.zeros(3, classes)
    for item in dataset.items:
        image, target = dataset.read(item)
        labels = segment_image(model, image.to(device), text, chosen).cpu()
        labels, target = labels[target != IGNORE], target[target != IGNORE].long()
        parts = (labels[labels == target], labels, target)
        areas += torch.stack([torch.histc(part.float(), classes, 0, classes - 1) for part in parts])
    return areas[0] / (areas[1] + areas[2] - areas[0])


def whole_evaluation(args, device: str, folder: Path) -> Iterator[list[Row]]:
    """All evaluations over the photos in turns; a row each, time for an image. Given after every turn."""
    dataset = VocFolder(folder)
    model = ColourGroups(create_model(args.preset, seed=0)).eval().to(device)
    chosen = protocol(args.protocol)
    resolved = resolve_protocol(model, dataset, chosen, 0.5)
    samples: dict[str, list[float]] = {}
    parts = [dataset.items[i : i + args.part] for i in range(0, len(dataset.items), args.part)]
    check_labels(model, dataset, parts[0][:2], resolved)
    for part in parts:
        dataset.items = part
        ious = {}
        for name, run in contenders(args, model, dataset, chosen, resolved).items():
            seconds, ious[name] = stopwatch.once(run, device, args.clock)
            samples.setdefault(name, []).append(seconds * 1e3 / len(part))
            print(f"  {name}: {len(part) / seconds:.2f} images/s", flush=True)
        for name in ious.keys() - {"bf16"}:
            if not torch.allclose(ious[name], ious["reference"], atol=2e-3, equal_nan=True):
                raise UserError(f"IoUs differ: {ious}")
        timings = {name: Timing.of(values) for name, values in samples.items()}
        for precision in args.precision:
            case = args.protocol if precision == "fp32" else f"{args.protocol} {precision}"
            compared = {"reference": timings["reference"], "released": timings["released"]}
            compared["ours"] = timings[precision]
            yield timing_rows("evaluation, an image", case, compared, items=1, unit="images")


def contenders(args, model, dataset, chosen, resolved) -> dict[str, Callable[[], Tensor]]:
    """The loops of the released code, and ours by its precision."""

    def ours(precision: str) -> Tensor:
        device = next(model.parameters()).device
        options = {"background_threshold": 0.5, "precision": precision}
        result = evaluate(model, dataset, chosen, device=device, **options)
        return class_iou(torch.tensor(result.confusion)).float()

    def released() -> Tensor:
        encoder = model.model.image_encoder
        encoder.set_absorb(False)
        with ops.use_backend("reference"), sdpa_kernel(SDPBackend.MATH):
            ious = reference_loop(model, dataset, resolved)
        encoder.set_absorb(True)
        return ious

    loops = {"reference": lambda: reference_loop(model, dataset, resolved), "released": released}
    return loops | {precision: partial(ours, precision) for precision in args.precision}


def agreement(args, device: str, folder: Path) -> Iterator[list[Row]]:
    """The labels of a trained checkpoint in bfloat16 beside those in float32: pixels that agree, and mIoU."""
    dataset = VocFolder(write_shapes(folder / "shapes", train_samples=0, val_samples=SCENES).voc_root)
    model = load_model(args.checkpoint, device)
    chosen = resolve_protocol(model, dataset, protocol("shapes"))
    images = [dataset.read(item)[0].to(device) for item in dataset.items]
    labels, scores = {}, {}
    for precision in PRECISIONS:
        with evaluating(model, precision):
            text = encode_protocol_classes(model, dataset.foreground, chosen)
            found = segment_batch(model, images, text, chosen, precision=precision)
        labels[precision] = torch.stack([item.labels for item in found])
        scores[precision] = evaluate(model, dataset, chosen, device=device, precision=precision).miou
    same = (labels["fp32"] == labels["bf16"]).double().mean().item()
    name, case = "bf16 beside fp32", f"shapes, {model.config.image.width} channels"
    yield [
        value_row(name, case, "same labels", same, "of all pixels", scenes=SCENES),
        *(value_row(name, case, f"mIoU {precision}", value, "mIoU") for precision, value in scores.items()),
    ]


def check_labels(model, dataset, items, chosen) -> None:
    """Compare the labels of some photos; a benchmark of something else is no benchmark."""
    text = encode_protocol_classes(model, dataset.foreground, chosen)
    device = text.embeddings.device
    images = [dataset.read(item)[0].to(device) for item in items]
    same = total = 0
    for image, result in zip(images, segment_batch(model, images, text, chosen), strict=True):
        expected = segment_image(model, image, text, chosen)
        same += (expected == result.labels).sum().item()
        total += expected.numel()
    print(f"labels: {same} of {total} pixels as in the reference")
    if same < AGREEMENT * total:
        raise UserError(f"only {same} of {total} pixels have the label of the reference")


def decoding(args, device: str, folder: Path) -> Iterator[list[Row]]:
    """From encoded windows of one 500 x 375 photo to its labels: time and peak memory, case by case."""
    dataset = VocFolder(folder)
    image = next(image for image, _ in map(dataset.read, dataset.items) if image.shape[:2] == (375, 500))
    model = ColourGroups(create_model(args.preset, seed=0)).eval().to(device)
    for case, (classes, threshold) in CLASSES.items():
        chosen = replace(protocol(args.protocol), background_threshold=threshold)
        chosen = replace(chosen, short_side=chosen.short_side or model.config.image.image_size)
        text = eval_photos.random_text(classes, model.config.embed_dim).to(device)
        runs = decoders(model, image.to(device), text, chosen)
        expected, found = (run() for run in runs.values())
        if (expected == found).sum() < AGREEMENT * found.numel():
            raise UserError(f"{case}: {(expected != found).sum()} pixels differ")
        regions = len(found.unique())
        timings = stopwatch.interleaved(runs, device, seconds=args.seconds, clock=args.clock)
        peaks = {name: stopwatch.peak_memory(run, device) for name, run in runs.items()}
        yield timing_rows("decoding, 500 x 375", case, timings, peak_bytes=peaks, labels_seen=regions)


def decoders(model, image: Tensor, text: ClassText, chosen) -> dict[str, Callable[[], Tensor]]:
    """The two ways from the model's encodings, which are made beforehand, to labels."""
    pixels = prepare(image, chosen)
    boxes = window_boxes(*pixels.shape[-2:], chosen)
    size = tuple(image.shape[:2])
    replay = Replay(model, [pixels[(slice(None), *box.slices())] for box in boxes])

    def ours() -> Tensor:
        windows = named(replay.all, text, chosen, learnt_scale(replay))
        return decode_windows(windows, boxes, size, text, chosen).labels

    return {"reference": lambda: segment_pixels(replay.twice(), pixels, size, text, chosen), "ours": ours}


def lines(rows: list[Row]) -> Iterator[str]:
    """Aligned lines of the table: the contenders of a case beside ours, or the values of a case."""
    own = next((row for row in rows if row["contender"] == "ours"), None)
    for row in rows:
        text = f"{row['name']:<22}{row['case']:<21}{row['contender']:<12}"
        if own is None:
            yield f"{text}{row['value']:>10.4f} {row['unit']}"
        elif row is not own:
            text += f"{row['median_s'] * 1e3:>10.1f} ms{own['median_s'] * 1e3:>9.2f} ms{row['ratio']:>9.1f} x"
            if "peak_bytes" in row:
                peaks = [part["peak_bytes"] / 2**20 for part in (row, own)]
                text += f"{peaks[0]:>10.1f} MB{peaks[1]:>8.2f} MB{peaks[0] / peaks[1]:>8.1f} x"
            yield text


def usual_precisions(preset: str, device: str) -> list[str]:
    """Both, unless bfloat16 would be emulated."""
    width = model_preset(preset).image.width
    return list(PRECISIONS) if device == "cuda" or cpu_has_fast_bf16(width) else ["fp32"]


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    device = resolve_device(args.device)
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.only == "agreement" and args.checkpoint is None:
        raise UserError("the agreement is that of a trained checkpoint; give one with --checkpoint")
    args.precision = args.precision or usual_precisions(args.preset, device)
    print(one_line(describe(device)))
    parts = {"decode": decoding, "whole": whole_evaluation}
    if args.checkpoint is not None:
        parts["agreement"] = agreement
    settings = {"images": args.images, "preset": args.preset, "protocol": args.protocol}
    settings |= {"precision": args.precision, "part": args.part, "clock": args.clock}
    cases: dict[tuple[str, str], list[Row]] = {}
    with tempfile.TemporaryDirectory() as folder:
        eval_photos.make_photos(Path(folder), args.images)
        for name, part in parts.items():
            if args.only not in (None, name):
                continue
            for rows in part(args, device, Path(folder)):
                if not cases:
                    print(f"{'':<55}{'theirs':>13}{'ours':>12}{'':>11}{'peak memory of tensors':>32}")
                cases[rows[0]["name"], rows[0]["case"]] = rows  # a later turn's rows take the place
                print(*lines(rows), sep="\n", flush=True)
                if args.json:  # after each: a run that is cut off keeps what it had
                    done = list(chain.from_iterable(cases.values()))
                    write_result(args.json, "eval_bench", done, device=device, **settings)
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
