"""Names of every parameter in the three checkpoint layouts, and the translation between them.

- "ours": the state dict of `GroupViT`;
- "hf": Hugging Face's `GroupViTModel`;
- "official": the `.pth` files of the paper's authors.

The layouts differ in names, in which projections are stacked into one matrix, and in that the official
projectors are convolutions of kernel size 1. The numbers are the same, so translation is exact.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

LAYOUTS = ("ours", "hf", "official")

# Ours, Hugging Face, official. {s} is a stage, {b} a layer, * what follows (weight, bias, a running mean).
# [qkv] stands for three matrices which are one in our layout, stacked in that order; None: has no such thing.
_IMAGE = ("image_encoder.", "vision_model.", "img_encoder.")
_BLOCK = (
    "image_encoder.stages.{s}.blocks.{b}.",
    "vision_model.encoder.stages.{s}.layers.{b}.",
    "img_encoder.layers.{s}.blocks.{b}.",
)
_STAGE = ("image_encoder.stages.{s}.", "vision_model.encoder.stages.{s}.", "img_encoder.layers.{s}.")
_GROUPING = tuple(
    prefix + part for prefix, part in zip(_STAGE, ("grouping.", "downsample.", "downsample."), strict=True)
)
_TEXT = ("text_encoder.", "text_model.", "text_encoder.")
_TEXT_BLOCK = (
    "text_encoder.blocks.{b}.",
    "text_model.encoder.layers.{b}.",
    "text_encoder.transformer.resblocks.{b}.",
)
_TABLE: tuple[tuple[tuple[str, str, str], tuple[tuple[str, str | None, str], ...]], ...] = (
    (
        ("", "", ""),
        (
            ("logit_scale", "logit_scale", "logit_scale"),
            ("multi_label_logit_scale", None, "multi_label_logit_scale"),
            ("image_projector.hidden.*", "visual_projection.0.*", "img_projector.linear_hidden.0.*"),
            ("image_projector.norm.*", "visual_projection.1.*", "img_projector.linear_hidden.1.*"),
            ("image_projector.out.*", "visual_projection.3.*", "img_projector.linear_out.*"),
            ("text_projector.hidden.*", "text_projection.0.*", "text_projector.linear_hidden.0.*"),
            ("text_projector.norm.*", "text_projection.1.*", "text_projector.linear_hidden.1.*"),
            ("text_projector.out.*", "text_projection.3.*", "text_projector.linear_out.*"),
        ),
    ),
    (
        _IMAGE,
        (
            (
                "patch_embedding.projection.*",
                "embeddings.patch_embeddings.projection.*",
                "patch_embed.proj.*",
            ),
            ("patch_embedding.norm.*", "embeddings.layernorm.*", "patch_embed.norm.*"),
            ("patch_embedding.position", "embeddings.position_embeddings", "pos_embed"),
            ("norm.*", "layernorm.*", "norm.*"),
        ),
    ),
    (
        _BLOCK,
        (
            ("norm1.*", "layer_norm1.*", "norm1.*"),
            ("attention.qkv.*", "self_attn.[qkv]_proj.*", "attn.qkv.*"),
            ("attention.out.*", "self_attn.out_proj.*", "attn.proj.*"),
            ("norm2.*", "layer_norm2.*", "norm2.*"),
            ("mlp.fc1.*", "mlp.fc1.*", "mlp.fc1.*"),
            ("mlp.fc2.*", "mlp.fc2.*", "mlp.fc2.*"),
        ),
    ),
    (
        _STAGE,
        (
            ("group_tokens", "group_token", "group_token"),
            ("group_projector.norm.*", "group_projector.0.*", "group_projector.0.*"),
            ("group_projector.mixer.fc1.*", "group_projector.1.fc1.*", "group_projector.1.fc1.*"),
            ("group_projector.mixer.fc2.*", "group_projector.1.fc2.*", "group_projector.1.fc2.*"),
        ),
    ),
    (
        _GROUPING,
        (
            ("norm_tokens.*", "norm_tokens.*", "norm_tokens.*"),
            ("token_mixer.fc1.*", "mlp_inter.fc1.*", "mlp_inter.fc1.*"),
            ("token_mixer.fc2.*", "mlp_inter.fc2.*", "mlp_inter.fc2.*"),
            ("norm_mixed.*", "norm_post_tokens.*", "norm_post_tokens.*"),
            ("norm_image.*", "norm_x.*", "norm_x.*"),
            (
                "pre_assign.attention.query.*",
                "pre_assign_attn.attn.q_proj.*",
                "pre_assign_attn.attn.q_proj.*",
            ),
            (
                "pre_assign.attention.key_value.*",
                "pre_assign_attn.attn.[kv]_proj.*",
                "pre_assign_attn.attn.[kv]_proj.*",
            ),
            ("pre_assign.attention.out.*", "pre_assign_attn.attn.out_proj.*", "pre_assign_attn.attn.proj.*"),
            ("pre_assign.norm2.*", "pre_assign_attn.norm2.*", "pre_assign_attn.norm2.*"),
            ("pre_assign.mlp.fc1.*", "pre_assign_attn.mlp.fc1.*", "pre_assign_attn.mlp.fc1.*"),
            ("pre_assign.mlp.fc2.*", "pre_assign_attn.mlp.fc2.*", "pre_assign_attn.mlp.fc2.*"),
            ("pre_assign.norm_post.*", "pre_assign_attn.norm_post.*", "pre_assign_attn.norm_post.*"),
            ("assignment.query.*", "assign.q_proj.*", "assign.q_proj.*"),
            ("assignment.key.*", "assign.k_proj.*", "assign.k_proj.*"),
            ("assignment.value.*", "assign.v_proj.*", "assign.v_proj.*"),
            ("assignment.out.*", "assign.proj.*", "assign.proj.*"),
            ("norm_groups.*", "norm_new_x.*", "norm_new_x.*"),
            ("mlp.fc1.*", "mlp_channels.fc1.*", "mlp_channels.fc1.*"),
            ("mlp.fc2.*", "mlp_channels.fc2.*", "mlp_channels.fc2.*"),
        ),
    ),
    (
        _TEXT,
        (
            ("token_embedding.*", "embeddings.token_embedding.*", "token_embedding.*"),
            ("position", "embeddings.position_embedding.weight", "positional_embedding"),
            ("norm.*", "final_layer_norm.*", "ln_final.*"),
        ),
    ),
    (
        _TEXT_BLOCK,
        (
            ("norm1.*", "layer_norm1.*", "ln_1.*"),
            ("attention.qkv.*", "self_attn.[qkv]_proj.*", "attn.in_proj_*"),
            ("attention.out.*", "self_attn.out_proj.*", "attn.out_proj.*"),
            ("norm2.*", "layer_norm2.*", "ln_2.*"),
            ("mlp.fc1.*", "mlp.fc1.*", "mlp.c_fc.*"),
            ("mlp.fc2.*", "mlp.fc2.*", "mlp.c_proj.*"),
        ),
    ),
)


@dataclass
class KeyReport:
    """What a state dict lacks, has too much, or has in another shape: names, and for shapes a description."""

    missing: list[str]
    unexpected: list[str]
    misshaped: list[str]

    @property
    def complete(self) -> bool:
        return not (self.missing or self.unexpected or self.misshaped)


@functools.cache
def _rules() -> tuple[tuple[re.Pattern[str], tuple[str | None, ...]], ...]:
    """The table as (pattern of our key, templates of the three layouts)."""
    rules = []
    for prefixes, rows in _TABLE:
        for row in rows:
            names = tuple(
                None if part is None else prefix + part for prefix, part in zip(prefixes, row, strict=True)
            )
            pattern = re.escape(names[0]).replace(r"\{s\}", r"(?P<s>\d+)").replace(r"\{b\}", r"(?P<b>\d+)")
            rules.append((re.compile(pattern.replace(r"\*", r"(?P<rest>\w+)")), names))
    return tuple(rules)


@functools.cache
def foreign_keys(key: str, layout: str) -> tuple[str, ...]:
    """Names that our parameter `key` has in `layout`: several if it is a stack of them, none if it is not kept.

    KeyError for a name that is not ours.
    """
    for pattern, names in _rules():
        if match := pattern.fullmatch(key):
            template = names[LAYOUTS.index(layout)]
            if template is None:
                return ()
            name = template.replace("*", match.groupdict().get("rest", "")).format(**match.groupdict())
            letters = re.search(r"\[(\w+)\]", name)
            return tuple(name.replace(letters[0], letter) for letter in letters[1]) if letters else (name,)
    raise KeyError(f"{key} is no parameter of a GroupViT model")


def to_ours(
    state: Mapping[str, Tensor], layout: str, expected: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], KeyReport]:
    """Translate a state dict to our names.

    `expected` is the state dict of the model to fill (meta tensors will do): it says which parameters and
    shapes are wanted. Returns what could be translated and a report of what could not, in the names of
    `layout`.
    """
    found: dict[str, Tensor] = {}
    report = KeyReport([], [], [])
    known: set[str] = set()
    for key, target in expected.items():
        names = foreign_keys(key, layout)
        known.update(names)
        absent = [name for name in names if name not in state]
        report.missing += absent
        if absent or not names:
            continue
        parts = [_without_kernel(state[name], target) for name in names]
        rows = target.shape[0] // len(parts) if target.dim() else 0
        wanted = (rows, *target.shape[1:]) if target.dim() else ()
        wrong = [
            f"{name}: {list(part.shape)}, expected {list(wanted)}"
            for name, part in zip(names, parts, strict=True)
            if part.shape != wanted
        ]
        report.misshaped += wrong
        if not wrong:
            found[key] = torch.cat(parts) if len(parts) > 1 else parts[0]
    report.unexpected = [name for name in state if name not in known]
    return found, report


def from_ours(state: Mapping[str, Tensor], layout: str) -> dict[str, Tensor]:
    """Translate our state dict to the names and stacking of `layout`."""
    result: dict[str, Tensor] = {}
    for key, value in state.items():
        names = foreign_keys(key, layout)
        if layout == "official" and re.fullmatch(r"\w+_projector\.(hidden|out)\.weight", key):
            value = value[..., None]
        for name, part in zip(
            names, value.chunk(len(names)) if len(names) > 1 else [value] * len(names), strict=True
        ):
            result[name] = part.contiguous()
    return result


def _without_kernel(value: Tensor, target: Tensor) -> Tensor:
    """A convolution of kernel size 1, [O,I,1] or [O,I,1,1], as the Linear weight [O,I] it is."""
    if target.dim() == 2 and value.dim() > 2 and value.shape[2:].numel() == 1:
        return value.flatten(1)
    return value
