"""Small teachers and students with known shapes, made from a seed without touching the global generator."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from tgt_fast.teacher import Latents, Teacher

FEATURES, LATENT, CLASSES = 8, 4, 3


def seeded(build: Callable[[], nn.Module], seed: int) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build()


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def labeler(seed: int = 2) -> nn.Module:
    """With a BatchNorm, whose statistics must never move, and dropout, which must never draw."""
    return seeded(
        lambda: nn.Sequential(
            nn.Linear(FEATURES, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.5), nn.Linear(16, CLASSES)
        ),
        seed,
    )


def student(seed: int = 3, classes: int = CLASSES) -> nn.Module:
    return seeded(
        lambda: nn.Sequential(
            nn.Linear(FEATURES, 12), nn.BatchNorm1d(12), nn.Tanh(), nn.Dropout(0.3), nn.Linear(12, classes)
        ),
        seed,
    )


def vector_teacher(**options: Any) -> Teacher:
    """x [B, 8] <-> z [B, 4] -> 3 classes."""
    encoder = seeded(lambda: nn.Linear(FEATURES, LATENT), 0)
    decoder = seeded(lambda: nn.Sequential(nn.Linear(LATENT, 16), nn.Tanh(), nn.Linear(16, FEATURES)), 1)
    return Teacher(encoder, decoder, labeler(), **options)


def image_teacher(**options: Any) -> Teacher:
    """x [B, 1, 8, 8] <-> z [B, 2, 4, 4] -> 3 classes."""
    encoder = seeded(lambda: nn.Conv2d(1, 2, 2, stride=2), 0)
    decoder = seeded(lambda: nn.ConvTranspose2d(2, 1, 2, stride=2), 1)
    judge = seeded(lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, CLASSES)), 2)
    return Teacher(encoder, decoder, judge, **options)


class SequenceEncoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(FEATURES, LATENT)

    def forward(self, x: dict[str, Tensor]) -> Latents:
        return Latents(self.project(x["features"]), x["mask"])


class SequenceDecoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(LATENT, FEATURES)

    def forward(self, latents: Latents) -> dict[str, Tensor]:
        assert latents.mask is not None
        return {"features": self.project(latents.z).tanh(), "mask": latents.mask}


class SequenceClassifier(nn.Module):
    """The mean over real positions, then one layer: what is padded never shows."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(FEATURES, CLASSES)

    def forward(self, x: dict[str, Tensor]) -> Tensor:
        weight = x["mask"][..., None].to(x["features"].dtype)
        logits: Tensor = self.head((x["features"] * weight).sum(1) / weight.sum(1))
        return logits


def sequence_teacher(**options: Any) -> Teacher:
    """{"features" [B, L, 8], "mask" [B, L]} <-> z [B, L, 4] with the mask -> 3 classes."""
    return Teacher(seeded(SequenceEncoder, 0), seeded(SequenceDecoder, 1), seeded(SequenceClassifier, 2), **options)


def sequences(lengths: list[int], seed: int = 0) -> dict[str, Tensor]:
    """Examples of unequal length in one batch, junk where padded."""
    longest = max(lengths)
    mask = torch.arange(longest)[None] < torch.tensor(lengths)[:, None]
    return {"features": normal(len(lengths), longest, FEATURES, seed=seed), "mask": mask}


def snapshot(module: nn.Module) -> dict[str, Any]:
    """All that exploration may not change: values, gradients, buffers, flags."""
    return {
        "parameters": {name: p.detach().clone() for name, p in module.named_parameters()},
        "gradients": {name: None if p.grad is None else p.grad.clone() for name, p in module.named_parameters()},
        "buffers": {name: b.clone() for name, b in module.named_buffers()},
        "flags": {name: m.training for name, m in module.named_modules()},
        "needs": {name: p.requires_grad for name, p in module.named_parameters()},
    }


def same(a: Any, b: Any) -> bool:
    """Bit-equal, through dicts and lists."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return torch.equal(a, b) if isinstance(a, Tensor) and isinstance(b, Tensor) else bool(a == b)
