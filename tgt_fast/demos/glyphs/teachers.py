"""Training the teacher on the families of the pool: a variational autoencoder, and a labeler."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from tgt_fast.demos import networks
from tgt_fast.demos.digits.data import Images
from tgt_fast.demos.digits.models import folded, seeded
from tgt_fast.demos.digits.teachers import minimise
from tgt_fast.demos.glyphs import models
from tgt_fast.demos.glyphs.settings import Settings
from tgt_fast.demos.networks import Weights, with_weights
from tgt_fast.teacher import Teacher
from tgt_fast.train.rng import isolated_rng


@dataclass(frozen=True)
class TeacherWeights:
    """The parts that travel between processes."""

    encoder: Weights
    decoder: Weights
    labeler: Weights

    def build(self, settings: Settings) -> Teacher:
        """The frozen teacher. Its prior is the autoencoder's: a standard normal."""
        return Teacher(
            with_weights(models.Encoder(settings.vae_width, settings.latents), self.encoder),
            with_weights(models.decoder(settings.vae_width, settings.latents), self.decoder),
            with_weights(folded(models.labeler(settings.labeler_width)), self.labeler),
            prior="normal",
        )


def train_vae(images: Images, settings: Settings, seed: int) -> tuple[Weights, Weights]:
    """Encoder and decoder, by the negative evidence bound ``||Dec(z) - x||^2 / (2 s^2) + KL(q(z|x) || N(0, I))``."""
    with isolated_rng(seed):
        encoder = models.Encoder(settings.vae_width, settings.latents)
        decoder = models.decoder(settings.vae_width, settings.latents)
        generator = seeded(seed)
        batch = _batches(images, settings, generator)

        def loss() -> Tensor:
            x, _ = batch()
            mean, log_variance = encoder.posterior(x)
            z = mean + torch.randn(mean.shape, generator=generator) * (0.5 * log_variance).exp()
            squares: Tensor = (decoder(z) - x).square().flatten(1).sum(1).mean()
            divergence = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).sum(1).mean()
            return squares / (2 * settings.pixel_noise**2) + divergence

        parameters = [*encoder.parameters(), *decoder.parameters()]
        minimise(loss, torch.optim.Adam(parameters, settings.vae_rate, fused=True), settings.vae_steps)
    return networks.weights_of(encoder), networks.weights_of(decoder)


def train_labeler(images: Images, settings: Settings, seed: int) -> Weights:
    """The labeler, by cross-entropy on augmented images; its BatchNorm is folded into the convolutions."""
    with isolated_rng(seed):
        labeler = models.labeler(settings.labeler_width)
        generator = seeded(seed)
        batch = _batches(images, settings, generator)

        def loss() -> Tensor:
            x, y = batch()
            return F.cross_entropy(labeler(settings.labeler_augmentation(x, generator)), y)

        optimizer = torch.optim.AdamW(labeler.parameters(), settings.labeler_rate, weight_decay=1e-2, fused=True)
        minimise(loss, optimizer, settings.labeler_steps)
    return networks.weights_of(folded(labeler))


def _batches(images: Images, settings: Settings, generator: torch.Generator) -> Callable[[], tuple[Tensor, Tensor]]:
    def batch() -> tuple[Tensor, Tensor]:
        rows = torch.randint(len(images), (settings.teacher_batch,), generator=generator)
        return images.x[rows], images.y[rows]

    return batch


@dataclass(frozen=True)
class TeacherQuality:
    """A teacher on the test images."""

    seed: int
    labeler_accuracy: float  # percent
    tail_accuracy: float  # on the third of the classes that the student sees least of
    reconstruction_error: float  # root mean square over pixels
