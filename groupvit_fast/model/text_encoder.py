"""The text encoder: CLIP's causal transformer, pooled at the end-of-text token.

Shapes: N texts, T tokens (at most the context length), C width; R, Q as in `packing`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from groupvit_fast.model.layers import AttentionPattern, TransformerBlock, run_block
from groupvit_fast.model.mlp import QUICK_GELU
from groupvit_fast.model.packing import PackedTexts, pack_texts
from groupvit_fast.model.presets import TextConfig


class TextEncoder(nn.Module):
    """Token rows to one vector each. `checkpointing`: layers are computed again in the backward pass."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.config = config
        self.checkpointing = False
        self.token_embedding = nn.Embedding(config.vocab_size, config.width)
        self.position = nn.Parameter(torch.empty(config.context_length, config.width))
        self.blocks = nn.ModuleList(
            TransformerBlock(config.width, config.heads, causal=True, activation=QUICK_GELU)
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

    def forward(self, tokens: Tensor | PackedTexts) -> Tensor:
        """tokens int64 [N,T], zero-padded after the end-of-text token, or packed -> [N,C].

        The end of the text is where the largest token id first stands. Tokens in host memory are packed
        here; an exported or compiled graph, and tokens on a GPU, keep their padding. ValueError if T
        exceeds the context.
        """
        context = self.config.context_length
        if isinstance(tokens, PackedTexts):
            if tokens.longest > context:
                raise ValueError(f"texts must be at most {context} tokens long, got {tokens.longest}")
            return self.encode_packed(tokens)
        if tokens.dim() != 2 or tokens.shape[1] > context:
            raise ValueError(f"tokens must be [N, at most {context}], got {list(tokens.shape)}")
        if tokens.device.type == "cpu" and tokens.numel() and not torch.compiler.is_compiling():
            return self.encode_packed(pack_texts(tokens))
        x = self.token_embedding(tokens) + self.position[: tokens.shape[1]]
        for block in self.blocks:
            x = run_block(block, x, checkpointing=self.checkpointing)
        # The norm works on each token alone, so only the token that is kept needs it.
        return self.norm(x[torch.arange(x.shape[0], device=x.device), tokens.argmax(dim=1)])

    def encode_packed(self, texts: PackedTexts) -> Tensor:
        """Packed texts -> [N,C]. The last layer computes queries and MLP of the end-of-text tokens alone."""
        x = self.token_embedding(texts.tokens) + F.embedding(texts.position, self.position)
        pattern = AttentionPattern.of(texts)
        for block in self.blocks[:-1]:
            x = run_block(block, x, pattern, checkpointing=self.checkpointing)
        x = self.blocks[-1].at_ends(x, pattern)
        return self.norm(x.flatten(0, 1)[texts.places])
