"""Model configurations: plain data, and one function per named preset.

A preset may call another one and change what differs. `ModelConfig.to_dict` is what a checkpoint's
config.json holds.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any


@dataclass(frozen=True)
class ImageConfig:
    """Image encoder: a ViT whose stages end in grouping blocks (GroupViT paper, section 3.1)."""

    image_size: int = 224
    """Side of the training images in pixels; it fixes the size of the position embedding."""
    patch_size: int = 16
    width: int = 384
    heads: int = 6
    depths: tuple[int, ...] = (6, 3, 3)
    """Transformer layers before each grouping block, then those after the last one (may be 0)."""
    group_tokens: tuple[int, ...] = (64, 8)
    """Learnable group tokens of each grouping stage."""
    output_groups: tuple[int, ...] = (64, 8)
    """Segment tokens each grouping block gives; need not equal its group tokens."""
    mlp_ratio: float = 4.0
    """Hidden width of the MLPs over `width`; a grouping block's own keep 0.5 (tokens) and 4 (channels)."""
    drop_path: float = 0.1
    """Rate of the last layer; it rises linearly from 0 at the first."""
    assign_eps: float = 1.0
    """Added to the number of tokens of a group when they are averaged."""
    hard_assignment: bool = True
    assign_scale: float | None = None
    """Factor of the assignment logits; None is width ** -0.5."""
    tau: float = 1.0
    """Temperature of the assignment softmax."""
    token_residual: bool = True
    """Add the projected group tokens to the grouped image tokens, as the paper does."""
    pre_assign_attention: bool = True
    """Let the projected group tokens attend to the image tokens before the assignment."""

    def __post_init__(self) -> None:
        for name in ("depths", "group_tokens", "output_groups"):
            object.__setattr__(self, name, tuple(int(value) for value in getattr(self, name)))
        require_positive(self, "image_size", "patch_size", "width", "heads", "mlp_ratio", "tau")
        stages = len(self.group_tokens)
        if stages == 0 or len(self.output_groups) != stages or len(self.depths) != stages + 1:
            raise ValueError(
                "group_tokens and output_groups need one entry per grouping stage and depths one more, got "
                f"{len(self.group_tokens)}, {len(self.output_groups)} and {len(self.depths)}"
            )
        if min(self.group_tokens + self.output_groups) < 1 or min(self.depths) < 0:
            raise ValueError("group_tokens and output_groups must be at least 1 and depths at least 0")
        if self.width % self.heads:
            raise ValueError(f"image width {self.width} is not a multiple of its {self.heads} heads")
        if self.image_size % self.patch_size:
            raise ValueError(
                f"image_size {self.image_size} is not a multiple of patch_size {self.patch_size}"
            )
        if not 0.0 <= self.drop_path < 1.0 or self.assign_eps < 0:
            raise ValueError("drop_path must lie in [0, 1) and assign_eps must not be negative")

    @property
    def grid_size(self) -> int:
        """Patches along one side of a training image."""
        return self.image_size // self.patch_size

    @property
    def logit_factor(self) -> float:
        """What the assignment logits are multiplied with."""
        return self.width**-0.5 if self.assign_scale is None else self.assign_scale


@dataclass(frozen=True)
class TextConfig:
    """Text encoder: the causal transformer of CLIP (GroupViT paper, section 3.2)."""

    context_length: int = 77
    vocab_size: int = 49408
    width: int = 256
    layers: int = 12
    heads: int = 4

    def __post_init__(self) -> None:
        require_positive(self, "context_length", "vocab_size", "width", "layers", "heads")
        if self.width % self.heads:
            raise ValueError(f"text width {self.width} is not a multiple of its {self.heads} heads")


@dataclass(frozen=True)
class ModelConfig:
    """Both encoders, the projectors into the shared space, and the temperatures."""

    image: ImageConfig = field(default_factory=ImageConfig)
    text: TextConfig = field(default_factory=TextConfig)
    embed_dim: int = 256
    """Size of the space that images and texts share."""
    projector_hidden: int = 4096
    projector_layers: int = 2
    """2: Linear, BatchNorm, ReLU, Linear (the paper's); 1: one Linear."""
    logit_scale_init: float = math.log(1 / 0.07)
    multi_label_logit_scale: bool = True
    """Whether the multi-label loss has a temperature of its own."""
    logit_bias_init: float | None = None
    """Where SigLIP's bias starts; None: the model has none."""

    def __post_init__(self) -> None:
        require_positive(self, "embed_dim", "projector_hidden")
        if self.projector_layers not in (1, 2):
            raise ValueError(f"projector_layers must be 1 or 2, got {self.projector_layers}")

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON-able values; `from_dict` gives the same configuration back."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ModelConfig:
        """Build from `to_dict`'s output. A missing key takes its default, an unknown one is a ValueError."""
        values = dict(values)
        image = from_known_keys(ImageConfig, values.pop("image", {}), "model.image")
        text = from_known_keys(TextConfig, values.pop("text", {}), "model.text")
        return from_known_keys(cls, {"image": image, "text": text, **values}, "model")


def require_positive(config: Any, *names: str) -> None:
    """Raise a ValueError naming the first of `names` that is not above zero."""
    for name in names:
        if not getattr(config, name) > 0:
            raise ValueError(f"{name} must be positive, got {getattr(config, name)}")


def from_known_keys(cls: type, values: Mapping[str, Any], where: str) -> Any:
    """Call `cls(**values)`; a key that is no field of it is a ValueError with the nearest field."""
    names = [item.name for item in fields(cls)]
    for key in values:
        if key not in names:
            raise ValueError(f"unknown key {key!r} in {where}{nearest(key, names)}")
    return cls(**values)


def nearest(name: str, names: list[str]) -> str:
    """The end of an error message: the closest of `names`, or all of them."""
    close = difflib.get_close_matches(name, names, n=1)
    return f"; did you mean {close[0]!r}?" if close else f"; there are {', '.join(names)}"


def groupvit_gcc_yfcc() -> ModelConfig:
    """The two-stage model trained on CC3M, CC12M and YFCC with the multi-label loss; 55.7 M parameters."""
    return ModelConfig()


def groupvit_gcc_redcaps() -> ModelConfig:
    """The same encoder trained on CC3M, CC12M and RedCaps by the caption contrast alone."""
    return replace(groupvit_gcc_yfcc(), multi_label_logit_scale=False)


def groupvit_1stage() -> ModelConfig:
    """The paper's one-stage model: 64 group tokens, mixed into 8 segments after the sixth layer."""
    image = ImageConfig(depths=(6, 6), group_tokens=(64,), output_groups=(8,))
    return replace(groupvit_gcc_yfcc(), image=image)


def tiny() -> ModelConfig:
    """The demo's model for 64 px scenes: learns to segment on a CPU in minutes.

    Not the paper's grouping block: sharper assignment logits, and no residual of the projected group
    tokens, which would carry whole-image content into every group. Projectors are linear, so that the
    embedding of an image is the mean of the embeddings of its groups.
    """
    width = 64
    image = ImageConfig(
        image_size=64,
        patch_size=8,
        width=width,
        heads=2,
        depths=(2, 0),
        group_tokens=(8,),
        output_groups=(8,),
        drop_path=0.0,
        assign_scale=30 * width**-0.5,
        token_residual=False,
    )
    text = TextConfig(width=64, layers=2, heads=2)
    return ModelConfig(image=image, text=text, embed_dim=64, projector_layers=1)


PRESETS: dict[str, Callable[[], ModelConfig]] = {
    "groupvit-gcc-yfcc": groupvit_gcc_yfcc,
    "groupvit-gcc-redcaps": groupvit_gcc_redcaps,
    "groupvit-1stage": groupvit_1stage,
    "tiny": tiny,
}


def preset(name: str) -> ModelConfig:
    """The configuration called `name`; an unknown name is a ValueError with the nearest one."""
    if name not in PRESETS:
        raise ValueError(f"unknown model preset {name!r}{nearest(name, list(PRESETS))}")
    return PRESETS[name]()
