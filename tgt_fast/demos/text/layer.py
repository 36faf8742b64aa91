"""A layer of the students that read text."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Layer(nn.Module):
    """A transformer's layer, normalised first. Attention is written out: on a CPU the backward pass of the fused one
    takes several times as long for texts this short."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.feed = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))
        self.drop = nn.Dropout(dropout)

    def forward(self, x: Tensor, real: Tensor) -> Tensor:
        """x: [B, L, width]; real: bool [B, L]."""
        q, k, v = self.qkv(self.norms[0](x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # [B, H, L, w]
        scores = (q @ k.transpose(-1, -2)) * q.shape[-1] ** -0.5
        seen = scores.masked_fill(~real[:, None, None], -torch.inf).softmax(-1)
        x = x + self.drop(self.out((seen @ v).transpose(1, 2).flatten(2)))
        fed: Tensor = self.drop(self.feed(self.norms[1](x)))
        return x + fed
