"""Sentences about a result, made from its numbers: also those that say that something did not help."""

from __future__ import annotations

from tgt_fast.demos.docstrings.results import DemoResult
from tgt_fast.demos.docstrings.settings import BASELINES
from tgt_fast.report.numbers import mean

LABELS = {
    "one-hot": "one-hot labels",
    "distillation": "distillation",
    "tgt-random": "TGT random",
    "tgt-gradient": "TGT gradient",
}


def findings(result: DemoResult) -> list[str]:
    """Findings of the accuracies, one comparison a sentence."""
    said = []
    for what, method, other in (
        ("Teacher-guided training with random exploration, against distillation", "tgt-random", "distillation"),
        ("The same, against one-hot labels", "tgt-random", "one-hot"),
        ("The teacher's soft labels alone, against one-hot labels", "distillation", "one-hot"),
        ("The gradient step, against random exploration", "tgt-gradient", "tgt-random"),
    ):
        said.append(f"{what}: {result.lead(method, other).verdict}.")
    climbs = [climb for climb in result.numbers("tgt-gradient", "ascent") if climb is not None]  # type: ignore[redundant-expr]
    if climbs:
        before, after = (mean([climb[k] for climb in climbs]) for k in (0, 1))  # type: ignore[index]
        said.append(
            f"A step of the gradient raised the disagreement of student and labeler on relaxed texts from {before:.2f} "
            f"to {after:.2f} on average."
        )
    return said


def costs(result: DemoResult) -> str:
    """The cost of the synthetic texts."""
    best = result.best(BASELINES)
    train = result.mean(best, "seconds")
    return (
        f"Making and labelling {result.pool.texts:,} synthetic texts took {result.pool.seconds:.0f} s, the gradient's "
        f"another {result.mean('tgt-gradient', 'exploring_seconds'):.0f} s; training a student takes "
        f"{train:.0f} s. All on one core each."
    )
