"""Command line: score a checkpoint on labelled images without any training on their classes."""

from __future__ import annotations

import argparse
import csv
import io
import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from groupvit_fast.console import (
    UserError,
    add_common_flags,
    resolve_device,
    run_command,
    write_json,
    write_text_atomically,
)

if TYPE_CHECKING:
    from groupvit_fast.segmentation.report import Evaluation
    from groupvit_fast.training.distributed import World

DESCRIPTION = """\
Zero-shot segmentation score (mIoU) of a checkpoint on a folder of labelled images.

  python -m groupvit_fast.evaluate runs/demo --root shapes/voc
  python -m groupvit_fast.evaluate weights --dataset voc21 --root VOCdevkit/VOC2012 --output results/voc21
  python -m groupvit_fast.evaluate weights --dataset voc21 --root VOC2012 --split train --sweep
  python -m groupvit_fast.evaluate weights --dataset imagenet --root imagenet/val --class-file names.txt
  python -m groupvit_fast.evaluate results/new.json --compare results/old.json
  python -m groupvit_fast.evaluate --explain --protocol sclip
  torchrun --nproc-per-node 8 -m groupvit_fast.evaluate weights --dataset coco_object --root coco

voc-folder is any folder in the layout of Pascal VOC: JPEGImages/KEY.jpg, SegmentationClass/KEY.png (palette
or grey values, 255 is ignored), ImageSets/Segmentation/val.txt and classes.txt, whose line k names label k.
folder-pair is images/KEY.jpg with masks/KEY.png and classes.txt or id2label.json. A first class "background"
makes label 0 background, which needs --background-threshold. imagenet is classification: one folder a class,
or shards. With --output, an evaluation that was killed goes on where it was when started again.
"""
SHOWN_LEFT_OUT = 5
IMAGENET = "imagenet"
NOT_FOR_CLASSIFICATION = (
    "split", "details", "compare", "modes", "background_threshold", "protocol", "top_k", "short_side", "mode",
    "crop", "stride", "logit_scale", "area_threshold", "background_names",
)  # fmt: skip


def build_parser() -> argparse.ArgumentParser:
    from groupvit_fast.segmentation.datasets import DATASETS
    from groupvit_fast.segmentation.evaluation import PRECISIONS
    from groupvit_fast.segmentation.options import add_protocol_flags

    parser = argparse.ArgumentParser(
        prog="python -m groupvit_fast.evaluate",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("checkpoint", type=Path, nargs="?",
        help="run folder, converted folder or .pth file; or a result.json, to show it again")  # fmt: skip
    names = ", ".join((*DATASETS, IMAGENET))
    add("--dataset", default="voc-folder", metavar="NAME", help=f"one of {names} (default: voc-folder)")
    add("--root", type=Path, metavar="DIR", help="folder of the dataset")
    add("--split", default="val", metavar="NAME", help="val (default), train, or a list of keys of your own")
    add("--class-file", type=Path, metavar="FILE", help="other names of the classes, label k in line k")
    add("--limit", type=int, metavar="N", help="only the first N images")
    add("--batch-size", type=int, default=64, metavar="N",
        help="images at once, fewer if they are large (default: 64)")  # fmt: skip
    add("--precision", choices=PRECISIONS, default="fp32",
        help="of the encoder; bf16 is faster where the hardware has it, and moves some labels")  # fmt: skip
    add("--details", action="store_true", help="also boundary IoU, and what the groups of each stage allow")
    add("--strict", action="store_true", help="stop at the first image that cannot be used")
    add("--compare", type=Path, metavar="FILE", help="show an earlier --json result beside this one")
    add("--sweep", action="store_true", help="score many background thresholds instead; needs --split train")
    add("--force", action="store_true", help="--sweep on the very split that is scored")
    add("--explain", action="store_true", help="print the steps of the protocol (on --dataset) and stop")
    add_protocol_flags(parser)
    add("--background-threshold", type=float, metavar="T", help="score below which is background")
    add("--modes", metavar="LIST", help="with --output: also these pictures of every image, as in segment")
    add_common_flags(parser, output="folder for result.json, classes.csv and examples.png")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    from groupvit_fast.segmentation.modes import parse_modes
    from groupvit_fast.segmentation.options import explanation, require_writable

    if args.explain:
        print(explanation(args))
        return 0
    _check_arguments(args)
    args.modes = parse_modes(args.modes) if args.modes else []
    require_writable(args.json)
    require_writable(args.output, folder=True)
    if args.checkpoint.suffix == ".json":
        print(_read_result(args.checkpoint).table(_read_result(args.compare) if args.compare else None))
        return 0
    from groupvit_fast.training import distributed

    device = resolve_device(args.device)
    with distributed.session(device) as world:
        run = _classify if args.dataset == IMAGENET else _segment
        run(args, device, world)
    return 0


def _check_arguments(args: argparse.Namespace) -> None:
    if args.checkpoint is None:
        raise UserError("no checkpoint given; name a run folder, a converted folder or a .pth file")
    if args.checkpoint.suffix == ".json":
        return
    if args.root is None:
        raise UserError(f"dataset {args.dataset}: --root is missing; give the folder of the dataset")
    if args.modes and not args.output:
        raise UserError("--modes needs a folder for the pictures; give --output")
    for name in ("limit", "batch_size"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')} is {value}; it must be 1 or more")
    if args.sweep and args.dataset == IMAGENET:
        raise UserError("--sweep: classification has no background threshold")
    if args.dataset == IMAGENET:
        parser = build_parser()
        for name in NOT_FOR_CLASSIFICATION:
            if getattr(args, name) != parser.get_default(name):
                raise UserError(f"--{name.replace('_', '-')} has no meaning for classification; leave it out")
    training = args.split.startswith("train") and "val" not in args.split  # trainval holds what is scored
    if args.sweep and not training and not args.force:
        raise UserError(
            f"--sweep on split {args.split} would choose the threshold on what is scored; "
            "use --split train, or --force"
        )


def _segment(args: argparse.Namespace, device: str, world: World) -> None:
    from groupvit_fast.model import load_model
    from groupvit_fast.segmentation import evaluate, open_dataset
    from groupvit_fast.segmentation.evaluation import Ranks
    from groupvit_fast.segmentation.options import protocol_from_flags
    from groupvit_fast.segmentation.prompts import read_class_file
    from groupvit_fast.training import distributed

    before = _read_result(args.compare) if args.compare else None
    classes = read_class_file(args.class_file) if args.class_file else None
    dataset = open_dataset(args.dataset, args.root, args.split, classes)
    model = load_model(args.checkpoint, device)
    protocol = protocol_from_flags(args, model.config)
    options = {"batch_size": args.batch_size, "limit": args.limit, "precision": args.precision}
    options |= {"strict": args.strict, "ranks": Ranks(world.rank, world.size, distributed.on_main)}
    if args.sweep:
        return _sweep(args, model, dataset, protocol, device, options)
    partial = args.output / "partial" if args.output else None
    with _Progress(args.quiet or not world.is_main) as progress:
        result = evaluate(
            model, dataset, protocol, device=device, background_threshold=args.background_threshold,
            details=args.details, progress=progress, partial=partial, **options,
        )  # fmt: skip
    if result is None:
        return None
    print(result.table(before))
    _report_left_out(result.left_out)
    values = {"checkpoint": str(args.checkpoint), "root": str(args.root), **result.to_json()}
    if args.output:
        _write_folder(args, model, dataset, protocol, result, values, device)
        if args.modes:
            _write_gallery(args, model, dataset, protocol, args.modes)
    if args.json:
        write_json(args.json, values)
    if partial:
        shutil.rmtree(partial, ignore_errors=True)  # only now that the result is safe
    return None


def _sweep(args, model, dataset, protocol, device: str, options: dict) -> None:
    import torch

    from groupvit_fast.segmentation.evaluation import Run, resolve_protocol
    from groupvit_fast.segmentation.sweep import sweep_thresholds, table

    if options.pop("ranks").size > 1:
        raise UserError("--sweep runs in one process; start it without torchrun")
    threshold = 0.5 if dataset.background else None  # any, to have the rule of the protocol
    resolved = resolve_protocol(model, dataset, protocol, threshold)
    run = Run(model.to(device), dataset, resolved, torch.device(device), **options)
    with _Progress(args.quiet) as progress:
        results = sweep_thresholds(run, show=progress)
    print(f"{dataset.name}, split {args.split}, protocol {protocol.name}\n\n{table(results)}")
    _report_left_out(list(run.progress.left_out.values()))
    rows = [{"threshold": threshold, "miou": miou} for threshold, miou in results]
    values = {"checkpoint": str(args.checkpoint), "root": str(args.root), "dataset": dataset.name}
    values |= {"split": args.split, "protocol": protocol.to_dict(), "thresholds": rows}
    values |= {"class_names": list(dataset.class_names), "settings": run.settings()}
    for path in (args.json, args.output and args.output / "sweep.json"):
        if path:
            write_json(path, values)


def _classify(args: argparse.Namespace, device: str, world: World) -> None:
    from groupvit_fast.model import load_model
    from groupvit_fast.segmentation.classify import TEMPLATES, classify, open_images, table
    from groupvit_fast.segmentation.evaluation import Ranks
    from groupvit_fast.segmentation.options import parse_templates
    from groupvit_fast.segmentation.prompts import read_class_file
    from groupvit_fast.training import distributed

    images, names = open_images(args.root, read_class_file(args.class_file) if args.class_file else None)
    model = load_model(args.checkpoint, device)
    with _Progress(args.quiet or not world.is_main, score="top-1") as progress:
        result = classify(
            model, images, names, templates=parse_templates(args.templates) if args.templates else TEMPLATES,
            device=device, batch_size=args.batch_size, limit=args.limit, precision=args.precision,
            progress=progress, ranks=Ranks(world.rank, world.size, distributed.on_main),
        )  # fmt: skip
    if result is None:
        return
    print(table(result))
    values = {"checkpoint": str(args.checkpoint), "root": str(args.root), **result.to_json()}
    for path in (args.json, args.output and args.output / "result.json"):
        if path:
            write_json(path, values)


class _Progress:
    """A progress bar on a terminal, nothing elsewhere."""

    def __init__(self, quiet: bool, score: str = "mIoU") -> None:
        self.quiet, self.score, self.bar = quiet, score, None

    def __enter__(self) -> _Progress:
        return self

    def __call__(self, done: int, total: int | None, score: float) -> None:
        if self.bar is None:
            from tqdm import tqdm

            self.bar = tqdm(total=total, unit=" images", disable=True if self.quiet else None)
        self.bar.update(done - self.bar.n)
        self.bar.set_postfix({self.score: f"{score:.3f}"}, refresh=False)

    def __exit__(self, *_: object) -> None:
        if self.bar is not None:
            self.bar.close()


def _read_result(path: Path) -> Evaluation:
    from groupvit_fast.segmentation.report import Evaluation

    try:
        return Evaluation.from_json(json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        raise UserError(f"{path}: no such result; write one with --json") from None
    except (ValueError, AttributeError):
        raise UserError(f"{path}: not a JSON result; write one with --json") from None


def _report_left_out(left_out: Sequence[dict[str, str]]) -> None:
    for item in left_out[:SHOWN_LEFT_OUT]:
        print(f"left out {item['key']}: {item['reason']}", file=sys.stderr)
    if len(left_out) > SHOWN_LEFT_OUT:
        print(f"left out {len(left_out) - SHOWN_LEFT_OUT} more; --json lists them", file=sys.stderr)


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
