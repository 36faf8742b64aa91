"""Every number the demo was tuned on, chosen on the validation pairs by ``tune.py``, the same for all seeds."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from tgt_fast.demos.text.generator import GeneratorSettings

BASELINES = ("one-hot", "distillation", "uniform-negatives")
TGT_METHODS = ("tgt-random",)
METHODS = BASELINES + TGT_METHODS
DEPTHS = (1, 20, 100)  # recall within so many passages


@dataclass(frozen=True)
class StudentSettings:
    """The training of one method's student."""

    rate: float = 1e-2
    temperature: float = 0.1  # of the student's scores, which are cosines
    teacher_temperature: float = 0.1
    soft_weight: float = 1.0
    hard_weight: float = 0.0


@dataclass(frozen=True)
class Settings:
    """Hyper-parameters. Noise is in standard deviations of the encoder's output over the anchors."""

    # texts
    limit: int | None = None  # texts of the corpus that are used
    labels: int = 200  # pairs that the student is given
    uniform: int = 1000  # other passages, from which the uniform negatives are drawn
    length: int = 48  # tokens that generator and student read of a text
    query_tokens: int = 32  # that the teacher reads
    passage_tokens: int = 64
    # generator
    vocabulary: int = 4000
    generator: GeneratorSettings = field(
        default_factory=lambda: GeneratorSettings(
            max_length=48, width=128, hidden=256, batch=48, rate=1.5e-3, noise=2.0, steps=600
        )
    )
    # exploration
    variants: int = 8  # synthetic passages made of each passage, of which a step draws
    sigma: float = 1.0
    draw_temperature: float = 0.8
    draw_top_p: float = 0.95
    # student
    width: int = 64
    heads: int = 4
    dropout: float = 0.1
    vector: int = 128  # numbers of a text's vector
    steps: int = 400
    texts: int = 128  # that the student reads a step: pairs, or half pairs and half further passages
    students: dict[str, StudentSettings] = field(
        default_factory=lambda: {
            "one-hot": StudentSettings(2e-3, 0.05, 0.05, 0.0, 1.0),
            **dict.fromkeys(METHODS[1:], StudentSettings()),
        }
    )
    evaluations: int = 6  # points of a learning curve


def quick(settings: Settings) -> Settings:
    """About 3,000 texts and a fraction of the steps."""
    return replace(
        settings,
        limit=3000,
        labels=100,
        uniform=300,
        variants=3,
        generator=replace(settings.generator, steps=200),
        steps=120,
        evaluations=4,
    )
