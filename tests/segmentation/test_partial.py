"""An evaluation that is killed or shared by several processes has the counts of one that ran through."""

import os
import signal
import subprocess
import sys
import time

import pytest
import torch

from groupvit_fast.model import create_model
from groupvit_fast.segmentation import VocFolder, evaluate, evaluation, protocol
from groupvit_fast.segmentation.evaluation import Ranks
from groupvit_fast.segmentation.partial import PartialResults, Progress, fingerprint
from groupvit_fast.segmentation.tally import Tally

SIZES = [(32, 32), (40, 61), (33, 35), (70, 33), (32, 32), (45, 45), (38, 50), (32, 48), (36, 32)]


class Killed(BaseException):
    """Stands for the end of the process."""


@pytest.fixture
def dataset(tmp_path, tools):
    dataset = VocFolder(tools.make_voc(tmp_path / "voc", sizes=SIZES))
    dataset.items[4].mask.unlink()
    return dataset


@pytest.fixture
def chosen(tools):
    return tools.replace(protocol("official"), short_side=32, crop=32, stride=16)


def essence(result):
    """Everything but the time that it took."""
    values = result.to_json()
    for name in ("seconds", "images_per_s"):
        del values[name]
    values["settings"].pop("processes")
    return values


@pytest.mark.parametrize("died_after", range(1, 9))
def test_goes_on_after_a_kill(dataset, chosen, fake_model, tmp_path, monkeypatch, died_after):
    whole = evaluate(fake_model, dataset, chosen, batch_size=1, details=True)
    monkeypatch.setattr(evaluation, "SAVE_EVERY", -1.0)
    options = {"batch_size": 1, "details": True, "partial": tmp_path / "partial"}
    calls = []

    def die(*_):
        calls.append(1)
        if len(calls) == died_after:
            raise Killed

    with pytest.raises(Killed):
        evaluate(fake_model, dataset, chosen, progress=die, **options)
    fake_model.windows_encoded = 0
    again = evaluate(fake_model, dataset, chosen, **options)
    assert essence(again) == essence(whole)
    # The last image before the end was counted, but not yet saved.
    assert fake_model.windows_encoded <= windows_of(dataset, chosen, died_after - 1)
    fake_model.windows_encoded = 0
    assert essence(evaluate(fake_model, dataset, chosen, **options)) == essence(whole)
    assert fake_model.windows_encoded == 0


def windows_of(dataset, chosen, skipped: int) -> int:
    from groupvit_fast.segmentation.segment import resized_size, window_boxes

    usable = [size for number, size in enumerate(SIZES) if number != 4][skipped:]
    return sum(len(window_boxes(*resized_size(*size, chosen), chosen)) for size in usable)


def test_another_evaluation_does_not_take_over(dataset, chosen, fake_model, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluation, "SAVE_EVERY", -1.0)
    with pytest.raises(Killed):
        evaluate(fake_model, dataset, chosen, batch_size=4, partial=tmp_path / "p", progress=stop_at_once)
    whole = evaluate(fake_model, dataset, chosen, limit=6)
    again = evaluate(fake_model, dataset, chosen, limit=6, partial=tmp_path / "p")
    assert essence(again) == essence(whole)


def stop_at_once(*_):
    raise Killed


def test_a_changed_weight_is_another_evaluation(fake_model):
    before = fingerprint(fake_model, ["a"], {})
    assert before == fingerprint(fake_model, ["a"], {})
    fake_model.names.data[0, 0, 0] += 1e-6
    assert before != fingerprint(fake_model, ["a"], {})
    assert before != fingerprint(fake_model, ["b"], {})


def some_progress(numbers) -> Progress:
    tally = Tally(3, images=9)
    tally.counts += len(numbers)
    tally.scalars["images"] = len(numbers)
    tally.by_image = {number: torch.ones(3, 3, dtype=torch.int32) for number in numbers}
    return Progress(tally, set(numbers), {8: {"key": "k", "reason": "r"}}, 1.5)


def test_files_of_a_crash_are_counted_once(tmp_path):
    """The sum was written, the parts not yet removed; one file is cut short and one belongs elsewhere."""
    place = PartialResults(tmp_path, "this")
    place.save(some_progress([0, 1, 2, 3]), 0)
    place.save(some_progress([1, 3]), 1)
    place.save(some_progress([5]), 2)
    (tmp_path / "3.part").write_bytes(some_progress([6]).to_bytes("this")[:-5])
    (tmp_path / "4.part").write_bytes(some_progress([7]).to_bytes("other"))
    (tmp_path / "5.part").write_bytes(b"")
    found = place.load()
    assert found.done == set(found.tally.by_image) == {0, 1, 2, 3, 5}
    assert found.tally.scalars["images"] == 5
    assert found.tally.counts.tolist() == [[5] * 3] * 3
    assert found.left_out == {8: {"key": "k", "reason": "r"}}
    flipped = bytearray((tmp_path / "2.part").read_bytes())
    flipped[-3] ^= 1
    (tmp_path / "2.part").write_bytes(flipped)
    assert place.load().done == {0, 1, 2, 3}


@pytest.mark.parametrize("size", [2, 3, 4, 20])
def test_processes_share_the_images(dataset, chosen, fake_model, size):
    """One process after the other here: each does its share, the first adds up."""
    whole = evaluate(fake_model, dataset, chosen, details=True)
    states: list = []

    def collect(value):
        states.append(value)
        return []

    fake_model.windows_encoded = 0
    for rank in range(1, size):
        assert evaluate(fake_model, dataset, chosen, details=True, ranks=Ranks(rank, size, collect)) is None
    first = Ranks(0, size, lambda value: [value, *states])
    assert essence(evaluate(fake_model, dataset, chosen, details=True, ranks=first)) == essence(whole)
    assert fake_model.windows_encoded == windows_of(dataset, chosen, 0)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    folder = tmp_path_factory.mktemp("weights") / "tiny"
    create_model("tiny", seed=0).save_pretrained(folder)
    return folder


@pytest.mark.slow
def test_torchrun_and_a_real_kill(weights, tmp_path, tools):
    """Two processes are killed while they work; three finish what is left."""
    import json

    root = tools.make_voc(tmp_path / "voc", sizes=[(200, 300)] * 120)
    words = ["-m", "groupvit_fast.evaluate", weights, "--root", root, "--batch-size", "1", "--device", "cpu"]
    words = [*map(str, words)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, *words, "--json", tmp_path / "whole.json"], check=True, env=environment)
    output = tmp_path / "shared"
    patched = (
        "import sys; from groupvit_fast.segmentation import evaluation; evaluation.SAVE_EVERY = 0.05;"
        "from groupvit_fast import evaluate; from groupvit_fast.console import run_command;"
        "sys.exit(run_command(evaluate.main, sys.argv[1:]))"
    )
    (tmp_path / "run.py").write_text(patched)
    shared = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
    arguments = [*words[2:], "--output", str(output)]
    environment["PYTHONPATH"] = os.getcwd()
    process = subprocess.Popen(
        [sys.executable, *shared, "2", tmp_path / "run.py", *arguments],
        env=environment,
        start_new_session=True,
    )
    for _ in range(600):
        time.sleep(0.1)
        if len(list(output.glob("partial/*.part"))) == 2:
            break
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert list(output.glob("partial/*.part"))
    assert not (output / "result.json").exists()
    subprocess.run(
        [sys.executable, *shared, "3", tmp_path / "run.py", *arguments], check=True, env=environment
    )
    whole, again = (
        json.loads(path.read_text()) for path in (tmp_path / "whole.json", output / "result.json")
    )
    assert again["confusion"] == whole["confusion"]
    assert again["per_class"] == whole["per_class"]
    assert again["images"] == 120
    assert not (output / "partial").exists()
