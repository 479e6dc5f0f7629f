"""The GroupViT model: encoders, presets and checkpoints."""

from groupvit_fast.model.checkpoint_files import load_model
from groupvit_fast.model.groupvit import GroupEncoding, GroupViT, TrainingOutput, create_model
from groupvit_fast.model.presets import PRESETS, ImageConfig, ModelConfig, TextConfig, preset

__all__ = [
    "PRESETS",
    "GroupEncoding",
    "GroupViT",
    "ImageConfig",
    "ModelConfig",
    "TextConfig",
    "TrainingOutput",
    "create_model",
    "load_model",
    "preset",
]
