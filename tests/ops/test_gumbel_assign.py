"""gumbel_assign on every back end, against the reference in float64."""

from __future__ import annotations

import math

import pytest
import torch
from assign_problem import NOISE, check, inputs, noise_key, skip_if_too_large
from backends import BACKENDS
from error_budget import leaf, widened
from hypothesis import given, settings
from hypothesis import strategies as st

from groupvit_fast.ops import reference

# B, S, L, C: both official stages, one of everything, odd numbers, partial tiles, more groups than tokens.
SHAPES = [
    (2, 64, 196, 384),
    (2, 8, 64, 384),
    (1, 64, 785, 96),
    (3, 7, 37, 33),
    (2, 1, 5, 16),
    (2, 5, 1, 16),
    (1, 1, 1, 1),
    (2, 65, 3, 40),
    (1, 128, 97, 48),
    (2, 9, 131, 8),
]
# ---- values and gradients --------------------------------------------------------------------------------


@pytest.mark.parametrize("shared", [True, False], ids=["one tensor", "two tensors"])
@pytest.mark.parametrize("hard", [True, False], ids=["hard", "soft"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_within_the_error_budget(backend, shape, hard, shared):
    skip_if_too_large(backend, shape)
    check(backend, shape, {"tau": 0.7, "hard": hard, "noise_key": noise_key(backend)}, shared=shared)


@pytest.mark.parametrize("hard", [True, False], ids=["hard", "soft"])
@pytest.mark.parametrize("shape", [(2, 7, 37, 33), (1, 64, 60, 48)], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_other_dtypes_keep_the_budget(backend, dtype, shape, hard):
    if dtype not in backend.dtypes:
        pytest.skip(f"no {dtype} kernel")
    skip_if_too_large(backend, shape)
    check(backend, shape, {"hard": hard}, dtype=dtype)


def test_without_bias_and_noise(backend):
    check(backend, (2, 7, 37, 33), {"scale": 0.4}, bias=False)


@pytest.mark.parametrize("shape", [(2, 64, 196, 384), (2, 7, 37, 33)], ids=str)
def test_index_and_count(backend, shape):
    """Every token whose two best groups are apart agrees; the counts are those of the indices."""
    skip_if_too_large(backend, shape)
    query, key, _, bias, _ = inputs(shape, device=backend.device)
    result = backend.gumbel_assign(query, key, key, bias=bias, noise_key=noise_key(backend))
    z = reference.assignment_logits(*(widened(t) for t in (query, key, bias)), shape[3] ** -0.5)
    z = z + reference.gumbel_noise(torch.tensor(NOISE), z.shape)
    clear = z.topk(2, dim=1).values.diff(dim=1).abs()[:, 0] > 1e-5
    index = result.index.cpu()
    assert result.index.dtype == torch.int64
    assert clear.float().mean() > 0.999
    assert torch.equal(index[clear], z.argmax(dim=1)[clear])
    counted = torch.nn.functional.one_hot(index, shape[1]).sum(dim=1).float()
    assert torch.equal(result.count.cpu(), counted)
    soft = backend.gumbel_assign(query, key, key, bias=bias, noise_key=noise_key(backend), hard=False)
    torch.testing.assert_close(soft.count.cpu(), z.softmax(dim=1).sum(-1).float(), rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("key", [(0, 0), (5, 1), (-1, -2), (0x123456789ABCDEF, 0x7EDCBA9876543210)])
@pytest.mark.parametrize("shape", [(2, 7, 37), (1, 64, 100), (3, 2, 5), (2, 10, 129)])
def test_noise_is_that_of_the_reference_element_by_element(backend, shape, key):
    """Noise alone is assigned, softly, and every token is a channel of its own: the map can be read off."""
    if backend.name == "host_cuda":
        shape = (shape[0], min(shape[1], 10), shape[2])
    batch, groups, tokens = shape
    wanted = reference.gumbel_noise(torch.tensor(key), shape).double().log_softmax(dim=1)
    query, token = torch.zeros(batch, groups, tokens), torch.zeros(batch, tokens, tokens)
    value = torch.eye(tokens).expand(batch, -1, -1)
    query, token, value = (t.to(backend.device) for t in (query, token, value))
    result = backend.gumbel_assign(
        query, token, value, noise_key=noise_key(backend, key), hard=False, eps=0.0
    )
    assignment = result.output.double() * result.count.double().unsqueeze(-1)
    torch.testing.assert_close(assignment.log().cpu(), wanted, rtol=0, atol=5e-6)


def test_the_backward_gives_each_token_the_gradient_of_its_group(backend):
    """Also where groups tie to the last bit or nearly: its value has the gradient of a row of the output."""
    torch.manual_seed(0)
    query, key, value, bias, gradient = inputs((2, 34, 40, 48), device=backend.device)
    query[:, 1::2] = query[:, ::2]
    bias[:, 1::2] = bias[:, ::2]
    query[:, 3::4, 0] = query[:, 2::4, 0].nextafter(torch.full_like(query[:, 2::4, 0], torch.inf))
    value = leaf(value)
    result = backend.gumbel_assign(query, key, value, bias=bias)
    (grad_value,) = torch.autograd.grad(result.output, value, gradient)
    shares = gradient / (result.count + 1).unsqueeze(-1)
    wanted = shares.gather(1, result.index.unsqueeze(-1).expand(-1, -1, 48))
    torch.testing.assert_close(grad_value, wanted, rtol=1e-6, atol=0)


def test_soft_gradcheck(backend):
    if torch.float64 not in backend.dtypes:
        pytest.skip("no float64 kernel")
    query, key, value, bias, _ = (leaf(t) for t in inputs((2, 3, 4, 5), dtype=torch.float64))

    def results(query, key, value, bias):
        options = {"bias": bias, "hard": False, "tau": 0.7, "noise_key": noise_key(backend)}
        result = backend.gumbel_assign(query, key, value, **options)
        return result.output, result.count

    assert torch.autograd.gradcheck(results, (query, key, value, bias))


@pytest.mark.parametrize("with_output", [True, False], ids=["with output", "alone"])
@pytest.mark.parametrize("hard", [True, False], ids=["hard", "soft"])
@pytest.mark.parametrize("shape", [(2, 64, 70, 32), (2, 7, 37, 33), (1, 128, 20, 16), (2, 1, 5, 16)], ids=str)
def test_gradient_of_the_count(backend, shape, hard, with_output):
    """As the gradient of the assignment's sum over the tokens, straight-through where hard."""
    skip_if_too_large(backend, shape)
    query, key, _, bias, gradient = inputs(shape, device=backend.device)
    count_gradient = torch.randn(shape[:2], dtype=torch.float64)
    options = {"scale": 0.3, "tau": 0.7, "hard": hard, "eps": 0.5, "noise_key": noise_key(backend)}

    def gradients(function, tensors):
        leaves = [leaf(t) for t in tensors]
        result = function(leaves[0], leaves[1], leaves[1], bias=leaves[2], **options)
        loss = (result.count * count_gradient.to(result.count)).sum()
        if with_output:
            loss = loss + (result.output * gradient.to(result.output)).sum()
        return result.index.cpu(), torch.autograd.grad(loss, leaves)

    tensors = (query, key, bias)
    index, own = gradients(backend.gumbel_assign, tensors)
    options["noise_key"] = torch.tensor(NOISE)
    wanted_index, wanted = gradients(reference.gumbel_assign, [t.cpu().double() for t in tensors])
    assert torch.equal(index, wanted_index)
    for one, other in zip(own, wanted, strict=True):
        torch.testing.assert_close(one.cpu().double(), other, rtol=1e-4, atol=1e-4)


def test_saturated_logits_have_no_gradient(backend):
    """At logits of 1e4 the softmax is 0 or 1, and rounding must not leave a gradient of the logits."""
    query, key, _, _, gradient = inputs((2, 8, 40, 32), device=backend.device, shared=True, spread=1e4)
    query, key = leaf(query), leaf(key)
    z = reference.assignment_logits(query.cpu().double(), key.cpu().double(), None, 32**-0.5)
    apart = bool((z.topk(2, dim=1).values.diff(dim=1).abs() > 200).all())
    key = key if apart else leaf(key[:, z.topk(2, dim=1).values.diff(dim=1).abs()[:, 0].amin(0) > 200])
    (result,) = torch.autograd.grad(backend.gumbel_assign(query, key, key).output, query, gradient)
    assert result.abs().max() == 0


# ---- documented corner cases -----------------------------------------------------------------------------


def test_ties_go_to_the_lowest_group(backend):
    query, key = torch.ones(2, 9, 4, device=backend.device), torch.ones(2, 5, 4, device=backend.device)
    assert (backend.gumbel_assign(query, key, key).index == 0).all()
    bias = torch.zeros(2, 9, device=backend.device)
    bias[:, 6:] = 1
    assert (backend.gumbel_assign(query, key, key, bias=bias).index == 6).all()


@pytest.mark.parametrize("hard", [True, False], ids=["hard", "soft"])
@pytest.mark.parametrize(
    ("bad", "winner"),
    [
        ({2: math.nan}, 2),
        ({3: math.inf, 5: math.nan}, 5),
        ({4: math.inf, 1: math.inf}, 1),
        ({None: -math.inf}, 0),
    ],
    ids=["NaN", "NaN beats inf", "first inf", "only -inf"],
)
def test_a_token_without_a_softmax_spoils_its_sample_only(backend, bad, winner, hard):
    query, key, _, bias, gradient = inputs((3, 7, 10, 16), device=backend.device, shared=True)
    for group, value in bad.items():
        bias[1, slice(None) if group is None else group] = value
    query, key, bias = leaf(query), leaf(key), leaf(bias)
    result = backend.gumbel_assign(query, key, key, bias=bias, hard=hard)
    clean = backend.gumbel_assign(query[::2], key[::2], key[::2], bias=bias[::2], hard=hard)
    assert (result.index[1] == winner).all()
    assert result.output[1].isnan().all()
    assert result.count[1].isnan().all()
    assert torch.equal(result.output[::2], clean.output)
    for grad in torch.autograd.grad(result.output, (query, key), gradient):
        assert grad[1].isnan().any()
        assert torch.isfinite(grad[::2]).all()


def test_minus_infinity_excludes_a_group(backend):
    query, key, _, bias, gradient = inputs((2, 7, 30, 16), device=backend.device, shared=True)
    bias[:, 3] = -math.inf
    query, key = leaf(query), leaf(key)
    result = backend.gumbel_assign(query, key, key, bias=bias)
    assert not (result.index == 3).any()
    assert (result.output[:, 3] == 0).all()
    for grad in torch.autograd.grad(result.output, (query, key), gradient):
        assert torch.isfinite(grad).all()


@pytest.mark.parametrize("shape", [(0, 4, 5, 8), (2, 4, 0, 8)], ids=["no sample", "no token"])
@pytest.mark.parametrize("shared", [True, False])
def test_empty_inputs(backend, shape, shared):
    query, key, value, bias, gradient = inputs(shape, device=backend.device, shared=shared)
    tensors = [leaf(t) for t in (query, key, key if shared else value, bias)]
    if shared:
        tensors[2] = tensors[1]
    result = backend.gumbel_assign(*tensors[:3], bias=tensors[3], noise_key=noise_key(backend))
    assert result.index.shape == (shape[0], shape[2])
    assert (result.output == 0).all()
    assert (result.count == 0).all()
    for tensor, grad in zip(tensors, torch.autograd.grad(result.output, tensors, gradient), strict=True):
        assert grad.shape == tensor.shape
        assert (grad == 0).all()


def test_an_empty_group_without_eps_is_nan_as_in_eager(backend):
    query = torch.tensor([[[1.0], [-1.0]]], device=backend.device)
    key = torch.ones(1, 3, 1, device=backend.device)
    output = backend.gumbel_assign(query, key, key, eps=0.0).output
    assert output[0, 0].item() == pytest.approx(1.0)
    assert output[0, 1].isnan().all()


# ---- memory layouts --------------------------------------------------------------------------------------


def transposed(tensor):
    return tensor.mT.contiguous().mT


def sliced(tensor):
    wide = torch.zeros(*tensor.shape[:-1], 2 * tensor.shape[-1] + 1, dtype=tensor.dtype, device=tensor.device)
    wide[..., 1 : 1 + tensor.shape[-1]] = tensor
    return wide[..., 1 : 1 + tensor.shape[-1]]


def every_other_row(tensor):
    return tensor.repeat_interleave(2, dim=1)[:, ::2]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", [transposed, sliced, every_other_row], ids=lambda f: f.__name__)
def test_memory_layout_does_not_matter(backend, layout, dtype):
    query, key, value, bias, gradient = inputs((2, 7, 37, 32), dtype=dtype, device=backend.device)
    results = []
    for change in (lambda t: t, layout):
        leaves = [leaf(change(t)) for t in (query, key, value)]
        result = backend.gumbel_assign(*leaves, bias=leaf(bias), noise_key=noise_key(backend))
        results.append([*result, *torch.autograd.grad(result.output, leaves, change(gradient))])
    for one, other in zip(*results, strict=True):
        if backend.name == "reference":  # torch picks its matrix product by layout
            torch.testing.assert_close(one, other)
        else:
            assert torch.equal(one, other)


def test_expanded_inputs(backend):
    query, key, _, _, _ = inputs((1, 7, 37, 32), device=backend.device, shared=True)
    key = torch.cat([key, key + 0.5, key - 0.5])
    results = []
    for shared_query in (query.expand(3, -1, -1), query.repeat(3, 1, 1)):
        one, two = leaf(shared_query), leaf(key)
        output = backend.gumbel_assign(one, two, two).output
        results.append(
            [output, *torch.autograd.grad(output.sum(), (one, two))]
        )  # the gradient is expanded too
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


# ---- properties ------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    shape=st.tuples(*(st.integers(1, top) for top in (3, 70, 140, 70))),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    spread=st.sampled_from([0.0, 0.1, 3.0, 100.0, 1e4]),
    tau=st.sampled_from([0.1, 1.0, 5.0]),
    eps=st.sampled_from([1e-6, 1.0]),
    noisy=st.booleans(),
    hard=st.booleans(),
    shared=st.booleans(),
    biased=st.booleans(),
)
def test_any_problem_stays_in_the_budget(shape, dtype, spread, tau, eps, noisy, hard, shared, biased):
    backend = next((b for b in reversed(BACKENDS) if b.compiled), BACKENDS[0])
    options = {"tau": tau, "eps": eps, "hard": hard} | ({"noise_key": noise_key(backend)} if noisy else {})
    given = {"dtype": dtype, "shared": shared, "bias": biased, "spread": spread}
    torch.manual_seed(1)
    query, key, _, bias, _ = inputs(shape, device=backend.device, **given)
    own = backend.gumbel_assign(query, key, key, bias=bias, **options).index.cpu()
    z = reference.assignment_logits(*(widened(t) for t in (query, key, bias)), shape[3] ** -0.5)
    z = z + reference.gumbel_noise(torch.tensor(NOISE), z.shape) if noisy else z
    if hard and not torch.equal(own, z.argmax(dim=1)):
        return  # a tie to within rounding went the other way, so the outputs differ by a token
    torch.manual_seed(1)
    check(backend, shape, options, **given)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    bias=st.integers(1, 20).flatmap(
        lambda groups: st.lists(
            st.lists(
                st.sampled_from([-math.inf, math.inf, math.nan, -1e4, 0.0, 1.0, 1e4]),
                min_size=groups,
                max_size=groups,
            ),
            min_size=1,
            max_size=3,
        )
    ),
    tokens=st.integers(1, 70),
    hard=st.booleans(),
)
@pytest.mark.parametrize("name", [b.name for b in BACKENDS if b.name != "reference"])
def test_any_mix_of_ties_and_bad_numbers_is_that_of_the_reference(name, bias, tokens, hard):
    """Logits that are given by the bias, the products being 0; a row of it is a sample."""
    backend = next(b for b in BACKENDS if b.name == name)
    bias = torch.tensor(bias)
    batch, groups = bias.shape
    query, key = torch.zeros(batch, groups, 8), torch.zeros(batch, tokens, 8)
    value = torch.arange(tokens).float().view(1, tokens, 1).expand(batch, -1, 8)
    given = {"query": query, "key": key, "value": value, "bias": bias}
    options = {"scale": 1.0, "tau": 1.0, "eps": 1.0, "hard": hard, "noise_key": None}
    wanted = reference.gumbel_assign(**given, **options)
    own = backend.gumbel_assign(**{k: t.to(backend.device) for k, t in given.items()}, **options)
    assert torch.equal(own.index.cpu(), wanted.index)
    torch.testing.assert_close(own.output.cpu(), wanted.output, rtol=1e-5, atol=1e-5, equal_nan=True)
    torch.testing.assert_close(own.count.cpu(), wanted.count, rtol=1e-5, atol=1e-5, equal_nan=True)
