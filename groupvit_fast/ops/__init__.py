"""The operators of GroupViT: group attention, Gumbel assignment, mask upsampling and decoding.

Each has a compiled kernel and a plain-PyTorch definition (`reference`); which one runs depends on what was
built (`backend()`), never the result. Imports nothing but torch.
"""

from .group_attention import group_attention
from .gumbel_assign import Assignment, compose_assignments, gumbel_assign, gumbel_noise, soft_assignment
from .library import backend, use_backend
from .mask_upsample import decode_masks, upsample_masks

__all__ = [
    "Assignment",
    "backend",
    "compose_assignments",
    "decode_masks",
    "group_attention",
    "gumbel_assign",
    "gumbel_noise",
    "soft_assignment",
    "upsample_masks",
    "use_backend",
]
