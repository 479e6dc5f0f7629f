"""What a step minimises, and the form in which a batch reaches the model.

Everything that the host has to know of a batch - lengths of texts, which texts are equal - is read where the
loader left it, in host memory, and only then sent; so a GPU is never waited for.
"""

from __future__ import annotations

import torch
from torch import Tensor

from groupvit_fast.model.groupvit import GroupViT, TrainingOutput
from groupvit_fast.model.packing import PackedTexts, pack_texts, send
from groupvit_fast.training.config import TrainConfig
from groupvit_fast.training.distributed import rank
from groupvit_fast.training.losses import (
    Gathering,
    contrastive_loss,
    multi_label_loss,
    sigmoid_loss,
    text_labels,
)


class Objective:
    """The losses of `config` for `model`; `match_groups` says that the model must project its groups."""

    def __init__(self, model: GroupViT, config: TrainConfig) -> None:
        self.model, self.config = model, config
        self.match_groups = config.multi_label > 0 and config.multi_label_match == "group"
        self.gathering = Gathering(config.local_loss, config.gather_with_grad)

    def __call__(
        self, encoded: TrainingOutput, texts: Tensor, text_index: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The total and its two parts, 0-dim; the multi-label part is 0 without prompts.

        texts [U,T] and text_index [B,1+K] as the loader gave them.
        """
        config = self.config
        labels = send(text_labels(texts, text_index), encoded.image.device)
        contrastive = self._captions(encoded.image, encoded.text[:, 0], labels[:, 0])
        multi_label = torch.zeros_like(contrastive)
        if config.multi_label:
            whole = encoded.groups if self.match_groups else encoded.image
            multi_label = self._prompts(whole, encoded.text[:, 1:], labels[:, 1:])
        total = config.contrastive_weight * contrastive + config.multi_label_weight * multi_label
        return total, contrastive, multi_label

    def _captions(self, image: Tensor, text: Tensor, labels: Tensor) -> Tensor:
        model, gathering = self.model, self.gathering
        merged = labels if self.config.merge_captions else None
        if not self.config.siglip:
            return contrastive_loss(image, text, model.logit_scale, labels=merged, gathering=gathering)
        if merged is None:
            labels = own_labels(labels)
        scale, bias = model.logit_scale, model.logit_bias
        return sigmoid_loss(image, text[:, None], labels[:, None], scale, bias, gathering=gathering)

    def _prompts(self, image: Tensor, prompts: Tensor, labels: Tensor) -> Tensor:
        model, gathering = self.model, self.gathering
        scale = model.multi_label_logit_scale
        if self.config.siglip:
            return sigmoid_loss(image, prompts, labels, scale, model.logit_bias, gathering=gathering)
        return multi_label_loss(image, prompts, labels, scale, gathering=gathering)


def own_labels(like: Tensor) -> Tensor:
    """A different number for every row of every process, as if all texts differed."""
    return torch.arange(len(like), device=like.device) + rank() * len(like)


def packed(texts: Tensor, device: str, dtype: torch.dtype) -> PackedTexts | Tensor:
    """Texts as the encoder wants them on `device`: packed; in one row where a kernel for that exists.

    Texts that are on a GPU already keep their padding, because their lengths are not known here.
    """
    if texts.device.type != "cpu":
        return texts
    return pack_texts(texts, single_row=device == "cuda" and dtype != torch.float32).to(device)
