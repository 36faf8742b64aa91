"""Every number the demo was tuned on, chosen on the validation texts by ``tune.py``, the same for all seeds."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from tgt_fast.demos.text.generator import GeneratorSettings

BASELINES = ("one-hot", "distillation")
TGT_METHODS = ("tgt-random", "tgt-gradient")
METHODS = BASELINES + TGT_METHODS


@dataclass(frozen=True)
class StudentSettings:
    """The training of one method's student."""

    rate: float = 4e-3
    temperature: float = 2.0
    hard_weight: float = 1.0
    dropout: float = 0.3
    weight_decay: float = 0.01


@dataclass(frozen=True)
class Settings:
    """Hyper-parameters. Lengths in the latent space are in its standard deviations over the anchors."""

    # texts
    limit: int | None = None  # texts of the corpus that are used
    characters: int = 400  # of a text that are read
    classes: int = 20
    labels: int = 500
    test_per_class: int = 50  # texts at most, so that accuracy counts all classes alike
    decay: float = 0.85  # labelled examples of a class, relative to the next larger one
    # teacher
    vocabulary: int = 4000
    generator: GeneratorSettings = field(default_factory=lambda: GeneratorSettings(steps=900))
    labeler_hidden: int = 256
    labeler_dropout: float = 0.5
    labeler_steps: int = 300
    labeler_rate: float = 2e-3
    labeler_smoothing: float = 0.05
    labeler_batch: int = 256
    # student
    width: int = 96
    heads: int = 4
    layers: int = 1
    steps: int = 600
    batch: int = 64  # examples a step: all real ones, or half of them synthetic
    students: dict[str, StudentSettings] = field(
        default_factory=lambda: {
            "one-hot": StudentSettings(rate=4e-3),
            "distillation": StudentSettings(rate=4e-3),
            "tgt-random": StudentSettings(rate=8e-3),
            "tgt-gradient": StudentSettings(rate=8e-3),
        }
    )
    # exploration
    variants: int = 8  # synthetic texts of an anchor
    sigma: float = 2.5
    draw_temperature: float = 0.9
    draw_top_p: float | None = 0.95
    anchors: str = "balanced"  # over classes, or "batch": each labelled text as often as any other
    step_size: float = 16.0
    refreshes: int = 2  # of the gradient's texts over a training
    gradient_variants: int = 1  # of an anchor at each
    evaluations: int = 10  # points of a learning curve


def quick(settings: Settings) -> Settings:
    """About 3,000 texts and a fraction of the labels and steps."""
    return replace(
        settings,
        limit=3000,
        labels=300,
        generator=replace(settings.generator, steps=130),
        steps=160,
        variants=3,
        refreshes=1,
        evaluations=5,
    )
