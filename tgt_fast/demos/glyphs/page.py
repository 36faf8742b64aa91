"""The report of the glyphs demo: plots, tables and what they say."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from tgt_fast.demos.glyphs import findings
from tgt_fast.demos.glyphs.findings import LABELS
from tgt_fast.demos.glyphs.models import student
from tgt_fast.demos.glyphs.render import CHARACTERS
from tgt_fast.demos.glyphs.results import PACKAGES, DemoResult, learning_curve, sample_factors
from tgt_fast.demos.glyphs.settings import BASELINES, BEST_TGT, METHODS
from tgt_fast.demos.networks import parameter_count
from tgt_fast.demos.pages import MainTable, accuracy_table, ending, in_all, label_curve, learning_chart, learning_curves
from tgt_fast.report import Page, plots
from tgt_fast.report.numbers import mean
from tgt_fast.report.parts import diagnostics, percent_chart
from tgt_fast.report.plots import Bar, Tile
from tgt_fast.train.diagnostics import MEANING, SourceRow

COLORS = {
    "one-hot": "#a3adb8",
    "distillation": "#c8a75b",
    "distillation-mixup": "#e0a877",
    "distillation-augmented": "#d9782d",
    "tgt-prior": "#8fc1d4",
    "tgt-random": "#2a9d8f",
    "tgt-random-tail": "#4f7f3f",
    "tgt-gradient": "#1d4e89",
    "tgt-random-replay": "#7bbf6a",
    "tgt-gradient-replay": "#7b5ea7",
    "tgt-gradient-augmented": "#b0457b",
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
    title = f"Test accuracy in percent: {result.pictures.test_images:,} glyphs, {sum(result.counts)} labelled"
    return accuracy_table(result, title, LABELS, METHODS, BASELINES)


def write_page(result: DemoResult, folder: Path) -> Path:
    """Write index.html and its PNG files; returns the page's path.

    Raises:
        CheckpointError: a file cannot be written.
    """
    page = Page("Teacher-guided training on letters and digits of typefaces", _lead(result))
    _accuracy(page, result)
    _learning(page, result)
    _exploration(page, result)
    _diagnostics(page, result)
    if result.curve:
        _labels(page, result)
    _setup(page, result)
    return page.write(folder)


def _lead(result: DemoResult) -> str:
    counts, pictures = result.counts, result.pictures
    return (
        f"A convolutional student of {parameter_count(student()):,} parameters learns 36 characters from {sum(counts)} "
        f"labelled images: {counts[0]} of the letter A, falling to {counts[-1]} of the digit 9. A frozen teacher, "
        f"trained on {pictures.pool_images:,} images of {pictures.pool_families} font families, labels them softly. "
        "Teacher-guided training (TGT) also lets the teacher make new images, by exploring its latent space, and label "
        f"those. The test images are of {pictures.test_families} other families."
    )


def _accuracy(page: Page, result: DemoResult) -> None:
    best, rare = result.best(BASELINES), findings.best_of_tail(result)
    page.facts(
        [
            (f"{result.accuracy(BEST_TGT):.1f} %", f"test accuracy of {LABELS[BEST_TGT]}"),
            (f"{result.accuracy(best):.1f} %", f"the best without TGT: {LABELS[best]}"),
            (f"{result.lead(BEST_TGT, best).mean:+.1f}", "points between the two"),
            (f"{result.tail_lead(BEST_TGT, rare).mean:+.1f}", "points on the rarest third"),
            (f"{mean([t.labeler_accuracy for t in result.teachers]):.1f} %", "the labeler's own test accuracy"),
            in_all(result),
        ]
    )
    page.section("Accuracy")
    unit = f"correct of {result.pictures.test_images:,} test images"
    for name, title, number, more in (
        (
            "accuracy",
            "Test accuracy",
            "accuracy",
            "Each method shows the student the same number of examples a step.",
        ),
        (
            "rare",
            "Test accuracy on the rarest third",
            "tail",
            "The 12 characters that the student sees one or two labelled images of.",
        ),
    ):
        bars = [Bar(LABELS[m], result.numbers(m, number), COLORS[m]) for m in METHODS]
        percent_chart(page, name, bars, title, unit if number == "accuracy" else "correct", more)
    main = main_table(result)
    page.table(
        main.header,
        main.rows,
        "Mean over seeds, ± the sample standard deviation. Head, middle, tail: A to L, M to X, Y to 9. Agreement with "
        "the labeler and KL(labeler || student), in nats, on the test images. Seconds: processor time to train one "
        "student.",
        strong=main.strong,
    )
    page.items(findings.findings(result))
    page.text(findings.costs(result))


def _learning(page: Page, result: DemoResult) -> None:
    series = learning_curves(result, LABELS, COLORS, BASELINES)
    lowest = min(min(item.low[-1], item.y[-1]) for item in series)
    limits = (max(0.0, 5 * ((lowest - 15) // 5)), 100.0)
    learning_chart(page, series, "Test accuracy", "percent", "without teacher-guided training.", y_limits=limits)
    page.figure(
        "classes",
        plots.heatmap(
            [LABELS[m] for m in METHODS],
            [f"{character}\n{n}" for character, n in zip(CHARACTERS, result.counts, strict=True)],
            [[mean([s.per_class[c] for s in result.of(m)]) for c in range(len(CHARACTERS))] for m in METHODS],
            "Test accuracy by character, percent",
            "character, and labelled images of it",
        ),
        "Heat map of the test accuracy by method and character",
        "The rarer the character among the labelled images, the more the student depends on what the teacher shows it.",
    )


def _exploration(page: Page, result: DemoResult) -> None:
    page.section("Exploration")
    found = result.diagnostics[0]
    rows = []
    for name, pictures in found.grid.items():
        tiles = [
            Tile(p.pixels, f"{CHARACTERS[p.opinion]} · {100 * p.confidence:.0f} %", marked=p.opinion != c)
            for c, p in zip(found.shown, pictures, strict=True)
        ]
        rows.append((name, tiles))
    changed = sum(p.opinion != c for c, p in zip(found.shown, found.grid["gradient"], strict=True))
    page.figure(
        "exploration",
        plots.image_grid(rows, "What the teacher makes of a labelled image, and the labeler's opinion of it"),
        "Grid of characters: real, reconstructed, random and gradient exploration, with the labeler's opinion",
        "Labelled images from the frequent to the rare, their reconstructions, and one exploration of either kind from "
        "them, with the same noise; the gradient climbs the disagreement with the student of plain distillation. Below "
        "each: the labeler's class and probability, in colour where it is not the original's "
        f"({changed} of {len(found.shown)} in the last row). What the student is taught is the labeler's opinion, not "
        "the original label.",
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
        caption="Pixels lie between 0 and 1. “Real, test” are some of the test images.",
        table_caption="Means over seeds. The labeler's error is known only where there are true labels; it was trained "
        "on the labelled images.",
    )


def _labels(page: Page, result: DemoResult) -> None:
    page.section("How many labels it saves")
    methods = [m for m in METHODS if any(s.method == m for s in result.curve)]
    most = max(s.labels for s in result.curve)
    label_curve(
        page,
        {method: learning_curve(result, method) for method in methods},
        LABELS,
        COLORS,
        BASELINES,
        f"The same long tail, thinner or thicker, up to {most:,} images, where it has become even. The teacher is the "
        "same throughout: these are the student's labels alone.",
    )
    for sentence in findings.describe_factors(result):
        page.text(sentence)
    if any(any(factor.beyond) for factor in sample_factors(result)):
        page.text(f"“More than”: in some seed the other method does not get there with {most:,}.")


def _setup(page: Page, result: DemoResult) -> None:
    s, p = result.settings, result.pictures
    page.section("Set-up")
    lacking = f" {', '.join(p.left_out)} lacks one, or draws two alike, and is left out." if p.left_out else ""
    page.text(
        f"Data: capital letters and digits of {p.families} installed font packages (fontpkg-NAME, up to four weights "
        f"of a family), as large as 22 of 28 pixels, centred.{lacking} {p.pool_families} families "
        f"({p.pool_images:,} images) train the teacher and hold the student's labelled images; {p.test_families} "
        f"others ({p.test_images:,}) are the test images, the same for every seed. Families whose names begin alike "
        "are on one side. A seed chooses the labelled images and the initial weights of teacher and student."
    )
    page.text(
        "The numbers below were chosen on families of the pool that the teacher was not trained on, with other seeds, "
        "and are the same for every seed here. Lengths in the latent space are in standard deviations of the latents."
    )
    anchors = "balanced over the characters" if s.anchors == "balanced" else "the batch's own examples"
    even = ", ".join(LABELS[m] for m in s.balanced) or "none"
    page.table(
        ("setting", "value"),
        [
            ["teacher: generator", f"convolutional autoencoder, variational, {s.latents} latents, {s.vae_steps} steps"],
            ["teacher: labeler", f"four convolutions, {s.labeler_steps} steps on images with {s.labeler_augmentation}"],
            ["student", f"two convolutions, {s.steps} steps of Adam with cosine decay"],
            ["student: examples a step", f"{s.real} real and {s.real} other; alone: {2 * s.real} real"],
            ["student: learning rate", f"{s.rate:g}; one-hot: {s.one_hot_rate:g}"],
            [
                "student: temperature",
                f"{s.temperature:g}; distillation: {s.distillation_temperature:g}, mixup: {s.mixup_temperature:g}, "
                f"augmented: {s.augmented_temperature:g}",
            ],
            ["classes drawn uniformly", even],
            ["augmentation", str(s.augmentation)],
            ["TGT: noise", f"{s.sigma:g}; prior: {s.prior_sigma:g} of its own"],
            [
                "TGT tail-aware",
                f"anchors by n^-{s.tail_weight:g}, noise up to {100 * s.tail_sigma:.0f} % more for a single image",
            ],
            ["TGT gradient", f"{s.ascent_steps} step of {s.step_size:g}"],
            ["TGT random, gradient: anchors", anchors],
            [
                "TGT with replay",
                f"each example {s.reuse} times, the most disputed of {s.candidates} times as many",
            ],
            ["TGT with warps", "the augmentation, labelled softly, at even steps, exploration with replay at odd ones"],
        ],
    )
    ending(page, "glyphs", result, PACKAGES)
