"""Turn any GroupViT checkpoint into any layout: ours, Hugging Face's or the official one."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from groupvit_fast.console import UserError, run_command, write_json

_HELP = """\
SRC may be
  - a training run (its newest complete step is taken) or one of its step folders,
  - a directory with model.safetensors and config.json, ours or Hugging Face's,
  - an official .pth file. It is opened without running anything in it; a file that tries is refused.

DST is a directory for the layouts
  ours   groupvit_fast.load_model(DST) and every command of this package read it,
  hf     transformers.GroupViTModel.from_pretrained(DST) reads it; comes with an image processor,
and a file name for
  official   a .pth as the authors' code writes and reads.

The numbers do not change: any round trip gives the same bits.

examples:
  python -m groupvit_fast.convert group_vit_gcc_yfcc_30e.pth yfcc/
  python -m groupvit_fast.convert runs/demo mine-hf/ --to hf
"""


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m groupvit_fast.convert",
        description=__doc__,
        epilog=_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("source", metavar="SRC", type=Path, help="checkpoint to read")
    parser.add_argument("target", metavar="DST", type=Path, help="directory or file to write")
    parser.add_argument(
        "--to", choices=("ours", "hf", "official"), default="ours", help="layout (default: ours)"
    )
    parser.add_argument(
        "--partial",
        action="store_true",
        help="accept missing, unexpected and mis-shaped parameters; missing ones are freshly initialised",
    )
    parser.add_argument("--force", action="store_true", help="replace DST if it holds a checkpoint already")
    parser.add_argument("--json", metavar="FILE", type=Path, help="also write what was done as JSON to FILE")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    arguments = build_parser().parse_args(argv)
    target = arguments.target
    used = target.is_file() or (target.is_dir() and any(target.iterdir()))
    if used and not arguments.force:
        raise UserError(f"{target}: exists; name another place, or replace it with --force")
    from groupvit_fast.model.checkpoint_files import describe, read_checkpoint
    from groupvit_fast.model.checkpoint_write import write_checkpoint

    checkpoint = read_checkpoint(arguments.source, partial=arguments.partial)
    write_checkpoint(checkpoint.state, checkpoint.config, target, layout=arguments.to, about=checkpoint.about)
    report = checkpoint.report
    if not report.complete:
        print(f"accepted: {describe(report)}", file=sys.stderr)
    if checkpoint.placeholders:
        print(f"not read: {', '.join(checkpoint.placeholders)} (no part of the weights)", file=sys.stderr)
    count = sum(value.numel() for value in checkpoint.state.values() if value.is_floating_point())
    print(
        f"{arguments.source} ({checkpoint.layout}) -> {target} ({arguments.to}), {count / 1e6:.1f} M numbers"
    )
    if arguments.json:
        summary = {"source": str(arguments.source), "from": checkpoint.layout, "target": str(target)}
        write_json(arguments.json, {**summary, "to": arguments.to, "numbers": count, **vars(report)})
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
