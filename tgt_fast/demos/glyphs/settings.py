"""Every number the demo was tuned on, chosen on families of the pool by ``tune.py``, the same for all seeds."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from tgt_fast.demos.glyphs.augment import Augmentation

BASELINES = ("one-hot", "distillation", "distillation-mixup", "distillation-augmented")
TGT_METHODS = (
    "tgt-prior", "tgt-random", "tgt-random-tail", "tgt-gradient", "tgt-random-replay", "tgt-gradient-replay",
    "tgt-gradient-augmented",
)  # fmt: skip
METHODS = BASELINES + TGT_METHODS
BEST_TGT = "tgt-gradient-augmented"  # the best of them in tuning: the one that is compared


@dataclass(frozen=True)
class Settings:
    """Hyper-parameters. Lengths in the latent space are in its standard deviations over the labelled images."""

    # teacher
    latents: int = 24
    vae_width: int = 16
    vae_steps: int = 1500
    vae_rate: float = 2e-3
    pixel_noise: float = 0.2  # the decoder's assumed standard deviation: smaller means sharper and less smooth
    labeler_width: int = 12
    labeler_steps: int = 800
    labeler_rate: float = 3e-3
    labeler_augmentation: Augmentation = field(default_factory=lambda: Augmentation(warp=0.5))
    teacher_batch: int = 64
    # student
    steps: int = 500
    rate: float = 2e-2
    one_hot_rate: float = 3e-3
    real: int = 32  # real examples a step beside as many others; alone: twice as many
    temperature: float = 8.0
    distillation_temperature: float = 8.0  # of distillation on the real examples alone
    mixup_temperature: float = 8.0
    augmented_temperature: float = 4.0
    # methods whose real examples, if these are all, or else whose augmented ones are of classes drawn uniformly
    balanced: tuple[str, ...] = ("one-hot", "distillation-mixup", "distillation-augmented", "tgt-gradient-augmented")
    mixup: Augmentation = field(default_factory=lambda: Augmentation(mixup=True))
    augmentation: Augmentation = field(default_factory=lambda: Augmentation(warp=1.0, elastic=0.1, weight=0.8))
    # exploration
    sigma: float = 1.3
    prior_sigma: float = 1.2
    step_size: float = 1.0
    ascent_steps: int = 1
    anchors: str = "balanced"
    tail_weight: float = 0.25  # anchors by n^-this, of a class of n labelled images; 0: balanced
    tail_sigma: float = 0.3  # so much more noise, as a share, for a class of one image, in proportion to log n
    reuse: int = 4
    candidates: int = 4
    evaluations: int = 6  # points of a learning curve

    def rate_of(self, method: str) -> float:
        """The learning rate a method begins with."""
        return self.one_hot_rate if method == "one-hot" else self.rate

    def temperature_of(self, method: str) -> float:
        """The temperature of a method's loss."""
        own = {
            "distillation": self.distillation_temperature,
            "distillation-mixup": self.mixup_temperature,
            "distillation-augmented": self.augmented_temperature,
        }
        return own.get(method, self.temperature)


def quick(settings: Settings) -> Settings:
    """About half of the steps."""
    return replace(settings, vae_steps=700, labeler_steps=400, steps=250, evaluations=4)
