"""The training command as people use it: demo, signals and kills, several processes, bad input."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

import groupvit_fast
from groupvit_fast.console import run_command
from groupvit_fast.model import load_model
from groupvit_fast.train import main
from groupvit_fast.training.metrics import TIMINGS

SMALL = [
    "--shapes-train", "96", "--shapes-val", "5", "--batch-size", "8", "--log-every", "2", "--save-every", "3",
    "--model", "image.width=16", "--model", "image.depths=[1,0]", "--model", "text.width=16",
    "--model", "text.layers=1", "--model", "image.drop_path=0.2", "--workers", "1", "--device", "cpu",
]  # fmt: skip


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Models this small only lose by more; the bits of a result depend on the number."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """One drawn dataset for the whole file."""
    root = tmp_path_factory.mktemp("data")
    assert (
        run_command(main, [*SMALL, "--data-root", str(root), "--output", str(root / "run"), "--steps", "1"])
        == 0
    )
    return ["--data-root", str(root)]


def train(*argv):
    return run_command(main, [*map(str, argv)])


def start(*argv, **environment):
    """The command in a process of its own."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path), **environment}
    command = [sys.executable, "-m", "groupvit_fast.train", *map(str, argv)]
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def metrics(run):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in TIMINGS} for line in lines]


def weights(run, step):
    return (run / "checkpoints" / f"step_{step:08d}" / "model.safetensors").read_bytes()


def wait_for(path: Path, process):
    for _ in range(600):
        if path.exists():
            return
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    raise AssertionError(f"{path} never came")


def test_the_demo_ends_with_a_table_a_picture_and_results(data, tmp_path, capsys):
    run = tmp_path / "run"
    code = train(
        *SMALL,
        *data,
        "--amp",
        "--steps",
        4,
        "--eval-every",
        2,
        "--output",
        run,
        "--json",
        tmp_path / "r.json",
    )
    out, err = capsys.readouterr()
    assert code == 0
    assert "before" in out
    assert "largest class" in out
    assert "oracle" in out
    assert str(run / "examples.png") in out
    assert "step 4/4" in err
    result = json.loads((run / "result.json").read_text())
    assert json.loads((tmp_path / "r.json").read_text()) == result
    for key in ("miou", "miou_before", "miou_largest_class", "oracle_miou"):
        assert 0 <= result[key] <= 1
    assert len(result["per_class"]) == len(result["per_class_before"]) > 5
    assert result["training"]["step"] == 4
    assert sorted(json.loads((run / "evaluations.json").read_text())) == ["0", "2", "4"]
    assert load_model(run).config.image.width == 16
    assert {path.name for path in run.iterdir()} == {
        "config.yaml", "metrics.jsonl", "evaluations.json", "result.json", "examples.png", "checkpoints",
        "pictures", "report.html",
    }  # fmt: skip


def test_quiet_leaves_only_the_result(data, tmp_path, capsys):
    assert train(*SMALL, *data, "--steps", 1, "--output", tmp_path / "run", "--quiet") == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert "mIoU" in out


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_saves_and_says_how_to_continue(data, tmp_path, capsys, number, status):
    run = tmp_path / "run"

    def interrupt():
        while not ((run / "metrics.jsonl").exists() and (run / "metrics.jsonl").read_text()):
            time.sleep(0.01)
        os.kill(os.getpid(), number)

    threading.Thread(target=interrupt).start()
    steps = ["--steps", "100000", "--save-every", "100000"]
    assert train(*SMALL, *data, *steps, "--output", run) == status
    assert f"--resume {run}" in capsys.readouterr().err.splitlines()[-1]
    step = int(next((run / "checkpoints").iterdir()).name[5:])
    assert train("--resume", run, "--steps", step + 2) == 0
    assert metrics(run)[-1]["step"] == step + 2
    assert json.loads((run / "result.json").read_text())["training"]["step"] == step + 2


def test_two_processes_train_like_one_with_the_whole_batch(data, tmp_path, capsys):
    """Without noise and drop path, which are drawn per process, the loss curve is the same."""
    arguments = [
        *SMALL,
        *data,
        "--steps",
        "4",
        "--log-every",
        "1",
        "--no-gumbel",
        "--model",
        "image.drop_path=0",
    ]
    assert train(*arguments, "--batch-size", 16, "--output", tmp_path / "one") == 0
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    processes = [
        start(
            *arguments,
            "--batch-size",
            8,
            "--output",
            tmp_path / "two",
            RANK=str(rank),
            LOCAL_RANK=str(rank),
            WORLD_SIZE="2",
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT=port,
        )
        for rank in range(2)
    ]
    said = [process.communicate(timeout=120) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], said
    assert "run folder: " in said[0][0]
    assert said[1] == ("", "")
    one, two = metrics(tmp_path / "one"), metrics(tmp_path / "two")
    assert [line["loss"] for line in two] == pytest.approx([line["loss"] for line in one], rel=1e-4)
    assert [line["grad_norm"] for line in two] == pytest.approx([line["grad_norm"] for line in one], rel=1e-3)
    assert train("--resume", tmp_path / "two", "--steps", 6) == 0
    assert "was saved by 2 processes, this run has 1" in capsys.readouterr().err


def test_print_config_is_yaml_that_can_be_given_back(tmp_path, capsys):
    assert train("--preset", "groupvit-gcc-yfcc", "--lr", "1e-3", "--print-config") == 0
    text = capsys.readouterr().out
    (tmp_path / "c.yaml").write_text(text)
    assert train("--config", tmp_path / "c.yaml", "--print-config") == 0
    assert capsys.readouterr().out == text


def test_a_sweep_over_seeds_ends_with_mean_and_spread(data, tmp_path, capsys):
    root = tmp_path / "sweep"
    arguments = [*SMALL, *data, "--steps", 2, "--quiet", "--output", root, "--json", tmp_path / "r.json"]
    assert train(*arguments, "--seed", 7, "--seed-sweep", 2) == 0
    summary = json.loads((root / "seed_sweep.json").read_text())
    assert json.loads((tmp_path / "r.json").read_text()) == summary
    assert summary["seeds"] == [7, 8]
    losses = [metrics(root / f"seed_{seed}")[-1]["loss"] for seed in (7, 8)]
    assert [run["loss"] for run in summary["runs"]] == losses
    assert losses[0] != losses[1]
    assert summary["loss"]["mean"] == pytest.approx(sum(losses) / 2)
    assert summary["miou"]["std"] >= 0
    assert "2 seeds" in capsys.readouterr().out
    assert train(*SMALL, *data, "--steps", 2, "--seed", 7, "--output", tmp_path / "one") == 0
    assert weights(tmp_path / "one", 2) == weights(root / "seed_7", 2)


def test_the_report_can_be_made_again(data, tmp_path, capsys):
    run = tmp_path / "run"
    assert train(*SMALL, *data, "--steps", 2, "--output", run) == 0
    (run / "report.html").unlink()
    capsys.readouterr()
    assert train("--report", run) == 0
    assert capsys.readouterr().out == f"report: {run / 'report.html'}\n"
    assert "largest group" in (run / "report.html").read_text()
    assert train("--report", tmp_path / "absent") == 1


def test_the_saved_configuration_works_from_any_folder(data, tmp_path, monkeypatch, capsys):
    """Relative paths are made absolute; --config with it repeats the run elsewhere."""
    folder = next(Path(data[1]).glob("shapes-*")) / "train"
    monkeypatch.chdir(folder.parent)
    assert train(*SMALL, "--data", "train", "--steps", 1, "--output", tmp_path / "run") == 0
    monkeypatch.chdir(tmp_path)
    capsys.readouterr()
    assert train("--config", "run/config.yaml", "--output", "again") == 0
    assert weights(tmp_path / "again", 1) == weights(tmp_path / "run", 1)
    assert "evaluations.json" not in {path.name for path in (tmp_path / "again").iterdir()}
    assert train("--resume", "run", "--steps", 2) == 0
    assert metrics(tmp_path / "run")[-1]["step"] == 2


def test_a_run_is_never_started_over_by_accident(data, tmp_path, capsys):
    run = tmp_path / "run"
    assert train(*SMALL, *data, "--steps", 1, "--output", run) == 0
    saved = weights(run, 1)
    capsys.readouterr()
    assert train(*SMALL, *data, "--steps", 1, "--output", run) == 1
    assert "add --resume auto or name another --output" in capsys.readouterr().err
    assert weights(run, 1) == saved


@pytest.fixture
def bad(tmp_path, data):
    """Things to fail on, by name."""
    places = {"absent": tmp_path / "absent", "empty": tmp_path / "empty", "file": tmp_path / "file"}
    places["empty"].mkdir()
    places["file"].write_text("not a tar")
    (tmp_path / "bad.yaml").write_text("batch_sise: 3\n")
    return places | {"yaml": tmp_path / "bad.yaml", "run": Path(data[1]) / "run"}


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--data", "{absent}"], "{absent}"),
        (["--data", "{absent}/{{00..03}}.tar"], "missing shards: {absent}/00.tar"),
        (["--data", "{empty}"], "holds no .tar file"),
        (["--data", "{file}"], "{file}"),
        (["--preset", "tinny"], "did you mean 'tiny'"),
        (["--batchsize", "3"], "did you mean --batch-size"),
        (["--config", "{yaml}"], "did you mean 'batch_size'"),
        (["--output", "{file}/run"], "{file} is not a folder"),
        (["--json", "{file}/result.json"], "{file} is not a folder"),
        (["--resume", "{absent}"], "--resume {absent}: no such folder"),
        (["--resume", "{empty}"], "--resume {empty}: no usable checkpoint there"),
        (["--resume", "auto"], "--resume auto needs --output"),
        (["--resume", "{run}", "--model", "image.width=32"], "its image.width is 16, here it is 32"),
        (["--resume", "{run}", "--preset", "groupvit-1stage"], "was trained with --preset tiny"),
        (["--eval-data", "{absent}"], "{absent}"),
        (["--eval-protocol", "oficial"], "official"),
        (["--prompt-templates", "nown"], "noun"),
        (["--report-to", "tensorbord"], "not one of tensorboard, wandb"),
        (["--profile-steps", "9:3"], "expected FIRST:END"),
        (["--freeze", "texts"], "no parameter has a name that begins so"),
        (["--seed-sweep", "0"], "more than 0"),
        (["--batch-size", "97"], "fewer than one step"),
        (["--amp", "--amp-dtype", "fp16"], "needs a GPU"),
        (["--device", "cuda"], "no CUDA device"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(bad, data, tmp_path, capsys, argv, message):
    if "cuda" in argv and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    argv = [word.format(**bad) for word in argv]
    output = [] if "--output" in argv or "--resume" in argv else ["--output", str(tmp_path / "run")]
    before = sorted(bad["run"].rglob("*"))
    capsys.readouterr()
    assert train(*SMALL, *data, *output, *argv) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert message.format(**bad) in err
    assert not (tmp_path / "run").exists()
    assert sorted(bad["run"].rglob("*")) == before


def test_compiling_without_a_compiler_is_one_line(monkeypatch, capsys):
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert train("--compile") == 1
    assert capsys.readouterr().err.startswith("error: --compile needs a C++ compiler")


def test_the_module_runs_as_a_program():
    env = {**os.environ, "PYTHONPATH": str(Path(groupvit_fast.__file__).parents[1])}
    command = [sys.executable, "-m", "groupvit_fast.train", "--step", "3"]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "error: unknown option --step: did you mean --steps? (--help lists all)\n"
