"""Command line: segment photos with any list of class names."""

from __future__ import annotations

import argparse
import glob
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
Segment photos into the classes you name. For each photo the output folder gets NAME_input_pred_label.png
(regions with names), NAME_mask.png (label image with a palette) and NAME.json (share of the pixels of each
class); --modes chooses other pictures, --html writes one page to look at everything in a browser.

  python -m groupvit_fast.segment weights photo.jpg --classes "dog, grass, sofa|couch" --output out/
  python -m groupvit_fast.segment weights photos/ --classes voc21 --background --html voc.html
  python -m groupvit_fast.segment weights 'photos/**/*.jpg' --classes names.txt --modes all

A photo that cannot be used costs one line; the others go on, and the exit status is 1 at the end.
"""
MOST_PAGE_PHOTOS = 200
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")


def build_parser() -> argparse.ArgumentParser:
    from groupvit_fast.segmentation.options import CLASSES_HELP, add_protocol_flags

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
        help=CLASSES_HELP,
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
    _add_output_flags(parser)
    add_protocol_flags(parser)
    add_common_flags(parser, output="folder for the results (default: segmented)")
    parser.set_defaults(output=Path("segmented"))
    return parser


def _add_output_flags(parser: argparse.ArgumentParser) -> None:
    from groupvit_fast.segmentation.modes import MODES

    parser.add_argument(
        "--modes",
        default="input_pred_label, mask",
        metavar="LIST",
        help=f"pictures to write, between commas: {', '.join(MODES)}; or all (default: %(default)s)",
    )
    parser.add_argument(
        "--html",
        type=Path,
        metavar="FILE",
        help="also write one page with all photos, which needs no network and no other file",
    )


def main(argv: Sequence[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    from groupvit_fast.model import load_model
    from groupvit_fast.segmentation.evaluation import encode_protocol_classes
    from groupvit_fast.segmentation.modes import parse_modes
    from groupvit_fast.segmentation.options import classes_from_flag, protocol_from_flags, require_writable

    entries, modes = classes_from_flag(args.classes), parse_modes(args.modes)
    outputs = _name_outputs(_find_images(args.images), args.output)
    if args.html and len(outputs) > MOST_PAGE_PHOTOS:
        raise UserError(
            f"--html: {len(outputs)} photos make a page too heavy to open; give at most {MOST_PAGE_PHOTOS}"
        )
    for path, folder in ((args.json, False), (args.html, False), (args.output, True)):
        require_writable(path, folder=folder)
    model = load_model(args.checkpoint, resolve_device(args.device))
    protocol = protocol_from_flags(args, model.config).resolve(
        dataset="your classes",
        background=args.background,
        image_size=model.config.image.image_size,
        threshold=args.background_threshold if args.background else None,
    )
    segmenter = Segmenter(model, entries, encode_protocol_classes(model, entries, protocol), protocol)
    results, shown = [], []
    for path, output in outputs:
        try:
            result, part = segmenter.segment(path, output, modes, page=args.html is not None)
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            continue
        results.append(result)
        shown.append(part)
        if not args.quiet:
            print(_summary(result))
    if args.json and results:
        values = {"checkpoint": str(args.checkpoint), "protocol": protocol.to_dict(), "images": results}
        write_json(args.json, values)
    if args.html and results:
        _write_page(args, protocol, shown)
    return 1 if len(results) < len(outputs) else 0


def _write_page(args: argparse.Namespace, protocol, shown: list[dict]) -> None:
    from groupvit_fast.segmentation.page import self_contained_page

    title = shown[0]["name"] if len(shown) == 1 else f"{len(shown)} segmented photos"
    about = [args.checkpoint.resolve().name, f"protocol {protocol.name}"]
    if protocol.background_threshold is not None:
        about.append(f"background below {protocol.background_threshold:g}")
    write_text_atomically(args.html, self_contained_page(title, about, shown))
    if not args.quiet:
        print(f"page: {args.html}")


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
            matches = sorted(map(Path, glob.glob(argument, recursive=True)))
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


class Segmenter:
    """One model and one class list, for any number of photos."""

    def __init__(self, model, entries: Sequence[str], text, protocol) -> None:
        from groupvit_fast.segmentation.prompts import BACKGROUND, synonyms

        self.model, self.text, self.protocol = model, text, protocol
        background = protocol.background_threshold is not None
        self.names = [BACKGROUND] * background + [synonyms(entry)[0] for entry in entries]

    def segment(self, path: Path, output: Path, modes: Sequence[str], *, page: bool) -> tuple[dict, dict]:
        """Write the files of one photo; return its result and, for a page, what the viewer needs of it."""
        from groupvit_fast.data.images import read_image

        image = read_image(path)
        try:
            return self._segment(path, image, output, modes, page)
        except UserError as error:
            raise UserError(f"{path}: {error}") from None
        except (MemoryError, RuntimeError) as error:
            if isinstance(error, RuntimeError) and "memory" not in str(error):
                raise
            size = f"{image.shape[1]} x {image.shape[0]} pixels"
            raise UserError(f"{path}: not enough memory for {size}; make the image smaller") from None

    def _segment(
        self, path: Path, image, output: Path, modes: Sequence[str], page: bool
    ) -> tuple[dict, dict]:
        import numpy as np

        from groupvit_fast.segmentation.modes import save_modes, view_photo

        view = view_photo(self.model, image, self.text, self.protocol, self.names)
        labels = view.labels.ravel()
        shares = (np.bincount(labels, minlength=len(self.names)) / labels.size).tolist()
        files = save_modes(view, modes, output)
        result = {
            "image": str(path),
            "width": image.shape[1],
            "height": image.shape[0],
            "labels": dict(enumerate(self.names)),
            "shares": dict(zip(self.names, shares, strict=True)),
            "pictures": files,
        }
        write_json(output.with_name(f"{output.name}.json"), {**result, "protocol": self.protocol.to_dict()})
        return result, self._page_part(path.name, view, shares) if page else {}

    def _page_part(self, name: str, view, shares: Sequence[float]) -> dict:
        from groupvit_fast.segmentation.page import data_url, label_part, photo_part, picture_bytes

        picture = data_url(*picture_bytes(view.image))
        size = view.photo.size
        labels = label_part(view.scores, size, self.names, background=view.background, shares=shares)
        return {**photo_part(name, view.photo, picture), **labels}


def _summary(result: dict) -> str:
    shares = sorted(result["shares"].items(), key=lambda pair: -pair[1])
    listed = ", ".join(f"{name} {share:.1%}" for name, share in shares[:6] if share)
    files = list(result["pictures"].values())
    where = ", ".join(files) if len(files) <= 2 else f"{files[0]} and {len(files) - 1} more"
    return f"{result['image']}: {listed} -> {where}"


if __name__ == "__main__":
    sys.exit(run_command(main))
