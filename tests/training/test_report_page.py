"""The page of a run from its files alone, whatever is missing; curves with round axes."""

from __future__ import annotations

import json
import math
import re

import pytest

from groupvit_fast.console import UserError
from groupvit_fast.training import report_page
from groupvit_fast.training.curves import MOST_POINTS, Line, chart, short, thinned, ticks

RECORD = {
    "step": 1,
    "loss": 2.5,
    "grad_norm": 1.0,
    "images_per_s": 9.0,
    "bad_steps": 1,
    "groups_in_use": None,
}


def test_a_run_that_only_just_began(tmp_path):
    (tmp_path / "metrics.jsonl").write_text(json.dumps(RECORD) + "\n" + '{"step": 2, "lo')
    page = report_page.write(tmp_path).read_text()
    assert "2.500" in page
    assert "{{" not in page
    assert not re.search(r'(src|href)="(?!data:)', page)  # nothing is loaded from elsewhere
    assert "Configuration" not in page


def test_no_run_is_one_line(tmp_path):
    with pytest.raises(UserError, match="holds no run to report on"):
        report_page.write(tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("low", "high", "inside", "expected"),
    [
        (0, 100, False, [0, 25, 50, 75, 100]),
        (0.1, 0.93, False, [0, 0.25, 0.5, 0.75, 1.0]),
        (20, 1200, True, [500, 1000]),
        (5, 5, False, [4.5, 4.75, 5, 5.25, 5.5]),
        (-3, 4, False, [-4, -2, 0, 2, 4]),
    ],
)
def test_ticks_are_round_and_enclose_the_values(low, high, inside, expected):
    assert ticks(low, high, inside=inside) == pytest.approx(expected)


def test_numbers_are_short():
    values = [0, 0.25, 4e-5, 1200, 15000, 2_500_000, 12.0]
    assert [short(value) for value in values] == ["0", "0.25", "4e-05", "1200", "15k", "2.5M", "12"]


def test_long_lines_are_thinned_and_keep_their_end():
    points = [(float(step), math.sin(step)) for step in range(10 * MOST_POINTS + 3)]
    few = thinned(points)
    assert len(few) <= MOST_POINTS + 1
    assert few[-1] == points[-1]
    assert thinned(points[:50]) == points[:50]


def test_a_curve_ends_where_its_values_say(tmp_path):
    svg = chart("t", [Line("a", [(0, 0.0), (5, None), (10, 10.0), (7, float("nan"))])])
    places = re.search(r'points="([^"]+)"', svg)[1].split()
    assert places == ["46.0,166.0", "448.0,8.0"]
    assert chart("t", [Line("a", [(0, None)])]) == ""
