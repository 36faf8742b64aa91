"""The networks: a convolutional variational autoencoder, a convolutional labeler, and the small student."""

from __future__ import annotations

from torch import Tensor, nn

from tgt_fast.demos.glyphs.data import CLASSES
from tgt_fast.demos.glyphs.render import SIDE

_COARSE = SIDE // 4  # a side after two strides of 2


class Encoder(nn.Module):
    """Images [B, 1, 28, 28] -> the latent's mean [B, latents]; :meth:`posterior` adds its log variance."""

    def __init__(self, width: int, latents: int) -> None:
        super().__init__()
        self.trunk = nn.Sequential(
            nn.Conv2d(1, width, 4, 2, 1), nn.SiLU(),
            nn.Conv2d(width, 2 * width, 4, 2, 1), nn.SiLU(),
            nn.Flatten(), nn.Linear(2 * width * _COARSE**2, 8 * width), nn.SiLU(),
        )  # fmt: skip
        self.mean = nn.Linear(8 * width, latents)
        self.log_variance = nn.Linear(8 * width, latents)

    def posterior(self, x: Tensor) -> tuple[Tensor, Tensor]:
        features = self.trunk(x)
        return self.mean(features), self.log_variance(features).clamp(-8, 4)

    def forward(self, x: Tensor) -> Tensor:
        mean: Tensor = self.mean(self.trunk(x))
        return mean


def decoder(width: int, latents: int) -> nn.Sequential:
    """Latents [B, latents] -> images [B, 1, 28, 28] in [0, 1]."""
    return nn.Sequential(
        nn.Linear(latents, 8 * width), nn.SiLU(),
        nn.Linear(8 * width, 2 * width * _COARSE**2), nn.SiLU(),
        nn.Unflatten(1, (2 * width, _COARSE, _COARSE)),
        nn.ConvTranspose2d(2 * width, width, 4, 2, 1), nn.SiLU(),
        nn.ConvTranspose2d(width, 1, 4, 2, 1), nn.Sigmoid(),
    )  # fmt: skip


def labeler(width: int) -> nn.Sequential:
    """Images [B, 1, 28, 28] -> logits [B, 36]: four 3x3 convolutions, three of them of stride 2."""

    def block(channels: int, filters: int, stride: int) -> list[nn.Module]:
        return [nn.Conv2d(channels, filters, 3, stride, 1, bias=False), nn.BatchNorm2d(filters), nn.ReLU()]

    return nn.Sequential(
        *block(1, width, 2),
        *block(width, 2 * width, 1),
        *block(2 * width, 4 * width, 2),
        *block(4 * width, 4 * width, 2),
        nn.Flatten(),
        nn.Dropout(0.3),
        nn.Linear(4 * width * 16, CLASSES),
    )


def student() -> nn.Sequential:
    """Images [B, 1, 28, 28] -> logits [B, 36]: two small convolutions with strides of 3 and 2."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 5, 3, 1), nn.ReLU(),
        nn.Conv2d(16, 32, 3, 2, 1), nn.ReLU(),
        nn.Flatten(), nn.Linear(32 * 25, CLASSES),
    )  # fmt: skip
