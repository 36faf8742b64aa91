"""The student: one tower that turns queries and passages into vectors."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tgt_fast.demos.text.layer import Layer
from tgt_fast.teacher.modes import eval_mode


class Tower(nn.Module):
    """A one-layer encoder: int64 [B, L], padded on the right with 0 -> float32 [B, vector], of length 1."""

    def __init__(self, vocabulary: int, length: int, width: int, heads: int, vector: int, dropout: float) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.places = nn.Parameter(0.2 * torch.randn(length, width))
        self.drop = nn.Dropout(dropout)
        self.layer = Layer(width, heads, dropout)
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vector)

    def forward(self, ids: Tensor) -> Tensor:
        real = ids != 0
        longest = int(real.sum(1).max()) if len(ids) else 0
        ids, real = ids[:, :longest], real[:, :longest]
        x = self.drop(self.embedding(ids) + self.places[:longest])
        x = self.norm(self.layer(x, real))
        weight = real[..., None].to(x.dtype)
        return F.normalize(self.head((x * weight).sum(1) / weight.sum(1).clamp_min(1)), dim=1)

    @torch.inference_mode()
    def embed(self, ids: Tensor, batch: int = 256) -> Tensor:
        """The vectors of any number of texts, without dropout."""
        order = (ids != 0).sum(1).argsort()
        with eval_mode(self):
            found = torch.cat([self(ids[rows]) for rows in torch.split(order, batch)])
        made = torch.empty_like(found)
        made[order] = found
        return made


def recalls(queries: Tensor, passages: Tensor, depths: tuple[int, ...]) -> dict[int, float]:
    """In percent: how often passage i is among the ``depth`` that score highest for query i.

    Passages that score as high as the right one count as before it.

    >>> recalls(torch.eye(4), torch.eye(4), (1,)), recalls(torch.ones(4, 2), torch.ones(4, 2), (1, 4))
    ({1: 100.0}, {1: 0.0, 4: 100.0})
    """
    scores = queries @ passages.T
    place = (scores >= scores.diagonal()[:, None]).sum(1)
    return {depth: 100 * float((place <= depth).double().mean()) for depth in depths}
