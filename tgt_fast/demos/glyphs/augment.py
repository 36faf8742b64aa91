"""Augmentation of characters in the input space: the rival of exploration in the latent space."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

_FIELD = 4  # an elastic change is drawn on so many points a side


def moved(x: Tensor, generator: torch.Generator, warp: float = 1.0, elastic: float = 0.0) -> Tensor:
    """Images [B, 1, H, W], each moved in its own way.

    Args:
        warp: 1: rotated by up to 14 degrees, scaled by up to 15 % in either direction, sheared by up to 0.2, shifted by
            up to 5 % of a side; other values in proportion.
        elastic: standard deviation of a smooth field of shifts, as a share of half a side.
    """
    count = x.shape[0]

    def uniform(limit: float) -> Tensor:
        return (torch.rand(count, generator=generator) * 2 - 1) * limit * warp

    angle, width, height, shear = uniform(0.25), 1 + uniform(0.15), 1 + uniform(0.15), uniform(0.2)
    matrix = torch.stack(
        [
            torch.stack([width * angle.cos(), shear - height * angle.sin(), uniform(0.1)], 1),
            torch.stack([width * angle.sin(), height * angle.cos(), uniform(0.1)], 1),
        ],
        1,
    )
    grid = F.affine_grid(matrix, list(x.shape), align_corners=False)
    if elastic:
        field = torch.randn(count, 2, _FIELD, _FIELD, generator=generator) * elastic
        smooth = F.interpolate(field, size=x.shape[-2:], mode="bicubic", align_corners=True)
        grid = grid + smooth.permute(0, 2, 3, 1)
    return F.grid_sample(x, grid, align_corners=False)


def reweighted(x: Tensor, generator: torch.Generator, most: float) -> Tensor:
    """Strokes made bolder or thinner, by up to ``most`` of a pixel on either side."""
    amount = ((torch.rand(len(x), 1, 1, 1, generator=generator) * 2 - 1) * most).expand_as(x)
    bolder, thinner = F.max_pool2d(x, 3, 1, 1), -F.max_pool2d(-x, 3, 1, 1)
    return torch.where(amount > 0, torch.lerp(x, bolder, amount.abs()), torch.lerp(x, thinner, amount.abs()))


@dataclass(frozen=True)
class Augmentation:
    """Which changes to make, in this order: moves, stroke weight, mixup, noise."""

    warp: float = 0.0
    elastic: float = 0.0
    weight: float = 0.0  # of strokes
    mixup: bool = False
    noise: float = 0.0  # standard deviation; pixels lie in [0, 1]

    def __str__(self) -> str:
        parts = [f"{name} {getattr(self, name):g}" for name in ("warp", "elastic", "weight") if getattr(self, name)]
        parts += ["mixup"] * self.mixup + ([f"noise {self.noise:g}"] if self.noise else [])
        return " + ".join(parts) or "none"

    def __call__(self, x: Tensor, generator: torch.Generator) -> Tensor:
        """[B, 1, H, W] -> the same shape. Mixup takes two images of the batch, each changed on its own."""
        made = self._changed(x, generator)
        if self.mixup:
            other = self._changed(x[torch.randperm(len(x), generator=generator)], generator)
            made = torch.lerp(made, other, torch.rand(len(x), 1, 1, 1, generator=generator))
        return made + self.noise * torch.randn(x.shape, generator=generator) if self.noise else made

    def _changed(self, x: Tensor, generator: torch.Generator) -> Tensor:
        if self.warp or self.elastic:
            x = moved(x, generator, self.warp, self.elastic)
        return reweighted(x, generator, self.weight) if self.weight else x
