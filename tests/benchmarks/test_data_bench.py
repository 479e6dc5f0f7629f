"""The loader's benchmark compares like with like, and writes rows that the goals find."""

from __future__ import annotations

import importlib
import json
import random
import sys
from pathlib import Path

import numpy as np
import pytest
import torch


@pytest.fixture(scope="module")
def bench():
    sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))
    yield importlib.import_module("data_bench")
    sys.path.pop(0)


def test_photos_are_as_heavy_as_photos(bench):
    sizes = [len(bench.photo(seed)) for seed in range(3)]
    assert all(60_000 < size < 100_000 for size in sizes)


def test_contenders_make_the_same_kind_of_picture(bench):
    """Same photos, other draws: mean and spread of the pixels agree, with and without augmentation."""
    photos = [bench.photo(seed) for seed in range(4)] * 12
    rng = random.Random(0)
    for augment in (bench.Augmentation(), bench.AUGMENT):
        ours = bench.decoder(photos, augment, "cpu")()
        theirs = torch.stack(
            [bench.baseline.picture(p, rng, augment=augment is bench.AUGMENT) for p in photos]
        )
        assert ours.shape == theirs.shape == (48, 3, 224, 224)
        room = 0.4 if augment.layers else 0.15
        assert abs(ours.mean() - theirs.mean()) < room
        assert abs(ours.std() - theirs.std()) < room
        if not augment.layers:
            edges = [x.diff(dim=-1).abs().mean().item() for x in (ours, theirs)]
            assert np.isclose(*edges, rtol=0.1), "neither is blurred more than the other"


def test_rows_of_a_short_run(bench, tmp_path, capsys):
    path = tmp_path / "data.json"
    arguments = ["--seconds", "0.01", "--samples", "16", "--device", "cpu", "--json", str(path)]
    assert bench.main([*arguments, "--only", "index"]) == 0
    result = json.loads(path.read_text())
    assert result["bench"] == "data_bench"
    assert {(row["name"], row["contender"]) for row in result["rows"]} == {
        ("index", "wds2idx"),
        ("index", "ours"),
    }
    assert all(row["items"] == 16 and row["median_s"] > 0 for row in result["rows"])
    assert "wds2idx" in capsys.readouterr().out
