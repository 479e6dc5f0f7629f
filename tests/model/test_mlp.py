"""The MLP: gradients of the plain formula, and no second tensor of its hidden size kept."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close

from groupvit_fast.model import linear
from groupvit_fast.model.mlp import GELU, MLP, QUICK_GELU, TokenMixer, quick_gelu

INPUTS, HIDDEN, OUTPUTS = 24, 96, 40
PLAIN = {GELU: F.gelu, QUICK_GELU: quick_gelu}


def plain(mlp, x):
    hidden = F.linear(x, mlp.fc1.weight, mlp.fc1.bias)
    return F.linear(PLAIN[mlp.activation](hidden), mlp.fc2.weight, mlp.fc2.bias)


def gradients(mlp, x, function, **autocast):
    mlp.zero_grad()
    x = x.detach().requires_grad_()
    with torch.autocast("cpu", **autocast) if autocast else torch.enable_grad():
        y = function(x)
    (y.float() if autocast else y).square().sum().backward()
    return [y.detach(), x.grad, *(parameter.grad for parameter in mlp.parameters())]


@pytest.mark.parametrize("activation", PLAIN, ids=["gelu", "quick_gelu"])
@pytest.mark.parametrize("shape", [(7, INPUTS), (2, 5, INPUTS), (0, 5, INPUTS)])
def test_gradients_are_those_of_the_plain_formula(activation, shape):
    torch.manual_seed(0)
    mlp = MLP(INPUTS, HIDDEN, OUTPUTS, activation).double()
    x = torch.randn(shape, dtype=torch.float64)
    assert_close(gradients(mlp, x, mlp), gradients(mlp, x, lambda x: plain(mlp, x)))


@pytest.mark.parametrize("activation", PLAIN, ids=["gelu", "quick_gelu"])
def test_gradcheck(activation):
    torch.manual_seed(1)
    mlp = MLP(3, 5, 2, activation).double()
    assert torch.autograd.gradcheck(mlp, torch.randn(4, 3, dtype=torch.float64, requires_grad=True))


def test_autocast_gives_the_bits_of_the_plain_formula():
    torch.manual_seed(2)
    mlp, x = MLP(INPUTS, HIDDEN, OUTPUTS), torch.randn(3, 7, INPUTS)
    ours = gradients(mlp, x, mlp, dtype=torch.bfloat16)
    assert ours[0].dtype == torch.bfloat16
    expected = gradients(mlp, x, lambda x: plain(mlp, x), dtype=torch.bfloat16)
    assert_close(ours, expected, rtol=0, atol=0)


def test_large_products_go_to_onednn_in_both_directions(monkeypatch):
    if not linear.HAS_ONEDNN:
        pytest.skip("this PyTorch has no oneDNN")
    asked, product = [], linear._onednn
    monkeypatch.setattr(linear, "onednn_is_faster", lambda: True)
    monkeypatch.setattr(linear, "_onednn", lambda *inputs: asked.append(inputs) or product(*inputs))
    torch.manual_seed(3)
    mlp, x = MLP(64, 512, 64), torch.randn(1024, 64)
    ours = gradients(mlp, x, mlp)
    assert len(asked) == 4
    assert_close(ours, gradients(mlp, x, lambda x: plain(mlp, x)), rtol=1e-4, atol=1e-4)


def kept_bytes(function, x):
    """Bytes of the tensors that autograd keeps, each storage once."""
    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        function(x)
    return sum(kept.values())


@pytest.mark.parametrize("activation", PLAIN, ids=["gelu", "quick_gelu"])
@pytest.mark.parametrize("kind", [MLP, TokenMixer])
def test_one_tensor_of_the_hidden_size_is_kept(activation, kind):
    mlp = kind(INPUTS, HIDDEN, OUTPUTS, activation)
    x = torch.randn(2, 50, INPUTS) if kind is MLP else torch.randn(2, INPUTS, 50)
    weights = sum(parameter.nbytes for parameter in (mlp.fc1.weight, mlp.fc2.weight))
    assert kept_bytes(mlp, x.requires_grad_()) == x.nbytes + weights + 4 * 2 * 50 * HIDDEN


@pytest.mark.parametrize("frozen", ["fc1", "fc2", "x"])
def test_only_gradients_that_are_wanted_are_computed(frozen):
    mlp, x = MLP(INPUTS, HIDDEN, OUTPUTS), torch.randn(3, INPUTS).requires_grad_(frozen != "x")
    if frozen != "x":
        getattr(mlp, frozen).requires_grad_(False)
    mlp(x).sum().backward()
    assert (x.grad is None) == (frozen == "x")
    for name, parameter in mlp.named_parameters():
        assert (parameter.grad is None) == name.startswith(frozen)


def test_a_changed_layer_is_called_as_it_is():
    mlp, x = MLP(INPUTS, HIDDEN, OUTPUTS), torch.randn(3, INPUTS)
    seen = []
    handle = mlp.fc2.register_forward_hook(lambda *_: seen.append(1))
    mlp(x)
    handle.remove()
    assert seen == [1]
    mlp.fc2 = nn.Sequential(nn.Linear(HIDDEN, OUTPUTS), nn.Tanh())
    assert mlp(x).abs().max() < 1


def test_compiled_it_is_one_graph():
    mlp, x = MLP(INPUTS, HIDDEN, OUTPUTS), torch.randn(3, INPUTS)
    compiled = torch.compile(mlp, fullgraph=True, backend="aot_eager")
    assert_close(gradients(mlp, x, compiled), gradients(mlp, x, mlp))
