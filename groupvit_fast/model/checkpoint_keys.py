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

# Columns: ours, Hugging Face, official; what a row leaves out is the same as the column before. An unindented
# row that ends in a dot is the prefix of the indented ones after it. # is the number of a stage or layer,
# * what follows (weight, bias, ...). [qkv] stands for three matrices, which in our layout are one, stacked
# in that order. Hugging Face's model has no multi_label_logit_scale: its directories keep it in config.json.
_TABLE = """
logit_scale
multi_label_logit_scale
image_projector.                    visual_projection.                        img_projector.
  hidden.*                          0.*                                       linear_hidden.0.*
  norm.*                            1.*                                       linear_hidden.1.*
  out.*                             3.*                                       linear_out.*
text_projector.                     text_projection.                          text_projector.
  hidden.*                          0.*                                       linear_hidden.0.*
  norm.*                            1.*                                       linear_hidden.1.*
  out.*                             3.*                                       linear_out.*
image_encoder.                      vision_model.                             img_encoder.
  patch_embedding.projection.*      embeddings.patch_embeddings.projection.*  patch_embed.proj.*
  patch_embedding.norm.*            embeddings.layernorm.*                    patch_embed.norm.*
  patch_embedding.position          embeddings.position_embeddings            pos_embed
  norm.*                            layernorm.*                               norm.*
image_encoder.stages.#.             vision_model.encoder.stages.#.            img_encoder.layers.#.
  group_tokens                      group_token
  group_projector.norm.*            group_projector.0.*
  group_projector.mixer.fc1.*       group_projector.1.fc1.*
  group_projector.mixer.fc2.*       group_projector.1.fc2.*
image_encoder.stages.#.blocks.#.    vision_model.encoder.stages.#.layers.#.   img_encoder.layers.#.blocks.#.
  norm1.*                           layer_norm1.*                             norm1.*
  attention.qkv.*                   self_attn.[qkv]_proj.*                    attn.qkv.*
  attention.out.*                   self_attn.out_proj.*                      attn.proj.*
  norm2.*                           layer_norm2.*                             norm2.*
  mlp.fc1.*
  mlp.fc2.*
image_encoder.stages.#.grouping.    vision_model.encoder.stages.#.downsample. img_encoder.layers.#.downsample.
  norm_tokens.*
  token_mixer.fc1.*                 mlp_inter.fc1.*
  token_mixer.fc2.*                 mlp_inter.fc2.*
  norm_mixed.*                      norm_post_tokens.*
  norm_image.*                      norm_x.*
  pre_assign.attention.query.*      pre_assign_attn.attn.q_proj.*
  pre_assign.attention.key_value.*  pre_assign_attn.attn.[kv]_proj.*
  pre_assign.attention.out.*        pre_assign_attn.attn.out_proj.*           pre_assign_attn.attn.proj.*
  pre_assign.norm2.*                pre_assign_attn.norm2.*
  pre_assign.mlp.fc1.*              pre_assign_attn.mlp.fc1.*
  pre_assign.mlp.fc2.*              pre_assign_attn.mlp.fc2.*
  pre_assign.norm_post.*            pre_assign_attn.norm_post.*
  assignment.query.*                assign.q_proj.*
  assignment.key.*                  assign.k_proj.*
  assignment.value.*                assign.v_proj.*
  assignment.out.*                  assign.proj.*
  norm_groups.*                     norm_new_x.*
  mlp.fc1.*                         mlp_channels.fc1.*
  mlp.fc2.*                         mlp_channels.fc2.*
text_encoder.                       text_model.                               text_encoder.
  token_embedding.*                 embeddings.token_embedding.*              token_embedding.*
  position                          embeddings.position_embedding.weight      positional_embedding
  norm.*                            final_layer_norm.*                        ln_final.*
text_encoder.blocks.#.              text_model.encoder.layers.#.    text_encoder.transformer.resblocks.#.
  norm1.*                           layer_norm1.*                             ln_1.*
  attention.qkv.*                   self_attn.[qkv]_proj.*                    attn.in_proj_*
  attention.out.*                   self_attn.out_proj.*                      attn.out_proj.*
  norm2.*                           layer_norm2.*                             ln_2.*
  mlp.fc1.*                         mlp.fc1.*                                 mlp.c_fc.*
  mlp.fc2.*                         mlp.fc2.*                                 mlp.c_proj.*
"""


@dataclass
class KeyReport:
    """What a state dict lacks, has too much, or has in another shape: names, and for shapes a description."""

    missing: list[str]
    unexpected: list[str]
    misshaped: list[str]

    @property
    def complete(self) -> bool:
        return not (self.missing or self.unexpected or self.misshaped)


def _parse_table() -> list[tuple[re.Pattern[str], tuple[str, ...]]]:
    """The table as (pattern of our key, templates of the three layouts)."""
    rules, prefixes = [], [""] * 3
    for line in _TABLE.strip().splitlines():
        row = line.split()
        row += row[-1:] * (3 - len(row))
        if not line.startswith(" "):
            prefixes = row if row[0].endswith(".") else [""] * 3
            if row is prefixes:
                continue
        names = tuple(prefix + part for prefix, part in zip(prefixes, row, strict=True))
        pattern = names[0].replace(".", r"\.").replace("#", r"(\d+)").replace("*", r"(\w+)")
        rules.append((re.compile(pattern), names))
    return rules


_RULES = _parse_table()


@functools.cache
def foreign_keys(key: str, layout: str) -> tuple[str, ...]:
    """Names that our parameter `key` has in `layout`: several if it is a stack of them.

    KeyError for a name that is not ours.
    """
    for pattern, names in _RULES:
        if match := pattern.fullmatch(key):
            template = names[LAYOUTS.index(layout)]
            name = template.replace("#", "{}").replace("*", "{}").format(*match.groups())
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
        if absent:
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
        parts = value.chunk(len(names)) if len(names) > 1 else (value,)
        result.update((name, part.contiguous()) for name, part in zip(names, parts, strict=True))
    return result


def _without_kernel(value: Tensor, target: Tensor) -> Tensor:
    """A convolution of kernel size 1, [O,I,1] or [O,I,1,1], as the Linear weight [O,I] it is."""
    if target.dim() == 2 and value.dim() > 2 and value.shape[2:].numel() == 1:
        return value.flatten(1)
    return value
