"""Flags that `evaluate` and `segment` share: the protocol and its knobs, and checks of output paths."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from groupvit_fast.console import UserError
from groupvit_fast.model.presets import ModelConfig
from groupvit_fast.segmentation.datasets import BENCHMARKS, benchmark_classes
from groupvit_fast.segmentation.prompts import (
    BACKGROUND,
    TEMPLATE_SETS,
    foreground_classes,
    parse_classes,
    read_class_file,
)
from groupvit_fast.segmentation.protocols import MODES, PROTOCOLS, Protocol, protocol

SMALL_MODEL = 128
"""Models trained on smaller images than this are evaluated whole and at that size unless told otherwise."""


CLASSES_HELP = (
    'names between commas, "|" between synonyms; or a text file with one class a line; '
    f"or the classes of {', '.join(BENCHMARKS)}"
)


def classes_from_flag(text: str) -> list[str]:
    """The class entries that --classes stands for, without background."""
    if text in BENCHMARKS:
        entries = benchmark_classes(text)
    else:
        is_file = text.endswith(".txt") or ("," not in text and Path(text).is_file())
        entries = read_class_file(Path(text)) if is_file else parse_classes(text)
    return foreground_classes(entries)


def add_protocol_flags(parser: argparse.ArgumentParser) -> None:
    """Add --protocol and a flag for each knob that people tune."""
    group = parser.add_argument_group(
        "protocol", "how an image becomes labels; knobs override the named protocol"
    )
    group.add_argument(
        "--protocol",
        default="auto",
        metavar="NAME",
        help=f"{', '.join(PROTOCOLS)}; auto (default): shapes for models of less than {SMALL_MODEL} px, "
        "else official",
    )
    group.add_argument(
        "--templates",
        nargs="+",
        metavar="TEXT",
        help=f'sentences such as "a photo of a {{}}." or a set: {", ".join(TEMPLATE_SETS)}',
    )
    group.add_argument("--top-k", type=int, metavar="K", help="classes a window keeps; 0: all")
    group.add_argument("--short-side", type=int, metavar="PX", help="resize images to this short side")
    group.add_argument("--mode", choices=MODES, help="one window, or sliding windows")
    group.add_argument("--crop", type=int, metavar="PX", help="side of a sliding window")
    group.add_argument("--stride", type=int, metavar="PX", help="distance of sliding windows")
    group.add_argument(
        "--logit-scale", type=float, metavar="X", help="factor on cosines instead of the learnt one"
    )
    group.add_argument(
        "--area-threshold",
        type=float,
        metavar="X",
        help="share of the classes' pixels up to which a class gets none, under sclip, clearclip and "
        "proxyclip; 0: no threshold (default: 0.1 under sclip on voc21)",
    )
    group.add_argument(
        "--background-names",
        type=Path,
        metavar="FILE",
        help="names that stand for background, one a line, under sclip, clearclip and proxyclip",
    )


def protocol_from_flags(args: argparse.Namespace, config: ModelConfig | None = None) -> Protocol:
    """The protocol that the flags describe; `config` decides what `auto` means."""
    name = args.protocol
    if name == "auto":
        small = config is not None and config.image.image_size < SMALL_MODEL
        name = "shapes" if small else "official"
    knobs = ("short_side", "mode", "crop", "stride", "logit_scale")
    changes = {knob: getattr(args, knob) for knob in knobs if getattr(args, knob) is not None}
    if args.templates:
        changes["templates"] = parse_templates(args.templates)
    if args.top_k is not None:
        changes["top_k"] = args.top_k or None
    if args.area_threshold is not None:
        changes["area_threshold"] = args.area_threshold or None
    if args.background_names is not None:
        changes["background_names"] = tuple(read_class_file(args.background_names))
    chosen = protocol(name)
    return chosen.with_knobs(changes) if changes else chosen


def explanation(args: argparse.Namespace) -> str:
    """The steps of the protocol in words, with the numbers of a benchmark if `args.dataset` names one."""
    chosen = protocol_from_flags(args)
    if args.dataset in BENCHMARKS:
        background = benchmark_classes(args.dataset)[0].lower() == BACKGROUND
        options = {"background": background, "threshold": args.background_threshold}
        chosen = chosen.resolve(dataset=args.dataset, image_size=SMALL_MODEL, **options)
    return chosen.explain()


def parse_templates(texts: list[str]) -> tuple[str, ...]:
    """Sentences with {} and names of template sets, in order, to sentences."""
    return tuple(sentence for text in texts for sentence in TEMPLATE_SETS.get(text, (text,)))


def require_writable(path: Path | None, *, folder: bool = False) -> None:
    """Complain about an output path that cannot be written before any work is done; None passes."""
    if path is None:
        return
    if path.exists() and path.is_dir() != folder:
        raise UserError(f"{path}: is {'not ' if folder else ''}a folder; choose another output path")
    parent = path
    while not parent.exists():
        parent = parent.parent
    if not (parent.is_dir() or parent == path):
        raise UserError(f"{path}: {parent} is not a folder; choose another output path")
    if not os.access(parent, os.W_OK):
        raise UserError(f"{path}: no permission to write in {parent}; choose another output path")
