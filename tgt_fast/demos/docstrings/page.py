"""The report of the docstrings demo: plots, tables, examples and what they say."""

from __future__ import annotations

from pathlib import Path

from tgt_fast.demos.docstrings import findings
from tgt_fast.demos.docstrings.findings import LABELS
from tgt_fast.demos.docstrings.methods import new_student
from tgt_fast.demos.docstrings.results import PACKAGES, DemoResult
from tgt_fast.demos.docstrings.settings import BASELINES, METHODS, TGT_METHODS
from tgt_fast.demos.networks import parameter_count
from tgt_fast.demos.pages import (
    MainTable,
    accuracy_table,
    ending,
    in_all,
    learning_chart,
    learning_curves,
)
from tgt_fast.report import Page, plots
from tgt_fast.report.numbers import mean
from tgt_fast.report.parts import percent_chart
from tgt_fast.report.plots import Bar

COLORS = {"one-hot": "#a3adb8", "distillation": "#c8a75b", "tgt-random": "#2a9d8f", "tgt-gradient": "#1d4e89"}


def main_table(result: DemoResult) -> MainTable:
    """The main table, one row a method."""
    texts = result.texts
    title = f"Test accuracy in percent: {texts.test} texts, {sum(texts.counts)} labelled"
    return accuracy_table(result, title, LABELS, METHODS, BASELINES)


def write_page(result: DemoResult, folder: Path) -> Path:
    """Write index.html and its PNG files; returns the page's path.

    Raises:
        CheckpointError: a file cannot be written.
    """
    page = Page("Teacher-guided training on documentation strings", _lead(result))
    _accuracy(page, result)
    _learning(page, result)
    _exploration(page, result)
    _setup(page, result)
    return page.write(folder)


def _student_size(result: DemoResult) -> int:
    s = result.settings
    return parameter_count(new_student(s.vocabulary, s.classes, s, 0.0))


def _lead(result: DemoResult) -> str:
    texts = result.texts
    return (
        f"Which subpackage does this text belong to? A transformer of {_student_size(result):,} parameters learns it "
        f"from {sum(texts.counts)} labelled documentation strings, {texts.counts[0]} of {texts.classes[0]} falling to "
        f"{texts.counts[-1]} of {texts.classes[-1]}. A pretrained sentence encoder, with a head trained on "
        f"{texts.labelled:,} texts, labels them softly. Teacher-guided training (TGT) also lets a small BART, trained "
        "on texts without labels, write new ones through noise on the encodings of the labelled texts, and has those "
        "labelled."
    )


def _accuracy(page: Page, result: DemoResult) -> None:
    lead = result.accuracy("tgt-random") - result.accuracy(result.best(BASELINES))
    page.facts(
        [
            (f"{result.accuracy('tgt-random'):.1f} %", "test accuracy of TGT random"),
            (f"{result.accuracy('distillation'):.1f} %", "of distillation"),
            (f"{lead:+.1f}", f"points to the best without TGT: {LABELS[result.best(BASELINES)]}"),
            (f"{result.labeler_accuracy:.1f} %", "the labeler's own test accuracy"),
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
        f"correct of {result.texts.test} test texts",
        "Each method shows the student the same number of texts a step. The test texts are of other modules than all "
        "texts for training, and about as many of each class.",
    )
    main = main_table(result)
    page.table(
        main.header,
        main.rows,
        "Mean over seeds, ± the sample standard deviation. Head, middle, tail: thirds of the classes by their labelled "
        "texts. Agreement with the labeler and KL(labeler || student), in nats, on the test texts. Seconds: to train "
        "one student on one core, without the making of synthetic texts.",
        strong=main.strong,
    )
    page.items(findings.findings(result))
    page.text(findings.costs(result))


def _learning(page: Page, result: DemoResult) -> None:
    learning_chart(
        page,
        learning_curves(result, LABELS, COLORS, BASELINES),
        "Test accuracy",
        "percent",
        "without teacher-guided training.",
    )
    names = [f"{name} ({count})" for name, count in zip(result.texts.classes, result.texts.counts, strict=True)]
    page.figure(
        "classes",
        plots.heatmap(
            names,
            [LABELS[m] for m in METHODS],
            [[mean([s.per_class[c] for s in result.of(m)]) for m in METHODS] for c in range(len(names))],
            "Test accuracy by class (labelled texts of it), percent",
            "method",
        ),
        "Heat map of the test accuracy by class and method",
        "The classes with most labelled texts first. Of the last the student knows little but what the teacher shows "
        "it.",
    )


def _exploration(page: Page, result: DemoResult) -> None:
    page.section("What the teacher writes")
    rows, names = [], result.texts.classes
    for method in TGT_METHODS:
        for example in result.of(method)[0].examples:
            opinion = f"{names[example.opinion]} · {100 * example.confidence:.0f} %"
            rows.append([names[example.label], "labelled text", example.text])
            rows.append([opinion, LABELS[method], example.made])
    page.table(
        ("label", "what", "text"),
        rows,
        "Labelled texts with their classes, and texts made of them with the labeler's opinion and its probability: "
        "what the student is taught is that opinion, all of it, not the label of the text it was made from. Texts are "
        "cut, and in the tokens of the generator, which knows no capital letters. The first seed; the gradient's are "
        "those of its last round.",
        strong=range(1, len(rows), 2),
        prose=True,
    )
    mass = result.pool.mass
    share = [value / sum(mass) for value in mass]
    labels = [count / sum(result.texts.counts) for count in result.texts.counts]
    page.figure(
        "coverage",
        plots.heatmap(
            ["labelled texts", "synthetic texts"],
            [str(c + 1) for c in range(len(share))],
            [[100 * v for v in labels], [100 * v for v in share]],
            "Share of the classes, percent",
            "class, by its number of labelled texts",
            (0.0, 100 * max(*labels, *share)),
        ),
        "Heat map of the share of each class among labelled and synthetic texts",
        f"Of the {result.pool.texts:,} texts of random exploration (first seed), by the labeler's probabilities.",
    )


def _setup(page: Page, result: DemoResult) -> None:
    s, texts = result.settings, result.texts
    g = s.generator
    page.section("Set-up")
    page.text(
        "Texts: the documentation strings of the standard library, numpy, scikit-learn and torch as installed, found "
        "without importing them, duplicates removed, split by module. The classes are the "
        f"{len(texts.classes)} public subpackages with most texts. A seed chooses the labelled texts and the student's "
        "initial weights; there is one teacher."
    )
    page.text(
        "The numbers below were chosen on validation texts, of modules that are neither in training nor in the test. "
        "Lengths in the latent space are in standard deviations of the latents."
    )
    page.table(
        ("setting", "value"),
        [
            ["teacher: labeler", f"all-MiniLM-L6-v2 and a head of {s.labeler_hidden}, {s.labeler_steps} steps on "
             f"{texts.labelled:,} texts"],
            ["teacher: generator", f"BART of {g.layers} + {g.layers} layers of width {g.width}, {g.steps} steps of "
             f"{g.batch} of {texts.unlabelled:,} texts"],
            ["generator's training", f"up to {100 * g.masked:.0f} % of the tokens masked, noise up to {g.noise:g}"],
            ["texts", f"{g.max_length} tokens at most, of a vocabulary of {s.vocabulary:,}"],
            ["student", f"{s.layers} layer of width {s.width}, {s.steps} steps of AdamW with cosine decay"],
            ["student: texts a step", f"{s.batch} real, or {s.batch // 2} real and {s.batch // 2} synthetic"],
            *(
                [LABELS[m], f"learning rate {own.rate:g}, dropout {own.dropout:g}"
                 + ("" if m == "one-hot" else f", temperature {own.temperature:g}, labels' weight {own.hard_weight:g}")]
                for m, own in s.students.items()
            ),
            ["TGT: synthetic texts", f"{s.variants} of each labelled one, noise {s.sigma:g}, drawn at temperature "
             f"{s.draw_temperature:g}"],
            ["TGT gradient", f"step of {s.step_size:g}, {s.refreshes} times {s.gradient_variants} more of each"],
        ],
    )  # fmt: skip
    ending(page, "docstrings", result, PACKAGES)
