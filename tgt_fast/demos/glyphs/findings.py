"""Sentences about a result, made from its numbers: also those that say that something did not help."""

from __future__ import annotations

from tgt_fast.demos.glyphs.results import DemoResult, SampleFactor, sample_factors
from tgt_fast.demos.glyphs.settings import BASELINES, BEST_TGT
from tgt_fast.report.numbers import mean

LABELS = {
    "one-hot": "one-hot labels",
    "distillation": "distillation",
    "distillation-mixup": "distillation, mixup",
    "distillation-augmented": "distillation, augmented",
    "tgt-prior": "TGT prior",
    "tgt-random": "TGT random",
    "tgt-random-tail": "TGT random, tail-aware",
    "tgt-gradient": "TGT gradient",
    "tgt-random-replay": "TGT random, replay",
    "tgt-gradient-replay": "TGT gradient, replay",
    "tgt-gradient-augmented": "TGT and warps in turn",
}


def best_of_tail(result: DemoResult) -> str:
    """The method without exploration that is best on the rarest third."""
    return max(BASELINES, key=lambda method: result.mean(method, "tail"))


def findings(result: DemoResult) -> list[str]:
    """Findings of the accuracies, one comparison a sentence."""
    best, rare = result.best(BASELINES), best_of_tail(result)
    named = LABELS[BEST_TGT].removeprefix("TGT ")
    said = [
        f"Teacher-guided training ({named}), against the best method without it ({LABELS[best]}): "
        f"{result.lead(BEST_TGT, best).verdict}.",
        f"The same on the rarest third of the classes, against the best there ({LABELS[rare]}): "
        f"{result.tail_lead(BEST_TGT, rare).verdict}.",
    ]
    for what, method, other in (
        (
            "TGT without warped images (gradient, replay), against mixup, the best that does without them, too",
            "tgt-gradient-replay",
            "distillation-mixup",
        ),
        (
            "Warped images at every other step, against exploration at every step",
            "tgt-gradient-augmented",
            "tgt-gradient-replay",
        ),
        ("The teacher's soft labels alone, against one-hot labels", "distillation", "one-hot"),
        ("Mixup, against distillation without", "distillation-mixup", "distillation"),
        ("Warped images, against distillation without", "distillation-augmented", "distillation"),
        ("More anchors and more noise for rare classes, against classes alike", "tgt-random-tail", "tgt-random"),
        ("The gradient step, against random exploration", "tgt-gradient", "tgt-random"),
        ("Replay by disagreement, against fresh random examples", "tgt-random-replay", "tgt-random"),
        ("Replay by disagreement, against fresh examples of the gradient", "tgt-gradient-replay", "tgt-gradient"),
        ("Sampling the prior without any anchor, against random exploration", "tgt-prior", "tgt-random"),
    ):
        said.append(f"{what}: {result.lead(method, other).verdict}.")
    return said


def costs(result: DemoResult) -> str:
    """Training time relative to random exploration."""
    base = result.mean("tgt-random", "seconds")
    ratios = [
        f"{LABELS[m]} {result.mean(m, 'seconds') / base:.1f}"
        for m in ("distillation-augmented", "tgt-random-replay", "tgt-gradient", "tgt-gradient-replay", BEST_TGT)
    ]
    return f"Processor time of training, with TGT random as 1: {', '.join(ratios)}."


def describe_factors(result: DemoResult) -> list[str]:
    """The sample-size factors in words, with their spread over the seeds."""
    grouped: dict[str, list[SampleFactor]] = {}
    for factor in sample_factors(result):
        grouped.setdefault(factor.method, []).append(factor)
    said = []
    for method, factors in grouped.items():
        shown = [f"at {f.labels} labels ({f.accuracy:.1f} %) {times(f)}" for f in factors]
        said.append(
            f"Times the labels, with {LABELS[method]}, for the accuracy of {LABELS[BEST_TGT]}: {'; '.join(shown)}."
        )
    return said


def times(factor: SampleFactor) -> str:
    """``12 (9 to 15)``, the seeds' mean and extremes; "more than" where some seed's labels do not suffice."""
    low, high = min(factor.factors), max(factor.factors)
    spread = f" ({low:.1f} to {high:.1f} by seed)" if len(factor.factors) > 1 else ""
    return f"{'more than ' if any(factor.beyond) else ''}{mean(factor.factors):.1f}{spread}"
