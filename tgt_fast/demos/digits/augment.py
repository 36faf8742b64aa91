"""Augmentation of 8x8 images in the input space: the rival of exploration in the latent space."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from tgt_fast.demos.digits.data import SIDE


def shifted(x: Tensor, generator: torch.Generator) -> Tensor:
    """Each image moved by -1, 0 or 1 pixels in either direction; x: [B, 64]."""
    count = x.shape[0]
    padded = F.pad(x.view(count, SIDE, SIDE), (1, 1, 1, 1))
    offsets = torch.randint(0, 3, (2, count), generator=generator)
    line = torch.arange(SIDE)
    rows = (offsets[0][:, None] + line)[:, :, None]
    columns = (offsets[1][:, None] + line)[:, None, :]
    return padded[torch.arange(count)[:, None, None], rows, columns].reshape(count, -1)


def warped(x: Tensor, generator: torch.Generator, share: float = 1.0) -> Tensor:
    """A ``share`` of the images rotated by up to 14 degrees, scaled by up to 15 %, sheared, moved by up to a pixel."""
    count = x.shape[0]

    def uniform(limit: float) -> Tensor:
        return (torch.rand(count, generator=generator) * 2 - 1) * limit

    angle, width, height, shear = uniform(0.25), 1 + uniform(0.15), 1 + uniform(0.15), uniform(0.2)
    matrix = torch.stack(
        [
            torch.stack([width * angle.cos(), shear - height * angle.sin(), uniform(0.25)], 1),
            torch.stack([width * angle.sin(), height * angle.cos(), uniform(0.25)], 1),
        ],
        1,
    )
    grid = F.affine_grid(matrix, [count, 1, SIDE, SIDE], align_corners=False)
    moved = F.grid_sample(x.view(count, 1, SIDE, SIDE), grid, align_corners=False).reshape(count, -1)
    return torch.where(torch.rand(count, 1, generator=generator) < share, moved, x)


@dataclass(frozen=True)
class Augmentation:
    """Which changes to make, in this order: shift or warp, mixup, noise."""

    shift: bool = False
    warp: bool = False
    mixup: bool = False
    noise: float = 0.0  # standard deviation; pixels lie in [0, 1]
    clip: bool = False  # back to [0, 1] after the noise

    def __str__(self) -> str:
        noise = f"noise {self.noise:g}{' clipped' if self.clip else ''}" if self.noise else ""
        names = [name for name in ("shift", "warp", "mixup") if getattr(self, name)] + [noise]
        return " + ".join(name for name in names if name) or "none"

    def __call__(self, x: Tensor, generator: torch.Generator) -> Tensor:
        """x: [B, 64] -> [B, 64]. Mixup takes two images of the batch, each changed on its own, at a uniform ratio."""
        made = self._moved(x, generator)
        if self.mixup:
            other = self._moved(x[torch.randperm(len(x), generator=generator)], generator)
            made = torch.lerp(made, other, torch.rand(len(x), 1, generator=generator))
        if self.noise:
            made = made + self.noise * torch.randn(x.shape, generator=generator)
        return made.clamp(0, 1) if self.clip else made

    def _moved(self, x: Tensor, generator: torch.Generator) -> Tensor:
        if self.shift:
            x = shifted(x, generator)
        return warped(x, generator) if self.warp else x
