"""The networks: a variational autoencoder, a convolutional labeler, and the small student."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from tgt_fast.demos.digits.data import CLASSES, PIXELS, SIDE


class Encoder(nn.Module):
    """Images [B, 64] -> the latent's mean [B, latents]; :meth:`posterior` adds its log variance, for training."""

    def __init__(self, hidden: int, latents: int) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(PIXELS, hidden), nn.SiLU(), nn.Linear(hidden, hidden), nn.SiLU())
        self.mean = nn.Linear(hidden, latents)
        self.log_variance = nn.Linear(hidden, latents)

    def posterior(self, x: Tensor) -> tuple[Tensor, Tensor]:
        features = self.trunk(x)
        return self.mean(features), self.log_variance(features).clamp(-8, 4)

    def forward(self, x: Tensor) -> Tensor:
        mean: Tensor = self.mean(self.trunk(x))
        return mean


def decoder(hidden: int, latents: int) -> nn.Sequential:
    """Latents [B, latents] -> images [B, 64] in [0, 1]."""
    layers = [nn.Linear(latents, hidden), nn.SiLU(), nn.Linear(hidden, hidden), nn.SiLU()]
    return nn.Sequential(*layers, nn.Linear(hidden, PIXELS), nn.Sigmoid())


def labeler(width: int, batchnorm: bool = True) -> nn.Sequential:
    """Images [B, 64] -> logits [B, 10]: four 3x3 convolutions, two of them of stride 2."""

    def block(channels: int, filters: int, stride: int = 1) -> list[nn.Module]:
        convolution = nn.Conv2d(channels, filters, 3, stride, padding=1, bias=not batchnorm)
        normalisation = [nn.BatchNorm2d(filters)] if batchnorm else []
        return [convolution, *normalisation, nn.ReLU()]

    return nn.Sequential(
        nn.Unflatten(1, (1, SIDE, SIDE)),
        *block(1, width),
        *block(width, 2 * width, stride=2),
        *block(2 * width, 2 * width),
        *block(2 * width, 2 * width, stride=2),
        nn.Flatten(),
        nn.Dropout(0.3),
        nn.Linear(2 * width * (SIDE // 4) ** 2, CLASSES),
    )


def student() -> nn.Sequential:
    """Images [B, 64] -> logits [B, 10], 1,810 parameters."""
    return nn.Sequential(nn.Linear(PIXELS, 24), nn.ReLU(), nn.Linear(24, CLASSES))


def folded(network: nn.Sequential) -> nn.Sequential:
    """The same function in eval mode with every BatchNorm folded into the convolution before it: half the time."""
    layers: list[nn.Module] = []
    for layer in network.eval():
        if isinstance(layer, nn.BatchNorm2d):
            convolution = layers.pop()
            if not isinstance(convolution, nn.Conv2d):
                raise TypeError("a BatchNorm2d must follow a convolution")
            layers.append(fuse_conv_bn_eval(convolution, layer))
        elif not isinstance(layer, nn.Dropout):
            layers.append(layer)
    return nn.Sequential(*layers).eval()


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)
