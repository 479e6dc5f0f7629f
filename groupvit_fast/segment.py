"""Command line: segment photos with any list of class names."""

from __future__ import annotations

import argparse
import glob
import sys
from collections.abc import Sequence
from pathlib import Path

from groupvit_fast.console import UserError, add_common_flags, resolve_device, run_command, write_json

DESCRIPTION = """\
Segment photos into the classes you name. For each photo the output folder gets NAME_overlay.png (regions with
names), NAME_mask.png (label image with a palette) and NAME.json (share of the pixels of each class).

  python -m groupvit_fast.segment weights photo.jpg --classes "dog, grass, sofa|couch" --output out/
  python -m groupvit_fast.segment weights photos/ --classes voc21 --background --output out/
"""
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")


def build_parser() -> argparse.ArgumentParser:
    from groupvit_fast.segmentation.datasets import BENCHMARKS
    from groupvit_fast.segmentation.options import add_protocol_flags

    parser = argparse.ArgumentParser(
        prog="python -m groupvit_fast.segment",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("checkpoint", type=Path, help="run folder, converted folder or .pth file")
    parser.add_argument(
        "images", nargs="+", help="photos, folders of photos or patterns such as 'photos/*.jpg'"
    )
    parser.add_argument(
        "--classes",
        required=True,
        metavar="TEXT",
        help='names between commas, "|" between synonyms; or a text file with one class a line; '
        f"or the classes of {', '.join(BENCHMARKS)}",
    )
    parser.add_argument(
        "--background",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="leave pixels that fit no class unlabelled (default: every pixel gets a class)",
    )
    parser.add_argument(
        "--background-threshold",
        type=float,
        default=0.95,
        metavar="T",
        help="score below which --background leaves a pixel out (default: 0.95, the value published for VOC)",
    )
    add_protocol_flags(parser)
    add_common_flags(parser, output="folder for the results (default: segmented)")
    parser.set_defaults(output=Path("segmented"))
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    from groupvit_fast.model import load_model
    from groupvit_fast.segmentation.evaluation import encode_protocol_classes
    from groupvit_fast.segmentation.options import protocol_from_flags, require_writable

    entries = _read_classes(args.classes)
    outputs = _name_outputs(_find_images(args.images), args.output)
    require_writable(args.json)
    require_writable(args.output, folder=True)
    model = load_model(args.checkpoint, resolve_device(args.device))
    protocol = protocol_from_flags(args, model.config).resolve(
        dataset="your classes",
        background=args.background,
        image_size=model.config.image.image_size,
        threshold=args.background_threshold if args.background else None,
    )
    text = encode_protocol_classes(model, entries, protocol)
    results, failed = [], 0
    for path, output in outputs:
        try:
            results.append(_segment_file(model, path, output, entries, text, protocol))
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            failed += 1
            continue
        if not args.quiet:
            print(_summary(results[-1]))
    if args.json and results:
        write_json(
            args.json, {"checkpoint": str(args.checkpoint), "protocol": protocol.to_dict(), "images": results}
        )
    return 1 if failed else 0


def _read_classes(text: str) -> list[str]:
    from groupvit_fast.segmentation.datasets import BENCHMARKS, benchmark_classes
    from groupvit_fast.segmentation.prompts import BACKGROUND, parse_classes, read_class_file

    if text in BENCHMARKS:
        entries = benchmark_classes(text)
    else:
        is_file = text.endswith(".txt") or ("," not in text and Path(text).is_file())
        entries = read_class_file(Path(text)) if is_file else parse_classes(text)
    if entries[0].lower() == BACKGROUND:
        entries = entries[1:]
    if not entries:
        raise UserError("the class list has nothing but background; name at least one class")
    return entries


def _find_images(arguments: Sequence[str]) -> list[Path]:
    """Files as given, the pictures in a folder sorted by name, the matches of a pattern."""
    found: list[Path] = []
    for argument in arguments:
        path = Path(argument)
        if path.is_dir():
            matches = sorted(child for child in path.iterdir() if child.suffix.lower() in IMAGE_SUFFIXES)
            if not matches:
                raise UserError(f"{path}: no picture in this folder (looked for {', '.join(IMAGE_SUFFIXES)})")
        elif path.exists() or not glob.has_magic(argument):
            matches = [path]
        else:
            matches = sorted(map(Path, glob.glob(argument)))
            if not matches:
                raise UserError(f"{argument}: the pattern matches no file")
        found += matches
    missing = next((path for path in found if not path.exists()), None)
    if missing is not None:
        raise UserError(f"{missing}: no such image file")
    return list(dict.fromkeys(found))


def _name_outputs(paths: Sequence[Path], folder: Path) -> list[tuple[Path, Path]]:
    """(photo, output path without ending); equal names get a number."""
    used: set[str] = set()
    pairs = []
    for path in paths:
        name, number = path.stem, 2
        while name in used:
            name, number = f"{path.stem}-{number}", number + 1
        used.add(name)
        pairs.append((path, folder / name))
    return pairs


def _segment_file(model, path: Path, output: Path, entries: Sequence[str], text, protocol) -> dict:
    import torch

    from groupvit_fast.data.images import read_image
    from groupvit_fast.segmentation import pictures
    from groupvit_fast.segmentation.batch import check_size, segment_batch
    from groupvit_fast.segmentation.colours import class_colours
    from groupvit_fast.segmentation.prompts import BACKGROUND, synonyms

    image = read_image(path)
    try:
        check_size(*image.shape[:2], protocol, model.config.image.patch_size)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    labels = segment_batch(model, [torch.tensor(image)], text, protocol)[0].labels.cpu()
    background = protocol.background_threshold is not None
    names = [BACKGROUND] * background + [synonyms(entry)[0] for entry in entries]
    shares = (torch.bincount(labels.flatten(), minlength=len(names)) / labels.numel()).tolist()
    result = {
        "image": str(path),
        "width": image.shape[1],
        "height": image.shape[0],
        "labels": dict(enumerate(names)),
        "shares": dict(zip(names, shares, strict=True)),
    }
    picture = pictures.labelled_overlay(image, labels.numpy(), names, background=background)
    mask = pictures.mask_picture(labels.numpy(), class_colours(len(names), background=background))
    for ending, part in (("overlay", picture), ("mask", mask)):
        file = output.with_name(f"{output.name}_{ending}.png")
        pictures.save_atomically(part, file)
        result[ending] = str(file)
    write_json(output.with_name(f"{output.name}.json"), {**result, "protocol": protocol.to_dict()})
    return result


def _summary(result: dict) -> str:
    shares = sorted(result["shares"].items(), key=lambda pair: -pair[1])
    listed = ", ".join(f"{name} {share:.1%}" for name, share in shares[:6] if share)
    return f"{result['image']}: {listed} -> {result['overlay']}"


if __name__ == "__main__":
    sys.exit(run_command(main))
