"""Training the teacher: a variational autoencoder of 16 latents, and a labeler."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from tgt_fast.demos import networks
from tgt_fast.demos.digits import models
from tgt_fast.demos.digits.augment import warped
from tgt_fast.demos.digits.data import Images
from tgt_fast.demos.digits.settings import Settings
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
        """The frozen teacher. Its prior is the VAE's: a standard normal."""
        encoder = models.Encoder(settings.vae_hidden, settings.latents)
        decoder = models.decoder(settings.vae_hidden, settings.latents)
        labeler = models.folded(models.labeler(settings.labeler_width, settings.labeler_batchnorm))
        return Teacher(
            with_weights(encoder, self.encoder),
            with_weights(decoder, self.decoder),
            with_weights(labeler, self.labeler),
            prior="normal",
        )


def train_vae(images: Images, settings: Settings, seed: int) -> tuple[Weights, Weights]:
    """Encoder and decoder, by the negative evidence bound ``||Dec(z) - x||^2 / (2 s^2) + KL(q(z|x) || N(0, I))``."""
    with isolated_rng(seed):
        encoder = models.Encoder(settings.vae_hidden, settings.latents)
        decoder = models.decoder(settings.vae_hidden, settings.latents)
        generator = models.seeded(seed)

        def loss() -> Tensor:
            x, _ = _batch(images, settings.teacher_batch, generator)
            if settings.vae_warp:
                x = warped(x, generator, settings.vae_warp)
            mean, log_variance = encoder.posterior(x)
            z = mean + torch.randn(mean.shape, generator=generator) * (0.5 * log_variance).exp()
            squares: Tensor = (decoder(z) - x).square().sum(1).mean()
            divergence = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).sum(1).mean()
            return squares / (2 * settings.pixel_noise**2) + divergence

        parameters = [*encoder.parameters(), *decoder.parameters()]
        minimise(loss, torch.optim.Adam(parameters, settings.vae_rate, fused=True), settings.vae_steps)
    return networks.weights_of(encoder), networks.weights_of(decoder)


def train_labeler(images: Images, settings: Settings, seed: int) -> Weights:
    """The labeler, by cross-entropy on warped images; its BatchNorm is folded into the convolutions."""
    with isolated_rng(seed):
        labeler = models.labeler(settings.labeler_width, settings.labeler_batchnorm)
        generator = models.seeded(seed)

        def loss() -> Tensor:
            x, y = _batch(images, settings.teacher_batch, generator)
            return F.cross_entropy(labeler(warped(x, generator, settings.labeler_warp)), y)

        optimizer = torch.optim.AdamW(labeler.parameters(), settings.labeler_rate, weight_decay=1e-2, fused=True)
        minimise(loss, optimizer, settings.labeler_steps)
    return networks.weights_of(models.folded(labeler))


def cosine(steps: int) -> Callable[[int], float]:
    """The factor of the learning rate at a step: half a cosine from 1 down to 0."""
    return lambda step: 0.5 * (1 + math.cos(math.pi * min(step / steps, 1.0)))


def _batch(images: Images, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    rows = torch.randint(len(images), (size,), generator=generator)
    return images.x[rows], images.y[rows]


def minimise(loss: Callable[[], Tensor], optimizer: torch.optim.Optimizer, steps: int) -> None:
    """So many steps down the loss, at the rate that :func:`cosine` gives."""
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, cosine(steps))
    for _ in range(steps):
        optimizer.zero_grad()
        torch.autograd.backward(loss())
        optimizer.step()
        schedule.step()


@dataclass(frozen=True)
class TeacherQuality:
    """A teacher on the test images."""

    seed: int
    labeler_accuracy: float  # percent
    reconstruction_error: float  # root mean square over pixels


@torch.no_grad()
def quality(teacher: Teacher, images: Images, seed: int) -> TeacherQuality:
    """Measure a teacher on images it has not seen."""
    right = (teacher.label(images.x).argmax(1) == images.y).float().mean().item()
    again = teacher.decode(teacher.encode(images.x))
    return TeacherQuality(seed, 100 * right, (again - images.x).square().mean().sqrt().item())
