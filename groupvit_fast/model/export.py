"""Graphs of the model that run without this package: torch.export and ONNX.

The graphs hold the reference operators, which are plain tensor operations, and take any batch size and any
image of at least two patches on a side (to torch.export a size of one is a special case).
Shapes: B images, G groups, D shared space, K classes, h x w patch grid.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from groupvit_fast import ops
from groupvit_fast.model.checkpoint_write import write_file
from groupvit_fast.model.groupvit import GroupViT
from groupvit_fast.ops.library import use_backend


class ImageGraph(nn.Module):
    """pixels [B,3,H,W] -> groups [B,G,D], image [B,D] (projected, not normalised), maps [B,G,h,w]."""

    def __init__(self, model: GroupViT) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        encoding = self.model.encode_groups(pixels)
        maps = ops.compose_assignments(encoding.maps)
        return encoding.groups, encoding.image, maps.unflatten(2, encoding.grid)


class LabelGraph(nn.Module):
    """pixels [B,3,H,W] -> labels int64 [B,H,W]: the class of a bank [K,D] nearest to each pixel's group."""

    def __init__(self, model: GroupViT, class_bank: Tensor) -> None:
        super().__init__()
        self.image = ImageGraph(model)
        self.class_bank = nn.Buffer(F.normalize(class_bank, dim=1))

    def forward(self, pixels: Tensor) -> Tensor:
        groups, _, maps = self.image(pixels)
        labels = (F.normalize(groups, dim=2) @ self.class_bank.T).argmax(dim=2)
        return ops.decode_masks(maps, labels, pixels.shape[-2:])


def export_image_encoder(model: GroupViT) -> torch.export.ExportedProgram:
    """The graph of `ImageGraph` with dynamic batch, height and width; save it with `torch.export.save`."""
    return _export(ImageGraph(model), model)


def export_onnx(model: GroupViT, class_bank: Tensor, path: str | Path) -> None:
    """Write `LabelGraph` as one ONNX file with dynamic batch, height and width.

    class_bank: one text embedding for each class, [K,D], from `encode_text`; normalised here. Needs the
    packages onnx and onnxscript (ImportError otherwise).
    """
    program = _export(LabelGraph(model, class_bank), model)
    with torch.no_grad():
        onnx = torch.onnx.export(program, input_names=["pixels"], output_names=["labels"], verbose=False)
    write_file(Path(path), onnx.model_proto.SerializeToString())


def _export(graph: nn.Module, model: GroupViT) -> torch.export.ExportedProgram:
    """Trace in evaluation mode on the reference operators."""
    patch, size = model.config.image.patch_size, model.config.image.image_size
    example = torch.zeros(
        2, 3, size, size + patch, device=model.logit_scale.device, dtype=model.logit_scale.dtype
    )
    dims: Mapping[int, Any] = {
        0: torch.export.Dim("batch", min=1),
        2: torch.export.Dim("height", min=2 * patch),
        3: torch.export.Dim("width", min=2 * patch),
    }
    with torch.no_grad(), use_backend("reference"):
        return torch.export.export(graph.eval(), (example,), dynamic_shapes=(dims,))
