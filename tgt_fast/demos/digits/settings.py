"""Every number the demo was tuned on, chosen on the validation split by ``tune.py``, the same for all seeds."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from tgt_fast.demos.digits.augment import Augmentation

BASELINES = ("one-hot", "distillation", "distillation-augmented")
TGT_METHODS = ("tgt-prior", "tgt-random", "tgt-gradient", "tgt-persistent")
METHODS = BASELINES + TGT_METHODS


@dataclass(frozen=True)
class Settings:
    """Hyper-parameters. Lengths in the latent space are in its standard deviations over the training set."""

    # teacher
    latents: int = 16
    vae_hidden: int = 192
    vae_steps: int = 2500
    vae_rate: float = 2e-3
    pixel_noise: float = 0.1  # the decoder's assumed standard deviation: smaller means sharper and less smooth
    vae_warp: float = 0.0  # share of warped images
    labeler_width: int = 16
    labeler_batchnorm: bool = True
    labeler_steps: int = 600
    labeler_rate: float = 3e-3
    labeler_warp: float = 0.8
    teacher_batch: int = 128
    # student
    steps: int = 1500
    rate: float = 1e-2
    one_hot_rate: float = 3e-3
    real: int = 64  # real examples a step beside as many others; alone: twice as many
    temperature: float = 2.0
    distillation_temperature: float = 4.0  # of distillation on the real examples alone
    augmentation: Augmentation = field(default_factory=lambda: Augmentation(mixup=True, noise=0.2))
    # exploration
    sigma: float = 1.0
    prior_sigma: float = 1.0
    step_size: float = 0.5
    ascent_steps: int = 2
    persistent_step_size: float = 0.5
    restart_probability: float = 0.1
    persistent_radius: float | None = None
    anchors: str = "balanced"
    evaluations: int = 30  # points of a learning curve

    def rate_of(self, method: str) -> float:
        """The learning rate a method begins with."""
        return self.one_hot_rate if method == "one-hot" else self.rate

    def temperature_of(self, method: str) -> float:
        """The temperature of a method's loss."""
        return self.distillation_temperature if method == "distillation" else self.temperature


def quick(settings: Settings) -> Settings:
    """About half of the steps."""
    return replace(settings, vae_steps=1500, labeler_steps=400, steps=800, evaluations=16)
