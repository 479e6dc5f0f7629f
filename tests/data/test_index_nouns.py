"""Nouns found at index time are those that training would find itself."""

import random

import numpy as np
import pytest

from groupvit_fast.console import UserError
from groupvit_fast.data import index_nouns, text
from groupvit_fast.data.index import read_index
from groupvit_fast.data.index_files import store_index
from groupvit_fast.data.indexing import prepare_indexes
from groupvit_fast.data.pipeline import TrainLoader
from groupvit_fast.data.reader import SampleReader

CAPTIONS = [
    "A dog runs on the sand &amp; two big dogs sleep",
    "of the and",
    "Two red squares, a small green circle above them",
    "Ein Hund — naïve café\x00",
    "ﬁne ﬁsh at the <b>market</b>",
]


@pytest.fixture
def tar(write_tar, tmp_path, noise_image):
    members = []
    for n, caption in enumerate(CAPTIONS):
        members += [(f"{n}.jpg", noise_image(n)), (f"{n}.txt", caption.encode())]
    return write_tar(tmp_path / "s.tar", members)


@pytest.mark.parametrize("tags", ["official", "nouns", "phrases"])
def test_stored_nouns_equal_those_found_at_run_time(tar, tags):
    prepare_indexes([tar], nouns=tags)
    stored = read_index(tar).nouns
    reader = SampleReader([tar])
    expected = [text.nouns(caption, tags) for caption in reader.captions(np.arange(len(CAPTIONS)))]
    assert [stored.of(n) for n in range(len(CAPTIONS))] == expected
    assert reader.nouns(np.array([2, 0]), tags) == [expected[2], expected[0]]
    others = "nouns" if tags == "official" else "official"
    assert reader.nouns(np.array([2, 0]), others) == [None, None]


def test_training_reads_them_instead_of_tagging(tar, monkeypatch):
    def batch():
        loader = TrainLoader(tar, batch_size=5, image_size=8, num_prompts=2, num_threads=1, noun_tags="nouns")
        iterator = iter(loader)
        try:
            return next(iterator)
        finally:
            iterator.close()

    tagged = batch()
    prepare_indexes([tar], nouns="nouns")

    def refuse(caption, tagger):
        raise AssertionError("tagged at run time")

    monkeypatch.setattr(text, "_tagged", refuse)
    stored = batch()
    assert stored.texts.tolist() == tagged.texts.tolist()
    assert stored.text_index.tolist() == tagged.text_index.tolist()


def test_nouns_of_another_version_are_found_again(tar, monkeypatch):
    prepare_indexes([tar], nouns="nouns")
    monkeypatch.setattr(index_nouns, "VERSION", 0)
    assert read_index(tar).nouns is None
    prepare_indexes([tar], nouns="nouns")
    assert read_index(tar).nouns is not None


def test_known_words_draw_the_same_prompts():
    caption = "a dog and a cat on sand"
    known = text.draw_prompts(caption, 2, random.Random(3), words=text.nouns(caption))
    assert known == text.draw_prompts(caption, 2, random.Random(3))


def test_phrases_keep_adjectives_with_their_noun():
    assert text.nouns("two big red squares, a small circle on sand", "phrases") == [
        "big red squares",
        "small circle",
        "sand",
    ]
    assert text.nouns("it is very red", "phrases") == []


def test_nltk_is_used_where_it_is_asked_for(monkeypatch):
    nltk = pytest.importorskip("nltk")
    monkeypatch.setattr(nltk, "word_tokenize", str.split)
    monkeypatch.setattr(nltk, "pos_tag", lambda words: [(word, "VBG") for word in words])
    text._tagged.cache_clear()
    assert text.nouns("one two", "nltk:official") == ["one", "two"]
    assert text.nouns("one two", "nltk:nouns") == []
    text._tagged.cache_clear()

    def no_data(words):
        raise LookupError("Resource not found")

    monkeypatch.setattr(nltk, "pos_tag", no_data)
    with pytest.raises(UserError, match="nltk has no data here: run"):
        text.nouns("one two", "nltk:official")
    with pytest.raises(UserError, match="or nltk: before one"):
        text.nouns("one two", "spacy:official")


def test_index_without_a_writable_place_still_has_its_nouns(tar, monkeypatch):
    from groupvit_fast.data import index_files

    def refuse(path, data):
        raise OSError(30, "Read-only file system", str(path))

    monkeypatch.setattr(index_files, "write_bytes_atomically", refuse)
    (index,) = prepare_indexes([tar], nouns="nouns")
    assert index.nouns.of(1) == []
    assert store_index(index, None) is None
