"""Parts of the reports of all demos: the main table, its chart, learning curves, and how to repeat it."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tgt_fast._versions import versions
from tgt_fast.demos.results import AccuracyResults, StudentResults
from tgt_fast.report import Page, plots
from tgt_fast.report.identity import commit
from tgt_fast.report.numbers import mean, spread
from tgt_fast.report.parts import inside
from tgt_fast.report.plots import Series


@dataclass(frozen=True)
class MainTable:
    """The numbers of a demo, one row a method."""

    title: str
    header: tuple[str, ...]
    short_header: tuple[str, ...]  # for a terminal: it fits 80 columns
    rows: list[list[str]]
    best: int | None  # the row to be seen first
    ends: tuple[int, ...]  # rows under which a line is drawn

    @property
    def strong(self) -> list[int]:
        return [] if self.best is None else [self.best]


def accuracy_table(
    result: AccuracyResults[Any],
    title: str,
    labels: Mapping[str, str],
    methods: Sequence[str],
    baselines: Sequence[str],
) -> MainTable:
    """The main table of students that are judged by their accuracy; ``baselines`` are the first of ``methods``."""
    return MainTable(
        title,
        ("method", "accuracy %", "head %", "middle %", "tail %", "agreement %", "mean KL", "seconds"),
        ("method", "accuracy", "head", "mid", "tail", "agree", "KL", "seconds"),
        [
            [
                labels[method],
                spread(result.numbers(method, "accuracy")),
                *(f"{result.mean(method, name):.1f}" for name in ("head", "middle", "tail", "agreement")),
                f"{result.mean(method, 'mean_kl'):.3f}",
                f"{result.mean(method, 'seconds'):.1f}",
            ]
            for method in methods
        ],
        methods.index(result.best(methods)),
        (len(baselines) - 1,),
    )


def in_all(result: StudentResults[Any]) -> tuple[str, str]:
    """The fact about a demo's time."""
    seeds = len(result.seeds)
    return f"{result.seconds:.0f} s", f"for everything here, {seeds} seed{'s' * (seeds > 1)}"


def learning_chart(page: Page, series: Sequence[Series], title: str, unit: str, caption: str, **options: Any) -> None:
    """The section of the learning curves; ``series`` of ``learning_curves``, options of ``plots.lines``."""
    page.section("Learning")
    page.figure(
        "learning",
        plots.lines(series, f"{title} over training", "step", unit, **options),
        f"Line chart of the {inside(title)} over training steps, one line a method",
        f"Lines: means over seeds; bands: lowest to highest. Dashed: {caption}",
    )


def learning_curves(
    result: StudentResults[Any], labels: Mapping[str, str], colors: Mapping[str, str], dashed: Sequence[str]
) -> list[Series]:
    """One line a method of ``labels``."""
    return [
        Series.of_seeds(label, [student.curve for student in result.of(m)], colors[m], dashed=m in dashed)
        for m, label in labels.items()
    ]


def ending(page: Page, demo: str, result: StudentResults[Any], packages: Sequence[str] = ()) -> None:
    """The choice of the settings, and the making of the numbers."""
    page.text("To repeat the choice:")
    page.command(f"python -m tgt_fast.demos.{demo}.tune")
    page.footer(
        f"Seeds {', '.join(map(str, result.seeds))}. "
        + ", ".join(f"{name} {version}" for name, version in versions(packages).items())
        + f". Commit: {commit()}."
    )


def label_curve(
    page: Page,
    curves: Mapping[str, Sequence[tuple[int, Sequence[float]]]],
    labels: Mapping[str, str],
    colors: Mapping[str, str],
    baselines: Collection[str],
    caption: str,
) -> None:
    """The accuracies of a method's seeds over the labelled images: their mean, and from the least to the largest."""
    series = [
        Series(
            labels[method],
            [count for count, _ in line],
            [mean(v) for _, v in line],
            colors[method],
            [min(v) for _, v in line],
            [max(v) for _, v in line],
            dashed=method in baselines,
            marker="o",
        )
        for method, line in curves.items()
    ]
    page.figure(
        "labels",
        plots.lines(
            series,
            "Test accuracy over labelled images",
            "labelled images the student sees (logarithmic)",
            "percent",
            log_x=True,
            x_ticks=series[0].x,
        ),
        "Line chart of the test accuracy over the number of labelled images",
        caption,
    )
