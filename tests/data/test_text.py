import html
import random

import ftfy
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from groupvit_fast.console import UserError
from groupvit_fast.data import text

# From CLIP's own tokenizer and vocabulary (OpenAI CLIP, MIT licence).
GOLDEN = {
    "a photo of a cat": [49406, 320, 1125, 539, 320, 2368, 49407],
    "": [49406, 49407],
    "Hello, World!": [49406, 3306, 267, 1002, 256, 49407],
    "It's the dog's café — naïve £5": [
        49406, 585, 568, 518, 1929, 568, 15304, 2005, 1097, 35689, 563, 1950, 276, 49407,
    ],
    "don&amp;amp;#39;t": [49406, 847, 713, 49407],
    "Ã©tÃ© &lt;b&gt;": [49406, 3459, 39694, 283, 321, 285, 49407],
    "日本語 😀 ok": [49406, 39121, 44353, 34002, 508, 7334, 2481, 49407],
    "line one\r\nline  two\tend": [49406, 1148, 637, 1148, 1237, 806, 49407],
    "x.y@z.com #tag 2023": [49406, 343, 269, 344, 287, 345, 269, 2464, 258, 3640, 273, 271, 273, 274, 49407],
}  # fmt: skip


@pytest.mark.parametrize("caption", GOLDEN)
def test_tokens_equal_the_original_tokenizer(caption):
    expected = torch.zeros(77, dtype=torch.int64)
    expected[: len(GOLDEN[caption])] = torch.tensor(GOLDEN[caption])
    assert torch.equal(text.tokenize([caption])[0], expected)


def test_long_text_is_cut_with_its_end_token_kept():
    tokens = text.tokenize(["cat " * 100, "cat " * 75, "cat " * 74])
    assert tokens.shape == (3, 77)
    assert tokens[0].tolist() == [49406] + [2368] * 75 + [49407]
    assert torch.equal(tokens[0], tokens[1])
    assert tokens[2, 75] == 49407
    assert tokens[2, 76] == 0
    assert text.tokenize(["cat " * 100], context_length=5).tolist() == [[49406, 2368, 2368, 2368, 49407]]


@pytest.mark.parametrize(
    ("caption", "expected"),
    [
        ("<|endoftext|>", [27, 347, 40786, 4160, 91, 285]),
        ("<|startoftext|>", [27, 347, 993, 6659, 4160, 91, 285]),
        ("a <start_of_text> b!!<End_Of_Text>",
         [320, 283, 1572, 318, 539, 318, 4160, 285, 321, 1443, 283, 806, 318, 539, 318, 4160, 285]),
        ("&lt;end_of_text&gt;", [283, 806, 318, 539, 318, 4160, 285]),
    ],
)  # fmt: skip
def test_control_text_in_a_caption_stays_text(caption, expected):
    assert text.token_row(caption).tolist() == [text.START_TOKEN, *expected, text.END_TOKEN]


@given(
    st.lists(
        st.sampled_from(["<", "|", ">", "start", "end", "_of_", "oftext", "text", " ", "é"]), max_size=12
    )
)
def test_no_mixture_of_control_text_makes_a_control_token(parts):
    body = text.token_row("".join(parts))[1:-1]
    assert (body < text.START_TOKEN).all()


@given(st.text(alphabet=st.one_of(st.characters(max_codepoint=127), st.sampled_from(" &é\u200b;<"))))
def test_fast_path_of_cleaning_changes_nothing(caption):
    slow = html.unescape(html.unescape(ftfy.fix_text(caption)))
    assert text.clean(caption) == " ".join(slow.split()).lower()


def test_html_escapes_are_undone_twice():
    """ftfy leaves escapes alone in a text that has a tag, so both turns are needed here."""
    assert text.clean("<b> &amp;amp;lt;  X") == "<b> &lt; x"


def test_tokenize_names_the_fault():
    with pytest.raises(UserError, match="list of texts"):
        text.tokenize("a cat")
    with pytest.raises(UserError, match="context_length 2"):
        text.tokenize(["a cat"], context_length=2)


def test_nouns_by_tag_set():
    caption = "A dog runs on the sand &amp; two dogs sleep; it isn't 5 x y <|endoftext|>, dog"
    assert text.nouns("a red circle above two green squares on sand") == ["circle", "squares", "sand"]
    found = text.nouns(caption)
    assert found[:3] == ["dog", "runs", "sand"]
    assert len(found) == len(set(found)), "a repeated noun counts once"
    assert {"n", "t", "x", "y", "<|endoftext|>"}.isdisjoint(found)
    assert "runs" not in text.nouns(caption, "nouns")
    assert text.nouns("of the and") == []
    with pytest.raises(UserError, match="official, nouns"):
        text.nouns(caption, "verbs")


def test_prompts_hold_different_nouns_and_pad_with_the_caption():
    caption = "a dog and a cat on sand"
    for seed in range(20):
        prompts = text.draw_prompts(caption, 3, random.Random(seed), ["{}"])
        assert sorted(prompts) == ["cat", "dog", "sand"]
    firsts = {text.draw_prompts(caption, 1, random.Random(seed), ["{}"])[0] for seed in range(40)}
    assert firsts == {"cat", "dog", "sand"}
    assert text.draw_prompts("a dog", 3, random.Random(0), ["x {}"]) == ["x dog", "a dog", "a dog"]
    assert text.draw_prompts("of the", 2, random.Random(0)) == ["of the", "of the"]
    assert text.draw_prompts(caption, 0, random.Random(0)) == []


def test_prompts_can_repeat_the_nouns_instead_of_the_caption():
    drawn = text.draw_prompts("a dog on sand", 5, random.Random(0), ["{}"], fill="noun")
    assert len(drawn) == 5
    assert set(drawn) == {"dog", "sand"}
    assert text.draw_prompts("of the", 2, random.Random(0), fill="noun") == ["of the", "of the"]


def test_prompts_use_every_template_and_repeat_with_the_seed():
    drawn = {text.draw_prompts("a dog", 1, random.Random(seed))[0] for seed in range(2000)}
    assert drawn == {template.format("dog") for template in text.PROMPT_TEMPLATES}
    assert len(set(text.PROMPT_TEMPLATES)) == 80
    first, again = (text.draw_prompts("a dog on sand", 2, random.Random(7)) for _ in range(2))
    assert first == again


def test_prompt_templates_by_name():
    assert text.prompt_templates("clip") is text.PROMPT_TEMPLATES
    assert text.prompt_templates("noun") == ("{}",)
    assert text.prompt_templates(["a {}"]) == ("a {}",)
    for wrong in ("clips", ["a cat"], ["{} {}"], []):
        with pytest.raises(UserError):
            text.prompt_templates(wrong)


def test_unique_rows_share_equal_token_rows():
    rows, index = text.unique_rows([["a cat", "A  CAT"], ["a photo of a dog", "a cat"]], 77)
    assert index.tolist() == [[0, 0], [1, 0]]
    assert torch.equal(rows, text.tokenize(["a cat", "a photo of a dog"], 7))
