"""The GroupViT model: encoders, presets and checkpoints."""
