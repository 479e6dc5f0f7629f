"""torch.func and forward-mode AD: right derivatives through the public functions, never a silent zero."""

import pytest
import torch
from torch.autograd import forward_ad
from torch.testing import assert_close

from groupvit_fast import ops

NOISE = torch.tensor([7, 1])


def tensors(*shape, count):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(count)]


MAPS, KEY, VALUE = tensors(2, 3, 5, 8, count=3)
CASES = {
    "group_attention": lambda x: ops.group_attention(x, KEY, VALUE),
    "gumbel_assign soft": lambda x: ops.gumbel_assign(x[:, 0], KEY[:, 0], VALUE[:, 0], hard=False).output,
    "gumbel_assign hard": lambda x: ops.gumbel_assign(x[:, 0], KEY[:, 0], VALUE[:, 0]).output,
    "gumbel_assign noise": lambda x: (
        ops.gumbel_assign(x[:, 0], KEY[:, 0], VALUE[:, 0], noise_key=NOISE).output
    ),
    "upsample_masks": lambda x: ops.upsample_masks(x, (9, 11)),
}
function_of_maps = pytest.mark.parametrize("function", CASES.values(), ids=CASES)


def gradient(function):
    x = MAPS.clone().requires_grad_()
    return torch.autograd.grad(function(x).square().sum(), x)[0]


@function_of_maps
def test_functional_gradient(function):
    found = torch.func.grad(lambda x: function(x).square().sum())(MAPS)
    assert_close(found, gradient(function))


@function_of_maps
@pytest.mark.parametrize("way", ["torch.func.jvp", "forward_ad"])
def test_forward_mode(function, way):
    """The derivative along a direction is the product of gradient and direction."""
    (direction,) = tensors(2, 3, 5, 8, count=1)
    if way == "torch.func.jvp":
        tangent = torch.func.jvp(lambda x: function(x).square().sum(), (MAPS,), (direction,))[1]
    else:
        with forward_ad.dual_level():
            result = function(forward_ad.make_dual(MAPS, direction)).square().sum()
            tangent = forward_ad.unpack_dual(result).tangent
    assert_close(tangent, (gradient(function) * direction).sum())


def test_gradients_of_each_sample():
    def loss(x, key, value):
        return ops.group_attention(x[None], key[None], value[None]).square().sum()

    found = torch.func.vmap(torch.func.grad(loss))(MAPS, KEY, VALUE)
    assert_close(found, gradient(CASES["group_attention"]))


@pytest.mark.parametrize("transform", [lambda f: f, torch.func.grad], ids=["values", "gradients"])
def test_mapped_noise_is_refused(transform):
    def loss(x):
        return ops.gumbel_assign(x, KEY[:, 0], VALUE[:, 0], noise_key=NOISE).output.sum()

    with pytest.raises(RuntimeError, match="noise_key is not supported under vmap"):
        torch.func.vmap(transform(loss))(torch.stack([KEY[:, 0], KEY[:, 1]]))
