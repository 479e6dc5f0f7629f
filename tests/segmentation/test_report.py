"""The table that people read."""

import math

import pytest

from groupvit_fast.console import UserError
from groupvit_fast.segmentation.report import BAR_WIDTH, ClassResult, Evaluation, bar

TABLE = """\
voc-folder: 12 images, protocol shapes, 6 images/s

class          IoU                          pixels  predicted
grass        0.750  ███████████████          90.0%      80.0%
polar bear   0.250  █████                    10.0%      20.0%
ball             -                            0.0%       0.0%

mIoU               0.500  95 % interval over images: 0.400 to 0.600
  largest class    0.450  "grass" everywhere
  oracle           0.800  each group given its best class
pixel accuracy     0.750
mean accuracy      0.600
best mask          0.700  Jaccard index of the group that fits best
named right        0.850  of 40 pure groups
groups in use        3.2  of 8"""


def evaluation(**changes) -> Evaluation:
    values = {
        "dataset": "voc-folder",
        "images": 12,
        "miou": 0.5,
        "pixel_accuracy": 0.75,
        "mean_accuracy": 0.6,
        "per_class": (
            ClassResult("grass", 0.75, 0.8, 0.9, 0.8),
            ClassResult("polar bear", 0.25, 0.4, 0.1, 0.2),
            ClassResult("ball", math.nan, math.nan, 0.0, 0.0),
        ),
        "oracle_miou": 0.8,
        "largest_class": "grass",
        "miou_largest_class": 0.45,
        "groups_in_use": 3.25,
        "groups": 8,
        "best_mask_jaccard": 0.7,
        "miou_interval": (0.4, 0.6),
        "pure_groups": 40,
        "naming_accuracy": 0.85,
        "seconds": 2.0,
        "images_per_s": 6.0,
        "confusion": ((1, 2), (3, 4)),
        "left_out": (),
        "protocol": {"name": "shapes"},
        "settings": {},
    }
    return Evaluation(**{**values, **changes})


def test_table():
    assert evaluation().table() == TABLE


def test_table_beside_an_earlier_result():
    before = evaluation(miou=0.1, per_class=(ClassResult("grass", 0.05, 0, 0.9, 0),))
    lines = evaluation().table(before).splitlines()
    assert lines[2].split() == ["class", "before", "after", "pixels", "predicted"]
    assert lines[3].split()[:3] == ["grass", "0.050", "0.750"]
    assert lines[4].split()[:4] == ["polar", "bear", "-", "0.250"]
    assert any(line.split() == ["before", "0.100"] for line in lines)


def test_columns_stay_aligned():
    lines = evaluation().table(evaluation()).splitlines()
    assert len({len(line) for line in lines[2:6]}) == 1


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (0, ""),
        (1, "█" * BAR_WIDTH),
        (0.5, "█" * (BAR_WIDTH // 2)),
        (1 / (BAR_WIDTH * 8), "▏"),
        (2, "█" * BAR_WIDTH),
    ],
)
def test_bar(value, expected):
    assert bar(value) == expected


def test_undefined_numbers_become_null():
    values = evaluation(naming_accuracy=math.nan).to_json()
    assert values["naming_accuracy"] is None
    assert values["per_class"][2]["iou"] is None
    assert values["confusion"] == [[1, 2], [3, 4]]


def test_details_have_lines_of_their_own():
    table = evaluation(boundary_miou=0.3, oracle_miou_by_stage=(0.9, 0.8)).table()
    assert "  oracle, stage 1  0.900  the groups of that stage\n" in table
    assert "  near contours    0.300  boundary IoU" in table
    assert "interval" not in evaluation(miou_interval=(math.nan, math.nan)).table()


@pytest.mark.parametrize(
    "change",
    [
        {"per_class": 3},
        {"per_class": [3]},
        {"per_class": [{"name": "grass"}]},
        {"per_class": []},
        {"protocol": "official"},
        {"protocol": {}},
        {"settings": None},
        {"miou": "0.5"},
        {"miou_interval": [0.1]},
        {"left_out": 2},
    ],
)
def test_json_that_is_no_result(change):
    with pytest.raises(UserError, match="not an evaluation result"):
        Evaluation.from_json(evaluation().to_json() | change)


def test_keys_of_a_later_version_are_passed_over():
    values = evaluation().to_json() | {"new": 1}
    values["per_class"] = [row | {"new": 2} for row in values["per_class"]]
    assert Evaluation.from_json(values).table() == TABLE
