"""The report of the retrieval demo: plots, tables, examples and what they say."""

from __future__ import annotations

from pathlib import Path

from tgt_fast.demos.networks import parameter_count
from tgt_fast.demos.pages import MainTable, ending, in_all, learning_chart, learning_curves
from tgt_fast.demos.retrieval import findings
from tgt_fast.demos.retrieval.findings import LABELS
from tgt_fast.demos.retrieval.methods import new_student
from tgt_fast.demos.retrieval.results import PACKAGES, DemoResult
from tgt_fast.demos.retrieval.settings import BASELINES, DEPTHS, METHODS
from tgt_fast.report import Page
from tgt_fast.report.numbers import spread
from tgt_fast.report.parts import percent_chart
from tgt_fast.report.plots import Bar

COLORS = {
    "one-hot": "#a3adb8",
    "distillation": "#c8a75b",
    "uniform-negatives": "#d9782d",
    "tgt-random": "#2a9d8f",
}
_HEADER = ("method", *(f"recall@{depth}" for depth in DEPTHS), "seconds")


def main_table(result: DemoResult) -> MainTable:
    """The main table, one row a method."""
    return MainTable(
        f"Test recall in percent: {result.pairs.test} pairs, {result.pairs.labelled} labelled",
        _HEADER,
        _HEADER,
        [
            [
                LABELS[method],
                *(spread(result.recalls(method, depth)) for depth in DEPTHS),
                f"{result.mean(method, 'seconds'):.1f}",
            ]
            for method in METHODS
        ],
        METHODS.index(result.best(METHODS)),
        (len(BASELINES) - 1,),
    )


def write_page(result: DemoResult, folder: Path) -> Path:
    """Write index.html and its PNG files; returns the page's path.

    Raises:
        CheckpointError: a file cannot be written.
    """
    page = Page("Teacher-guided training of a retriever", _lead(result))
    _recall(page, result)
    _learning(page, result)
    _examples(page, result)
    _setup(page, result)
    return page.write(folder)


def _lead(result: DemoResult) -> str:
    s, pairs = result.settings, result.pairs
    size = parameter_count(new_student(s.vocabulary, s))
    return (
        f"Which of {pairs.test:,} passages continues this summary? A one-layer encoder of {size:,} parameters "
        f"learns it from {pairs.labelled} documentation strings, each the summary and the passage that follows it. "
        "A pretrained sentence encoder scores the texts of a batch for each other. Teacher-guided training (TGT) also "
        "lets a small BART, trained on texts without labels, write new passages through noise on the encodings of the "
        "real ones, and has those scored."
    )


def _recall(page: Page, result: DemoResult) -> None:
    lead = result.recall("tgt-random", 20) - result.recall("distillation", 20)
    page.facts(
        [
            (f"{result.recall('tgt-random', 20):.1f} %", "recall within 20 of TGT random"),
            (f"{result.recall('distillation', 20):.1f} %", "of distillation"),
            (f"{lead:+.1f}", "points between the two"),
            (f"{result.teacher[20]:.1f} %", "the teacher's own"),
            in_all(result),
        ]
    )
    page.section("Recall")
    bars = [Bar(LABELS[m], result.recalls(m, 20), COLORS[m]) for m in METHODS]
    percent_chart(
        page,
        "recall",
        bars,
        "Recall within 20",
        f"right passage among the first 20 of {result.pairs.test:,}",
        "Each method lets the student read the same number of texts a step. The test pairs are of other modules than "
        "all texts for training.",
    )
    main = main_table(result)
    page.table(
        main.header,
        [*main.rows, ["the teacher itself", *(f"{result.teacher[d]:.1f}" for d in DEPTHS), ""]],
        "Percent of the test pairs whose passage is among the first 1, 20 or 100. Mean over seeds, ± the sample "
        "standard deviation. Seconds: to train one student on one core, without the writing of synthetic passages.",
        strong=main.strong,
    )
    page.items(findings.findings(result))
    page.text(findings.costs(result))


def _learning(page: Page, result: DemoResult) -> None:
    learning_chart(
        page,
        learning_curves(result, LABELS, COLORS, BASELINES),
        "Recall within 20",
        "percent",
        "without teacher-guided training.",
    )


def _examples(page: Page, result: DemoResult) -> None:
    page.section("What the teacher writes")
    rows = []
    for example in result.examples:
        rows.append(["", "summary", example.query])
        rows.append([f"{example.score:.2f}", "its passage", example.passage])
        rows.append([f"{example.made_score:.2f}", "synthetic", example.made])
    page.table(
        ("score", "what", "text"),
        rows,
        "Labelled pairs, and a passage written from the noised encoding of each real one, with the teacher's score for "
        "the summary (a cosine). The student is taught that score, beside those of all other passages of its batch. "
        "Synthetic passages are in the tokens of the generator, which knows no capital letters. The first seed.",
        strong=range(2, len(rows), 3),
        prose=True,
    )


def _setup(page: Page, result: DemoResult) -> None:
    s, pairs = result.settings, result.pairs
    g = s.generator
    page.section("Set-up")
    page.text(
        "Texts: the documentation strings of the standard library, numpy, scikit-learn and torch as installed, found "
        "without importing them, duplicates removed, split by module. A pair is a summary and what follows it. A seed "
        "chooses the labelled pairs and the student's initial weights; there is one teacher. Scores are cosines "
        "divided by a temperature. Each text of a batch, query or passage, asks for the others: the loss compares the "
        "student's softmax over them with the teacher's (tgt.contrastive_distillation_loss); with one-hot labels the "
        "right answer is the other half of the pair."
    )
    page.text(
        "The numbers below were chosen on validation pairs, of modules that are neither in training nor in the test. "
        "Noise is in standard deviations of the encoder's output."
    )
    batch = s.texts // 4
    page.table(
        ("setting", "value"),
        [
            ["teacher", f"all-MiniLM-L6-v2, {s.query_tokens} and {s.passage_tokens} tokens of summary and passage"],
            ["generator", f"BART of {g.layers} + {g.layers} layers of width {g.width}, {g.steps} steps of {g.batch} of "
             f"{pairs.unlabelled:,} texts"],
            ["generator's training", f"up to {100 * g.masked:.0f} % of the tokens masked, noise up to {g.noise:g}"],
            ["student", f"one layer of width {s.width}, {s.length} tokens of a text, {s.steps} steps of AdamW with "
             "cosine decay"],
            ["student: texts a step", f"{2 * batch} pairs, or {batch} pairs and {2 * batch} further passages"],
            *(
                [LABELS[m], f"learning rate {own.rate:g}, temperature {own.temperature:g}, the teacher's "
                 f"{own.teacher_temperature:g}, labels' weight {own.hard_weight:g}, scores' {own.soft_weight:g}"]
                for m, own in s.students.items()
            ),
            ["uniform negatives", f"drawn from {s.uniform:,} real passages, most of which no labelled pair has"],
            ["TGT: synthetic passages", f"{s.variants} of each labelled one, noise {s.sigma:g}, drawn at temperature "
             f"{s.draw_temperature:g}"],
        ],
    )  # fmt: skip
    ending(page, "retrieval", result, PACKAGES)
