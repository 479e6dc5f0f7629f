"""The model configuration as each checkpoint layout tells it.

Ours and Hugging Face's directories hold a config.json. An official file is known by the shapes of its
parameters. What another layout has no word for (drop path, where the weights come from) travels along
under the key "groupvit_fast".
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from groupvit_fast.console import UserError
from groupvit_fast.model.presets import ImageConfig, ModelConfig, TextConfig

FORMAT = "groupvit_fast"
"""How our config.json is known, and the key for what is ours in other layouts."""
VERSION = 1
HEAD_WIDTH = 64
"""Official files do not say how many heads there are: all their attention heads are this wide."""


class CheckpointError(UserError, ValueError):
    """A checkpoint can not be read or written: one line that names it and the remedy."""


def our_json(config: ModelConfig, about: Mapping[str, Any]) -> dict[str, Any]:
    """The config.json of our layout; `about` is what is known of the weights beyond their shapes."""
    return {"format": FORMAT, "version": VERSION, "model": config.to_dict(), "about": dict(about)}


def config_from_ours(values: Mapping[str, Any]) -> tuple[ModelConfig, dict[str, Any]]:
    """Model configuration and `about` from our config.json (or the same stored inside another layout)."""
    if values.get("version", VERSION) > VERSION:
        raise ValueError(
            f"version {values['version']} is newer than this package reads; update groupvit_fast"
        )
    if "model" not in values:
        raise ValueError("its config.json has no 'model'")
    return ModelConfig.from_dict(values["model"]), dict(values.get("about", {}))


def hf_json(
    config: ModelConfig, about: Mapping[str, Any], extra: Mapping[str, Any], dtype: str
) -> dict[str, Any]:
    """The config.json of Hugging Face's layout. ValueError if its model can not compute this one."""
    refuse_unfaithful(config, "hf")
    image, text = config.image, config.text
    return {
        "architectures": ["GroupViTModel"],
        "model_type": "groupvit",
        "dtype": dtype,
        "projection_dim": config.embed_dim,
        "projection_intermediate_dim": config.projector_hidden,
        "logit_scale_init_value": config.logit_scale_init,
        "vision_config": {
            "model_type": "groupvit_vision_model",
            "image_size": image.image_size,
            "patch_size": image.patch_size,
            "hidden_size": image.width,
            "intermediate_size": int(image.mlp_ratio * image.width),
            "num_attention_heads": image.heads,
            "num_hidden_layers": sum(image.depths),
            "depths": list(image.depths),
            "num_group_tokens": [*image.group_tokens, 0],
            "num_output_groups": [*image.output_groups, image.output_groups[-1]],
            "assign_eps": image.assign_eps,
        },
        "text_config": {
            "model_type": "groupvit_text_model",
            "vocab_size": text.vocab_size,
            "hidden_size": text.width,
            "intermediate_size": 4 * text.width,
            "num_attention_heads": text.heads,
            "num_hidden_layers": text.layers,
            "max_position_embeddings": text.context_length,
            "bos_token_id": text.vocab_size - 2,
            "eos_token_id": text.vocab_size - 1,
        },
        FORMAT: {**our_json(config, about), **extra},
    }


def config_from_hf(values: Mapping[str, Any]) -> tuple[ModelConfig, dict[str, Any]]:
    """Model configuration and `about` from Hugging Face's config.json; missing values take its defaults."""
    if FORMAT in values:
        return config_from_ours(values[FORMAT])
    vision, text = values.get("vision_config") or {}, values.get("text_config") or {}
    refuse_other_maths(vision, text)
    width = vision.get("hidden_size", 384)
    depths = tuple(vision.get("depths", (6, 3, 3)))
    tokens = [count for count in vision.get("num_group_tokens", (64, 8, 0)) if count > 0]
    image = ImageConfig(
        image_size=vision.get("image_size", 224),
        patch_size=vision.get("patch_size", 16),
        width=width,
        heads=vision.get("num_attention_heads", 6),
        depths=depths + (0,) * (len(tokens) + 1 - len(depths)),
        group_tokens=tuple(tokens),
        output_groups=tuple(vision.get("num_output_groups", (64, 8, 8)))[: len(tokens)],
        mlp_ratio=vision.get("intermediate_size", 1536) / width,
        assign_eps=vision.get("assign_eps", 1.0),
    )
    text_config = TextConfig(
        context_length=text.get("max_position_embeddings", 77),
        vocab_size=text.get("vocab_size", 49408),
        width=text.get("hidden_size", 256),
        layers=text.get("num_hidden_layers", 12),
        heads=text.get("num_attention_heads", 4),
    )
    config = ModelConfig(
        image=image,
        text=text_config,
        embed_dim=values.get("projection_dim", 256),
        projector_hidden=values.get("projection_intermediate_dim", 4096),
        multi_label_logit_scale=False,
    )
    return config, {"origin": "hf"}


def refuse_other_maths(vision: Mapping[str, Any], text: Mapping[str, Any]) -> None:
    """ValueError if a Hugging Face configuration asks for what our encoders do not compute."""
    fixed = [
        (vision, "hidden_act", ("gelu",), "gelu"),
        (vision, "layer_norm_eps", (1e-5,), 1e-5),
        (vision, "assign_mlp_ratio", ([0.5, 4],), [0.5, 4]),
        (text, "hidden_act", ("quick_gelu",), "quick_gelu"),
        (text, "layer_norm_eps", (1e-5,), 1e-5),
        # 2 is a historical way to write: where the largest token stands, which is what we do.
        (text, "eos_token_id", (2, text.get("vocab_size", 49408) - 1), 2),
    ]
    for part, name, allowed, default in fixed:
        value = part.get(name, default)
        if value not in allowed:
            raise ValueError(f"its config.json has {name} = {value}, and only {allowed[0]} is supported")


def config_from_official(state: Mapping[str, Tensor]) -> ModelConfig:
    """Read the configuration off the shapes of an official state dict. KeyError names what is missing."""
    width = state["img_encoder.pos_embed"].shape[2]
    patch = state["img_encoder.patch_embed.proj.weight"].shape[-1]
    text_width = state["text_encoder.positional_embedding"].shape[1]
    stages = count(state, "img_encoder.layers.{}.group_token")
    depths = [
        count(state, f"img_encoder.layers.{stage}.blocks.{{}}.norm1.weight") for stage in range(stages + 1)
    ]
    mixers = [f"img_encoder.layers.{stage}.downsample.mlp_inter.fc2.weight" for stage in range(stages)]
    two_layers = "img_projector.linear_hidden.0.weight" in state
    for owner, size in (("image", width), ("text", text_width)):
        if size % HEAD_WIDTH:
            raise ValueError(
                f"its {owner} width {size} is not a multiple of {HEAD_WIDTH}, the width of a head"
            )
    image = ImageConfig(
        image_size=math.isqrt(state["img_encoder.pos_embed"].shape[1]) * patch,
        patch_size=patch,
        width=width,
        heads=width // HEAD_WIDTH,
        depths=tuple(depths),
        group_tokens=tuple(
            state[f"img_encoder.layers.{stage}.group_token"].shape[1] for stage in range(stages)
        ),
        output_groups=tuple(state[name].shape[0] for name in mixers),
        mlp_ratio=state["img_encoder.layers.0.blocks.0.mlp.fc1.weight"].shape[0] / width,
    )
    text = TextConfig(
        context_length=state["text_encoder.positional_embedding"].shape[0],
        vocab_size=state["text_encoder.token_embedding.weight"].shape[0],
        width=text_width,
        layers=count(state, "text_encoder.transformer.resblocks.{}.ln_1.weight"),
        heads=text_width // HEAD_WIDTH,
    )
    return ModelConfig(
        image=image,
        text=text,
        embed_dim=state["img_projector.linear_out.weight"].shape[0],
        projector_hidden=state["img_projector.linear_hidden.0.weight"].shape[0] if two_layers else 4096,
        projector_layers=2 if two_layers else 1,
        multi_label_logit_scale="multi_label_logit_scale" in state,
    )


def count(state: Mapping[str, Tensor], template: str) -> int:
    """How many of the numbered names template.format(0), (1), ... are in `state`."""
    number = 0
    while template.format(number) in state:
        number += 1
    return number


def refuse_unfaithful(config: ModelConfig, layout: str) -> None:
    """ValueError naming each setting that is not the paper's, for which `layout` has no word."""
    image = config.image
    reasons = {
        "token_residual=False": not image.token_residual,
        "pre_assign_attention=False": not image.pre_assign_attention,
        "hard_assignment=False": not image.hard_assignment,
        f"assign_scale={image.assign_scale}": image.logit_factor != image.width**-0.5,
        f"tau={image.tau}": image.tau != 1.0,
        f"logit_bias_init={config.logit_bias_init}": config.logit_bias_init is not None,
        "projector_layers=1": layout == "hf" and config.projector_layers == 1,
        f"assign_eps={image.assign_eps}": layout == "official" and image.assign_eps != 1.0,
        # Its group projector takes as many tokens as the stage before has output groups.
        f"group_tokens {image.group_tokens} with output_groups {image.output_groups}": (
            layout == "hf" and image.output_groups[:-1] != image.group_tokens[:-1]
        ),
    }
    found = [reason for reason, applies in reasons.items() if applies]
    if found:
        raise ValueError(f"the {layout} layout can not express {', '.join(found)}; convert with --to ours")
