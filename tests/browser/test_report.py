"""report.html of a training run in a real browser: both schemes, a narrow window, mouse and slider."""

from __future__ import annotations

import json

import pytest
from PIL import Image
from selenium.webdriver import ActionChains

from groupvit_fast.training import report_page


@pytest.fixture(scope="module")
def url(tmp_path_factory):
    """A made-up run of 40 lines, three evaluations and their pictures."""
    run = tmp_path_factory.mktemp("runs") / "<b>run"
    (run / "pictures").mkdir(parents=True)
    (run / "config.yaml").write_text("preset: tiny\nlr: 0.002\n")
    records = [
        {"step": 20 * n, "loss": None if n == 7 else 6 / n, "contrastive": 4 / n, "multi_label": 2 / n,
         "grad_norm": 3.0, "groups_in_use": 7.5, "group_entropy": 0.9, "largest_group": 0.3, "lr": 1e-3 / n,
         "logit_scale": 14.0 + n, "bad_steps": 0, "images_per_s": 250.0, "data_wait": 0.01}
        for n in range(1, 41)
    ]  # fmt: skip
    (run / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    classes = [{"name": "sky", "iou": 0.25, "share": 0.5}, {"name": "<i>sea</i>", "iou": None, "share": 0.5}]
    evaluations = {
        step: {"miou": step / 1000, "dataset": "voc", "per_class": classes} for step in (0, 400, 800)
    }
    (run / "evaluations.json").write_text(json.dumps(evaluations))
    for step, colour in ((0, "red"), (400, "green"), (800, "blue")):
        Image.new("RGB", (300, 100), colour).save(run / "pictures" / f"step_{step:08d}.png")
    return report_page.write(run).as_uri()


@pytest.mark.parametrize(("width", "dark"), [(1280, False), (1280, True), (380, False)])
def test_everything_is_there_and_fits(browser, url, width, dark):
    browser.open(url, width=width, dark=dark)
    assert browser.script("return document.documentElement.scrollWidth <= innerWidth")
    assert browser.find("h1").text == "tiny: <b>run"
    assert [cell.text for cell in browser.all("td:first-child")] == ["sky", "<i>sea</i>", "mean"]
    titles = [title.text for title in browser.all(".chart h3")]
    assert {"Zero-shot mIoU", "Loss", "Groups in use", "Learning rate", "Gradient norm"} <= set(titles)
    assert "Memory of a process" not in titles  # this run has no such numbers
    for svg in browser.all(".chart svg"):
        inside = "const b = arguments[0].querySelector('polyline').getBBox(); return [b.y, b.y + b.height]"
        top, bottom = browser.script(inside, svg)
        assert 0 <= top <= bottom <= 190
    page, ink = browser.script(
        "const s = getComputedStyle(document.body); return [s.backgroundColor, s.color]"
    )
    assert (page == "rgb(18, 20, 24)") == dark
    assert page != ink
    assert browser.problems() == []


def test_the_mouse_reads_a_curve(browser, url):
    browser.open(url)
    svg = next(f for f in browser.all(".chart") if f.find_element("css selector", "h3").text == "Loss")
    svg = svg.find_element("css selector", "svg")
    ActionChains(browser.driver).move_to_element_with_offset(svg, 0, 0).perform()
    tip = browser.find("#tip").text.splitlines()
    step = int(tip[0].split()[1])
    assert 380 <= step <= 440
    assert f"total: {float(f'{6 / (step / 20):.4g}')}" in tip
    assert len(tip) == 4
    ActionChains(browser.driver).move_to_element(browser.find("h1")).perform()
    assert not browser.find("#tip").is_displayed()


def test_the_slider_changes_the_picture(browser, url):
    browser.open(url)
    shown = (
        "return [...document.querySelectorAll('.picture img')].filter(i => i.offsetHeight).map(i => i.alt)"
    )
    assert browser.script(shown) == ["step 800"]
    browser.script(
        "const s = document.querySelector('.picture input'); s.value = 1; s.dispatchEvent(new Event('input'))"
    )
    assert browser.script(shown) == ["step 400"]
    assert browser.find(".picture output").text == "step 400"
    assert browser.script("return document.querySelectorAll('.picture img')[1].naturalWidth") == 300
    assert browser.problems() == []
