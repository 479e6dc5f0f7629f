"""kill -9, again and again, also in the middle of checkpoint writes: the run ends as if nothing happened."""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from groupvit_fast.console import run_command
from groupvit_fast.train import main
from groupvit_fast.training import checkpoint
from groupvit_fast.training.metrics import TIMINGS

STEPS = 64
ARGUMENTS = [
    "--shapes-train", "96", "--shapes-val", "2", "--batch-size", "8", "--log-every", "1", "--save-every", "4",
    "--model", "image.width=16", "--model", "image.depths=[1,0]", "--model", "text.width=16",
    "--model", "text.layers=1", "--model", "image.drop_path=0.2", "--workers", "1", "--device", "cpu",
    "--steps", str(STEPS), "--seed", "5", "--model-ema", "--quiet",
]  # fmt: skip


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An uninterrupted run, and the arguments that find its data."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("kill")
    arguments = [*ARGUMENTS, "--data-root", str(root / "data")]
    assert run_command(main, [*arguments, "--output", str(root / "whole")]) == 0
    yield root / "whole", arguments
    torch.set_num_threads(threads)


def start(arguments, output, **environment):
    """The command in a process of its own; continues what is in `output`."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path), **environment}
    command = [
        sys.executable,
        "-m",
        "groupvit_fast.train",
        *arguments,
        "--output",
        str(output),
        "--resume",
        "auto",
    ]
    return subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def lines(run):
    path = run / "metrics.jsonl"
    return path.read_text().count("\n") if path.exists() else 0


def writing(run):
    return list((run / "checkpoints").glob(".writing-*"))


def kill(process, run, moment):
    """End the process at `moment`: a number of new lines of metrics, or "write" for a checkpoint being made.

    Returns whether it lived long enough, and whether it was killed inside a write.
    """
    before = None
    while process.poll() is None:
        if before is None and lines(run):
            before = lines(run)
        if writing(run) if moment == "write" else before is not None and lines(run) >= before + moment:
            break
        time.sleep(0.0005)
    process.kill()
    said = process.communicate()[1]
    assert process.returncode in (0, -signal.SIGKILL), said
    return process.returncode != 0, bool(writing(run))


def curve(run):
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in record.items() if name not in TIMINGS} for record in records]


def sums(run, steps=STEPS):
    """SHA-256 of weights and averaged weights, and all numbers of optimiser, loader and counters."""
    folder = run / "checkpoints" / f"step_{steps:08d}"
    digests = [
        hashlib.sha256((folder / name / "model.safetensors").read_bytes()).hexdigest() for name in ("", "ema")
    ]
    state = checkpoint.load_state(folder)
    flat = []

    def walk(value):
        if isinstance(value, dict):
            [walk(item) for key, item in sorted(value.items(), key=str) if key != "evaluations"]
        elif isinstance(value, (list, tuple)):
            [walk(item) for item in value]
        else:
            flat.append(value.numpy().tobytes() if isinstance(value, torch.Tensor) else value)

    walk(state)
    return digests, flat


def survive(whole, output, moments):
    reference, arguments = whole
    inside = survived = 0
    for moment in moments:
        lived, in_write = kill(start(arguments, output), output, moment)
        survived, inside = survived + lived, inside + in_write
    assert survived == len(moments)
    assert run_command(main, [*arguments, "--output", str(output), "--resume", "auto"]) == 0
    assert [record["step"] for record in curve(output)] == list(range(1, STEPS + 1))
    assert curve(output) == curve(reference)
    assert sums(output) == sums(reference)
    return inside


def test_three_kills(whole, tmp_path):
    survive(whole, tmp_path / "run", [5, "write", 2])


@pytest.mark.slow
def test_twenty_kills(whole, tmp_path):
    """At random moments, every third inside a write; the data passes the end of several epochs."""
    draw = random.Random(7)
    moments = ["write" if number % 3 == 2 else draw.randint(0, 7) for number in range(20)]
    assert survive(whole, tmp_path / "run", moments) >= 3


@pytest.mark.slow
def test_torchrun_restarts_after_a_killed_rank(whole, tmp_path):
    """One of two ranks is killed: all end, torchrun starts them again, and nothing of it shows in the end."""
    arguments = [*whole[1], "--timeout-seconds", "20"]
    results = []
    for name in ("lived", "killed"):
        run = tmp_path / name
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = str(probe.getsockname()[1])
        torchrun = [
            sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--max-restarts", "2",
            "--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{port}",
            "-m", "groupvit_fast.train",
        ]  # fmt: skip
        env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
        command = [*torchrun, *arguments, "--output", str(run), "--resume", "auto"]
        process = subprocess.Popen(command, env=env, stderr=subprocess.PIPE, text=True)
        if name == "killed":
            while lines(run) < 10:
                assert process.poll() is None, process.communicate()
                time.sleep(0.005)
            os.kill(rank_process(process.pid, 1), signal.SIGKILL)
        said = process.communicate(timeout=280)[1]
        assert process.returncode == 0, said
        results.append((curve(run), sums(run)))
    assert results[0] == results[1]


EVALUATING = ["--eval-every", "8"]


def stop(process, run, moment):
    """Send SIGTERM at `moment`; returns the step that was saved, and whether that was inside an evaluation.

    A moment is a number of seconds after the first new line of metrics, "write" while a checkpoint is being
    made, or "evaluation" as soon as the line of a step is there after which one is due.
    """
    before = lines(run)
    while process.poll() is None:
        now = lines(run)
        if writing(run) if moment == "write" else now > before and (moment != "evaluation" or now % 8 == 0):
            break
        time.sleep(0.0005)
    if isinstance(moment, float):
        time.sleep(moment)
    process.send_signal(signal.SIGTERM)
    said = process.communicate(timeout=60)[1]
    assert process.returncode == 128 + signal.SIGTERM, said
    step = int(re.search(r"stopped by SIGTERM after step (\d+) of \d+; saved \S+step_0*\1;", said)[1])
    evaluated = json.loads((run / "evaluations.json").read_text())
    return step, step % 8 == 0 and str(step) not in evaluated


def stop_often(reference, arguments, output, moments, last=STEPS):
    """Returns how many signals ended an evaluation."""
    steps, inside = [0], 0
    for moment in moments:
        step, in_evaluation = stop(start([*arguments, *EVALUATING], output), output, moment)
        assert step >= steps[-1]
        steps, inside = [*steps, step], inside + in_evaluation
    assert run_command(main, [*arguments, "--output", str(output), "--resume", "auto"]) == 0
    assert [record["step"] for record in curve(output)] == list(range(1, last + 1))
    assert curve(output) == curve(reference)
    assert sums(output, last) == sums(reference, last)
    return inside


def test_signals_while_training_saving_and_evaluating(whole, tmp_path):
    stop_often(*whole, tmp_path / "run", [0.01, "write", "evaluation"])


@pytest.mark.slow
def test_twenty_signals(whole, tmp_path):
    """At random moments, some inside writes and evaluations: each run saves, and nothing shows in the end."""
    draw = random.Random(11)
    kinds = ["write", "evaluation", *("time" for _ in range(5))]
    moments = [draw.uniform(0, 0.05) if (kind := draw.choice(kinds)) == "time" else kind for _ in range(22)]
    moments += ["evaluation"] * 2
    draw.shuffle(moments)
    arguments = [*whole[1], "--steps", "300"]
    assert run_command(main, [*arguments, "--output", str(tmp_path / "whole")]) == 0
    assert stop_often(tmp_path / "whole", arguments, tmp_path / "run", moments, 300) >= 1


@pytest.mark.slow
def test_a_signal_to_one_of_two_ranks_stops_both_and_loses_nothing(whole, tmp_path):
    """At random moments, to one or the other; weights, order, prompts, crops and noise go on to the bit."""
    draw, ranks = random.Random(3), []

    def both(output):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = str(probe.getsockname()[1])
        common = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        names = ({"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in (0, 1))
        return [start([*whole[1], *EVALUATING], output, **common, **name) for name in names]

    for process in both(tmp_path / "whole"):
        said = process.communicate(timeout=200)[1]
        assert process.returncode == 0, said
    for number in range(6):
        processes = both(tmp_path / "run")
        before = lines(tmp_path / "run")
        while lines(tmp_path / "run") == before:
            assert processes[0].poll() is None, processes[0].communicate()
            time.sleep(0.001)
        time.sleep(draw.uniform(0, 0.1))
        processes[number % 2].send_signal(signal.SIGTERM)
        said = [process.communicate(timeout=100)[1] for process in processes]
        assert [process.returncode for process in processes] == [128 + signal.SIGTERM] * 2, said
        ranks.append(int(re.search(r"stopped by SIGTERM after step (\d+)", said[0])[1]))
    assert ranks == sorted(ranks)
    assert ranks[-1] < STEPS
    for process in both(tmp_path / "run"):
        said = process.communicate(timeout=200)[1]
        assert process.returncode == 0, said
    assert curve(tmp_path / "run") == curve(tmp_path / "whole")
    assert sums(tmp_path / "run") == sums(tmp_path / "whole")


def rank_process(parent, rank):
    """The process of a rank below torchrun."""
    for path in Path("/proc").glob("[0-9]*"):
        try:
            own = (path / "stat").read_text().rpartition(")")[2].split()[1]
            environment = (path / "environ").read_bytes().split(b"\0")
        except OSError:
            continue
        if own == str(parent) and f"RANK={rank}".encode() in environment:
            return int(path.name)
    raise AssertionError("no such process")


def test_same_seed_same_curve_in_fresh_processes(whole, tmp_path):
    reference, arguments = whole
    process = start(arguments, tmp_path / "again")
    said = process.communicate(timeout=120)[1]
    assert process.returncode == 0, said
    assert curve(tmp_path / "again") == curve(reference)
    assert sums(tmp_path / "again") == sums(reference)
    shutil.rmtree(tmp_path / "again")
