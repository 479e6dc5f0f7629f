"""The page that `segment --html` writes, in a real browser: a file without network, mouse and keyboard."""

import json
import re

import numpy as np
import pytest
import torch
from PIL import Image

from groupvit_fast.console import run_command
from groupvit_fast.data.shapes_scenes import draw_scene
from groupvit_fast.model import load_model
from groupvit_fast.segment import main
from groupvit_fast.segmentation import protocol
from groupvit_fast.segmentation.explore import TextBank, encode_photo, score_photo, stage_groups

EVIL = "<b>sofa</b></script><script>document.title='taken'</script>"
NAMES = ["dog", "cat", "grass", "sky", EVIL]


@pytest.fixture(scope="module")
def result(tmp_path_factory, checkpoint):
    """(URL of a page with two photos, folder of the masks, first photo as pixels)."""
    folder = tmp_path_factory.mktemp("page")
    for number in (1, 2):
        image = draw_scene(np.random.default_rng(number), 96).image
        Image.fromarray(image).save(folder / f"scene{number}.png")
    (folder / "names.txt").write_text("\n".join(NAMES))
    words = [checkpoint, folder / "scene1.png", folder / "scene2.png", "--classes", folder / "names.txt"]
    words += ["--html", folder / "page.html", "--output", folder, "--quiet"]
    assert run_command(main, [str(word) for word in words]) == 0
    with Image.open(folder / "scene1.png") as picture:
        return (folder / "page.html").as_uri(), folder, np.asarray(picture)


@pytest.fixture
def page(browser, result):
    browser.open(result[0])
    browser.wait(lambda: browser.all(".list li"), "the list of classes")
    yield browser
    assert browser.problems() == []


def labels_of(folder, name="scene1"):
    with Image.open(folder / f"{name}_mask.png") as mask:
        return np.asarray(mask), np.array(mask.getpalette()).reshape(-1, 3)


def places(labels, count=25, seed=0):
    """Pixels (row, column) that lie inside their region, so that no border line is drawn there."""
    inside = np.ones(labels.shape, bool)
    for shift in ((0, 1), (1, 0), (0, -1), (-1, 0)):
        inside &= np.roll(labels, shift, (0, 1)) == labels
    inside[[0, -1]] = inside[:, [0, -1]] = False
    rows, columns = np.nonzero(inside)
    return [(rows[i], columns[i]) for i in np.random.default_rng(seed).permutation(len(rows))[:count]]


def centre(row, column):
    return (column + 0.5) / 96, (row + 0.5) / 96


def set_opacity(page, percent):
    page.script(
        "const s = document.getElementById('opacity'); s.value = arguments[0];"
        "s.dispatchEvent(new Event('input', {bubbles: true}))",
        percent,
    )


def test_nothing_is_loaded_from_elsewhere(page):
    loaded = page.script("return performance.getEntriesByType('resource').map((entry) => entry.name)")
    assert all(name.startswith(("data:", "blob:")) for name in loaded)
    assert page.driver.title == "2 segmented photos"
    assert EVIL in [name.text for name in page.all(".list .name")]


def test_colours_are_the_labels_and_opacity_fades_them(page, result):
    _, folder, photo = result
    labels, palette = labels_of(folder)
    assert len(np.unique(labels)) >= 3
    set_opacity(page, 100)
    for row, column in places(labels):
        assert page.colour_at(*centre(row, column)) == palette[labels[row, column]].tolist()
    set_opacity(page, 0)
    enlarged = np.array([page.colour_at(*centre(*place)) for place in places(labels)])
    original = np.array([photo[place] for place in places(labels)])
    assert np.abs(enlarged.astype(int) - original).mean() < 12
    assert page.find(".opacity output").text == "0 %"


def test_pointing_tells_class_score_and_group(page, result, checkpoint):
    _, folder, photo = result
    labels, _ = labels_of(folder)
    model = load_model(checkpoint)
    chosen = protocol("shapes").resolve(dataset="", background=False, image_size=64)
    encoded = encode_photo(model, torch.tensor(photo), chosen)
    scores = score_photo(model, encoded, TextBank(model, chosen).encode(NAMES), chosen)
    groups = stage_groups(encoded, 1, (96, 96)).numpy()
    for row, column in places(labels, 6):
        page.point(*centre(row, column))
        title = page.find(".tip strong").text.split("\n")
        assert title[0] == NAMES[labels[row, column]]
        expected = scores.groups[0, groups[row, column], labels[row, column]].item()
        assert float(title[1].removeprefix("< ")) == pytest.approx(expected, abs=0.011)
        assert page.find(".tip .note").text == f"in final group {groups[row, column] + 1}"
        assert title[0] in page.find("#reading").text
        assert [row.get_attribute("data-label") for row in page.all("li.here")] != []


def test_classes_are_switched_off_and_on(page, result):
    _, folder, _ = result
    labels, _ = labels_of(folder)
    shares = json.loads((folder / "scene1.json").read_text())["shares"]
    rows = page.all(".list li")
    assert [row.find_element("css selector", ".name").text for row in rows] == sorted(
        (name for name in NAMES if shares[name]), key=lambda name: -shares[name]
    )
    name = rows[0].find_element("css selector", ".name").text
    row, column = next(place for place in places(labels, 500) if NAMES[labels[place]] == name)
    covered = page.colour_at(*centre(row, column))
    rows[0].find_element("css selector", "input").click()
    page.point(0.01, 0.01)
    set_opacity(page, 0)
    bare = page.colour_at(*centre(row, column))
    set_opacity(page, 62)
    assert page.colour_at(*centre(row, column)) == bare != covered
    page.all("button.link")[1].click()
    assert not any(box.is_selected() for box in page.all(".list input"))
    page.all("button.link")[0].click()
    assert all(box.is_selected() for box in page.all(".list input"))


def test_views_of_the_groups_and_their_soft_maps(page):
    assert [button.text for button in page.all(".views button")] == [
        "Classes", "First groups", "Final groups", "Photo",
    ]  # fmt: skip
    seen = {page.pixels()}
    for number, title in ((1, "First groups"), (2, "Final groups")):
        page.all(".views button")[number].click()
        assert page.all(".views button")[number].get_attribute("aria-pressed") == "true"
        assert page.find(".list h2").text == title
        seen.add(page.pixels())
    notes = [row.text for row in page.all(".list li .name .note")]
    assert all(re.fullmatch(r".+ (< )?[01]\.\d\d", note) for note in notes)
    for row in range(2):
        page.all(".list button.row")[row].click()
        assert page.all(".list button.row")[row].get_attribute("aria-pressed") == "true"
        page.point(0.5, 0.01)
        seen.add(page.pixels())
    page.all(".views button")[3].click()
    seen.add(page.pixels())
    assert len(seen) == 6


def test_everything_by_keyboard(page, result):
    from selenium.webdriver import Keys

    labels, _ = labels_of(result[1])
    page.script("document.querySelector('canvas').focus()")
    page.press(Keys.ARROW_RIGHT, Keys.ARROW_DOWN)
    x = y = 0.5 + 1 / 40
    assert page.find("#reading").text.startswith(NAMES[labels[int(y * 96), int(x * 96)]])
    assert page.find(".cross").is_displayed()
    for _ in range(50):
        page.press(Keys.ARROW_LEFT)
    assert page.find("#reading").text.startswith(NAMES[labels[int(y * 96), 0]])
    page.press(Keys.ESCAPE)
    assert not page.find(".tip").is_displayed()
    page.press(Keys.TAB)  # All
    page.press(Keys.TAB, Keys.ENTER)  # None
    assert not any(box.is_selected() for box in page.all(".list input"))
    page.script("document.querySelector('.list input').focus()")
    page.press(Keys.SPACE)
    assert page.all(".list input")[0].is_selected()
    page.script("document.querySelectorAll('.views button')[2].focus()")
    page.press(Keys.ENTER)
    page.script("document.querySelector('canvas').focus()")
    page.press(Keys.ARROW_UP, Keys.ENTER)
    assert [row.get_attribute("aria-pressed") for row in page.all(".list button.row")].count("true") == 1


def test_another_photo(page, result):
    labels, palette = labels_of(result[1], "scene2")
    thumbnails = page.all("#photos button")
    assert [item.get_attribute("aria-label") for item in thumbnails] == ["scene1.png", "scene2.png"]
    thumbnails[1].click()
    canvas = page.find("canvas")
    page.wait(lambda: canvas.get_attribute("aria-label").startswith("scene2.png"), "the second photo")
    set_opacity(page, 100)
    row, column = places(labels, 1)[0]
    expected = palette[labels[row, column]].tolist()
    page.wait(lambda: page.colour_at(*centre(row, column)) == expected, "its labels")


def brightness(page, selector):
    colour = page.script(
        "return getComputedStyle(document.querySelector(arguments[0])).backgroundColor", selector
    )
    return sum(map(int, re.findall(r"\d+", colour)[:3])) / 3


def test_light_and_dark(browser, result):
    for dark in (False, True):
        browser.open(result[0], dark=dark)
        assert (brightness(browser, "body") < 60) == dark
        browser.find("#theme").click()
        assert (brightness(browser, "body") < 60) != dark


@pytest.mark.parametrize("width", [320, 375, 768])
def test_narrow_windows_do_not_scroll_sideways(browser, result, width):
    browser.open(result[0], width=width, height=720)
    browser.wait(lambda: browser.all(".list li"), "the list of classes")
    assert browser.script("return document.documentElement.scrollWidth") <= width
    stage, panel = browser.find(".stage").rect, browser.find(".panel").rect
    assert panel["y"] >= stage["y"] + stage["height"]
    assert browser.find("canvas").rect["width"] > 0.6 * width
