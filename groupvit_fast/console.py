"""What every command line shares: clear one-line errors, common flags, JSON results."""

from __future__ import annotations

import argparse
import json
import os
import secrets
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any


class UserError(Exception):
    """A fault of the input, not of the program: one line that names the thing and the remedy."""


def run_command(main: Callable[[Sequence[str] | None], int | None], argv: Sequence[str] | None = None) -> int:
    """Run `main(argv)`; turn bad input and interruption into one line and an exit status.

    Returns 0 on success, 1 for a `UserError` or a failing file operation, 130 for Ctrl-C, as shells do.
    """
    try:
        return main(argv) or 0
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        print(f"error: {where}{error.strerror or error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def printable(text: str) -> str:
    """`text` for a terminal: control characters and bytes that are no text become escapes such as \\x1b."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


def add_common_flags(parser: argparse.ArgumentParser, *, output: str | None = None) -> None:
    """Add the flags every long command has; `output` is the help text of --output, None leaves it out."""
    if output:
        parser.add_argument("--output", metavar="DIR", type=Path, help=output)
    parser.add_argument(
        "--device", choices=("auto", "cpu", "cuda"), default="auto", help="where to compute (default: auto)"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of everything random (default: 0)")
    parser.add_argument("--json", metavar="FILE", type=Path, help="also write the result as JSON to FILE")
    parser.add_argument("--quiet", action="store_true", help="print only errors and the final result")


def resolve_device(name: str) -> str:
    """Turn auto|cpu|cuda into a torch device string; asking for an absent GPU is an error."""
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch finds no CUDA device here; use --device cpu or auto")
    return name


def write_bytes_atomically(path: Path, data: bytes) -> None:
    """Write `data` to `path` whole or not at all, and flush it to the disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}")
    try:
        with open(temporary, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_text_atomically(path: Path, text: str) -> None:
    """`write_bytes_atomically` for text, as UTF-8."""
    write_bytes_atomically(path, text.encode("utf-8"))


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON, atomically."""
    write_text_atomically(path, json.dumps(value, indent=2, sort_keys=False) + "\n")
