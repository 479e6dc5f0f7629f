"""The demo command: where it says it is, how it ends, and one line for every fault."""

import json
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

from groupvit_fast.console import run_command
from groupvit_fast.demo import main
from groupvit_fast.model import create_model

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("weights") / "tiny"
    create_model("tiny", seed=3).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_it_says_where_it_is_and_ends_cleanly(checkpoint, number):
    words = [
        sys.executable,
        "-m",
        "groupvit_fast.demo",
        str(checkpoint),
        "--port",
        "0",
        "--classes",
        "dog, cat",
    ]
    with subprocess.Popen(
        words, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        line = process.stdout.readline()
        address = re.match(r"demo: (http://127\.0\.0\.1:\d+) ", line)[1]
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(f"{address}/api/info", timeout=20) as answer:
            assert json.load(answer)["classes"] == "dog, cat"
        idle = socket.create_connection(("127.0.0.1", int(address.rpartition(":")[2])))
        start = time.monotonic()
        process.send_signal(number)
        rest, errors = process.communicate(timeout=20)
        idle.close()
    assert (process.returncode, rest, errors) == (0, "stopped\n", "")
    assert time.monotonic() - start < 8


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "no checkpoint given; train one in minutes with python -m groupvit_fast.train --amp"),
        (["{dir}/none"], "{dir}/none"),
        (["{weights}", "--port", "70000"], "--port 70000: wanted 0 to 65535"),
        (["{weights}", "--classes", "dog, dog"], "'dog' occurs twice"),
        (["{weights}", "--classes", ","], "class list is empty"),
        (["{weights}", "--protocol", "shape"], "did you mean shapes"),
        (["{weights}", "--port", "{taken}"], "choose another --port, or 0"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line(checkpoint, tmp_path, capsys, words, message):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        places = {"{weights}": checkpoint, "{dir}": tmp_path, "{taken}": taken.getsockname()[1]}
        for key, place in places.items():
            words = [word.replace(key, str(place)) for word in words]
        assert run_command(main, words) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
    assert message.replace("{dir}", str(tmp_path)) in captured.err
