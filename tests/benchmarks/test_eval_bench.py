"""The evaluation benchmark: both contenders, a JSON file, and no number for labels that differ."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from groupvit_fast.console import run_command
from groupvit_fast.model import create_model

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import eval_bench

WORDS = ["--preset", "tiny", "--protocol", "shapes", "--images", "2", "--part", "1", "--seconds", "0"]
WORDS += ["--device", "cpu", "--precision", "fp32", "bf16"]


def test_rows_of_both(tmp_path, capsys):
    path = tmp_path / "bench.json"
    assert run_command(eval_bench.main, [*WORDS, "--json", str(path)]) == 0
    result = json.loads(path.read_text())
    assert result["bench"] == "eval_bench"
    rows = {(row["name"], row["case"], row["contender"]): row for row in result["rows"]}
    cases = {key[:2] for key in rows}
    assert cases == {
        *(("decoding, 500 x 375", name) for name in eval_bench.CLASSES),
        ("evaluation, an image", "shapes"),
        ("evaluation, an image", "shapes bf16"),
    }
    for case in cases:
        reference, own = rows[(*case, "reference")], rows[(*case, "ours")]
        assert reference["ratio"] == pytest.approx(reference["median_s"] / own["median_s"])
    voc = rows["decoding, 500 x 375", "voc21", "reference"]
    assert voc["peak_bytes"] > 5 * rows["decoding, 500 x 375", "voc21", "ours"]["peak_bytes"]
    assert voc["labels_seen"] >= 2
    out = capsys.readouterr().out
    assert "pixels as in the reference" in out
    assert out.count("decoding, 500 x 375") == 3
    full, half = (
        {part: rows["evaluation, an image", case, part] for part in ("reference", "released", "ours")}
        for case in ("shapes", "shapes bf16")
    )
    assert full["reference"]["median_s"] == half["reference"]["median_s"]
    assert full["released"]["ratio"] == pytest.approx(full["released"]["median_s"] / full["ours"]["median_s"])
    assert full["ours"]["median_s"] != half["ours"]["median_s"]


@pytest.mark.parametrize(
    ("part", "message"), [("decode", "pixels differ"), ("whole", "have the label of the")]
)
def test_different_labels_are_no_benchmark(monkeypatch, capsys, part, message):
    real = eval_bench.segment_pixels, eval_bench.segment_image
    monkeypatch.setattr(eval_bench, "segment_pixels", lambda *args: real[0](*args).roll(3, 0))
    monkeypatch.setattr(eval_bench, "segment_image", lambda *args: real[1](*args).roll(3, 0))
    assert run_command(eval_bench.main, [*WORDS, "--only", part]) == 1
    captured = capsys.readouterr()
    assert message in captured.err
    assert "ours" not in captured.out


def test_a_run_that_is_cut_off_keeps_what_it_had(monkeypatch, tmp_path):
    def stopped(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(eval_bench, "whole_evaluation", stopped)
    path = tmp_path / "bench.json"
    with pytest.raises(KeyboardInterrupt):
        eval_bench.main([*WORDS, "--json", str(path)])
    cases = [row["case"] for row in json.loads(path.read_text())["rows"]]
    assert list(dict.fromkeys(cases)) == list(eval_bench.CLASSES)


def test_agreement_of_the_precisions_of_a_checkpoint(tmp_path, monkeypatch, capsys):
    create_model("tiny", seed=0).save_pretrained(tmp_path / "weights")
    monkeypatch.setattr(eval_bench, "SCENES", 3)
    words = ["--only", "agreement", "--device", "cpu", "--json", str(tmp_path / "bench.json")]
    assert run_command(eval_bench.main, [*words, "--checkpoint", str(tmp_path / "weights")]) == 0
    rows = {
        row["contender"]: row["value"] for row in json.loads((tmp_path / "bench.json").read_text())["rows"]
    }
    assert rows.keys() == {"same labels", "mIoU fp32", "mIoU bf16"}
    assert 0 < rows["same labels"] <= 1
    assert run_command(eval_bench.main, words) == 1
    assert "give one with --checkpoint" in capsys.readouterr().err
