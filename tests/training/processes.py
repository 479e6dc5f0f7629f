"""Start a test file as a program in several gloo processes."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import groupvit_fast

PACKAGE = str(Path(groupvit_fast.__file__).parents[1])


def launch(file, *arguments, count=2):
    """The processes, in order of rank."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    common = {
        **os.environ, "WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port,
        "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([PACKAGE, str(Path(__file__).parent)]),
    }  # fmt: skip
    command = [sys.executable, str(file), *map(str, arguments)]
    return [
        subprocess.Popen(
            command, env={**common, "RANK": str(rank), "LOCAL_RANK": str(rank)}, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )
        for rank in range(count)
    ]  # fmt: skip
