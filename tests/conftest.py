"""Settings that hold for every test: one seed, and no thread pool wider than the machine of CI."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(autouse=True)
def _fixed_seed():
    """Tests that draw from the global generator draw the same numbers, alone or in the whole suite."""
    torch.manual_seed(0)
