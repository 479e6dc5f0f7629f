"""Two gloo processes in one run: a fault or a signal on one of them is handled by both alike."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from processes import launch

from groupvit_fast.console import UserError
from groupvit_fast.training import distributed


def work(case: str, folder: str) -> None:
    """What one of the processes does: this file run as a program."""
    from small_run import CONFIG, Loader, bits, nan_pixels, trainer

    with distributed.session("cpu") as world:
        spoil = {}
        if world.rank == 1 and case == "nan":
            spoil = dict.fromkeys(range(3, 40), nan_pixels)
        if world.rank == 1 and case == "signal":
            spoil = {3: lambda batch: os.kill(os.getpid(), signal.SIGTERM)}
        run = trainer(Path(folder), replace(CONFIG, max_rewinds=0), Loader(spoil), world=world)
        message, stopped = "", None
        try:
            stopped = run.fit()
        except UserError as error:
            message = str(error)
        state = hashlib.sha256(b"".join(bits(run))).hexdigest()
        skipped = int(run.optimizer.bad_steps.item())
        told = {"step": run.step, "stopped": stopped, "message": message, "state": state, "skipped": skipped}
        Path(folder, f"rank_{world.rank}.json").write_text(json.dumps(told))


@pytest.fixture
def both(tmp_path, request):
    processes = launch(__file__, request.param, tmp_path)
    said = [process.communicate(timeout=100) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], said
    return [json.loads((tmp_path / f"rank_{rank}.json").read_text()) for rank in (0, 1)]


@pytest.mark.parametrize("both", ["nan"], indirect=True)
def test_bad_pixels_on_one_rank_stop_both_with_its_number(both):
    first, second = both
    assert first["message"] == second["message"]
    assert "first in the pixels of sample batch7/2 on rank 1" in first["message"]
    assert "on rank 0" not in first["message"]
    assert first["state"] != ""
    assert first["skipped"] == second["skipped"] == 5
    assert first["step"] == second["step"] == 8


@pytest.mark.parametrize("both", ["signal"], indirect=True)
def test_a_signal_on_one_rank_stops_both_after_the_same_step(both):
    first, second = both
    assert first["step"] == second["step"]
    assert 4 <= first["step"] <= 6
    assert first["stopped"] == second["stopped"] == signal.SIGTERM


if __name__ == "__main__":
    work(*sys.argv[1:])
