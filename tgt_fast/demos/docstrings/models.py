"""The student, and the head that makes a labeler of the sentence encoder."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tgt_fast.demos.text.layer import Layer
from tgt_fast.demos.text.sentences import WIDTH, SentenceEncoder


class Student(nn.Module):
    """A small transformer: a dict of tokens -> logits [B, C].

    Called with a dict of ``input_ids`` (int64 [B, L]) or ``inputs_embeds`` ([B, L, width]), and ``attention_mask``.
    """

    def __init__(
        self, vocabulary: int, classes: int, width: int, heads: int, layers: int, dropout: float, max_length: int
    ) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.places = nn.Parameter(0.2 * torch.randn(max_length, width))
        self.drop = nn.Dropout(dropout)
        self.layers = nn.ModuleList(Layer(width, heads, dropout) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, classes)

    def get_input_embeddings(self) -> nn.Module:
        return self.embedding

    def forward(self, inputs: dict[str, Tensor]) -> Tensor:
        x = inputs["inputs_embeds"] if "inputs_embeds" in inputs else self.embedding(inputs["input_ids"])
        real = inputs["attention_mask"].bool()
        x = self.drop(x + self.places[: x.shape[1]])
        for layer in self.layers:
            x = layer(x, real)
        hidden = self.norm(x)
        weight = real[..., None].to(hidden.dtype)
        logits: Tensor = self.head((hidden * weight).sum(1) / weight.sum(1).clamp_min(1))
        return logits


def as_input(ids: Tensor) -> dict[str, Tensor]:
    """int64 [B, L], padded on the right with 0 -> the student's input, without columns of padding alone."""
    real = ids != 0
    longest = int(real.sum(1).max()) if len(ids) else 0
    return {"input_ids": ids[:, :longest], "attention_mask": real[:, :longest].long()}


def labeler_head(classes: int, hidden: int, dropout: float) -> nn.Sequential:
    """Embeddings of length 1 -> logits."""
    return nn.Sequential(
        _Scaled(WIDTH**0.5), nn.Linear(WIDTH, hidden), nn.ReLU(), nn.Dropout(dropout), nn.Linear(hidden, classes)
    )


class _Scaled(nn.Module):
    """Coordinates of about unit size, as layers are initialised for."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        return x * self.factor


class Labeler(nn.Module):
    """The sentence encoder and a head: a dict of the encoder's tokens -> logits [B, C]."""

    def __init__(self, encoder: SentenceEncoder, head: nn.Module) -> None:
        super().__init__()
        self.encoder, self.head = encoder, head

    def get_input_embeddings(self) -> nn.Module:
        return self.encoder.get_input_embeddings()

    def forward(self, inputs: dict[str, Tensor]) -> Tensor:
        logits: Tensor = self.head(self.encoder(inputs))
        return logits
