"""Counted arithmetic against PyTorch's own counter and against published figures."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from groupvit_fast import ops
from groupvit_fast.model.groupvit import create_model
from groupvit_fast.model.presets import ImageConfig, TextConfig, preset
from groupvit_fast.training import flops


def counted(call):
    """The counter does not know the CPU's fused attention, so that is written out."""
    plain = sdpa_kernel(SDPBackend.MATH)
    with plain, FlopCounterMode(display=False) as counter, ops.use_backend("reference"):
        call()
    return counter.get_total_flops()


@pytest.mark.parametrize("name", ["groupvit-gcc-yfcc", "groupvit-1stage"])
def test_image_encoder_equals_the_counter(name):
    """The counter sees a product in the hard assignment, which a segment sum does without."""
    config, batch = preset(name), 64
    model = create_model(replace(config, text=TextConfig(vocab_size=8)))
    with FakeTensorMode(allow_non_fake_inputs=True):
        found = counted(lambda: model.image_encoder(torch.zeros(batch, 3, 224, 224)))
    soft = replace(config.image, hard_assignment=False)
    of_weights = len(soft.group_tokens) * 2 * 2 * soft.width**3
    assert found == pytest.approx(batch * flops.image_flops(soft) + of_weights, rel=1e-4)


def test_text_layers_equal_the_counter():
    text = TextConfig(vocab_size=8)
    model = create_model(replace(preset("groupvit-gcc-yfcc"), text=text)).to("meta")
    found = counted(lambda: model.text_encoder(torch.zeros(4, 77, dtype=torch.int64, device="meta")))
    full = 4 * text.layers * flops.block_flops(77, text.width, 4)
    assert found == pytest.approx(full, rel=1e-3)
    one = TextConfig(layers=1)
    assert flops.text_flops(replace(one, layers=2), [5]) - flops.text_flops(one, [5]) == pytest.approx(
        5 * 24 * 256**2 + 4 * 256 * (1 + 2 + 3 + 4 + 5)
    )


def test_official_recipe_is_near_the_published_arithmetic():
    """7.94 GF an image and 0.68 GF for a caption of 12 tokens and three prompts of 8.

    There, keys and values of the assignment are made from every token, and all four projections.
    """
    config = preset("groupvit-gcc-yfcc")
    absorbed = 4 * 384**2 * (196 + 64)
    assert flops.image_flops(config.image) + absorbed == pytest.approx(7.94e9, rel=0.005)
    assert flops.text_flops(config.text, [12, 8, 8, 8]) == pytest.approx(0.68e9, rel=0.08)
    trained = flops.training_flops(config, [12, 8, 8, 8], 4) + 3 * absorbed
    assert trained == pytest.approx(25.9e9, rel=0.02)


def test_more_costs_more():
    config = preset("tiny")
    assert flops.training_flops(config, [5, 5], 2) < flops.training_flops(config, [5, 6], 2)
    assert flops.training_flops(config, [5, 5], 2) < flops.training_flops(config, [5, 5], 3)
    plain = ImageConfig(pre_assign_attention=False)
    assert flops.image_flops(plain) < flops.image_flops(ImageConfig())
