"""How much arithmetic a training step needs, counted from the shapes.

Counted is what the result needs and nothing else: no padding, the last text layer at the ends of texts alone,
causal attention below the diagonal, projections of the assignment joined in pairs (the product of two
weights is made once a batch), hard assignment without a product. A product of [n,k] and [k,m] is 2nkm; norms,
activations and softmax count nothing. A training step is three forward passes.

Shapes: L image tokens, T group tokens, S output groups of a stage, C width, D shared space.
"""

from __future__ import annotations

from collections.abc import Sequence

from groupvit_fast.model.presets import ImageConfig, ModelConfig, TextConfig


def training_flops(config: ModelConfig, lengths: Sequence[int], rows: int) -> float:
    """Of one image with its texts, forward and backward.

    lengths: tokens of each distinct text that is encoded for it; rows: texts that go through the projector.
    Both may be means over a batch, as `[mean] * n`.
    """
    return 3 * (
        image_flops(config.image)
        + text_flops(config.text, lengths)
        + projector_flops(config, config.image.width, 1)
        + projector_flops(config, config.text.width, rows)
    )


def image_flops(image: ImageConfig) -> float:
    """Forward pass of the image encoder for one image, with the projections as in training."""
    width, tokens = image.width, image.grid_size**2
    total = 2 * tokens * 3 * image.patch_size**2 * width
    for stage, depth in enumerate(image.depths):
        last = stage == len(image.group_tokens)
        groups = 0 if last else image.group_tokens[stage]
        total += depth * block_flops(tokens + groups, width, image.mlp_ratio)
        if last:
            break
        if stage:
            total += mixer_flops(image.group_tokens[stage - 1], groups, width)
        total += grouping_flops(image, tokens, groups, image.output_groups[stage])
        tokens = image.output_groups[stage]
    return total


def block_flops(tokens: int, width: int, mlp_ratio: float) -> float:
    """One transformer layer in which every token sees every other."""
    return 2 * tokens * width**2 * (4 + 2 * mlp_ratio) + 4 * tokens**2 * width


def mixer_flops(inputs: int, outputs: int, width: int) -> float:
    """An MLP over tokens whose hidden size is half the width."""
    return 2 * (width // 2) * (inputs + outputs) * width


def grouping_flops(image: ImageConfig, tokens: int, group_tokens: int, groups: int) -> float:
    """One grouping block: token mixer, attention to the image, assignment, MLP."""
    width = image.width
    total = mixer_flops(group_tokens, groups, width)
    if image.pre_assign_attention:
        total += 2 * width**2 * (2 * groups + 2 * tokens) + 4 * groups * tokens * width
        total += 4 * groups * width**2 * image.mlp_ratio
    # query and key weights, value and output weights; logits
    total += 2 * width**2 * 2 * groups + 2 * groups * tokens * width
    if not image.hard_assignment:
        total += 2 * groups * tokens * width
    return total + 4 * groups * width**2 * 4


def text_flops(text: TextConfig, lengths: Sequence[int]) -> float:
    """Forward pass of the text encoder over texts of these lengths."""
    width, tokens = text.width, sum(lengths)
    pairs = sum(length * (length + 1) / 2 for length in lengths)
    full = 24 * tokens * width**2 + 4 * pairs * width
    ends = 4 * tokens * width**2 + 20 * len(lengths) * width**2 + 4 * tokens * width
    return (text.layers - 1) * full + ends


def projector_flops(config: ModelConfig, width: int, rows: int) -> float:
    hidden, shared = config.projector_hidden, config.embed_dim
    return 2 * rows * (width * hidden + hidden * shared if config.projector_layers == 2 else width * shared)
