"""Class lists, synonyms and the averaging orders of templates."""

import pytest
import torch
import torch.nn.functional as F

from groupvit_fast.console import UserError
from groupvit_fast.data.text import tokenize
from groupvit_fast.segmentation import class_embeddings
from groupvit_fast.segmentation.prompts import (
    TEMPLATE_SETS,
    encode_classes,
    parse_classes,
    read_class_file,
    synonyms,
)


def test_parse_classes():
    assert parse_classes(" dog, tall  grass ,sofa| couch") == ["dog", "tall grass", "sofa| couch"]
    assert synonyms("sofa| couch") == ["sofa", "couch"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "class list is empty"),
        ("  , ", "class list is empty"),
        ("dog,,cat", "empty name"),
        ("dog, cat,", "empty name"),
        ("dog, Dog", "'Dog' occurs twice"),
        ("sofa|couch, chair|couch", "'couch' occurs twice"),
        ("sofa|, chair", "empty synonym"),
    ],
)
def test_faulty_class_lists(text, message):
    with pytest.raises(UserError, match=message) as error:
        parse_classes(text)
    assert "\n" not in str(error.value)


def test_read_class_file(tmp_path):
    path = tmp_path / "classes.txt"
    path.write_text("# a comment\nbackground\n potted  plant\nsofa|couch\n\n\n")
    assert read_class_file(path) == ["background", "potted plant", "sofa|couch"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "class list is empty"),
        (b"# only a comment\n", "class list is empty"),
        (b"a\n\nb\n", "blank line before class 1"),
        (b"a\nA\n", "occurs twice"),
        (b"\xff\xfe\x00", "not a UTF-8 text file"),
    ],
)
def test_faulty_class_files(tmp_path, content, message):
    path = tmp_path / "classes.txt"
    path.write_bytes(content)
    with pytest.raises(UserError, match=message) as error:
        read_class_file(path)
    assert str(path) in str(error.value)


def test_missing_class_file(tmp_path):
    with pytest.raises(UserError, match="no such class list"):
        read_class_file(tmp_path / "none.txt")


@pytest.mark.parametrize("normalise_each", [False, True])
def test_both_averaging_orders(fake_model, normalise_each):
    """The mean over templates, one name and one template at a time."""
    names, templates = ["dog", "polar bear", "ball"], ["a photo of a {}.", "{}", "art of the {} in snow."]
    rows = []
    for name in names:
        parts = [fake_model.encode_text(tokenize([template.format(name)], 16))[0] for template in templates]
        if normalise_each:
            parts = [part / part.norm() for part in parts]
        mean = sum(parts) / len(parts)
        rows.append(mean / mean.norm())
    result = class_embeddings(fake_model, names, templates, normalise_each=normalise_each, batch_size=4)
    torch.testing.assert_close(result, torch.stack(rows))


def test_the_orders_differ(fake_model):
    templates = TEMPLATE_SETS["subset"]
    one = class_embeddings(fake_model, ["dog"], templates)
    other = class_embeddings(fake_model, ["dog"], templates, normalise_each=True)
    assert (one - other).abs().max() > 1e-3


def test_synonyms_have_a_row_each(fake_model):
    text = encode_classes(fake_model, ["dog", "sofa|couch", "ball"], ["{}"])
    assert text.owner.tolist() == [0, 1, 1, 2]
    assert text.num_classes == 3
    torch.testing.assert_close(
        text.embeddings, class_embeddings(fake_model, ["dog", "sofa", "couch", "ball"], ["{}"])
    )
    torch.testing.assert_close(text.embeddings, F.normalize(text.embeddings, dim=-1))


def test_template_sets():
    assert len(TEMPLATE_SETS["subset"]) == 7
    assert len(TEMPLATE_SETS["clip"]) == 80
    assert set(TEMPLATE_SETS["subset"]) <= set(TEMPLATE_SETS["clip"])
    assert all(sentence.count("{}") == 1 for sentences in TEMPLATE_SETS.values() for sentence in sentences)


def test_ten_thousand_classes(fake_model):
    text = encode_classes(fake_model, [f"thing {number}" for number in range(10_000)], ["{}"])
    assert text.embeddings.shape == (10_000, 12)
