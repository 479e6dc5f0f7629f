"""The reference against independent statements: known vectors, integers, statistics, closed forms."""

from __future__ import annotations

import math

import pytest
import torch

from groupvit_fast import ops
from groupvit_fast.ops import reference

MASK = 0xFFFFFFFF


@pytest.fixture(autouse=True)
def _on_reference():
    with ops.use_backend("reference"):
        yield


def philox_of_integers(counter, key):
    """Philox4x32-10 in Python's integers."""
    c, k = list(counter), list(key)
    for _ in range(10):
        p0, p1 = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [(p1 >> 32) ^ c[1] ^ k[0], p1 & MASK, (p0 >> 32) ^ c[3] ^ k[1], p0 & MASK]
        k = [(k[0] + 0x9E3779B9) & MASK, (k[1] + 0xBB67AE85) & MASK]
    return c


# ---- noise -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        ([MASK] * 4, [MASK] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            [0xA4093822, 0x299F31D0],
            [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
        ),
    ],
    ids=["zeros", "ones", "pi"],
)
def test_philox_gives_the_published_vectors(counter, key, words):
    result = reference.philox4x32_10([torch.tensor([c]) for c in counter], [torch.tensor([k]) for k in key])
    assert [int(w) for w in result] == words
    assert philox_of_integers(counter, key) == words


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 4, 3), (3, 7, 5), (2, 9, 4)])
@pytest.mark.parametrize("noise_key", [(0, 0), (5, 1), (-1, -2), (0x123456789ABCDEF, 0x7EDCBA9876543210)])
def test_noise_is_numbered_as_documented(shape, noise_key):
    batch, groups, tokens = shape
    noise = ops.gumbel_noise(torch.tensor(noise_key), shape)
    assert noise.dtype == torch.float32
    key, offset = (n & (2**64 - 1) for n in noise_key)
    for b, s, t in [(0, 0, 0), (batch - 1, groups - 1, tokens - 1), (batch // 2, groups // 2, tokens // 2)]:
        call = (b * math.ceil(groups / 4) + s // 4) * tokens + t
        counter = [call & MASK, call >> 32, offset & MASK, offset >> 32]
        word = philox_of_integers(counter, [key & MASK, key >> 32])[s % 4]
        uniform = max(word >> 8, 1) * 2.0**-24
        assert noise[b, s, t].item() == pytest.approx(-math.log(-math.log(uniform)), rel=1e-6, abs=1e-7)


def test_noise_passes_a_kolmogorov_smirnov_test():
    count = 400_000
    noise = ops.gumbel_noise(torch.tensor([11, 3]), (10, 40, count // 400)).double().flatten().sort().values
    distribution = torch.exp(-torch.exp(-noise))
    steps = torch.arange(count + 1, dtype=torch.float64) / count
    distance = torch.maximum(distribution - steps[:-1], steps[1:] - distribution).max().item()
    assert distance * math.sqrt(count) < 1.95  # one in a thousand fair samples is further off
    assert noise.var().item() == pytest.approx(math.pi**2 / 6, rel=0.01)


def test_noise_is_finite_and_rarely_ties_at_the_top():
    noise = ops.gumbel_noise(torch.tensor([1, 2]), (4, 64, 25_000))
    assert torch.isfinite(noise).all()
    first, second = noise.topk(2, dim=1).values.unbind(1)
    assert (first == second).float().mean() < 5e-5


@pytest.mark.parametrize("other", [(1, 3), (2, 2), (1, 2 + 2**32), (1 + 2**32, 2)])
def test_every_half_of_the_key_matters(other):
    shape = (2, 8, 50)
    one, two = (ops.gumbel_noise(torch.tensor(key), shape) for key in ((1, 2), other))
    assert (one == two).float().mean() < 0.01


# ---- assignment ------------------------------------------------------------------------------------------


def identity_problem(logits, **options):
    """gumbel_assign whose logits are given ([S, L]) and whose output is the assignment itself, [S, L]."""
    tokens = logits.shape[1]
    values = torch.eye(tokens, dtype=logits.dtype)[None]
    result = ops.gumbel_assign(logits[None], values, values, scale=1.0, eps=0.0, **options)
    return result, result.output[0] * result.count[0, :, None]


def test_assignment_frequencies_equal_softmax_probabilities():
    tokens, query = 100_000, torch.tensor([0.0, 1.0, -1.0, 2.0, 0.5]).view(1, 5, 1)
    ones = torch.ones(1, tokens, 1)
    probability = query[0].double().softmax(dim=0).flatten()
    index = ops.gumbel_assign(query, ones, ones, scale=1.0, noise_key=torch.tensor([7, 8])).index[0]
    expected = probability * tokens
    chi_square = ((torch.bincount(index, minlength=5) - expected) ** 2 / expected).sum().item()
    assert chi_square < 18.5  # 4 degrees of freedom, one in a thousand


def test_straight_through_values_are_exactly_zero_or_one():
    logits = torch.randn(6, 300) * 3
    result, assign = identity_problem(logits, noise_key=torch.tensor([1, 1]))
    wanted = torch.nn.functional.one_hot(result.index[0], 6).T.float()
    assert torch.equal(result.count[0], wanted.sum(dim=1))
    torch.testing.assert_close(assign.nan_to_num(), wanted, rtol=1e-6, atol=0)


def test_straight_through_gradient_is_the_soft_gradient_of_the_hard_value():
    """The formulas of the compiled backward, against autograd of the reference, in float64."""
    query, key, value = (torch.randn(2, n, 6, dtype=torch.float64, requires_grad=True) for n in (4, 9, 9))
    bias = torch.randn(2, 4, dtype=torch.float64, requires_grad=True)
    noise_key, scale, tau, eps = torch.tensor([3, 4]), 0.6, 0.8, 1.0
    result = ops.gumbel_assign(
        query, key, value, bias=bias, scale=scale, tau=tau, eps=eps, noise_key=noise_key
    )
    gradient = torch.randn_like(result.output)
    own = torch.autograd.grad(result.output, (query, key, value, bias), gradient)

    z = (scale * (query @ key.mT + bias[..., None]) + ops.gumbel_noise(noise_key, (2, 4, 9))) / tau
    soft, hard = z.softmax(dim=1), torch.nn.functional.one_hot(z.argmax(dim=1), 4).mT.double()
    mass = result.count[..., None] + eps
    d_assign = (gradient @ value.mT - (gradient * result.output).sum(-1, keepdim=True)) / mass
    d_logits = scale / tau * soft * (d_assign - (soft * d_assign).sum(dim=1, keepdim=True))
    closed = (d_logits @ key, d_logits.mT @ query, (hard / mass).mT @ gradient, d_logits.sum(dim=-1))
    for one, other in zip(own, closed, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-13)


def test_a_large_temperature_or_no_noise_changes_what_it_should():
    logits = torch.randn(5, 40)
    hard, soft = identity_problem(logits), identity_problem(logits, hard=False, tau=1e6)
    assert torch.equal(hard[0].index[0], logits.argmax(dim=0))
    torch.testing.assert_close(soft[1], torch.full((5, 40), 0.2), rtol=1e-4, atol=0)


@pytest.mark.parametrize("hard", [False, True])
def test_gradcheck(hard):
    query, key, value = (torch.randn(2, n, 5, dtype=torch.float64, requires_grad=True) for n in (3, 4, 4))
    bias = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)

    def output(query, key, value, bias):
        options = {"bias": bias, "noise_key": torch.tensor([1, 2]), "tau": 0.7}
        if hard:  # the hard value is piecewise constant in the logits: only the values can be checked
            query, key, options["bias"] = query.detach(), key.detach(), bias.detach()
        return ops.gumbel_assign(query, key, value, hard=hard, **options).output

    if hard:
        assert torch.autograd.gradcheck(lambda value: output(query, key, value, bias), (value,))
    else:
        assert torch.autograd.gradcheck(output, (query, key, value, bias))


# ---- maps ------------------------------------------------------------------------------------------------


def test_soft_assignment_is_a_distribution_over_groups():
    query, key, bias = torch.randn(2, 5, 8), torch.randn(2, 9, 8), torch.randn(2, 5)
    soft = ops.soft_assignment(query, key, bias=bias, tau=0.5)
    wanted = (8**-0.5 / 0.5 * (query @ key.mT + bias[..., None])).softmax(dim=1)
    torch.testing.assert_close(soft, wanted)
    torch.testing.assert_close(soft.sum(dim=1), torch.ones(2, 9))


def test_composed_maps_multiply_from_the_first_stage():
    first, second, third = (torch.rand(2, *s).softmax(dim=1) for s in ((6, 10), (4, 6), (2, 4)))
    torch.testing.assert_close(ops.compose_assignments([first, second, third]), third @ second @ first)
    assert ops.compose_assignments([first]) is first


@pytest.mark.parametrize(
    ("maps", "message"),
    [
        ([], "at least one"),
        ([torch.rand(2, 3)], r"maps\[0\] must be \[B, S, L\]"),
        ([torch.rand(2, 3, 5), torch.rand(2, 2, 4)], r"maps\[1\] must be \[B, G, S\] with S = 3"),
    ],
)
def test_compose_refuses_maps_that_do_not_chain(maps, message):
    with pytest.raises(ValueError, match=message):
        ops.compose_assignments(maps)


@pytest.mark.parametrize("shape", [(2, 3), (1, -1, 2)])
def test_noise_refuses_a_wrong_shape(shape):
    with pytest.raises(ValueError, match="shape must be"):
        ops.gumbel_noise(torch.tensor([1, 2]), shape)


# ---- attention -------------------------------------------------------------------------------------------


def test_attention_is_scaled_dot_product_attention():
    query, key, value = (torch.randn(2, 3, n, 8) for n in (5, 11, 11))
    wanted = torch.nn.functional.scaled_dot_product_attention(query, key, value)
    torch.testing.assert_close(ops.group_attention(query, key, value), wanted)
    wanted = torch.nn.functional.scaled_dot_product_attention(query, key, value, scale=-0.3)
    torch.testing.assert_close(ops.group_attention(query, key, value, scale=-0.3), wanted)
