"""The compiled operators as citizens of PyTorch: opcheck, compile, autocast, checkpointing, vmap, graphs."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from backends import BACKENDS
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from groupvit_fast import ops

COMPILED = [backend for backend in BACKENDS if backend.compiled]
pytestmark = pytest.mark.skipif(not COMPILED, reason="nothing was compiled")
NOISE = torch.tensor([3, 4])


@pytest.fixture(params=COMPILED, ids=lambda backend: backend.name)
def device(request):
    return request.param.device


def assign_tensors(device, gradient=False, dtype=torch.float32, shape=(2, 5, 7, 9)):
    batch, groups, tokens, channels = shape
    sizes = ((batch, groups, channels), (batch, tokens, channels), (batch, tokens, channels), (batch, groups))
    return [torch.randn(size, device=device, dtype=dtype, requires_grad=gradient) for size in sizes]


def attention_tensors(device, gradient=False, dtype=torch.float32, shape=(2, 3, 5, 7, 8)):
    batch, heads, groups, tokens, depth = shape
    sizes = ((batch, heads, rows, depth) for rows in (groups, tokens, tokens))
    return [torch.randn(size, device=device, dtype=dtype, requires_grad=gradient) for size in sizes]


# ---- opcheck ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("complete", [True, False], ids=["bias and noise", "neither"])
@pytest.mark.parametrize("hard", [True, False])
def test_opcheck_gumbel_assign(device, shared, complete, hard):
    operators, constants = torch.ops.groupvit_fast, (0.3, 0.9, 1.0, hard)

    def optional(query, key, value, bias):
        noise = NOISE.to(device) if complete else None
        return query, key, None if shared else value, bias if complete else None, noise

    arguments = optional(*assign_tensors(device, gradient=True))
    torch.library.opcheck(operators.gumbel_assign_forward, (*arguments, *constants))
    arguments = optional(*assign_tensors(device))
    results = operators.gumbel_assign_forward(*arguments, *constants)
    gradient = torch.randn_like(results[0])
    count_gradient = torch.randn_like(results[2]) if complete else None
    torch.library.opcheck(
        operators.gumbel_assign_backward, (gradient, count_gradient, *arguments, *results, *constants)
    )


def test_opcheck_group_attention(device):
    operators = torch.ops.groupvit_fast
    torch.library.opcheck(operators.group_attention_forward, (*attention_tensors(device, gradient=True), 0.3))
    tensors = attention_tensors(device)
    results = operators.group_attention_forward(*tensors, 0.3)
    gradient = torch.randn_like(results[0])
    torch.library.opcheck(operators.group_attention_backward, (gradient, *tensors, *results, 0.3))


@pytest.mark.parametrize("fake", [False, True])
def test_attention_called_directly_has_the_registered_gradient(device, fake):
    with FakeTensorMode() if fake else nullcontext():
        tensors = attention_tensors(device, gradient=True)
        registered = torch.ops.groupvit_fast.group_attention_forward(*tensors, 8**-0.5)[0]
        results = [
            [output, *torch.autograd.grad(output.sum(), tensors)]
            for output in (ops.group_attention(*tensors), registered)
        ]
        for one, other in zip(*results, strict=True):
            assert one.stride() == other.stride()
            assert fake or torch.equal(one, other)
    frozen = [t.detach() for t in tensors]
    assert ops.group_attention(frozen[0], tensors[1], frozen[2]).requires_grad
    assert not ops.group_attention(*frozen).requires_grad
    with torch.no_grad():
        assert not ops.group_attention(*tensors).requires_grad


@pytest.mark.parametrize("fake", [False, True])
def test_assign_called_directly_has_the_registered_gradient(device, fake):
    with FakeTensorMode() if fake else nullcontext():
        query, key, value, bias = assign_tensors(device, gradient=True)
        noise = torch.tensor([3, 4], device=device)
        arguments = (query, key, value, bias, noise, 9**-0.5, 1.0, 1.0, True)
        registered = torch.ops.groupvit_fast.gumbel_assign_forward(*arguments)
        direct = ops.gumbel_assign(query, key, value, bias=bias, noise_key=noise)
        results = []
        for output, index, count in (direct, registered[:3]):
            loss = (output * output).sum() + (count * bias.detach()).sum()
            results.append([output, index, count, *torch.autograd.grad(loss, (query, key, value, bias))])
        for one, other in zip(*results, strict=True):
            assert one.shape == other.shape
            assert one.dtype == other.dtype
            assert fake or torch.equal(one, other)
    assert ops.gumbel_assign(query.detach(), key.detach(), value).output.requires_grad
    assert not ops.gumbel_assign(*(t.detach() for t in (query, key, value))).count.requires_grad
    with torch.no_grad():
        assert not ops.gumbel_assign(query, key, value).output.requires_grad


# ---- compile, autocast, checkpointing --------------------------------------------------------------------


def block(query, key, value, bias, noise_key):
    """Both operators with something around them, as a model has."""
    heads = ops.group_attention(*(t.unflatten(-1, (3, 3)).transpose(1, 2) for t in (query, key, value)))
    query = query + heads.transpose(1, 2).flatten(2)
    output, index, count = ops.gumbel_assign(query, key, key, bias=bias, noise_key=noise_key)
    plain = ops.gumbel_assign(query * 2, key, value, hard=False, tau=0.5)
    return output * 2 + plain.output, index, count


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_without_a_graph_break(device, dynamic):
    torch._dynamo.reset()
    compiled = torch.compile(block, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for shape in ((2, 5, 7, 9), (3, 4, 8, 9)) if dynamic else ((2, 5, 7, 9),):
        tensors = assign_tensors(device, gradient=True, shape=shape)
        results = []
        for function in (block, compiled):
            output, index, count = function(*tensors, NOISE.to(device))
            results.append([output, index, count, *torch.autograd.grad(output.square().sum(), tensors)])
        for one, other in zip(*results, strict=True):
            torch.testing.assert_close(one, other)


def test_compiles_with_inductor(device):
    torch._dynamo.reset()
    tensors = assign_tensors(device, gradient=True)
    compiled = torch.compile(block, fullgraph=True)
    own, wanted = (f(*tensors, NOISE.to(device))[0] for f in (compiled, block))
    torch.testing.assert_close(own, wanted)
    pairs = zip(*(torch.autograd.grad(o.square().sum(), tensors) for o in (own, wanted)), strict=True)
    for one, other in pairs:
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("compiled", [False, True])
def test_autocast_casts_as_a_matrix_product_does(device, compiled):
    torch._dynamo.reset()
    function = torch.compile(block, fullgraph=True, backend="aot_eager") if compiled else block
    tensors = assign_tensors(device, gradient=True)
    with torch.autocast(device, torch.bfloat16):
        output, _, count = function(*tensors, NOISE.to(device))
        kept = ops.gumbel_assign(*(t.double() for t in tensors[:3])) if device == "cpu" else None
    assert output.dtype == torch.bfloat16
    assert count.dtype == torch.float32
    assert kept is None or kept.output.dtype == torch.float64
    for tensor, grad in zip(tensors, torch.autograd.grad(output.float().sum(), tensors), strict=True):
        assert grad.dtype == tensor.dtype


def test_one_tensor_stays_one_under_autocast(device):
    """Cast twice, the shared tensor would be read twice, and saved twice for the backward."""
    query, key, *_ = assign_tensors(device, gradient=True)
    saved = []
    note = torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.dtype) or t, lambda t: t)
    with note, torch.autocast(device, torch.bfloat16):
        ops.gumbel_assign(query, key, key)
    assert saved.count(torch.bfloat16) == 3  # query, key, output


def test_checkpointing_repeats_the_noise(device):
    tensors = assign_tensors(device, gradient=True)
    noise_key = NOISE.to(device)
    results = []
    for wrap in (block, lambda *arguments: checkpoint(block, *arguments, use_reentrant=False)):
        output = wrap(*tensors, noise_key)[0]
        results.append([output, *torch.autograd.grad(output.sum(), tensors)])
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_cuda_graph_capture():
    tensors = assign_tensors("cuda", gradient=True)
    noise_key = NOISE.cuda()
    graphed = torch.cuda.make_graphed_callables(lambda *t: block(*t, noise_key)[0], tuple(tensors))
    for key in ((3, 4), (5, 6)):
        noise_key.copy_(torch.tensor(key))
        torch.testing.assert_close(graphed(*tensors), block(*tensors, noise_key)[0])


# ---- what is saved, and what is refused ------------------------------------------------------------------


def saved_bytes(function, known):
    """Bytes kept for the backward beside the `known` tensors."""
    sizes = {}
    known = {t.untyped_storage().data_ptr() for t in known}

    def note(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        results = function()
    outputs = {
        t.untyped_storage().data_ptr() for t in (results if isinstance(results, tuple) else (results,))
    }
    return sum(size for address, size in sizes.items() if address not in outputs)


@pytest.mark.parametrize("hard", [True, False])
def test_nothing_large_is_saved_for_the_backward(device, hard):
    batch, groups, tokens, channels = 2, 64, 196, 32
    query, key, value, bias = assign_tensors(device, gradient=True, shape=(batch, groups, tokens, channels))
    noise = NOISE.to(device)
    extra = saved_bytes(
        lambda: ops.gumbel_assign(query, key, value, bias=bias, hard=hard, noise_key=noise),
        (query, key, value, bias, noise),
    )
    assert extra <= batch * (4 * tokens if device == "cuda" else 0)  # the CPU makes all of it again
    tensors = attention_tensors(device, gradient=True, shape=(batch, 2, groups, tokens, 16))
    assert saved_bytes(lambda: ops.group_attention(*tensors), tensors) <= batch * 2 * groups * 4


@pytest.mark.parametrize("name", ["gumbel_assign", "group_attention"])
def test_a_second_derivative_is_an_error(device, name):
    if name == "gumbel_assign":
        query, key, *_ = assign_tensors(device, gradient=True)
        output = ops.gumbel_assign(query, key, key, hard=False).output
    else:
        query, key, value = attention_tensors(device, gradient=True)
        output = ops.group_attention(query, key, value)
    (gradient,) = torch.autograd.grad(output.sum(), query, create_graph=True)
    with pytest.raises(RuntimeError, match=f"{name}: the compiled operator has no second derivative"):
        torch.autograd.grad(gradient.sum(), key)


def test_the_reference_has_a_second_derivative():
    query, key, *_ = assign_tensors("cpu", gradient=True, dtype=torch.float64)
    with ops.use_backend("reference"):
        output = ops.gumbel_assign(query, key, key, hard=False).output
        (gradient,) = torch.autograd.grad(output.sum(), query, create_graph=True)
        (second,) = torch.autograd.grad(gradient.sum(), key)
    assert second.abs().max() > 0


def test_vmap_joins_the_batch(device):
    query, key, _, bias = (torch.stack([t, t + 1, t - 1]) for t in assign_tensors(device))
    mapped = torch.vmap(lambda q, k, b: ops.gumbel_assign(q, k, k, bias=b), in_dims=(0, 0, 0))(
        query, key, bias
    )
    for i in range(3):
        single = ops.gumbel_assign(query[i], key[i], key[i], bias=bias[i])
        for one, other in zip(mapped, single, strict=True):
            assert torch.equal(one[i], other)
    fixed = torch.vmap(lambda q: ops.gumbel_assign(q, key[0], key[0]).output, in_dims=1, out_dims=1)
    result = fixed(query.transpose(0, 1).contiguous())
    assert torch.equal(result[:, 2], ops.gumbel_assign(query[2], key[0], key[0]).output)
    query, key, value = (torch.stack([t, t + 1]) for t in attention_tensors(device))
    result = torch.vmap(ops.group_attention)(query, key, value)
    assert torch.equal(result[1], ops.group_attention(query[1], key[1], value[1]))


def test_vmap_refuses_noise(device):
    query, key, *_ = (torch.stack([t, t]) for t in assign_tensors(device))
    with pytest.raises(RuntimeError, match="noise_key is not supported under vmap"):
        torch.vmap(lambda q, k: ops.gumbel_assign(q, k, k, noise_key=NOISE.to(device)).output)(query, key)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_batched_gradients(device):
    """Several gradients of one forward at once, as `torch.autograd.functional.jacobian` asks for them."""
    query, key, *_ = assign_tensors(device, gradient=True)
    output = ops.gumbel_assign(query, key, key, noise_key=NOISE.to(device)).output
    several = torch.randn(4, *output.shape, device=device)
    (batched,) = torch.autograd.grad(output, query, several, is_grads_batched=True, retain_graph=True)
    (single,) = torch.autograd.grad(output, query, several[2])
    assert torch.equal(batched[2], single)
