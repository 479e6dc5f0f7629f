"""Command line: score a checkpoint on labelled images without any training on their classes."""

from __future__ import annotations

import argparse
import csv
import io
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from groupvit_fast.console import (
    UserError,
    add_common_flags,
    resolve_device,
    run_command,
    write_json,
    write_text_atomically,
)

DESCRIPTION = """\
Zero-shot segmentation score (mIoU) of a checkpoint on a folder of labelled images.

  python -m groupvit_fast.evaluate runs/demo --root shapes/voc
  python -m groupvit_fast.evaluate weights --dataset voc21 --root VOCdevkit/VOC2012 --json voc.json
  python -m groupvit_fast.evaluate --explain --protocol official

voc-folder is any folder in the layout of Pascal VOC: JPEGImages/KEY.jpg, SegmentationClass/KEY.png (palette
or grey values, 255 is ignored), ImageSets/Segmentation/val.txt and classes.txt, whose line k names label k.
A first line "background" makes label 0 background, which needs --background-threshold.
"""
SHOWN_LEFT_OUT = 5


def build_parser() -> argparse.ArgumentParser:
    from groupvit_fast.segmentation.datasets import DATASETS
    from groupvit_fast.segmentation.options import add_protocol_flags

    parser = argparse.ArgumentParser(
        prog="python -m groupvit_fast.evaluate",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("checkpoint", type=Path, nargs="?", help="run folder, converted folder or .pth file")
    parser.add_argument(
        "--dataset", default="voc-folder", metavar="NAME", help=f"one of {', '.join(DATASETS)}"
    )
    parser.add_argument("--root", type=Path, metavar="DIR", help="folder of the dataset")
    parser.add_argument("--limit", type=int, metavar="N", help="only the first N images")
    parser.add_argument(
        "--batch-size", type=int, default=64, metavar="N", help="images at once (default: 64)"
    )
    parser.add_argument("--strict", action="store_true", help="stop at the first image that cannot be used")
    parser.add_argument(
        "--compare", type=Path, metavar="FILE", help="show an earlier --json result beside this one"
    )
    parser.add_argument("--explain", action="store_true", help="print the steps of the protocol and stop")
    add_protocol_flags(parser)
    parser.add_argument(
        "--background-threshold", type=float, metavar="T", help="score below which is background"
    )
    parser.add_argument(
        "--modes", metavar="LIST", help="with --output: also these pictures of every image, as in segment"
    )
    add_common_flags(parser, output="folder for result.json, classes.csv and examples.png")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    from groupvit_fast.model import load_model
    from groupvit_fast.segmentation import evaluate, open_dataset
    from groupvit_fast.segmentation.modes import parse_modes
    from groupvit_fast.segmentation.options import protocol_from_flags, require_writable
    from groupvit_fast.segmentation.report import Evaluation

    if args.explain:
        print(protocol_from_flags(args).explain())
        return 0
    _check_arguments(args)
    modes = parse_modes(args.modes) if args.modes else []
    require_writable(args.json)
    require_writable(args.output, folder=True)
    before = Evaluation.from_json(_read_json(args.compare)) if args.compare else None
    dataset = open_dataset(args.dataset, args.root)
    device = resolve_device(args.device)
    model = load_model(args.checkpoint, device)
    protocol = protocol_from_flags(args, model.config)
    with _Progress(args.quiet) as progress:
        result = evaluate(
            model,
            dataset,
            protocol,
            device=device,
            batch_size=args.batch_size,
            limit=args.limit,
            background_threshold=args.background_threshold,
            strict=args.strict,
            progress=progress,
        )
    print(result.table(before))
    _report_left_out(result)
    values = {"checkpoint": str(args.checkpoint), "root": str(args.root), **result.to_json()}
    if args.output:
        _write_folder(args, model, dataset, protocol, result, values, device)
        if modes:
            _write_gallery(args, model, dataset, protocol, modes)
    if args.json:
        write_json(args.json, values)
    return 0


def _check_arguments(args: argparse.Namespace) -> None:
    if args.checkpoint is None:
        raise UserError("no checkpoint given; name a run folder, a converted folder or a .pth file")
    if args.root is None:
        raise UserError(f"dataset {args.dataset}: --root is missing; give the folder of the dataset")
    if args.modes and not args.output:
        raise UserError("--modes needs a folder for the pictures; give --output")
    for name in ("limit", "batch_size"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')} is {value}; it must be 1 or more")


class _Progress:
    """A progress bar on a terminal, nothing elsewhere."""

    def __init__(self, quiet: bool) -> None:
        self.quiet, self.bar = quiet, None

    def __enter__(self) -> _Progress:
        return self

    def __call__(self, done: int, total: int, miou: float) -> None:
        if self.bar is None:
            from tqdm import tqdm

            self.bar = tqdm(total=total, unit=" images", disable=True if self.quiet else None)
        self.bar.update(done - self.bar.n)
        self.bar.set_postfix(mIoU=f"{miou:.3f}", refresh=False)

    def __exit__(self, *_: object) -> None:
        if self.bar is not None:
            self.bar.close()


def _read_json(path: Path) -> dict:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such result; write one with --json") from None
    except ValueError:
        raise UserError(f"{path}: not a JSON result; write one with --json") from None


def _report_left_out(result) -> None:
    for item in result.left_out[:SHOWN_LEFT_OUT]:
        print(f"left out {item['key']}: {item['reason']}", file=sys.stderr)
    if len(result.left_out) > SHOWN_LEFT_OUT:
        print(f"left out {len(result.left_out) - SHOWN_LEFT_OUT} more; --json lists them", file=sys.stderr)


def _write_folder(args, model, dataset, protocol, result, values, device) -> None:
    from groupvit_fast.segmentation.evaluation import examples_picture
    from groupvit_fast.segmentation.pictures import save_atomically

    picture = examples_picture(
        model, dataset, protocol, device=device, background_threshold=args.background_threshold,
        title=f"{dataset.name}, protocol {protocol.name}: mIoU {result.miou:.3f} over {result.images} images",
    )  # fmt: skip
    text = io.StringIO()
    writer = csv.DictWriter(text, list(values["per_class"][0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(values["per_class"])
    write_json(args.output / "result.json", values)
    write_text_atomically(args.output / "classes.csv", text.getvalue())
    save_atomically(picture, args.output / "examples.png")
    print(f"\nwritten: {args.output}/result.json, classes.csv, examples.png")


def _write_gallery(args, model, dataset, protocol, modes) -> None:
    from groupvit_fast.segmentation.gallery import save_gallery

    folder = args.output / "pictures"
    count = save_gallery(
        model, dataset, protocol, modes, folder,
        limit=args.limit, background_threshold=args.background_threshold,
    )  # fmt: skip
    print(f"written: {', '.join(modes)} of {count} images in {folder}")


if __name__ == "__main__":
    sys.exit(run_command(main))
