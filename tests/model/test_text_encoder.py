"""The text encoder: packed, padded, compiled and checkpointed, all the same."""

import pytest
import torch
from torch.testing import assert_close

from groupvit_fast.model import layers
from groupvit_fast.model.packing import PackedTexts, pack_texts
from groupvit_fast.model.presets import TextConfig
from groupvit_fast.model.text_encoder import TextEncoder

LENGTHS = [3, 9, 5, 16, 2, 2, 7, 1, 12, 9, 4]


@pytest.fixture
def encoder(small_config, device):
    torch.manual_seed(0)
    return TextEncoder(small_config.text).double().to(device)


def padded(encoder, tokens):
    """What the encoder gives for rows of the full context, end-of-text row and all."""
    x = encoder.token_embedding(tokens) + encoder.position[: tokens.shape[1]]
    for block in encoder.blocks:
        x = block(x)
    return encoder.norm(x[torch.arange(len(x)), tokens.argmax(1)])


def value_and_gradients(encoder, result):
    encoder.zero_grad()
    (result * torch.linspace(-1, 1, result.numel()).view_as(result)).sum().backward()
    return [result.detach(), *(parameter.grad.clone() for parameter in encoder.parameters())]


@pytest.mark.parametrize("lengths", [LENGTHS, [5], [1], [16] * 9, list(range(1, 17))])
def test_packing_changes_neither_embeddings_nor_gradients(encoder, small_config, token_rows, lengths):
    tokens = token_rows(small_config.text, lengths)
    packed = pack_texts(tokens).to(encoder.position.device)
    found = value_and_gradients(encoder, encoder(packed))
    wanted = value_and_gradients(encoder, padded(encoder, tokens.to(encoder.position.device)))
    assert_close(found, wanted, rtol=1e-12, atol=1e-12)


def test_official_encoder_packed_equals_padded_in_float32(token_rows):
    torch.manual_seed(0)
    config = TextConfig()
    encoder = TextEncoder(config)
    tokens = token_rows(config, [12, 77, 3, 8, 8, 20, 9, 11, 40, 7])
    with torch.no_grad():
        assert_close(encoder(tokens), padded(encoder, tokens), rtol=0, atol=1e-5)


def test_texts_share_rows_and_little_is_left_over(token_rows):
    lengths = torch.randint(5, 16, (96,), generator=torch.Generator().manual_seed(1)).tolist()
    packed = pack_texts(token_rows(TextConfig(), lengths))
    assert packed.tokens.shape[1] <= 64
    assert packed.tokens.numel() < 1.05 * sum(lengths)
    for place, length in zip(packed.places, lengths, strict=True):
        assert packed.position.flatten()[packed.ends.flatten()[place]] == length - 1
    assert (packed.segment >= 0).sum() == sum(lengths)


def test_a_row_is_as_long_as_the_longest_text_and_no_longer_than_all(small_config, token_rows):
    assert pack_texts(token_rows(TextConfig(), [77, 3, 50])).tokens.shape == (2, 77)
    assert pack_texts(token_rows(small_config.text, [3, 9, 5])).tokens.shape == (1, 17)


def test_the_last_layer_asks_at_the_ends_only(encoder, small_config, token_rows, monkeypatch):
    rows = []
    plain = layers.attend

    def attend(query, key, value, **mask):
        rows.append(query.shape[0] * query.shape[1])
        return plain(query, key, value, **mask)

    monkeypatch.setattr(layers, "attend", attend)
    packed = pack_texts(token_rows(small_config.text, [8] * 12))
    encoder(packed.to(encoder.position.device))
    assert rows == [packed.tokens.numel()] * (small_config.text.layers - 1) + [12]
    assert rows[0] == 96


def by_hand(query, key, value, query_bounds, key_bounds, longest_query, longest_key, window_size=(-1, -1)):
    """What `varlen_attn` computes, one text after the other; it has no CPU kernel to ask."""
    assert longest_query == query_bounds.diff().max()
    assert longest_key == key_bounds.diff().max()
    results = []
    for text in range(len(key_bounds) - 1):
        q = query[query_bounds[text] : query_bounds[text + 1]].transpose(0, 1)
        k, v = (x[key_bounds[text] : key_bounds[text + 1]].transpose(0, 1) for x in (key, value))
        scores = q @ k.mT * q.shape[-1] ** -0.5
        if window_size == (-1, 0):
            offset = k.shape[1] - q.shape[1]
            scores = scores.masked_fill(~torch.ones_like(scores).bool().tril(offset), -torch.inf)
        results.append((scores.softmax(-1) @ v).transpose(0, 1))
    return torch.cat(results)


def test_one_row_for_kernels_of_variable_length(encoder, small_config, token_rows, monkeypatch):
    """Bounds and lengths as the GPU's kernel gets them, with a plain statement of it in its place."""
    monkeypatch.setattr(layers, "varlen_attn", by_hand)
    tokens = token_rows(small_config.text, LENGTHS)
    packed = pack_texts(tokens, single_row=True)
    assert packed.tokens.shape == (1, sum(LENGTHS))
    found = value_and_gradients(encoder, encoder(packed.to(encoder.position.device)))
    wanted = value_and_gradients(encoder, padded(encoder, tokens.to(encoder.position.device)))
    assert_close(found, wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="variable-length attention is a GPU kernel")
def test_variable_length_kernel_equals_the_mask(token_rows):
    torch.manual_seed(0)
    config = TextConfig()
    encoder, tokens = TextEncoder(config).cuda(), token_rows(config, [12, 77, 3, 8, 8, 20, 9, 11, 40, 7])
    with torch.autocast("cuda", torch.bfloat16), torch.no_grad():
        masked = encoder(pack_texts(tokens).to("cuda"))
        assert_close(encoder(pack_texts(tokens, single_row=True).to("cuda")), masked, rtol=0, atol=0.05)


def test_checkpointing_gives_the_same(encoder, small_config, token_rows):
    packed = pack_texts(token_rows(small_config.text, LENGTHS)).to(encoder.position.device)
    wanted = value_and_gradients(encoder, encoder(packed))
    encoder.checkpointing = True
    assert_close(value_and_gradients(encoder, encoder(packed)), wanted, rtol=0, atol=0)


def test_compiled_packed_and_padded(encoder, small_config, token_rows):
    tokens = token_rows(small_config.text, LENGTHS)
    wanted = value_and_gradients(encoder, encoder(tokens))
    compiled = torch.compile(encoder, fullgraph=True, backend="aot_eager")
    for form in (pack_texts(tokens), tokens):
        form = form.to(encoder.position.device)
        assert_close(value_and_gradients(encoder, compiled(form)), wanted, rtol=1e-10, atol=1e-10)


def test_export_keeps_the_padding(encoder, small_config, token_rows):
    tokens = token_rows(small_config.text, [4, 9, 5]).to(encoder.position.device)
    dims = {0: torch.export.Dim("texts", min=1)}
    program = torch.export.export(encoder.eval(), (tokens,), dynamic_shapes=(dims,))
    more = token_rows(small_config.text, LENGTHS).to(encoder.position.device)
    assert_close(program.module()(more), encoder(more), rtol=1e-10, atol=1e-10)


def test_what_follows_the_end_of_text_does_not_matter(encoder, small_config, token_rows, device):
    tokens = token_rows(small_config.text, [6, 16]).to(device)
    noisy = tokens.clone()
    noisy[0, 6:] = 7
    assert_close(encoder(noisy), encoder(tokens), rtol=1e-12, atol=1e-12)
    noisy[0, 3] += 1
    assert (encoder(noisy)[0] - encoder(tokens)[0]).abs().max() > 1e-6


def test_no_texts_at_all(encoder, small_config):
    device = encoder.position.device
    assert encoder(torch.zeros(0, 16, dtype=torch.int64, device=device)).shape == (0, small_config.text.width)


@pytest.mark.parametrize("shape", [(2, 17), (5,)])
def test_wrong_tokens_are_refused(encoder, shape):
    with pytest.raises(ValueError, match="at most 16"):
        encoder(torch.zeros(shape, dtype=torch.int64))


def test_packed_texts_beyond_the_context_are_refused(encoder):
    with pytest.raises(ValueError, match="at most 16 tokens long, got 17"):
        encoder(pack_texts(torch.arange(1, 18)[None]))


@pytest.mark.parametrize(
    "tokens", [torch.zeros(0, 3), torch.zeros(3), torch.zeros(2, 3, device="meta")], ids=["0", "1-D", "meta"]
)
def test_what_can_not_be_packed_is_refused(tokens):
    with pytest.raises(ValueError, match="token"):
        pack_texts(tokens.long())


def test_moving_keeps_everything():
    packed = pack_texts(torch.arange(1, 18)[None]).to("cpu")
    assert isinstance(packed, PackedTexts)
    assert packed.longest == 17
