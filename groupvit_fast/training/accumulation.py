"""A contrastive batch larger than memory: embeddings first, their gradients, then the encoders again.

Both encoders run over the batch piece by piece without keeping anything; projectors, batch norm and losses
see the whole batch at once, which is cheap; then the encoders run again, piece by piece, and pass on the
gradients that arrived at their outputs. Nothing that mixes samples stands inside the encoders, so this is the
gradient of the big batch, batch norm included. Noise and drop path of a piece are the same in both runs.

Source: "Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup" (Gao et al. 2021).
Shapes: B images, U distinct texts, C and Ct widths of the encoders.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from groupvit_fast.model.groupvit import Features
from groupvit_fast.model.packing import PackedTexts


@dataclass
class JoinedBatch:
    """Several batches of a loader as one; each distinct text once. The fields are those of any batch."""

    images: Tensor
    texts: Tensor
    text_index: Tensor

    @classmethod
    def of(cls, batches: Sequence[Any]) -> JoinedBatch:
        """Join batches whose texts are in host memory."""
        longest = max(batch.texts.shape[1] for batch in batches)
        rows = torch.cat([_widened(batch.texts, longest) for batch in batches])
        texts, number = torch.unique(rows, dim=0, return_inverse=True)
        starts = torch.tensor([0, *(len(batch.texts) for batch in batches)]).cumsum(0).tolist()
        index = [number[batch.text_index + start] for batch, start in zip(batches, starts, strict=False)]
        return cls(torch.cat([batch.images for batch in batches]), texts, torch.cat(index))


def joined(batches: Iterator[Any], count: int) -> Iterator[Any]:
    """Every `count` batches as one."""
    while True:
        yield next(batches) if count == 1 else JoinedBatch.of([next(batches) for _ in range(count)])


@dataclass(frozen=True)
class Piece:
    """What the encoders see at a time; `number` makes its noise differ from that of the others."""

    number: int
    images: Tensor
    texts: PackedTexts | Tensor


def pieces(images: Tensor, texts: Tensor, count: int, pack: Callable[[Tensor], Any]) -> list[Piece]:
    """`count` parts of about equal size, or fewer if there are not as many images.

    The number follows from that of the images alone, so all processes have it: with sharded weights each part
    is a message. Where texts are fewer, the last is repeated; nothing refers to the repetitions.
    """
    count = min(count, len(images))
    texts = torch.cat([texts, texts[-1:].expand(max(0, count - len(texts)), -1)])
    parts = zip(images.tensor_split(count), texts.tensor_split(count), strict=True)
    return [Piece(number, part, pack(rows)) for number, (part, rows) in enumerate(parts)]


def backward_in_pieces(
    pieces: Sequence[Piece],
    encode: Callable[[Piece], Features],
    rest: Callable[[Features], tuple[Any, Tensor]],
) -> Any:
    """Add the gradients of a step to the parameters.

    `encode` must give the same features for a piece each time, so it sets the random state itself. `rest` is
    everything behind the encoders: it returns what this returns, and the number to differentiate.
    """
    with torch.no_grad():
        cached = [encode(piece) for piece in pieces]
    groups, text, areas = (torch.cat(parts) for parts in zip(*cached, strict=True))
    groups.requires_grad_()
    text.requires_grad_()
    result, number = rest(Features(groups, text, areas))
    number.backward()
    group_gradients = groups.grad.split([len(one.groups) for one in cached])
    text_gradients = text.grad.split([len(one.text) for one in cached])
    for piece, *gradients in zip(pieces, group_gradients, text_gradients, strict=True):
        again = encode(piece)
        outputs = [(again.groups, gradients[0]), (again.text, gradients[1])]
        live = [pair for pair in outputs if pair[0].requires_grad]  # a frozen encoder wants none
        if live:
            torch.autograd.backward(*zip(*live, strict=True))
    return result


def _widened(texts: Tensor, length: int) -> Tensor:
    return torch.nn.functional.pad(texts, (0, length - texts.shape[1]))
