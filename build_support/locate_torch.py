"""Finds the torch of the environment that runs the build, without importing it.

Under pip's build isolation the interpreter is still the environment's own, but `PYTHONPATH` hides that
environment behind a temporary overlay. Asking a second, isolated interpreter (`python -I`) looks past the
overlay; the last try looks into it, for the case in which torch was absent and pip has just put it there.
"""

from __future__ import annotations

import subprocess
import sys

ASK = """
from importlib.util import find_spec
torch = find_spec("torch")
print(torch.submodule_search_locations[0] if torch else "")
"""
# -I: the environment alone; -E: also the user's own site directory; nothing: also pip's overlay.
TRIES = (["-I"], ["-E"], [])


def torch_directory(*, overlay: bool = True) -> str | None:
    """Return the directory of the torch package, or None; `overlay=False` asks the environment only."""
    for flags in TRIES if overlay else TRIES[:-1]:
        answer = subprocess.run([sys.executable, *flags, "-c", ASK], capture_output=True, text=True, cwd="/")
        if answer.returncode == 0 and answer.stdout.strip():
            return answer.stdout.strip()
    return None


if __name__ == "__main__":
    print(torch_directory() or "")
