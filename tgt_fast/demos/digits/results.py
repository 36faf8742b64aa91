"""Results of a run of the demo, and the numbers made of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tgt_fast.demos.digits.diagnostics import Diagnostics
from tgt_fast.demos.digits.methods import StudentResult
from tgt_fast.demos.digits.settings import METHODS, Settings
from tgt_fast.demos.digits.teachers import TeacherQuality
from tgt_fast.demos.results import AccuracyResults, provenance
from tgt_fast.report.numbers import mean, summary

PACKAGES = ("scikit-learn",)  # whose versions belong to the result


@dataclass(frozen=True, kw_only=True)
class DemoResult(AccuracyResults[StudentResult]):
    """Everything the table, the page and the JSON file show."""

    settings: Settings
    counts: tuple[int, ...]  # labelled examples a class
    teachers: tuple[TeacherQuality, ...]  # one a seed
    diagnostics: tuple[Diagnostics, ...]  # one a seed
    curve: tuple[StudentResult, ...]  # students of other numbers of labels, for --curve
    recipes: tuple[str, ...] = ()  # methods beside the demo's own, for --with


@dataclass(frozen=True)
class SampleFactor:
    """The factor of labels that another method needs for the same accuracy."""

    method: str
    labels: int  # of the teacher-guided student
    accuracy: float
    factor: float  # at least this, where ``beyond``
    beyond: bool  # the other method does not get there with all labels there are


def learning_curve(result: DemoResult, method: str) -> list[tuple[int, list[float]]]:
    """(labels, accuracies by seed), by number of labels; those of the main experiment among them."""
    found: dict[int, list[float]] = {}
    for student in sorted((*result.curve, *result.students), key=lambda s: s.seed):
        if student.method == method:
            found.setdefault(student.labels, []).append(student.accuracy)
    return sorted(found.items())


def sample_factors(
    result: DemoResult, method: str = "tgt-gradient", others: Sequence[str] = ("one-hot", "distillation")
) -> list[SampleFactor]:
    """For each number of labels: how many more another method needs, interpolated over log(labels)."""
    factors = []
    for other in others:
        line = [(labels, mean(values)) for labels, values in learning_curve(result, other)]
        for labels, values in learning_curve(result, method):
            if labels == line[-1][0]:
                continue  # with all labels there is nothing further to compare with
            accuracy = mean(values)
            needed = labels_for(line, accuracy)
            factors.append(SampleFactor(other, labels, accuracy, (needed or line[-1][0]) / labels, needed is None))
    return factors


def labels_for(line: Sequence[tuple[int, float]], accuracy: float) -> float | None:
    """The point at which a curve first reaches an accuracy; None where it does not."""
    before: tuple[int, float] | None = None
    for labels, reached in line:
        if reached >= accuracy:
            if before is None:
                return float(labels)
            share = (accuracy - before[1]) / (reached - before[1])
            return math.exp(math.log(before[0]) + share * math.log(labels / before[0]))
        before = (labels, reached)
    return None


def as_json(result: DemoResult) -> dict[str, Any]:
    """The result as plain data. Accuracies and agreement in percent, KL in nats, seconds a student."""
    means = ("head", "middle", "tail", "agreement", "mean_kl", "seconds")
    content: dict[str, Any] = {
        "methods": {
            method: {
                "accuracy": summary(result.numbers(method, "accuracy")),
                **{name: result.mean(method, name) for name in means},
            }
            for method in (*METHODS, *result.recipes)
        },
        **provenance(result, PACKAGES),
        "teacher": {
            "labeler_accuracy": [teacher.labeler_accuracy for teacher in result.teachers],
            "reconstruction_error": [teacher.reconstruction_error for teacher in result.teachers],
        },
        "augmentation": str(result.settings.augmentation),
        "steps": result.settings.steps,
    }
    if result.curve:
        content["curve"] = {
            method: [
                {"labels": labels, "accuracy": mean(values), "per_seed": values}
                for labels, values in learning_curve(result, method)
            ]
            for method in sorted({student.method for student in result.curve})
        }
        content["sample_size_factors"] = [vars(factor) for factor in sample_factors(result)]
    return content
