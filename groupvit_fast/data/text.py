"""Captions to token rows: cleaning, CLIP byte-pair tokens, nouns, and the prompts drawn from them.

The vocabulary and the byte-pair merges come with `instant_clip_tokenizer`; the word classes come with
`textblob`'s PatternTagger. Both carry their tables inside the package, so nothing here needs a network.
"""

from __future__ import annotations

import html
import random
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache, lru_cache
from typing import TYPE_CHECKING

import numpy as np

from groupvit_fast.console import UserError
from groupvit_fast.data.prompts import PROMPT_TEMPLATES

if TYPE_CHECKING:  # imported where a tensor is made: commands that index shards start without it
    import torch

CONTEXT_LENGTH = 77
START_TOKEN = 49406
END_TOKEN = 49407

# Tags that count as an object word. GroupViT section 4.1 draws nouns; the public training code also let
# verbs through ("a dog running"), which is what "official" repeats. "phrases" keeps the adjectives and nouns
# that stand together as one ("red squares").
NOUN_TAGS: dict[str, frozenset[str]] = {
    "official": frozenset({"NN", "NNS", "NNP", "VB", "VBD", "VBG", "VBN", "VBP", "VBZ"}),
    "nouns": frozenset({"NN", "NNS", "NNP", "NNPS"}),
    "phrases": frozenset({"NN", "NNS", "NNP", "NNPS"}),
}
_ADJECTIVES = frozenset({"JJ", "JJR", "JJS"})

# The tokenizer's own names of the control tokens. Cut after "<", where the byte-pair words are separate
# anyway, they are spelled out like any other text; "<|endoftext|>" has no meaning to it.
_CONTROL_TEXT = re.compile(r"(?<=<)(?=(?:start|end)_of_text>)")

# Letters with inner hyphens. Single ASCII letters are dropped: the tagger leaves "n" and "t" of "isn't".
_WORD = re.compile(r"[^\W\d_]+(?:-[^\W\d_]+)*")


def clean(text: str) -> str:
    """Repair mojibake, undo HTML escapes twice, collapse white space, lower the case: as CLIP was trained.

    Printable ASCII without an ampersand passes ftfy and HTML unescaping unchanged, so it skips both.
    """
    bare = text.strip(" \t\r\n")
    if not (bare.isascii() and bare.isprintable() and "&" not in bare):
        import ftfy

        text = html.unescape(html.unescape(ftfy.fix_text(text)))
    return " ".join(text.split()).lower()


@cache
def _tokenizer():
    from instant_clip_tokenizer import Tokenizer

    return Tokenizer()


@lru_cache(maxsize=1 << 16)
def token_row(text: str, context_length: int = CONTEXT_LENGTH) -> np.ndarray:
    """Return the unpadded tokens of one text, start and end token included, at most `context_length`.

    Control text inside a caption, such as a literal "<|endoftext|>", stays ordinary characters. The array
    is cached and read-only.
    """
    parts = _CONTROL_TEXT.split(clean(text))
    body = [token for part in parts for token in _tokenizer().encode(part)][: context_length - 2]
    row = np.array([START_TOKEN, *body, END_TOKEN], dtype=np.int64)
    row.flags.writeable = False
    return row


def pad_rows(rows: Sequence[np.ndarray], length: int) -> torch.Tensor:
    """Stack token rows into an int64 tensor [N, length], zeros after each row's end."""
    import torch

    tokens = np.zeros((len(rows), length), dtype=np.int64)
    for target, row in zip(tokens, rows, strict=True):
        target[: len(row)] = row
    return torch.from_numpy(tokens)


def tokenize(texts: Sequence[str], context_length: int = CONTEXT_LENGTH) -> torch.Tensor:
    """CLIP tokens of `texts`: int64 [N, context_length], zero-padded, cut with the end token kept."""
    if isinstance(texts, str):
        raise UserError("tokenize: expected a list of texts, got one string; put it in a list")
    if context_length < 3:
        raise UserError(f"tokenize: context_length {context_length} leaves no room for text; use 3 or more")
    return pad_rows([token_row(text, context_length) for text in texts], context_length)


def unique_rows(
    texts: Sequence[Sequence[str]], context_length: int = CONTEXT_LENGTH
) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokenise a table of texts [B][C] once per different text.

    Returns the different token rows, int64 [U, T] with T the longest of them, and int64 [B, C] row numbers.
    """
    import torch

    numbers: dict[bytes, int] = {}
    rows: list[np.ndarray] = []
    index = []
    for line in texts:
        for item in line:
            row = token_row(item, context_length)
            number = numbers.setdefault(row.tobytes(), len(rows))
            if number == len(rows):
                rows.append(row)
            index.append(number)
    longest = max(map(len, rows), default=0)
    return pad_rows(rows, longest), torch.tensor(index, dtype=torch.int64).reshape(len(texts), -1)


@cache
def _tagger(name: str) -> Callable[[str], list[tuple[str, str]]]:
    if name == "nltk":
        import nltk

        return lambda caption: nltk.pos_tag(nltk.word_tokenize(caption))
    from textblob.en.taggers import PatternTagger

    return PatternTagger().tag


@lru_cache(maxsize=1 << 16)
def _tagged(caption: str, tagger: str) -> tuple[tuple[str, str], ...]:
    """(word, tag) of a cleaned caption; the tag is empty where the word is none."""
    try:
        pairs = _tagger(tagger)(caption)
    except LookupError:
        raise UserError(
            "nltk has no data here: run python -m nltk.downloader averaged_perceptron_tagger_eng punkt_tab, "
            "or leave out nltk:"
        ) from None
    return tuple(
        (w, tag if _WORD.fullmatch(w) and (len(w) > 1 or not w.isascii()) else "") for w, tag in pairs
    )


def check_noun_tags(name: str) -> str:
    """Return `name` if it is a key of NOUN_TAGS, or one behind "nltk:", which chooses NLTK's tagger."""
    if name.removeprefix("nltk:") not in NOUN_TAGS:
        known = ", ".join(NOUN_TAGS)
        raise UserError(f"noun tags '{name}' are unknown; use one of {known}, or nltk: before one")
    return name


def nouns(caption: str, tags: str = "official") -> list[str]:
    """The distinct nouns of a caption in the order they appear, lower case.

    `tags` names a row of NOUN_TAGS: "official" also counts verbs, as the public training code does, and
    "phrases" returns noun phrases. Textblob's PatternTagger finds the word classes; with "nltk:" before the
    name NLTK does, whose data has to be installed.
    """
    tagger, _, kind = check_noun_tags(tags).rpartition(":")
    pairs = _tagged(clean(caption), tagger)
    if kind == "phrases":
        return list(dict.fromkeys(_phrases(pairs)))
    return list(dict.fromkeys(word for word, tag in pairs if tag in NOUN_TAGS[kind]))


def _phrases(pairs: Iterable[tuple[str, str]]) -> Iterator[str]:
    """Adjectives and nouns in a row, up to the last noun of the row."""
    row: list[str] = []
    end = 0
    for word, tag in (*pairs, ("", "")):
        if tag in _ADJECTIVES or tag in NOUN_TAGS["phrases"]:
            row.append(word)
            end = end if tag in _ADJECTIVES else len(row)
            continue
        if end:
            yield " ".join(row[:end])
        row, end = [], 0


def prompt_templates(name: str | Sequence[str]) -> tuple[str, ...]:
    """Resolve "clip" (the 80 ImageNet templates), "noun" (the bare word) or a list of format strings."""
    if name == "clip":
        return PROMPT_TEMPLATES
    if name == "noun":
        return ("{}",)
    if isinstance(name, str):
        raise UserError(f"prompt templates '{name}' are unknown; use clip, noun or a list with {{}} in each")
    for template in name:
        if template.count("{}") != 1:
            raise UserError(f"prompt template '{template}' must contain {{}} exactly once")
    if not name:
        raise UserError("the list of prompt templates is empty; give at least one, such as '{}'")
    return tuple(name)


def draw_prompts(
    caption: str,
    k: int,
    rng: random.Random,
    templates: Sequence[str] = PROMPT_TEMPLATES,
    tags: str = "official",
    fill: str = "caption",
    words: Sequence[str] | None = None,
) -> list[str]:
    """Draw `k` prompts for a caption: up to k different nouns of it, each put into a random template.

    With fewer than `k` nouns, `fill` = "caption" fills the rest with the caption itself (GroupViT section
    3.2) and "noun" with its nouns over again; a caption without nouns always fills all.
    `words` are the caption's nouns where they are known already.
    """
    words = nouns(caption, tags) if words is None else words
    chosen = rng.sample(words, min(k, len(words)))
    prompts = [rng.choice(templates).replace("{}", word) for word in chosen]
    again = prompts if fill == "noun" and prompts else [caption]
    return prompts + [again[i % len(again)] for i in range(k - len(prompts))]
