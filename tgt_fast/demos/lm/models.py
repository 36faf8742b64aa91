"""Teacher and student: the same kind of transformer, of another size."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Block(nn.Module):
    """Causal attention, then an MLP of four times the width, each beside its input: ``[B, L, H] -> [B, L, H]``."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.before_attention = nn.LayerNorm(width)
        self.projected = nn.Linear(width, 3 * width, bias=False)
        self.attended = nn.Linear(width, width, bias=False)
        self.before_mlp = nn.LayerNorm(width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width, bias=False), nn.ReLU(), nn.Linear(4 * width, width, bias=False)
        )

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        shape = (batch, length, 3, self.heads, width // self.heads)
        query, key, value = self.projected(self.before_attention(x)).view(shape).permute(2, 0, 3, 1, 4)
        found = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.attended(found.transpose(1, 2).reshape(batch, length, width))
        made: Tensor = x + self.mlp(self.before_mlp(x))
        return made


class LanguageModel(nn.Module):
    """Tokens ``[B, L]`` -> hidden states ``[B, L, H]`` of the next token's logits, which are ``hidden @ head.T``.

    The head is the embedding of the tokens itself, so the logits need no parameters of their own, and the losses of
    tgt_fast take the hidden states and the head in their place.
    """

    def __init__(self, tokens: int, length: int, width: int, layers: int, heads: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(tokens, width)
        self.position = nn.Parameter(torch.zeros(length, width))
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(layers)))
        self.last = nn.LayerNorm(width)
        nn.init.normal_(self.embedding.weight, std=width**-0.5)
        nn.init.normal_(self.position, std=0.3 * width**-0.5)
        for block in self.blocks.children():  # each begins as the identity
            nn.init.zeros_(block.attended.weight)  # type: ignore[union-attr, arg-type]
            nn.init.zeros_(block.mlp[-1].weight)  # type: ignore[union-attr, index]

    @property
    def head(self) -> Tensor:
        """``[tokens, H]``"""
        return self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens) + self.position[: tokens.shape[1]]
        hidden: Tensor = self.last(self.blocks(x))
        return hidden
