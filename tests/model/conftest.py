"""Models and inputs that several tests of the model share."""

import pytest
import torch
from transformers import GroupViTConfig, GroupViTModel

from groupvit_fast.model.presets import ImageConfig, ModelConfig, TextConfig


@pytest.fixture(
    params=["cpu", pytest.param("cuda", marks=pytest.mark.skipif("not torch.cuda.is_available()"))]
)
def device(request):
    return request.param


@pytest.fixture
def small_config():
    """Two faithful stages in miniature; group tokens and output groups differ in the last one."""
    return ModelConfig(
        image=ImageConfig(
            image_size=48,
            patch_size=8,
            width=32,
            heads=4,
            depths=(2, 1, 1),
            group_tokens=(6, 5),
            output_groups=(6, 3),
        ),
        text=TextConfig(context_length=16, vocab_size=100, width=24, layers=2, heads=2),
        embed_dim=20,
        projector_hidden=40,
    )


@pytest.fixture
def small_hf_config():
    """What `small_config` is called by Hugging Face."""
    vision = {
        "image_size": 48,
        "patch_size": 8,
        "hidden_size": 32,
        "intermediate_size": 128,
        "num_attention_heads": 4,
        "depths": [2, 1, 1],
        "num_hidden_layers": 4,
        "num_group_tokens": [6, 5, 0],
        "num_output_groups": [6, 3, 3],
    }
    text = {
        "vocab_size": 100,
        "hidden_size": 24,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": 16,
        "bos_token_id": 98,
        "eos_token_id": 99,
    }
    return GroupViTConfig(
        vision_config=vision, text_config=text, projection_dim=20, projection_intermediate_dim=40
    )


@pytest.fixture
def random_hf_model():
    """A function: Hugging Face's model of a configuration, every number random, in evaluation mode.

    Its own initial position embedding and group tokens are zero, which would hide mistakes in them.
    """

    def build(config: GroupViTConfig, seed: int = 0) -> GroupViTModel:
        torch.manual_seed(seed)
        model = GroupViTModel(config).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                noise = torch.randn_like(parameter)
                parameter.copy_(0.05 * noise if parameter.dim() > 1 else parameter + 0.1 * noise)
            for name, buffer in model.named_buffers():
                if "running" in name:
                    buffer.add_(0.2 * torch.rand_like(buffer))
        return model

    return build


@pytest.fixture
def token_rows():
    """A function: random texts with start and end tokens, zero-padded to the context length."""

    def draw(config: TextConfig, lengths: list[int], seed: int = 0) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        tokens = torch.zeros(len(lengths), config.context_length, dtype=torch.int64)
        for row, length in zip(tokens, lengths, strict=True):
            row[:length] = torch.randint(1, config.vocab_size - 2, (length,), generator=generator)
            row[0], row[length - 1] = config.vocab_size - 2, config.vocab_size - 1
        return tokens

    return draw
