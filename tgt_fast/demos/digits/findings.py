"""Sentences about a result, made from its numbers: also those that say that something did not help."""

from __future__ import annotations

from tgt_fast.demos.digits.results import DemoResult, SampleFactor, sample_factors
from tgt_fast.demos.digits.settings import BASELINES
from tgt_fast.report.numbers import mean

LABELS = {
    "one-hot": "one-hot labels",
    "distillation": "distillation",
    "distillation-augmented": "distillation, augmented",
    "tgt-prior": "TGT prior",
    "tgt-random": "TGT random",
    "tgt-gradient": "TGT gradient",
    "tgt-persistent": "TGT persistent",
}


def findings(result: DemoResult) -> list[str]:
    """Findings of the accuracies, one comparison a sentence."""
    best = result.best(BASELINES)
    said = [
        f"Teacher-guided training with the gradient, against the best method without it ({LABELS[best]}): "
        f"{result.lead('tgt-gradient', best).verdict}."
    ]
    for what, method, other in (
        ("The teacher's soft labels alone, against one-hot labels", "distillation", "one-hot"),
        ("Augmenting the images, against distillation without", "distillation-augmented", "distillation"),
        ("The gradient step, against random exploration", "tgt-gradient", "tgt-random"),
        ("Persistent chains, against the gradient step", "tgt-persistent", "tgt-gradient"),
        ("Sampling the prior without any anchor, against random exploration", "tgt-prior", "tgt-random"),
    ):
        said.append(f"{what}: {result.lead(method, other).verdict}.")
    return said


def caption_of_prior(result: DemoResult) -> str:
    """Why the prior is a control."""
    ahead = result.accuracy("tgt-prior") >= result.accuracy("tgt-gradient") - 0.5
    reason = (
        "The prior does as well as anchored exploration here, because this generator was trained on all ten digits "
        "evenly: its prior knows the rare classes that the labelled images hardly show."
    )
    other = "Anchored exploration is ahead of the prior here."
    return reason if ahead else other


def costs(result: DemoResult) -> str:
    """Training time relative to random exploration."""
    base = result.mean("tgt-random", "seconds")
    ratios = [
        f"{LABELS[m]} {result.mean(m, 'seconds') / base:.1f}"
        for m in ("distillation", "tgt-gradient", "tgt-persistent")
    ]
    return f"Training time, with TGT random as 1: {', '.join(ratios)}."


def describe_ascent(result: DemoResult) -> str:
    """The change of each student's disagreement over the ascent."""
    parts = []
    for student in result.diagnostics[0].ascent:
        paths = [found.ascent[student] for found in result.diagnostics]
        first, last = mean([path[0] for path in paths]), mean([path[-1] for path in paths])
        parts.append(f"{LABELS[student]} from {first:.2f} to {last:.2f}")
    return f"Mean disagreement over the climb: {'; '.join(parts)}."


def describe_factors(result: DemoResult) -> list[str]:
    """The sample-size factors in words."""
    grouped: dict[str, list[SampleFactor]] = {}
    for factor in sample_factors(result):
        grouped.setdefault(factor.method, []).append(factor)
    said = []
    for method, factors in grouped.items():
        shown = [
            f"with {f.labels} labels ({f.accuracy:.1f} %) {'more than ' if f.beyond else ''}{f.factor:.1f} times"
            for f in factors
        ]
        said.append(f"For the accuracy of TGT gradient, {LABELS[method]} needs: {', '.join(shown)} as many.")
    return said
