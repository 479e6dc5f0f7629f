"""The image encoder: sizes, noise, symmetry, the absorbed projections."""

from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close

from groupvit_fast import ops
from groupvit_fast.model.image_encoder import ImageEncoder, stage_noise_key
from groupvit_fast.model.layers import DropPath, attend
from groupvit_fast.model.presets import ImageConfig, preset


@pytest.fixture
def encoder(small_config, device):
    torch.manual_seed(0)
    return ImageEncoder(small_config.image).to(device).eval()


@pytest.mark.parametrize(("height", "width"), [(48, 48), (96, 96), (32, 72), (8, 8), (61, 50)])
def test_any_size_runs(encoder, device, height, width):
    encoding = encoder(torch.randn(2, 3, height, width, device=device), return_maps=True)
    cells = (height // 8) * (width // 8)
    assert encoding.groups.shape == (2, 3, 32)
    assert [tuple(soft.shape) for soft in encoding.maps] == [(2, 6, cells), (2, 3, 6)]
    for soft in encoding.maps:
        assert_close(soft.sum(dim=1), torch.ones_like(soft[:, 0]))
    assert_close(encoding.counts[0].sum(dim=1), torch.full((2,), float(cells), device=device))
    assert_close(encoding.pooled, encoding.groups.mean(dim=1))
    first, last = (soft.argmax(dim=1) for soft in encoding.maps)
    expected = torch.stack(
        [torch.bincount(index[group], minlength=3) for index, group in zip(last, first, strict=True)]
    )
    assert_close(encoding.areas, expected.to(encoding.areas.dtype))


def test_published_model_runs_at_448_pixels():
    encoder = ImageEncoder(preset("groupvit-gcc-yfcc").image).eval()
    with torch.inference_mode():
        encoding = encoder(torch.randn(1, 3, 448, 336), return_maps=True)
    assert [tuple(soft.shape) for soft in encoding.maps] == [(1, 64, 28 * 21), (1, 8, 64)]


@pytest.mark.parametrize("shape", [(3, 48, 48), (1, 1, 48, 48), (1, 3, 7, 48)])
def test_wrong_pixels_are_refused(encoder, shape):
    with pytest.raises(ValueError, match="pixels must be"):
        encoder(torch.zeros(shape))


def test_position_embedding_of_the_training_size_is_what_interpolation_gives(encoder):
    position = encoder.patch_embedding.position
    grid = position.unflatten(1, (6, 6)).permute(0, 3, 1, 2)
    same = torch.nn.functional.interpolate(grid, size=(6, 6), mode="bicubic", align_corners=False)
    assert torch.equal(same.flatten(2).transpose(1, 2), position)


@pytest.mark.parametrize("name", ["groupvit-gcc-yfcc", "groupvit-1stage", "tiny"])
def test_fresh_model_is_not_symmetric(name):
    """Equal group tokens would stay equal for ever: nothing else tells groups apart."""
    config = preset(name).image
    torch.manual_seed(0)
    encoder = ImageEncoder(config).eval()
    pixels = torch.randn(1, 3, config.image_size, config.image_size)
    with torch.no_grad():
        encoding = encoder(pixels, return_maps=True)
    for soft in encoding.maps:
        assert torch.pdist(soft[0]).min() > 0
    assert all(not stage.group_tokens.any() for stage in encoder.stages[1:-1])
    assert encoder.stages[0].group_tokens.std().item() == pytest.approx(0.02, rel=0.15)


@pytest.mark.parametrize("batch", [2, 12], ids=["rows first", "weights first"])
@pytest.mark.parametrize("hard", [True, False])
def test_absorbed_projections_change_nothing(small_config, hard, batch):
    """In float64 outputs and all gradients of both forms agree to rounding, with noise as in training."""
    torch.manual_seed(1)
    encoder = ImageEncoder(replace(small_config.image, hard_assignment=hard, drop_path=0.0)).double()
    for parameter in encoder.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    pixels = torch.randn(batch, 3, 48, 48, dtype=torch.float64)
    noise_key = torch.tensor([5, 7])
    results = []
    for absorb in (True, False):
        encoder.set_absorb(absorb)
        encoder.zero_grad()
        encoding = encoder(pixels, noise_key=noise_key, return_maps=True)
        (encoding.groups * torch.arange(32)).sin().sum().backward()
        results.append((encoding, [parameter.grad for parameter in encoder.parameters()]))
        with torch.no_grad():
            results.append((encoder(pixels, noise_key=noise_key, return_maps=True), None))
    reference, gradients = results[2]
    for encoding, found in results:
        assert_close(encoding.groups, reference.groups, rtol=1e-10, atol=1e-10)
        assert_close(encoding.maps, reference.maps, rtol=1e-10, atol=1e-10)
        assert_close(encoding.counts, reference.counts, rtol=1e-6, atol=1e-6)
        if found is not None:
            assert_close(found, gradients, rtol=1e-8, atol=1e-9)


def test_noise_key_decides_the_noise(encoder, device):
    pixels = torch.randn(1, 3, 48, 48, device=device)
    quiet = encoder(pixels).groups
    first, again, other = (
        encoder(pixels, noise_key=torch.tensor([3, offset], device=device)).groups for offset in (1, 1, 2)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert not torch.equal(first, quiet)


def test_stages_never_share_noise(monkeypatch, encoder, device):
    """Stage i of a step must use offset * stages + i, so that no two (step, stage) pairs meet."""
    seen = []
    original = ops.gumbel_assign
    monkeypatch.setattr(
        ops,
        "gumbel_assign",
        lambda *args, **kwargs: seen.append(kwargs["noise_key"].tolist()) or original(*args, **kwargs),
    )
    for offset in (0, 1):
        encoder(torch.randn(1, 3, 48, 48, device=device), noise_key=torch.tensor([9, offset], device=device))
    assert seen == [[9, 0], [9, 1], [9, 2], [9, 3]]
    assert stage_noise_key(None, 0, 2) is None


@pytest.mark.parametrize(
    "knobs",
    [
        {"token_residual": False},
        {"pre_assign_attention": False},
        {"assign_scale": 5.0},
        {"tau": 0.25},
        {"assign_eps": 0.5},
        {"hard_assignment": False},
    ],
)
def test_every_knob_changes_the_result(small_config, knobs):
    pixels = torch.randn(2, 3, 48, 48, generator=torch.Generator().manual_seed(0))
    outputs = []
    for config in (small_config.image, replace(small_config.image, **knobs)):
        torch.manual_seed(0)
        encoder = ImageEncoder(config).eval()
        encoder.load_state_dict(random_state(encoder), strict=True)
        outputs.append(encoder(pixels, noise_key=torch.tensor([1, 1]), return_maps=True))
    difference = (outputs[0].groups - outputs[1].groups).abs().max()
    map_difference = (outputs[0].maps[0] - outputs[1].maps[0]).abs().max()
    assert max(difference, map_difference) > 1e-4


def random_state(module):
    """Values that depend on the parameter's name alone, so that models with other parts share the rest."""
    state = {}
    for name, value in module.state_dict().items():
        generator = torch.Generator().manual_seed(sum(name.encode()))
        state[name] = torch.randn(value.shape, generator=generator) * 0.2
    return state


def test_no_layers_after_the_last_grouping():
    config = ImageConfig(
        image_size=32, patch_size=8, width=16, heads=2, depths=(1, 0), group_tokens=(4,), output_groups=(2,)
    )
    encoder = ImageEncoder(config)
    assert encoder(torch.randn(1, 3, 32, 32)).groups.shape == (1, 2, 16)
    assert not list(encoder.stages[1].parameters())


def test_drop_path_keeps_the_mean_and_drops_whole_samples():
    layer = DropPath(0.25)
    x = torch.ones(4000, 3, 2)
    torch.manual_seed(0)
    dropped = layer(x)
    torch.manual_seed(0)
    assert torch.equal(dropped, layer(x))
    per_sample = dropped.flatten(1)
    assert torch.equal(per_sample.amin(dim=1), per_sample.amax(dim=1))
    assert_close(per_sample[:, 0].unique(), torch.tensor([0.0, 1 / 0.75]))
    assert dropped.mean().item() == pytest.approx(1.0, abs=0.03)
    assert layer.eval()(x) is x


def test_drop_path_rates_rise_from_zero(small_config):
    encoder = ImageEncoder(small_config.image)
    rates = [block.drop_path.rate for stage in encoder.stages for block in stage.blocks]
    assert_close(torch.tensor(rates), torch.linspace(0, 0.1, 4))


@pytest.mark.parametrize("mask", [{}, {"is_causal": True}])
def test_attention_in_bf16_on_a_cpu_is_as_exact_as_bf16(mask):
    """Under autocast too, which would have PyTorch's own attention compute in bfloat16."""
    torch.manual_seed(0)
    tensors = [torch.randn(2, 40, 3, 64).bfloat16().requires_grad_() for _ in range(3)]
    exact = [tensor.detach().double().requires_grad_() for tensor in tensors]
    wanted = attend(*exact, **mask)
    with torch.autocast("cpu", torch.bfloat16):
        found = attend(*tensors, **mask)
    assert found.dtype == torch.bfloat16
    rounding = (wanted.bfloat16().double() - wanted).norm()
    # with a mask it is computed in float32; products of our operator round the probabilities as well
    assert (found.double() - wanted).norm() < (1.05 if mask else 2) * rounding
    found.sum().backward()
    wanted.sum().backward()
    for tensor, reference in zip(tensors, exact, strict=True):
        error = (tensor.grad.double() - reference.grad).norm()
        assert error <= 0.01 * reference.grad.norm()
