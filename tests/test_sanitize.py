"""The cases of `make sanitize` run, so that they are ready where a GPU is."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).parent / "sanitize.py"


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(SCRIPT), *arguments], capture_output=True, text=True)


def test_every_case_can_be_called():
    done = run("--cases", "cpu")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("69 calls")


def test_fewer_cases_can_be_asked_for():
    done = run("--cases", "cpu", "--calls", "40")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("40 calls")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so():
    done = run()
    assert done.returncode == 1
    assert "no GPU here" in done.stderr
