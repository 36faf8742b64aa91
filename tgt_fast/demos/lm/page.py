"""The report of the language model demo: plots, tables and what they say."""

from __future__ import annotations

from pathlib import Path

from tgt_fast.demos.lm import findings
from tgt_fast.demos.lm.findings import LABELS
from tgt_fast.demos.lm.memory import CLASSES, ROWS
from tgt_fast.demos.lm.results import CACHED, RECORDS, DemoResult
from tgt_fast.demos.lm.settings import FEW, METHODS
from tgt_fast.demos.lm.students import student_model
from tgt_fast.demos.lm.teachers import teacher_model
from tgt_fast.demos.networks import parameter_count
from tgt_fast.demos.pages import MainTable, ending, in_all, learning_chart
from tgt_fast.report import Page, plots
from tgt_fast.report.numbers import spread
from tgt_fast.report.plots import Bar, Series

COLORS = {
    "one-hot": "#a3adb8",
    "distillation": "#d9782d",
    "distillation-records": "#7b5ea7",
    "distillation-cached": "#2a9d8f",
    "one-hot-plenty": "#5b6b7b",
    "distillation-plenty": "#1d4e89",
}
_TEACHER_COLOR = "#1c2733"


def main_table(result: DemoResult) -> MainTable:
    """The main table: the teacher, then one row a method."""
    s, teacher = result.settings, result.teacher
    step = 1000 * teacher.seconds / s.teacher_steps
    rows = [
        [
            "teacher", f"{teacher.bits_per_byte:.3f}", f"{teacher.before:.2f}", f"{result.text.train_windows}",
            f"{s.teacher_steps}", f"{step:.0f}", f"{teacher.seconds:.1f}",
        ]
    ]  # fmt: skip
    for method in METHODS:
        rows.append(
            [
                LABELS[method],
                spread(result.numbers(method, "bits_per_byte"), 3),
                f"{result.mean(method, 'before'):.2f}",
                *(f"{result.mean(method, name):.0f}" for name in ("windows", "steps", "step_ms")),
                f"{result.mean(method, 'seconds'):.1f}",
            ]
        )
    return MainTable(
        "Bits per byte of test text (fewer are better)",
        ("method", "bits per byte", "untrained", "windows of text", "steps", "ms a step", "seconds"),
        ("method", "bits/byte", "before", "windows", "steps", "ms/step", "seconds"),
        rows,
        None,
        (0, len(FEW)),
    )


def write_page(result: DemoResult, folder: Path) -> Path:
    """Write index.html and its PNG files; returns the page's path.

    Raises:
        CheckpointError: a file cannot be written.
    """
    page = Page("Distillation of a language model", _lead(result))
    _bits(page, result)
    _learning(page, result)
    _cost(page, result)
    _setup(page, result)
    return page.write(folder)


def _lead(result: DemoResult) -> str:
    s, text = result.settings, result.text
    ours, theirs = parameter_count(student_model(s)), parameter_count(teacher_model(s))
    return (
        f"A transformer of {s.layers} layer and {ours:,} parameters learns to continue Python's standard library, its "
        f"source and documentation strings, from {s.few} windows of {s.length} tokens. Its teacher, {s.teacher_layers} "
        f"layers and {theirs:,} parameters, was pretrained here on {text.train_windows:,} windows. The vocabulary has "
        f"{s.tokens:,} tokens; the loss meets hidden states and heads, and keeps no logits."
    )


def _bits(page: Page, result: DemoResult) -> None:
    facts = [
        (f"{result.bits('distillation'):.3f}", "bits per byte by distillation"),
        (f"{result.bits('one-hot'):.3f}", "from one-hot labels on the same text"),
        (f"{result.teacher.bits_per_byte:.3f}", "the teacher's own"),
        (f"{result.cache_speedup:.1f}x", "faster steps from the cache than from records made again"),
        in_all(result),
    ]
    page.facts(facts)
    page.section("Bits per byte")
    bars = [Bar("teacher", [result.teacher.bits_per_byte], _TEACHER_COLOR)]
    bars += [Bar(LABELS[m], result.numbers(m, "bits_per_byte"), COLORS[m]) for m in METHODS]
    floor = 0.5 * (min(min(bar.points) for bar in bars) // 0.5)
    page.figure(
        "bits",
        plots.bars(bars, "Test text, fewer are better", "bits per byte", low=floor, form=".3f"),
        "Chart of the bits per byte of the teacher and of each method",
        f"Dots: means; circles: the seeds. The axis begins at {floor:g}. Four methods see the same "
        f"{result.settings.few} windows of text again and again; the two with plenty draw from all training text.",
    )
    main = main_table(result)
    page.table(
        main.header,
        main.rows,
        "Means over seeds, ± the sample standard deviation. Bits per byte of the test text: what the next token costs, "
        "over the bytes it stands for. A step's time: the median behind the first epoch, on one core. The teacher's: "
        "the mean.",
    )
    page.items(findings.findings(result))


def _learning(page: Page, result: DemoResult) -> None:
    shown = [m for m in METHODS if not (m == RECORDS and result.cache_is_exact)]  # else it lies under the cache's
    series = [
        Series.of_seeds(
            LABELS[m], [student.curve[1:] for student in result.of(m)], COLORS[m], m.startswith("one-hot"), marker="o"
        )
        for m in shown
    ]
    exact = " The line of records made again is that of the cache, point for point." * result.cache_is_exact
    learning_chart(page, series, "Bits per byte", "bits per byte of the test text", f"without a teacher.{exact}")


def _cost(page: Page, result: DemoResult) -> None:
    page.section("What it costs")
    bars = [Bar(LABELS[m], result.numbers(m, "step_ms"), COLORS[m]) for m in METHODS if not m.endswith("plenty")]
    page.figure(
        "steps",
        plots.bars(
            bars, "Time of a training step", "milliseconds on one core, median behind the first epoch", form=".0f"
        ),
        "Bar chart of the time of a training step by method",
        f"{result.settings.batch * result.settings.length:,} tokens a step. In the first epoch a step with the cache "
        f"takes {result.mean(CACHED, 'first_epoch_ms'):.0f} ms: it fills the cache, with "
        f"{result.mean(CACHED, 'cache_bytes') / 1e6:.1f} MB. The teacher makes records a window at a time, so "
        "that they do not depend on the batch.",
    )
    if result.memory is None:
        return
    names = {"linear": "from hidden states", "logits": "from logits", "eager": "from logits, PyTorch"}
    colors = {"linear": COLORS[CACHED], "logits": COLORS["distillation"], "eager": COLORS["one-hot"]}
    page.figure(
        "memory",
        plots.bars(
            [Bar(name, [result.memory[way] / 1e6], colors[way]) for way, name in names.items()],
            f"Memory of the loss of {ROWS:,} tokens",
            "megabytes at the peak of forward and backward, over those before",
            form=".0f",
        ),
        "Bar chart of the peak memory of the loss from hidden states, from logits, and from logits in PyTorch",
        f"Soft labels over a vocabulary of {CLASSES:,}, at the demo's widths; the logits of one side take "
        f"{ROWS * CLASSES * 4 / 1e6:.0f} MB.",
    )


def _setup(page: Page, result: DemoResult) -> None:
    s, text = result.settings, result.text
    page.section("Set-up")
    page.text(
        f"Text: the standard library of this Python, split by module: {text.train_modules} for training, "
        f"{text.test_modules} for the test, others for choosing the numbers below. The test text is "
        f"{text.test_windows} windows, at most {s.module_bytes:,} bytes of a module, {text.bytes_per_token:.2f} bytes "
        "a token. The tokens are merges of byte pairs, learnt from training text alone. A seed chooses a student's "
        "windows and initial weights; there is one teacher."
    )
    page.table(
        ("setting", "value"),
        [
            ["teacher", f"{s.teacher_layers} layers of width {s.teacher_width}, {s.teacher_steps} steps, "
             f"learning rate {s.teacher_rate:g}"],
            ["student", f"{s.layers} layer of width {s.width}, {s.steps} steps, learning rate {s.rate:g}"],
            ["student: one-hot", f"learning rate {s.one_hot_rate:g}, {s.one_hot_steps} steps on few windows"],
            ["batch", f"{s.batch} windows of {s.length} tokens"],
            ["optimizer", f"AdamW, weight decay {s.weight_decay:g}, cosine"],
            ["distillation", f"temperature {s.temperature:g}, weight of the labels {s.hard_weight:g}"],
            ["records", f"{s.k} tokens and the mass of the others, weight of the labels {s.record_hard_weight:g}"],
        ],
    )  # fmt: skip
    ending(page, "lm", result)
