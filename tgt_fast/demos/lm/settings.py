"""Every number of the demo, chosen on the validation text by ``tune.py``, the same for all seeds."""

from __future__ import annotations

from dataclasses import dataclass, replace

FEW = ("one-hot", "distillation", "distillation-records", "distillation-cached")
PLENTY = ("one-hot-plenty", "distillation-plenty")
METHODS = FEW + PLENTY


@dataclass(frozen=True)
class Settings:
    """Hyper-parameters."""

    # text
    tokens: int = 4096  # of the vocabulary
    tokenizer_bytes: int = 2_000_000  # of training text that the merges are learnt from
    train_bytes: int = 4_000_000  # of training text at most
    module_bytes: int = 16_000  # of each validation or test module, at most, so that none outweighs the others
    length: int = 128  # tokens of a window
    few: int = 200  # windows that a student with few data has
    validation: int = 192  # windows
    test: int = 128
    # teacher
    teacher_width: int = 128
    teacher_layers: int = 4
    teacher_heads: int = 4
    teacher_steps: int = 720
    teacher_rate: float = 3e-3
    # student
    width: int = 64
    layers: int = 1
    heads: int = 4
    steps: int = 220
    batch: int = 4  # windows a step, of the teacher too
    rate: float = 1e-2
    one_hot_rate: float = 1e-2
    one_hot_steps: int = 220
    weight_decay: float = 0.1
    # loss
    k: int = 256  # classes that a record lists
    temperature: float = 1.0
    hard_weight: float = 0.0
    record_hard_weight: float = 0.3  # beside records, which say little of rare tokens
    tail: str = "bucket"  # what a record's loss makes of the classes that are not listed
    evaluations: int = 4  # points of a learning curve behind the first

    def rate_of(self, method: str) -> float:
        """The highest learning rate of a method's student."""
        return self.one_hot_rate if method.startswith("one-hot") else self.rate

    def steps_of(self, method: str) -> int:
        """One-hot labels on few data wear out sooner than a teacher's."""
        return self.one_hot_steps if method == "one-hot" else self.steps


def quick(settings: Settings) -> Settings:
    """Less text, and fewer steps of teacher and students."""
    return replace(
        settings, teacher_steps=160, steps=80, one_hot_steps=80, evaluations=2, test=96, train_bytes=1_500_000
    )
