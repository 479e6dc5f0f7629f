"""What the browser gets: maps that unpack to the labels, only what is used, a page nothing breaks out of."""

import base64
import json
import re
import zlib
from html.parser import HTMLParser

import numpy as np
import pytest
import torch

from groupvit_fast.segmentation import page, protocol
from groupvit_fast.segmentation.explore import encode_photo, label_photo, score_photo, stage_groups
from groupvit_fast.segmentation.prompts import encode_classes


def unpacked(part: dict) -> np.ndarray:
    data = zlib.decompress(base64.b64decode(part["data"]))
    return np.frombuffer(data, f"<{part['type']}").reshape(part["shape"])


@pytest.fixture
def parts(tools):
    """(photo, scores, photo part, label part) of one photo in several windows."""

    def make(names, shape=(48, 80), threshold=None, shares=None):
        model = tools.FakeModel().eval()
        image = tools.blobs(*shape, np.random.default_rng(4))
        knobs = {"short_side": 32, "crop": 32, "stride": 16, "background_threshold": threshold}
        chosen = tools.replace(protocol("official"), **knobs)
        photo = encode_photo(model, torch.tensor(image), chosen)
        scores = score_photo(model, photo, encode_classes(model, names, chosen.templates), chosen)
        background = threshold is not None
        names = ["background"] * background + names
        labels = page.label_part(scores, shape, names, background=background, shares=shares)
        picture = page.data_url(*page.picture_bytes(image))
        return photo, scores, page.photo_part("a.jpg", photo, picture), labels

    return make


@pytest.mark.parametrize("highest", [0, 255, 256, 65535, 65536])
def test_packed_takes_the_smallest_type(highest):
    values = np.array([[0, 1, highest]])
    part = page.packed(values)
    assert np.array_equal(unpacked(part), values)
    assert part["type"] == ("u1" if highest <= 255 else "u2" if highest <= 65535 else "u4")


@pytest.mark.parametrize("threshold", [None, 0.3])
def test_labels_names_and_scores(parts, threshold):
    names = [f"thing {number}" for number in range(40)]
    _, scores, _, part = parts(names, threshold=threshold)
    labels = label_photo(scores, (48, 80)).numpy()
    all_names = ["background"] * (threshold is not None) + names
    listed = [item["name"] for item in part["classes"]]
    assert np.array_equal(np.array(listed)[unpacked(part["labels"])], np.array(all_names)[labels])
    for item in part["classes"]:
        assert item["share"] == pytest.approx((labels == all_names.index(item["name"])).mean())
        assert re.fullmatch("#[0-9a-f]{6}", item["colour"])
    assert part["total"] == len(all_names)
    assert (part["background"] is None) == (threshold is None)
    if threshold is not None:
        assert listed[part["background"]] == "background"
    for best, row in zip(part["groups"], scores.groups.flatten(0, 1), strict=True):
        assert listed[best[0][0]] == names[int(row.argmax())]
        assert [score for _, score in best] == pytest.approx(row.topk(4).values.tolist(), abs=1e-4)
    assert unpacked(part["scores"]).shape == (48, 80)


def test_ten_thousand_names_send_only_those_in_use(parts):
    _, _, _, part = parts([f"thing {number}" for number in range(10_000)])
    assert part["total"] == 10_000
    assert len(part["classes"]) < 200
    assert len(json.dumps(part)) < 40_000


def test_shares_counted_at_full_size_are_kept(parts):
    _, _, _, part = parts(["sea", "sand"], shares=[0.25, 0.75])
    assert {item["name"]: item["share"] for item in part["classes"]} == {"sea": 0.25, "sand": 0.75}


def test_groups_parents_and_soft_maps(parts):
    photo, _, part, _ = parts(["sea", "sand"])
    first, final = part["stages"]
    assert [first["title"], final["title"]] == ["First groups", "Final groups"]
    windows = len(photo.boxes)
    assert len(first["colours"]) == 12 * windows
    assert len(final["colours"]) == 6 * windows
    for number, stage in enumerate(part["stages"]):
        assert np.array_equal(unpacked(stage["groups"]), stage_groups(photo, number, (48, 80)).numpy())
    assert final["parents"] is None
    for group, parent in enumerate(first["parents"]):
        window, number = divmod(group, 12)
        above = photo.encodings[window].maps[1][0]
        assert parent == window * 6 + int(above[:, number].argmax())
    heat = unpacked(part["heat"])
    assert heat.shape == (windows, 6, 8, 8)
    assert np.abs(heat.sum(axis=1, dtype=int) - 255).max() <= 6
    assert len(part["boxes"]) == windows


def test_large_photos_are_reduced(parts):
    assert page.page_size((6000, 8000)) == (720, 960)
    assert page.page_size((1, 1)) == (1, 1)
    assert page.page_size((1, 90_000)) == (1, 960)
    _, _, part, labels = parts(["sea", "sand"], shape=(1400, 70))
    assert part["shown"] == [960, 48] == labels["labels"]["shape"]
    assert (part["width"], part["height"]) == (70, 1400)


class Scripts(HTMLParser):
    """The elements of a document, and the text of each script."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.scripts = [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, data):
        if self.tags and self.tags[-1][0] == "script":
            self.scripts.append(data)


def test_the_page_needs_nothing_and_nothing_breaks_out_of_it(parts):
    evil = '</script><img src=x onerror=alert(1)> @DATA@ "\u2028 <!-- <script>'
    _, _, photo, labels = parts([evil, "sand"])
    text = page.self_contained_page(f"a {evil}", ["@STYLE@"], [{**photo, "name": evil, **labels}])
    document = Scripts(text)
    assert [tag for tag, _ in document.tags].count("script") == 2
    assert "img" not in [tag for tag, _ in document.tags]
    for _, attributes in document.tags:
        assert not {"src", "href"} & set(attributes)
    assert not re.search(r"""(src|href)\s*=\s*["']?(https?:)?//|@import|url\(|fetch\(""", text)
    values = json.loads(document.scripts[0])
    assert values["photos"][0]["name"] == evil
    assert values["about"] == ["@STYLE@"]
    assert {item["name"] for item in values["photos"][0]["classes"]} == {evil, "sand"}
    assert "default-src 'none'" in text
