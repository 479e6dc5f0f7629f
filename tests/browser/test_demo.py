"""The demo in a real browser: samples, own photos by every way in, edits of the classes, and bad turns."""

import io
import threading

import numpy as np
import pytest
from PIL import Image

from groupvit_fast.data.shapes_scenes import draw_scene
from groupvit_fast.model import load_model
from groupvit_fast.segmentation import protocol, studio
from groupvit_fast.segmentation.server import DemoServer
from groupvit_fast.segmentation.studio import Studio


@pytest.fixture(scope="module")
def model(checkpoint):
    return load_model(checkpoint)


@pytest.fixture
def server(model):
    with DemoServer(
        Studio(model, protocol("shapes"), name="two-stages", classes="dog, cat, sky"), 0
    ) as found:
        thread = threading.Thread(target=found.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield found
        found.shutdown()
        thread.join()


@pytest.fixture
def page(browser, server):
    browser.open(server.address)
    browser.wait(lambda: browser.all(".list li"), "the segments of the first sample")
    return browser


@pytest.fixture
def photo(tmp_path):
    path = tmp_path / "mine.png"
    Image.fromarray(draw_scene(np.random.default_rng(9), 120).image).save(path)
    return path


def listed(page):
    return [name.text for name in page.all(".list .name")]


def type_classes(page, text):
    page.script(
        "const t = document.getElementById('classes'); t.value = arguments[0];"
        "t.dispatchEvent(new Event('input', {bubbles: true}))",
        text,
    )


def drop(page, data: bytes, name: str):
    """Let go of a file over the page, as a file manager does."""
    page.script(
        "const files = new DataTransfer();"
        "files.items.add(new File([new Uint8Array(arguments[0])], arguments[1]));"
        "for (const kind of ['dragenter', 'dragover', 'drop'])"
        " document.body.dispatchEvent(new DragEvent(kind, {dataTransfer: files, bubbles: true}))",
        list(data), name,
    )  # fmt: skip


def label(page):
    return page.find("canvas").get_attribute("aria-label")


def test_the_first_sample_is_there_at_once(page, server):
    assert page.problems() == []
    assert label(page) == "Sample 1, 96 x 96 pixels"
    assert page.find("#classes").get_attribute("value") == "dog, cat, sky"
    assert set(listed(page)) <= {"dog", "cat", "sky"}
    assert len(page.all("#photos button")) == studio.SAMPLES
    assert page.find("#facts").text == "two-stages · protocol shapes · 5 groups"
    loaded = page.script("return performance.getEntriesByType('resource').map((entry) => entry.name)")
    assert all(name.startswith((server.address, "data:", "blob:")) for name in loaded)


def test_edits_change_the_segments_and_encode_nothing(page, server, model, monkeypatch):
    def refuse(*_):
        raise AssertionError("the photo was encoded again")

    monkeypatch.setattr(model, "encode_groups", refuse)
    before = page.pixels()
    type_classes(page, "grass, water, ")
    page.wait(lambda: set(listed(page)) <= {"grass", "water"}, "the new classes")
    assert page.find("#status").text.startswith("2 classes in ")
    assert page.pixels() != before
    type_classes(page, "grass, grass")
    page.wait(lambda: "occurs twice" in page.find("#status").text, "the complaint")
    assert page.find("#classes").get_attribute("aria-invalid") == "true"
    assert set(listed(page)) <= {"grass", "water"}
    type_classes(page, "grass|meadow, house")
    page.wait(lambda: page.find("#classes").get_attribute("aria-invalid") == "false", "its end")
    page.script("const s = document.querySelector('.editor select'); s.value = 'voc21';"
                "s.dispatchEvent(new Event('change'))")  # fmt: skip
    page.wait(lambda: page.find("#status").text.startswith("20 classes"), "the list of a benchmark")


def test_background_is_switched_on_and_off(page):
    page.find("#background").click()
    page.script(
        "const s = document.querySelector('.editor [type=range]'); s.value = 100;"
        "s.dispatchEvent(new Event('input', {bubbles: true}))"
    )
    page.wait(lambda: "background" in listed(page), "background")
    assert page.find(".editor .number").text == "1.00"
    page.find("#background").click()
    page.wait(lambda: "background" not in listed(page), "the end of it")


def test_photos_by_button_drop_and_paste(page, photo):
    page.find("#file").send_keys(str(photo))
    page.wait(lambda: label(page) == "mine.png, 120 x 120 pixels", "the chosen photo")
    page.wait(lambda: len(page.all("#photos button")) == studio.SAMPLES + 1, "its place in the strip")
    assert page.all("#photos button")[0].get_attribute("aria-pressed") == "true"
    buffer = io.BytesIO()
    Image.fromarray(draw_scene(np.random.default_rng(11), 64).image).save(buffer, "PNG")
    drop(page, buffer.getvalue(), "dropped.png")
    page.wait(lambda: label(page) == "dropped.png, 64 x 64 pixels", "the dropped photo")
    assert not page.find("#drop").is_displayed()
    page.script(
        "const files = new DataTransfer();"
        "files.items.add(new File([new Uint8Array(arguments[0])], 'pasted.png'));"
        "document.dispatchEvent(new ClipboardEvent('paste', {clipboardData: files, bubbles: true}))",
        list(photo.read_bytes()),
    )
    page.wait(lambda: label(page) == "pasted.png, 120 x 120 pixels", "the pasted photo")
    page.all("#photos button")[-1].click()
    page.wait(lambda: label(page).startswith(f"Sample {studio.SAMPLES}"), "a sample again")
    assert page.problems() == []


def test_what_is_no_photo_is_told_and_the_last_one_stays(page):
    drop(page, b"not an image", "notes.txt")
    alert = page.find("#alert")
    page.wait(alert.is_displayed, "the complaint")
    assert alert.text == "notes.txt: cannot be read as an image (unknown or damaged format)"
    assert label(page).startswith("Sample 1")
    assert page.all("#photos button")[0].get_attribute("aria-pressed") == "true"
    page.all("#photos button")[1].click()
    page.wait(lambda: not alert.is_displayed(), "the end of it")


def test_a_file_that_is_too_large_is_not_even_sent(page):
    page.script(
        "const files = new DataTransfer();"
        "files.items.add(new File([new Uint8Array(26 << 20)], 'huge.png'));"
        "document.body.dispatchEvent(new DragEvent('drop', {dataTransfer: files, bubbles: true}))"
    )
    page.wait(page.find("#alert").is_displayed, "the complaint")
    assert page.find("#alert").text == "huge.png: 26 MB; at most 25 MB are taken."


def test_a_forgotten_photo_is_sent_again(page, server):
    server.studio._photos.clear()
    type_classes(page, "grass, water")
    page.wait(lambda: set(listed(page)) <= {"grass", "water"}, "the new classes")
    assert not page.find("#alert").is_displayed()


def test_a_server_that_is_gone_is_told(page):
    offline = {"offline": True, "latency": 0, "downloadThroughput": -1, "uploadThroughput": -1}
    page.driver.execute_cdp_cmd("Network.enable", {})
    page.driver.execute_cdp_cmd("Network.emulateNetworkConditions", offline)
    try:
        type_classes(page, "grass, water")
        page.wait(page.find("#alert").is_displayed, "the complaint")
        assert page.find("#alert").text == "the demo does not answer; does it still run in its terminal?"
    finally:
        page.driver.execute_cdp_cmd("Network.emulateNetworkConditions", {**offline, "offline": False})
    type_classes(page, "grass, sand")
    page.wait(lambda: not page.find("#alert").is_displayed(), "the end of it")


def test_quick_clicks_end_at_the_last_photo(page):
    page.script("document.querySelectorAll('#photos button').forEach((button) => button.click())")
    page.wait(lambda: label(page).startswith(f"Sample {studio.SAMPLES}"), "the last sample")
    pressed = [button.get_attribute("aria-pressed") for button in page.all("#photos button")]
    assert pressed == ["false"] * (studio.SAMPLES - 1) + ["true"]
    page.wait(lambda: not page.find(".stage").get_attribute("aria-busy"), "rest")
    assert page.problems() == []


@pytest.mark.parametrize("width", [320, 768])
def test_narrow_windows_do_not_scroll_sideways(browser, server, width):
    browser.open(server.address, width=width, height=720)
    browser.wait(lambda: browser.all(".list li"), "the segments")
    assert browser.script("return document.documentElement.scrollWidth") <= width
