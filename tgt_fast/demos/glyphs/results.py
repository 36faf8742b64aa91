"""Results of a run of the demo, and the numbers made of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tgt_fast.demos.digits.methods import StudentResult
from tgt_fast.demos.digits.results import labels_for
from tgt_fast.demos.glyphs.diagnostics import Diagnostics
from tgt_fast.demos.glyphs.settings import BASELINES, BEST_TGT, METHODS, Settings
from tgt_fast.demos.glyphs.teachers import TeacherQuality
from tgt_fast.demos.results import AccuracyResults, provenance
from tgt_fast.report.numbers import Difference, mean, summary

PACKAGES = ("pillow",)  # whose versions belong to the result


@dataclass(frozen=True)
class Pictures:
    """What was drawn."""

    families: int
    left_out: tuple[str, ...]  # that lack a character
    pool_families: int
    test_families: int
    pool_images: int
    test_images: int


@dataclass(frozen=True, kw_only=True)
class DemoResult(AccuracyResults[StudentResult]):
    """Everything the table, the page and the JSON file show."""

    settings: Settings
    pictures: Pictures
    counts: tuple[int, ...]  # labelled examples a class
    teachers: tuple[TeacherQuality, ...]  # one a seed
    diagnostics: tuple[Diagnostics, ...]  # one a seed
    curve: tuple[StudentResult, ...]  # students of other numbers of labels, for --curve
    processor_seconds: float  # of all processes

    def tail_lead(self, method: str, other: str) -> Difference:
        """Points of accuracy on the rarest third by which ``method`` is ahead of ``other``."""
        return Difference(self.ahead(method, other, "tail"))


@dataclass(frozen=True)
class SampleFactor:
    """The factor of labels that another method needs for the accuracy of ``BEST_TGT``, seed by seed."""

    method: str
    labels: int  # of the teacher-guided student
    accuracy: float  # its mean
    factors: tuple[float, ...]  # one a seed; at least this, where it is beyond
    beyond: tuple[bool, ...]  # the other method does not get there with all labels there are


def learning_curve(result: DemoResult, method: str, seed: int | None = None) -> list[tuple[int, list[float]]]:
    """(labels, accuracies by seed), by number of labels; those of the main experiment among them."""
    found: dict[int, list[float]] = {}
    for student in sorted((*result.curve, *result.students), key=lambda s: result.seeds.index(s.seed)):
        if student.method == method and seed in (None, student.seed):
            found.setdefault(student.labels, []).append(student.accuracy)
    return sorted(found.items())


def sample_factors(
    result: DemoResult,
    method: str = BEST_TGT,
    others: Sequence[str] = ("one-hot", "distillation", "distillation-augmented"),
) -> list[SampleFactor]:
    """For each number of labels: how many more another method needs, interpolated over log(labels)."""
    factors = []
    for other in others:
        lines = [
            [(labels, values[0]) for labels, values in learning_curve(result, other, seed)] for seed in result.seeds
        ]
        for labels, values in learning_curve(result, method):
            if len(values) < len(lines) or labels >= lines[0][-1][0]:
                continue  # with all labels there is nothing further to compare with
            needed = [labels_for(line, accuracy) for line, accuracy in zip(lines, values, strict=True)]
            factors.append(
                SampleFactor(
                    other, labels, mean(values),
                    tuple((n or line[-1][0]) / labels for n, line in zip(needed, lines, strict=True)),
                    tuple(n is None for n in needed),
                )
            )  # fmt: skip
    return factors


def as_json(result: DemoResult) -> dict[str, Any]:
    """The result as plain data. Accuracies and agreement in percent, KL in nats, processor seconds a student."""
    means = ("head", "middle", "tail", "agreement", "mean_kl", "seconds")
    best = result.best(BASELINES)
    best_of_tail = max(BASELINES, key=lambda method: result.mean(method, "tail"))
    content: dict[str, Any] = {
        "methods": {
            method: {
                "accuracy": summary(result.numbers(method, "accuracy")),
                "tail_per_seed": result.numbers(method, "tail"),
                **{name: result.mean(method, name) for name in means},
            }
            for method in METHODS
        },
        **provenance(result, PACKAGES),
        "processor_seconds": result.processor_seconds,
        "pictures": vars(result.pictures),
        "labels": sum(result.counts),
        "best_tgt": BEST_TGT,
        "leads": {
            "accuracy": {"over": best, "points": list(result.lead(BEST_TGT, best).points)},
            "tail": {"over": best_of_tail, "points": list(result.tail_lead(BEST_TGT, best_of_tail).points)},
        },
        "teacher": {
            name: [getattr(teacher, name) for teacher in result.teachers]
            for name in ("labeler_accuracy", "tail_accuracy", "reconstruction_error")
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
