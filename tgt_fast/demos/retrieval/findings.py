"""Sentences about a result, made from its numbers: also those that say that something did not help."""

from __future__ import annotations

from tgt_fast.demos.retrieval.results import DemoResult
from tgt_fast.report.numbers import Difference

LABELS = {
    "one-hot": "one-hot labels",
    "distillation": "distillation",
    "uniform-negatives": "distillation + uniform negatives",
    "tgt-random": "TGT random",
}


def difference(result: DemoResult, method: str, other: str, depth: int = 20) -> Difference:
    """Points of recall by which ``method`` is ahead of ``other``, seed by seed."""
    ours, theirs = (result.recalls(name, depth) for name in (method, other))
    points = [a - b for a, b in zip(ours, theirs, strict=True)]
    return Difference(points, f"points of recall within {depth}")


def findings(result: DemoResult) -> list[str]:
    """Findings of the recalls, one comparison a sentence."""
    said = []
    for what, method, other in (
        ("Teacher-guided training with random exploration, against distillation", "tgt-random", "distillation"),
        ("The same, against distillation with real further passages", "tgt-random", "uniform-negatives"),
        ("Real further passages, against distillation alone", "uniform-negatives", "distillation"),
        ("The teacher's scores, against one-hot labels", "distillation", "one-hot"),
    ):
        said.append(f"{what}: {difference(result, method, other).verdict}.")
    return said


def costs(result: DemoResult) -> str:
    """The cost of the synthetic passages."""
    train = result.mean("distillation", "seconds")
    return (
        f"Writing and labelling {result.settings.variants * result.pairs.labelled:,} synthetic passages took "
        f"{result.writing_seconds:.0f} s, training a student takes {train:.0f} s, all on one core each."
    )
