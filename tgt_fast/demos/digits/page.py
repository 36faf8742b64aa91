"""The report of the digits demo: plots, tables and what they say."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from tgt_fast.demos.digits import findings
from tgt_fast.demos.digits.data import CLASSES
from tgt_fast.demos.digits.findings import LABELS
from tgt_fast.demos.digits.models import student
from tgt_fast.demos.digits.recipes import RECIPES
from tgt_fast.demos.digits.results import PACKAGES, DemoResult, learning_curve, sample_factors
from tgt_fast.demos.digits.settings import BASELINES, METHODS
from tgt_fast.demos.networks import parameter_count
from tgt_fast.demos.pages import (
    MainTable,
    accuracy_table,
    ending,
    in_all,
    label_curve,
    learning_chart,
    learning_curves,
)
from tgt_fast.report import Page, plots
from tgt_fast.report.numbers import mean
from tgt_fast.report.parts import diagnostics, percent_chart
from tgt_fast.report.plots import Bar, Series, Tile
from tgt_fast.train.diagnostics import MEANING, SourceRow

COLORS = {
    "one-hot": "#a3adb8",
    "distillation": "#c8a75b",
    "distillation-augmented": "#d9782d",
    "tgt-prior": "#8fc1d4",
    "tgt-random": "#2a9d8f",
    "tgt-gradient": "#1d4e89",
    "tgt-persistent": "#7b5ea7",
}
_SOURCE_COLORS = {
    "real, test": "#5b6b7b",
    "real, labelled": COLORS["one-hot"],
    "reconstruction": "#c9b8a8",
    "augmented": COLORS["distillation-augmented"],
    "prior": COLORS["tgt-prior"],
    "random": COLORS["tgt-random"],
    "gradient": COLORS["tgt-gradient"],
}


def main_table(result: DemoResult) -> MainTable:
    """The main table, one row a method."""
    title = f"Test accuracy in percent: 897 digits, {sum(result.counts)} labelled"
    labels = LABELS | {name: RECIPES[name].label for name in result.recipes}
    return accuracy_table(result, title, labels, (*METHODS, *result.recipes), BASELINES)


def write_page(result: DemoResult, folder: Path) -> Path:
    """Write index.html and its PNG files; returns the page's path.

    Raises:
        CheckpointError: a file cannot be written.
    """
    page = Page("Teacher-guided training on handwritten digits", _lead(result))
    _accuracy(page, result)
    _learning(page, result)
    _exploration(page, result)
    _diagnostics(page, result)
    if result.curve:
        _labels(page, result)
    _setup(page, result)
    return page.write(folder)


def _lead(result: DemoResult) -> str:
    counts = result.counts
    return (
        f"A student of {parameter_count(student()):,} parameters learns ten digits from {sum(counts)} labelled "
        f"images: {counts[0]} of the digit 0, falling to {counts[-1]} of the digit 9. A frozen teacher, trained on "
        "900 images, labels them softly. Teacher-guided training (TGT) also lets the teacher make new images, by "
        "exploring its latent space, and label those."
    )


def _accuracy(page: Page, result: DemoResult) -> None:
    best = result.best(BASELINES)
    page.facts(
        [
            (f"{result.accuracy('tgt-gradient'):.1f} %", "test accuracy of TGT gradient"),
            (f"{result.accuracy(best):.1f} %", f"the best without TGT: {LABELS[best]}"),
            (f"{result.lead('tgt-gradient', best).mean:+.1f}", "points between the two"),
            (
                f"{mean([t.labeler_accuracy for t in result.teachers]):.1f} %",
                "the labeler's own test accuracy",
            ),
            in_all(result),
        ]
    )
    page.section("Accuracy")
    bars = [Bar(LABELS[m], result.numbers(m, "accuracy"), COLORS[m]) for m in METHODS]
    percent_chart(
        page,
        "accuracy",
        bars,
        "Test accuracy",
        "correct of 897 test images",
        "Each method shows the student the same number of examples a step.",
    )
    main = main_table(result)
    page.table(
        main.header,
        main.rows,
        "Mean over seeds, ± the sample standard deviation. Head, middle, tail: the digits 0 to 3, 4 to 6, 7 to 9. "
        "Agreement with the labeler and KL(labeler || student), in nats, on the test images. Seconds: to train one "
        "student on one core.",
        strong=main.strong,
    )
    page.items(findings.findings(result))
    page.text(findings.caption_of_prior(result))
    page.text(findings.costs(result))


def _learning(page: Page, result: DemoResult) -> None:
    series = learning_curves(result, LABELS, COLORS, BASELINES)
    learning_chart(
        page, series, "Test accuracy", "percent", "without teacher-guided training.", y_limits=_limits(series)
    )
    page.figure(
        "classes",
        plots.heatmap(
            [LABELS[m] for m in METHODS],
            [f"{c}\n({n})" for c, n in enumerate(result.counts)],
            [[mean([s.per_class[c] for s in result.of(m)]) for c in range(CLASSES)] for m in METHODS],
            "Test accuracy by digit, percent",
            "digit (labelled images of it)",
        ),
        "Heat map of the test accuracy by method and digit",
        "The rarer the digit among the labelled images, the more the student depends on what the teacher shows it.",
    )


def _limits(series: list[Series]) -> tuple[float, float]:
    """From a little below the lowest end to 100: the first steps would flatten everything else."""
    lowest = min(min(item.low[-1], item.y[-1]) for item in series)
    return max(0.0, 5 * ((lowest - 15) // 5)), 100.0


def _exploration(page: Page, result: DemoResult) -> None:
    page.section("Exploration")
    found = result.diagnostics[0]
    rows = []
    for name, pictures in found.grid.items():
        tiles = [
            Tile(p.pixels, f"{p.opinion} · {100 * p.confidence:.0f} %", marked=p.opinion != c)
            for c, p in enumerate(pictures)
        ]
        rows.append((name, tiles))
    changed = sum(p.opinion != c for c, p in enumerate(found.grid["gradient"]))
    page.figure(
        "exploration",
        plots.image_grid(rows, "What the teacher makes of a labelled image, and the labeler's opinion of it"),
        "Grid of digit images: real, reconstructed, random and gradient exploration, with the labeler's opinion",
        "One labelled image of each digit, its reconstruction, and one exploration of either kind from it, with the "
        "same noise; the gradient climbs the disagreement with the student of plain distillation. Below each: the "
        "labeler's class and probability, in colour where it is not the original's "
        f"({changed} of {CLASSES} in the last row). What the student is taught is the labeler's opinion, not the "
        "original label.",
    )
    steps = len(next(iter(found.ascent.values())))
    series = [
        Series(
            LABELS[name],
            range(steps),
            [mean([f.ascent[name][k] for f in result.diagnostics]) for k in range(steps)],
            COLORS[name],
            [min(f.ascent[name][k] for f in result.diagnostics) for k in range(steps)],
            [max(f.ascent[name][k] for f in result.diagnostics) for k in range(steps)],
            marker="o",
        )
        for name in found.ascent
    ]
    page.figure(
        "ascent",
        plots.lines(
            series,
            "Disagreement over ascent steps",
            "step of half a standard deviation along the gradient",
            "mean of the soft-label loss",
        ),
        "Line chart of the disagreement of student and labeler over ascent steps, one line a student",
        "From the labelled images plus noise, for students as they are at the end of their training. "
        + findings.describe_ascent(result),
    )


def _diagnostics(page: Page, result: DemoResult) -> None:
    page.section("Diagnostics")
    page.text(f"{MEANING} The loss is that of the student of plain distillation.")
    fields = [field.name for field in dataclasses.fields(SourceRow) if field.name != "source"]

    def values(name: str, field: str) -> list[float]:
        found = [getattr(row, field) for d in result.diagnostics for row in d.sources if row.source == name]
        return [value for value in found if value is not None]

    diagnostics(
        page,
        {row.source: {f: values(row.source, f) for f in fields} for row in result.diagnostics[0].sources},
        _SOURCE_COLORS,
        real="the test images",
        caption="Pixels lie between 0 and 1. The 118 labelled images are far from the test images because of their "
        "long tail; a source that is nearer to them fills in what they lack.",
        table_caption="Means over seeds. The labeler's error is known only where there are true labels; it was trained "
        "on the labelled images.",
    )


def _labels(page: Page, result: DemoResult) -> None:
    page.section("How many labels it saves")
    methods = [m for m in METHODS if any(s.method == m for s in result.curve)]
    label_curve(
        page,
        {method: learning_curve(result, method) for method in methods},
        LABELS,
        COLORS,
        BASELINES,
        "The same long tail, thinner or thicker, up to all 900 images, where it has become even. The teacher is the "
        "same throughout: these are the student's labels alone.",
    )
    for sentence in findings.describe_factors(result):
        page.text(sentence)
    if any(factor.beyond for factor in sample_factors(result)):
        page.text("“More than”: the other method does not get there with all 900.")


def _setup(page: Page, result: DemoResult) -> None:
    s = result.settings
    page.section("Set-up")
    page.text(
        "Data: scikit-learn's 1,797 digits of 8x8 pixels. 900, 90 of each digit, train the teacher and hold the "
        "student's labelled images; the 897 others are the test images, the same for every seed. A seed chooses the "
        "labelled images and the initial weights of teacher and student."
    )
    page.text(
        "The numbers below were chosen on a validation split of the 900 images, with other seeds, and are the same for "
        "every seed here. Lengths in the latent space are in standard deviations of the latents."
    )
    anchors = "balanced over the digits" if s.anchors == "balanced" else "the batch's own examples"
    page.table(
        ("setting", "value"),
        [
            ["teacher: generator", f"variational autoencoder, {s.latents} latents, {s.vae_steps} steps"],
            ["teacher: labeler", f"four convolutions, {s.labeler_steps} steps on warped images"],
            ["student", f"MLP 64-24-10, {s.steps} steps of Adam with cosine decay"],
            ["student: examples a step", f"{s.real} real and {s.real} other; alone: {2 * s.real} real"],
            ["student: learning rate", f"{s.rate:g}; one-hot: {s.one_hot_rate:g}"],
            ["student: temperature", f"{s.temperature:g}; distillation alone: {s.distillation_temperature:g}"],
            ["augmentation", f"{s.augmentation} (the best of 77 of shift, warp, mixup, noise)"],
            ["TGT: noise", f"{s.sigma:g}; prior: {s.prior_sigma:g} of its own"],
            ["TGT gradient", f"{s.ascent_steps} step of {s.step_size:g}"],
            ["TGT random, gradient: anchors", anchors],
            ["TGT persistent", f"steps of {s.persistent_step_size:g}, restarts at {s.restart_probability:g} a visit"],
        ],
    )
    ending(page, "digits", result, PACKAGES)
