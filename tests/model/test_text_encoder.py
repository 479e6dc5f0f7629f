"""The text encoder."""

import pytest
import torch
from torch.testing import assert_close

from groupvit_fast.model.text_encoder import TextEncoder, without_padding


@pytest.fixture
def encoder(small_config, device):
    torch.manual_seed(0)
    return TextEncoder(small_config.text).double().to(device)


def test_cutting_the_padding_is_exact(monkeypatch, encoder, small_config, token_rows, device):
    tokens = token_rows(small_config.text, [3, 9, 5]).to(device)
    cut = encoder(tokens[:, :9])
    monkeypatch.setattr("groupvit_fast.model.text_encoder.without_padding", lambda tokens: tokens)
    assert_close(encoder(tokens), cut, rtol=1e-12, atol=1e-12)


def test_padding_is_cut_at_the_longest_text(small_config, token_rows):
    assert without_padding(token_rows(small_config.text, [3, 9, 5])).shape == (3, 9)
    assert without_padding(torch.zeros(0, 16, dtype=torch.int64)).shape == (0, 16)


def test_what_follows_the_end_of_text_does_not_matter(encoder, small_config, token_rows, device):
    tokens = token_rows(small_config.text, [6, 16]).to(device)
    noisy = tokens.clone()
    noisy[0, 6:] = 7
    assert_close(encoder(noisy), encoder(tokens), rtol=1e-12, atol=1e-12)
    noisy[0, 3] += 1
    assert (encoder(noisy)[0] - encoder(tokens)[0]).abs().max() > 1e-6


@pytest.mark.parametrize("shape", [(2, 17), (5,)])
def test_wrong_tokens_are_refused(encoder, shape):
    with pytest.raises(ValueError, match="at most 16"):
        encoder(torch.zeros(shape, dtype=torch.int64))
