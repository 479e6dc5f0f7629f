"""The sweep scores each threshold as a whole evaluation does, and guards the split that is scored."""

import json

import numpy as np
import pytest

from groupvit_fast.console import UserError, run_command
from groupvit_fast.evaluate import main
from groupvit_fast.model import create_model
from groupvit_fast.segmentation import VocFolder, evaluate, protocol
from groupvit_fast.segmentation.evaluation import Run, resolve_protocol
from groupvit_fast.segmentation.sweep import sweep_thresholds, table

NAMES = ("background", "sky", "sea", "sand", "boat")


@pytest.mark.parametrize("rule", ["capped", "constant", "probability"])
def test_every_threshold_as_an_evaluation(tmp_path, tools, rule):
    dataset = VocFolder(tools.make_voc(tmp_path / "voc", sizes=[(32, 32), (40, 61), (70, 33)], names=NAMES))
    named = protocol("sclip" if rule == "probability" else "official")
    chosen = tools.replace(named, short_side=32, crop=32, stride=16, background_rule=rule, logit_scale=20.0)
    model = tools.FakeModel().eval()
    run = Run(model, dataset, resolve_protocol(model, dataset, chosen, 0.5), "cpu", batch_size=2)
    thresholds = 0.1, 0.3, 0.6
    results = sweep_thresholds(run, thresholds)
    expected = [evaluate(model, dataset, chosen, background_threshold=value).miou for value in thresholds]
    assert [value for value, _ in results] == list(thresholds)
    np.testing.assert_allclose([miou for _, miou in results], expected, rtol=1e-12)
    assert len(set(expected)) > 1


def test_no_background_no_sweep(voc, fake_model):
    dataset = VocFolder(voc)
    run = Run(fake_model, dataset, resolve_protocol(fake_model, dataset, protocol("shapes")), "cpu", 2)
    with pytest.raises(UserError, match="has no background class"):
        sweep_thresholds(run)


def test_table_marks_the_best():
    assert table([(0.1, 0.2), (0.35, 0.4)]).splitlines()[1:] == ["      0.1  0.200", "     0.35  0.400  best"]


def test_command(tmp_path, tools, capsys):
    root = tools.make_voc(tmp_path / "voc", names=NAMES)
    create_model("tiny", seed=0).save_pretrained(tmp_path / "tiny")
    words = [str(tmp_path / "tiny"), "--root", str(root), "--device", "cpu", "--sweep"]
    assert run_command(main, words) == 1
    assert "use --split train, or --force" in capsys.readouterr().err
    assert run_command(main, [*words, "--split", "trainval"]) == 1  # of which val is a part
    assert "use --split train, or --force" in capsys.readouterr().err
    assert run_command(main, [*words, "--split", "train"]) == 1
    assert "no split file" in capsys.readouterr().err
    lists = root / "ImageSets/Segmentation"
    (lists / "train.txt").write_text("photo_001\nphoto_002\n")
    output = tmp_path / "out"
    assert run_command(main, [*words, "--split", "train", "--output", str(output)]) == 0
    assert "best" in capsys.readouterr().out
    values = json.loads((output / "sweep.json").read_text())
    assert values["class_names"] == list(NAMES)
    assert values["settings"]["precision"] == "fp32"
    rows = values["thresholds"]
    assert [row["threshold"] for row in rows] == [round(0.05 * k, 2) for k in range(1, 20)]
    assert run_command(main, [*words, "--force", "--limit", "2"]) == 0
