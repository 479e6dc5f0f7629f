"""The whole model against Hugging Face's, and what training needs of it."""

from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close
from transformers import GroupViTConfig

from groupvit_fast import ops
from groupvit_fast.model.checkpoint_keys import to_ours
from groupvit_fast.model.groupvit import create_model
from groupvit_fast.model.presets import preset


def converted(hf_model, config):
    """Our model with the weights of Hugging Face's."""
    model = create_model(replace(config, multi_label_logit_scale=False)).eval()
    state, report = to_ours(hf_model.state_dict(), "hf", model.state_dict())
    assert report.complete
    model.load_state_dict(state)
    return model.to(hf_model.dtype)


def assert_same_as_hf(model, hf_model, pixels, tokens, atol):
    """Embeddings, logits, segment tokens and maps of every stage agree to `atol`.

    Where values exceed 1 the tolerance is relative to the largest.
    """
    theirs = hf_model(input_ids=tokens, pixel_values=pixels, output_attentions=True)
    vision = theirs.vision_model_output
    ours = model.encode_groups(pixels)
    text = model.encode_text(tokens)
    image = torch.nn.functional.normalize(ours.image, dim=1)
    logits = model.logit_scale.exp() * image @ torch.nn.functional.normalize(text, dim=1).T
    pairs = {
        "image": (ours.image, hf_model.get_image_features(pixels).pooler_output),
        "text": (text, hf_model.get_text_features(tokens).pooler_output),
        "logits": (logits, theirs.logits_per_image),
        "segments": (model.image_encoder(pixels).groups, vision.last_hidden_state),
        "groups": (
            ours.groups,
            hf_model.visual_projection(vision.last_hidden_state.flatten(0, 1)).view_as(ours.groups),
        ),
        **{f"map {i}": pair for i, pair in enumerate(zip(ours.maps, vision.attentions, strict=True))},
    }
    for name, (found, wanted) in pairs.items():
        assert_close(
            found,
            wanted,
            rtol=0,
            atol=atol * max(1.0, wanted.abs().max().item()),
            msg=lambda text, name=name: f"{name}: {text}",
        )
        assert wanted.abs().max() > 1e-3, f"{name} is too small to compare"


@pytest.mark.parametrize(("dtype", "atol"), [(torch.float32, 1e-5), (torch.float64, 1e-10)])
@torch.no_grad()
def test_equals_hugging_face(random_hf_model, token_rows, dtype, atol):
    hf_model = random_hf_model(GroupViTConfig()).to(dtype)
    config = preset("groupvit-gcc-redcaps")
    model = converted(hf_model, config)
    pixels, tokens = torch.randn(2, 3, 224, 224, dtype=dtype), token_rows(config.text, [4, 30, 77])
    for absorb in (True, False):
        model.image_encoder.set_absorb(absorb)
        assert_same_as_hf(model, hf_model, pixels, tokens, atol)


@pytest.mark.parametrize(
    ("vision", "ours"),
    [
        ({}, {}),
        (
            {"num_group_tokens": [6, 5, 0], "num_output_groups": [6, 5, 5], "assign_eps": 0.5},
            {"output_groups": (6, 5), "assign_eps": 0.5},
        ),
        (
            {"depths": [3, 0], "num_group_tokens": [7, 0], "num_output_groups": [2, 2]},
            {"depths": (3, 0), "group_tokens": (7,), "output_groups": (2,)},
        ),
        (
            {"hidden_size": 48, "intermediate_size": 96, "num_attention_heads": 3, "patch_size": 16},
            {"width": 48, "heads": 3, "mlp_ratio": 2.0, "patch_size": 16},
        ),
    ],
)
@torch.no_grad()
def test_equals_hugging_face_in_other_shapes(
    random_hf_model, token_rows, small_hf_config, small_config, vision, ours
):
    for name, value in vision.items():
        setattr(small_hf_config.vision_config, name, value)
    hf_model = random_hf_model(small_hf_config).double()
    config = replace(small_config, image=replace(small_config.image, **ours))
    pixels = torch.randn(3, 3, 48, 48, dtype=torch.float64)
    tokens = token_rows(config.text, [3, 16])
    assert_same_as_hf(converted(hf_model, config), hf_model, pixels, tokens, atol=1e-10)


def random_batch(config, token_rows, images=4, prompts=2):
    """pixels, distinct texts of which some occur often, and their index."""
    generator = torch.Generator().manual_seed(0)
    size = config.image.image_size
    pixels = torch.randn(images, 3, size, size, generator=generator)
    texts = token_rows(config.text, [4, 7, 5])
    return pixels, texts, torch.randint(0, 3, (images, 1 + prompts), generator=generator)


@pytest.mark.parametrize("name", ["small", "tiny"])
def test_gradient_reaches_every_parameter(small_config, token_rows, name):
    config = small_config if name == "small" else preset(name)
    model = create_model(config, seed=0)
    output = model(*random_batch(config, token_rows), noise_key=torch.tensor([1, 0]))
    scales = model.logit_scale.exp() + model.multi_label_logit_scale.exp()
    (scales * (output.image[:, None] * output.text).sin().sum()).backward()
    idle = [name for name, parameter in model.named_parameters() if not parameter.grad.any()]
    assert idle == []


def test_text_rows_are_repeated_before_the_batch_norm(small_config, token_rows):
    """Statistics and outputs equal those of encoding every caption and prompt on its own."""
    model = create_model(small_config, seed=0).double()
    other = create_model(small_config, seed=0).double()
    pixels, texts, index = random_batch(small_config, token_rows)
    output = model(pixels.double(), texts, index)
    expanded = other.encode_text(texts[index.flatten()]).view(4, 3, -1)
    assert_close(output.text, expanded, rtol=1e-10, atol=1e-10)
    for ours, wanted in zip(
        model.text_projector.norm.buffers(), other.text_projector.norm.buffers(), strict=True
    ):
        assert_close(ours, wanted, rtol=1e-10, atol=1e-12)
    assert len(index.unique()) < index.numel()


def test_training_output_shapes(small_config, token_rows):
    output = create_model(small_config)(*random_batch(small_config, token_rows))
    assert output.image.shape == (4, 20)
    assert output.text.shape == (4, 3, 20)
    assert output.areas.shape == (4, 3)


def test_seed_decides_the_weights_and_leaves_the_global_state(small_config):
    before = torch.get_rng_state()
    first, again, other = (create_model(small_config, seed=seed).state_dict() for seed in (1, 1, 2))
    assert torch.equal(before, torch.get_rng_state())
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(
        first["image_encoder.patch_embedding.position"], other["image_encoder.patch_embedding.position"]
    )


def test_encode_groups_refuses_training_mode(small_config):
    with pytest.raises(RuntimeError, match=r"model\.eval\(\)"):
        create_model(small_config).encode_groups(torch.zeros(1, 3, 48, 48))


def test_linear_projector_keeps_means():
    """With one-layer projectors the image embedding is the mean of its group embeddings."""
    model = create_model("tiny", seed=0).eval()
    encoding = model.encode_groups(torch.randn(2, 3, 64, 64))
    assert_close(encoding.image, encoding.groups.mean(dim=1), rtol=1e-4, atol=1e-5)
    assert encoding.grid == (8, 8)


def test_bfloat16_autocast_trains(small_config, token_rows):
    model = create_model(small_config, seed=0)
    batch = random_batch(small_config, token_rows)
    wanted = model(*batch, noise_key=torch.tensor([1, 0]))
    with torch.autocast("cpu", torch.bfloat16):
        output = model(*batch, noise_key=torch.tensor([1, 0]))
    output.image.float().sin().sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.image_encoder.parameters())
    cosine = torch.nn.functional.cosine_similarity(output.text.float(), wanted.text, dim=-1)
    assert cosine.min() > 0.99


def test_compiles_without_graph_breaks(small_config, token_rows):
    """The training forward is one graph, and gives what the plain one gives."""
    model = create_model(replace(small_config, image=replace(small_config.image, drop_path=0.0)), seed=0)
    batch = (*random_batch(small_config, token_rows), torch.tensor([1, 0]))
    compiled = torch.compile(create_model(model.config, seed=0), fullgraph=True, backend="aot_eager")
    results = []
    for network in (model, compiled):
        output = network(*batch)
        output.image.sin().sum().backward()
        results.append((output, network.image_encoder.patch_embedding.position.grad))
    assert_close(results[1], results[0], rtol=1e-4, atol=1e-5)


def test_training_can_ask_for_projected_groups():
    model = create_model("tiny", seed=0).eval()
    pixels, texts = torch.randn(3, 3, 64, 64), torch.tensor([[49406, 320, 49407], [49406, 2368, 49407]])
    index = torch.tensor([[0, 1], [1, 0], [0, 0]])
    output = model(pixels, texts, index, return_groups=True)
    assert output.groups.shape == (3, 8, 64)
    assert_close(output.groups, model.encode_groups(pixels).groups)
    assert_close(output.groups.mean(1), output.image)  # linear projectors
    assert model(pixels, texts, index).groups is None


def test_projected_groups_are_refused_with_batch_norm():
    model = create_model(replace(preset("tiny"), projector_layers=2))
    with pytest.raises(RuntimeError, match="projector_layers=1"):
        model(torch.randn(2, 3, 64, 64), torch.tensor([[49406, 49407]]), torch.zeros(2, 1, dtype=torch.int64),
              return_groups=True)  # fmt: skip


@torch.no_grad()
@pytest.mark.parametrize("size", [(448, 448), (320, 464)])
def test_other_sizes_equal_the_reference_operators(size):
    """Hugging Face's model takes 224 px only, so here the plain-PyTorch operators are the judge."""
    model = create_model("groupvit-gcc-yfcc", seed=0).eval()
    pixels = torch.randn(1, 3, *size, generator=torch.Generator().manual_seed(1))
    found = model.encode_groups(pixels)
    with ops.use_backend("reference"):
        wanted = model.encode_groups(pixels)
    assert found.grid == (size[0] // 16, size[1] // 16)
    assert_close(found.groups, wanted.groups, rtol=1e-5, atol=1e-5)
    assert_close(found.image, wanted.image, rtol=1e-5, atol=1e-5)
    for ours, theirs in zip(found.maps, wanted.maps, strict=True):
        assert_close(ours, theirs, rtol=0, atol=1e-5)
