"""The linear layer: oneDNN's products give what PyTorch's give, and are asked only where they should be."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode

from groupvit_fast.model import linear
from groupvit_fast.model.linear import Linear, PackedProduct, prepacked
from groupvit_fast.model.mlp import MLP, QUICK_GELU, TokenMixer

pytestmark = pytest.mark.skipif(not linear.HAS_ONEDNN, reason="this PyTorch has no oneDNN")
ROWS, INPUTS, OUTPUTS = 3, 280, 320


@pytest.fixture
def calls(monkeypatch):
    """As on a processor where oneDNN is the faster one; the products it was asked for."""
    found, plain = [], linear._onednn
    monkeypatch.setattr(linear, "onednn_is_faster", lambda: True)
    monkeypatch.setattr(linear, "_onednn", lambda *inputs: found.append(inputs) or plain(*inputs))
    return found


@pytest.fixture
def packed_calls(monkeypatch):
    """As on a processor where packed weights are the faster ones; the activations they were asked for."""
    found, plain = [], PackedProduct.__call__

    def call(self, x, activation="none"):
        found.append(activation)
        return plain(self, x, activation)

    monkeypatch.setattr(linear, "onednn_is_faster", lambda: True)
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: True)
    monkeypatch.setattr(PackedProduct, "__call__", call)
    return found


def problem(tokens=200, bias=True):
    generator = torch.Generator().manual_seed(0)
    layer = Linear(INPUTS, OUTPUTS, bias=bias)
    for parameter in layer.parameters():
        nn.init.normal_(parameter, generator=generator)
    return layer, torch.randn(ROWS, tokens, INPUTS, generator=generator).requires_grad_()


def results(layer, x):
    y = layer(x)
    (y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)).sum().backward()
    return [y.detach(), x.grad, *(parameter.grad for parameter in layer.parameters())]


@pytest.mark.parametrize("bias", [True, False])
def test_result_and_gradients_are_as_exact_as_those_of_pytorch(calls, bias):
    layer, x = problem(bias=bias)
    plain = nn.Linear(INPUTS, OUTPUTS, bias=bias)
    exact = nn.Linear(INPUTS, OUTPUTS, bias=bias).double()
    plain.load_state_dict(layer.state_dict())
    exact.load_state_dict(layer.state_dict())
    found = results(layer, x)
    assert len(calls) == 2
    other = results(plain, x.detach().requires_grad_())
    wanted = results(exact, x.detach().double().requires_grad_())
    for ours, theirs, truth in zip(found, other, wanted, strict=True):
        assert ours.shape == theirs.shape
        assert ours.is_contiguous()
        assert (ours - truth).norm() <= 2 * (theirs - truth).norm() + 1e-7 * truth.norm()


@pytest.mark.parametrize("threads", [1, 2])
def test_repeated_it_gives_the_same_bits(calls, threads):
    torch.set_num_threads(threads)
    first, second = (results(*problem()) for _ in range(2))
    assert calls
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_only_gradients_that_are_wanted_are_computed(calls):
    layer, x = problem()
    layer.weight.requires_grad_(False)
    layer(x.detach()).sum().backward()
    assert len(calls) == 1
    assert x.grad is None
    assert layer.weight.grad is None
    assert_close(layer.bias.grad, torch.full((OUTPUTS,), ROWS * 200.0))


def test_everything_else_is_left_to_pytorch(calls, monkeypatch):
    layer, x = problem()
    small = x[:, :4].contiguous()
    turned = x.transpose(0, 1)
    for inputs in (small, turned):
        assert torch.equal(layer(inputs), nn.functional.linear(inputs, layer.weight, layer.bias))
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16
    with torch.backends.mkldnn.flags(enabled=False):
        layer(x)
    torch.compile(layer, backend="eager", fullgraph=True)(x)
    layer.double()(x.double())
    monkeypatch.setattr(linear, "onednn_is_faster", lambda: False)
    layer.float()(x)
    assert not calls


def test_arithmetic_is_counted(calls):
    layer, x = problem()
    with FlopCounterMode(display=False) as counter:
        results(layer, x)
    assert len(calls) == 2
    assert counter.get_total_flops() == 3 * 2 * x.numel() * OUTPUTS


def test_functional_gradients(calls):
    layer, x = problem()
    parameters = {name: value.detach() for name, value in layer.named_parameters()}
    found = torch.func.grad(lambda p: torch.func.functional_call(layer, p, x.detach()).sum())(parameters)
    assert calls
    assert_close(found["weight"], x.detach().sum((0, 1)).expand(OUTPUTS, INPUTS), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize(("maker", "capability", "expected"), [
    ("AuthenticAMD", "AVX512", True), ("GenuineIntel", "AVX512", False), ("AuthenticAMD", "AVX2", False),
])  # fmt: skip
def test_it_is_decided_by_the_processor(monkeypatch, maker, capability, expected):
    monkeypatch.setattr(linear, "cpu_flags", lambda: frozenset({"vendor_id", ":", maker}))
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    assert linear.onednn_is_faster.__wrapped__() is expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", [MLP, TokenMixer])
def test_packed_weights_give_results_as_exact_as_plain_ones(packed_calls, dtype, kind):
    generator = torch.Generator().manual_seed(0)
    layer = kind(24, 96, 40)
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.3, generator=generator)
    shape = (3, 50, 24) if kind is MLP else (3, 24, 50)
    x = torch.randn(shape, generator=generator)
    with torch.no_grad(), torch.autocast("cpu", dtype, enabled=dtype == torch.bfloat16):
        plain = layer(x)
        with prepacked(layer, dtype):
            packed = layer(x)
    assert packed_calls == ["gelu", "none"]
    assert packed.dtype == plain.dtype == dtype
    with torch.no_grad():
        exact = layer.double()(x.double())
    assert (packed - exact).norm() <= 1.5 * (plain - exact).norm()


def test_packed_weights_serve_only_what_they_were_made_for(packed_calls):
    layer = MLP(24, 96, 40)
    x = torch.randn(5, 24)
    with prepacked(layer):
        layer(x).sum().backward()  # gradients are wanted
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            layer(x)
        with torch.no_grad():
            torch.compile(layer, backend="eager", fullgraph=True)(x)
    assert layer.fc1.weight.grad is not None
    with prepacked(layer, torch.bfloat16), torch.no_grad():
        layer(x)
    with torch.no_grad():
        layer(x)
    assert not packed_calls
    other = MLP(24, 96, 40, QUICK_GELU)
    with prepacked(other), torch.no_grad():
        other(x)
    assert packed_calls == ["none", "none"]


def test_packed_weights_are_let_go_of_after_an_error(packed_calls):
    layer = MLP(24, 96, 40)
    with pytest.raises(RuntimeError), prepacked(layer), torch.no_grad():
        layer(torch.zeros(5, 23))
    assert packed_calls == ["gelu"]
    assert layer.fc1.packed is layer.fc2.packed is None


@pytest.mark.parametrize(
    "why", ["another processor", "switched off", "no bfloat16", "float64", "not on the CPU"]
)
def test_weights_are_not_packed_where_it_does_not_pay(packed_calls, monkeypatch, why):
    dtype, device = torch.float32, "cpu"
    if why == "another processor":
        monkeypatch.setattr(linear, "onednn_is_faster", lambda: False)
    elif why == "no bfloat16":
        monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)
        dtype = torch.bfloat16
    elif why == "float64":
        dtype = torch.float64
    elif why == "not on the CPU":
        device = "meta"
    with torch.backends.mkldnn.flags(enabled=why != "switched off"):
        layer = MLP(24, 96, 40).to(device)
        with prepacked(layer, dtype):
            assert layer.fc1.packed is None


def test_an_empty_batch(packed_calls):
    layer = MLP(24, 96, 40)
    with prepacked(layer), torch.no_grad():
        assert layer(torch.zeros(0, 7, 24)).shape == (0, 7, 40)
