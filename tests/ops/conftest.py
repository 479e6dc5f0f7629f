"""One operator test-suite, several back ends: every test that takes `backend` runs on each of them."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parent.parent / "host_cuda"))

from backends import BACKENDS


@pytest.fixture(params=BACKENDS, ids=lambda backend: backend.name)
def backend(request):
    with request.param.active():
        yield request.param


@pytest.fixture(params=["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"])
def device(request):
    return request.param


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(20230817)
