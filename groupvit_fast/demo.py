"""Command line: a local web page that segments photos with the classes you type."""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from groupvit_fast.console import UserError, resolve_device, run_command

PROGRAM = "python -m groupvit_fast.demo"
DESCRIPTION = f"""\
Serve a page on this machine: drop a photo, edit the list of classes, and see segments and groups change.

  {PROGRAM} runs/demo
  {PROGRAM} weights.pth --classes "dog, grass, sofa|couch" --port 0

The page answers on the loopback interface only. From another machine: ssh -L 7860:localhost:7860 HOST.
Ctrl-C stops it.
"""
PORT = 7860


def build_parser() -> argparse.ArgumentParser:
    from groupvit_fast.segmentation.options import CLASSES_HELP, add_protocol_flags

    parser = argparse.ArgumentParser(
        prog=PROGRAM, description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", type=Path, nargs="?", help="run folder, converted folder or .pth file")
    parser.add_argument(
        "--port", type=int, default=PORT, metavar="N", help=f"0: a free one (default: {PORT})"
    )
    parser.add_argument(
        "--classes", metavar="TEXT", help=f"to begin with: {CLASSES_HELP} (default: by the model)"
    )
    parser.add_argument(
        "--device", choices=("auto", "cpu", "cuda"), default="auto", help="where to compute (default: auto)"
    )
    add_protocol_flags(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    if args.checkpoint is None:
        raise UserError(
            "no checkpoint given; train one in minutes with "
            "python -m groupvit_fast.train --amp --output runs/demo, then give runs/demo"
        )
    if not 0 <= args.port <= 65_535:
        raise UserError(f"--port {args.port}: wanted 0 to 65535")
    from groupvit_fast.model import load_model
    from groupvit_fast.segmentation.options import classes_from_flag, protocol_from_flags
    from groupvit_fast.segmentation.server import DemoServer
    from groupvit_fast.segmentation.studio import Studio, sample_image

    classes = ", ".join(classes_from_flag(args.classes)) if args.classes is not None else None
    model = load_model(args.checkpoint, resolve_device(args.device))
    protocol = protocol_from_flags(args, model.config)
    name = args.checkpoint.resolve().name
    studio = Studio(model, protocol, name=name, classes=classes)
    studio.segment(
        studio.add_photo(sample_image(0))["id"], studio.classes
    )  # faults show before the page does
    for number in (signal.SIGINT, signal.SIGTERM):  # a shell starts background jobs with SIGINT ignored
        signal.signal(number, signal.default_int_handler)
    with DemoServer(studio, args.port) as server:
        print(f"demo: {server.address} (this machine only; Ctrl-C stops it)", flush=True)
        try:
            server.serve_forever(poll_interval=0.2)
        except KeyboardInterrupt:
            print("stopped")
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
