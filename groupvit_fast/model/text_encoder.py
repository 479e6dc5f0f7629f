"""The text encoder: CLIP's causal transformer, pooled at the end-of-text token.

Shapes: N texts, T tokens (at most the context length), C width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from groupvit_fast.model.layers import TransformerBlock, quick_gelu
from groupvit_fast.model.presets import TextConfig


class TextEncoder(nn.Module):
    """Token rows to one vector each."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.config = config
        self.token_embedding = nn.Embedding(config.vocab_size, config.width)
        self.position = nn.Parameter(torch.empty(config.context_length, config.width))
        self.blocks = nn.ModuleList(
            TransformerBlock(config.width, config.heads, causal=True, activation=quick_gelu)
            for _ in range(config.layers)
        )
        self.norm = nn.LayerNorm(config.width)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the parameters as CLIP does: residual outputs shrink with the number of layers."""
        width = self.config.width
        residual_std = (2 * width * self.config.layers) ** -0.5
        nn.init.normal_(self.token_embedding.weight, std=0.02)
        nn.init.normal_(self.position, std=0.01)
        for block in self.blocks:
            nn.init.normal_(block.attention.qkv.weight, std=width**-0.5)
            nn.init.normal_(block.attention.out.weight, std=residual_std)
            nn.init.normal_(block.mlp.fc1.weight, std=(2 * width) ** -0.5)
            nn.init.normal_(block.mlp.fc2.weight, std=residual_std)
            nn.init.zeros_(block.attention.qkv.bias)
            nn.init.zeros_(block.attention.out.bias)

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens int64 [N,T], zero-padded after the end-of-text token -> [N,C].

        The end of the text is where the largest token id first stands. ValueError if T exceeds the context.
        """
        context = self.config.context_length
        if tokens.dim() != 2 or tokens.shape[1] > context:
            raise ValueError(f"tokens must be [N, at most {context}], got {list(tokens.shape)}")
        tokens = without_padding(tokens)
        x = self.token_embedding(tokens) + self.position[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x)
        # The norm works on each token alone, so only the token that is kept needs it.
        return self.norm(x[torch.arange(x.shape[0], device=x.device), tokens.argmax(dim=1)])


def without_padding(tokens: Tensor) -> Tensor:
    """Cut the trailing columns that no row of tokens [N,T] needs; exact, as no token sees a later one.

    Only for tokens in host memory: reading the length of those on a GPU would stall it, so what is
    bound for a GPU should be cut before it goes there. An exported graph keeps its shape.
    """
    if tokens.device.type != "cpu" or tokens.numel() == 0 or torch.compiler.is_compiling():
        return tokens
    return tokens[:, : int(tokens.argmax(dim=1).max()) + 1]
