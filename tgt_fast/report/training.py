"""The page of a training run: ``tgt_fast.report.run`` and ``tgt-fast report``."""

from __future__ import annotations

import base64
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

from tgt_fast._opening import as_path
from tgt_fast.errors import ArgumentError
from tgt_fast.report import plots, story
from tgt_fast.report.output import prepare_file
from tgt_fast.report.page import Cell, Page
from tgt_fast.report.parts import diagnostics
from tgt_fast.report.plots import Bar, Series
from tgt_fast.report.story import Story
from tgt_fast.train.diagnostics import MEANING

Curves = Mapping[str, story.Curve]
NAME: Final = "report.html"
_COLORS: Final = ("#1d4e89", "#d9782d", "#2a9d8f", "#7b5ea7", "#c8a75b", "#5b6b7b", "#c1440e", "#8fc1d4")
_LOSSES: Final = {"loss": "#5b6b7b", "hard": "#c8a75b", "soft": "#2a9d8f", "synthetic": "#1d4e89"}
_ACCURACIES: Final = {"accuracy": "#1c2733", "head": "#2a9d8f", "middle": "#c8a75b", "tail": "#c1440e"}
_THIRDS: Final = ("head", "middle", "tail")
_ROWS: Final = 200  # of the table of records
_FIGURES: Final = 6  # of further metrics


def of_folder(folder: str | os.PathLike[str], out: str | os.PathLike[str] | None = None) -> Path:
    """Write the page of a run from its log, also while it runs.

    Args:
        folder: what ``fit(log=)`` was given.
        out: a file ending in .html, or a folder; by default ``report.html`` beside the log.

    Returns:
        The page's path.

    Raises:
        ArgumentError, CheckpointError: there is no log, or the page cannot be written.
    """
    source = as_path("report", "folder", folder)
    told = story.of_log(source)
    return write(told, source if out is None else out)


def write(told: Story, out: str | os.PathLike[str]) -> Path:
    """The page of what was told, in one file that needs nothing else."""
    path = as_path("report", "out", out)
    file = prepare_file(path if path.suffix.lower() in (".html", ".htm") else path / NAME)
    page = Page(told.name, _lead(told))
    draw = _Drawing(page)
    _facts(page, told)
    _losses(page, told, draw)
    _metrics(page, told, draw)
    _exploration(page, told, draw)
    _setup(page, told)
    return page.save(file)


class _Drawing:
    """Figures, where matplotlib is there; where it is not the page says so once."""

    def __init__(self, page: Page) -> None:
        self.page, self.missing = page, False

    def __call__(self, add: Callable[[], None]) -> None:
        try:
            add()
        except ArgumentError as error:
            if "matplotlib" not in str(error):
                raise
            if not self.missing:
                self.page.text(f"There are no plots here: {error}.")
            self.missing = True

    def lines(
        self,
        name: str,
        title: str,
        y: str,
        curves: Mapping[str, story.Curve],
        colors: Mapping[str, str],
        **options: Any,
    ) -> None:
        """A figure of curves over steps; options of ``plots.lines``, and its ``caption``."""
        caption = options.pop("caption", "")
        series = [_series(_plain(label), curve, colors[label]) for label, curve in curves.items() if curve]
        if series:
            alt = f"Line chart of {', '.join(curves)} over the steps of the training"
            drawn = {"title": _plain(title), "x_label": "step", "y_label": _plain(y), **options}
            self(lambda: self.page.figure(name, plots.lines(series, **drawn), alt, caption))


def _series(label: str, curve: story.Curve, color: str) -> Series:
    """A line; few points are set off, and a single one would not be seen without."""
    marker = "o" if len(curve) < 30 else ""
    return Series(label, [x for x, _ in curve], [value for _, value in curve], color, marker=marker)


def _lead(told: Story) -> str:
    if told.state == "finished":
        return f"{told.steps:,} steps of training."
    if told.state == "running":
        return f"{told.steps:,} of {told.total:,} steps of training so far; it had not ended when this page was made."
    return f"It {told.state}, after {told.steps:,} of {told.total:,} steps."


def _facts(page: Page, told: Story) -> None:
    facts = [(f"{told.steps:,}", f"of {told.total:,} steps" if told.total else "steps")]
    if told.losses.get("loss"):
        facts.append((f"{told.losses['loss'][-1][1]:.4g}", "loss, at the end of its curve"))
    if told.best_score is not None:
        facts.append((f"{told.best_score:.4g}", f"best {_monitored(told)}, at step {told.best_step:,}"))
    if told.seconds is not None:
        each = 1e3 * told.seconds / told.steps_in_them
        facts.append((_duration(told.seconds), f"{each:.3g} ms a step, evaluations included"))
    page.facts(facts)


def _monitored(told: Story) -> str:
    return str(told.settings.get("monitor", "metric")).split(" (")[0]


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.3g} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60} min"


def _losses(page: Page, told: Story, draw: _Drawing) -> None:
    page.section("Losses")
    if not any(told.losses.values()):
        page.text("There is no loss to show yet, or none of those that were logged is a number.")
        return
    others = iter(_COLORS)
    colors = {name: _LOSSES.get(name) or next(others, "#5b6b7b") for name in told.losses}
    shown = {name: curve for name, curve in told.losses.items() if any(value for _, value in curve)}
    draw.lines("losses", "Loss and its parts", "mean loss", shown, colors, **_limits(shown))
    silent = [name for name in told.losses if name not in shown]
    if silent:
        page.text(f"Zero throughout, and not drawn: {', '.join(silent)}.")


def _limits(curves: Curves) -> dict[str, Any]:
    """The axis without the first steps, where these would flatten everything else."""
    values = [value for curve in curves.values() for _, value in curve]
    later = [value for curve in curves.values() for _, value in curve[len(curve) // 20 :]]
    if not later or max(values) < 2 * max(later):
        return {}
    low, high = min(0.0, *later), max(later)
    caption = f"The axis leaves the first steps out, which go up to {max(values):.4g}."
    return {"y_limits": (low - 0.03 * (high - low), high + 0.05 * (high - low)), "caption": caption}


def _metrics(page: Page, told: Story, draw: _Drawing) -> None:
    page.section("Metrics")
    names = told.metrics
    if not names and told.thirds is None:
        page.text("Nothing was evaluated: fit(evaluate=..., eval_every=...) would.")
        return
    accuracies = {name: told.curve(name) for name in _ACCURACIES if name in names}
    draw.lines("accuracy", "Accuracy", "share of examples that are right", accuracies, _ACCURACIES)
    thirds = told.thirds or {n: told.curve(n)[-1][1] for n in _THIRDS if told.curve(n)}
    if thirds:
        bars = [Bar(name, [100 * thirds[name]], _ACCURACIES[name]) for name in _THIRDS if name in thirds]
        draw(
            lambda: page.figure(
                "thirds",
                plots.bars(bars, "Accuracy by class thirds", "percent", high=100.0),
                "Bar chart of the accuracy on frequent, middling and rare classes",
                "Head, middle and tail: the classes in three groups by their number of examples, most to fewest.",
            )
        )
    elif "accuracy" in names:
        page.text("By class thirds: evaluate(..., class_counts=...) adds head, middle and tail.")
    others = [name for name in names if name not in _ACCURACIES]
    for number, name in enumerate(others[:_FIGURES]):
        color = _COLORS[number % len(_COLORS)]
        draw.lines(f"metric-{number}", name, name, {name: told.curve(name)}, {name: color}, height=3.0)
    if told.records:
        _records(page, told)


def _records(page: Page, told: Story) -> None:
    names = ["step", *(n for n in dict.fromkeys(n for record in told.records for n in record) if n != "step")]
    every = -(-len(told.records) // _ROWS)
    kept = [r for place, r in enumerate(told.records, 1) if place % every == 0 or place == len(told.records)]
    best = [place for place, record in enumerate(kept) if record.get("step") == told.best_step]
    caption = "Losses are means since the row before." if every == 1 else f"Every {every}th record."
    page.table(
        names,
        [[_number(r.get(n)) for n in names] for r in kept],
        f"{caption} A heading sorts by its column.",
        strong=best,
    )


def _number(value: Any) -> str:
    if not isinstance(value, (int, float)):
        return "-"
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def _exploration(page: Page, told: Story, draw: _Drawing) -> None:
    page.section("Exploration")
    found = told.exploration
    if found is None:
        page.text(
            "There is no sampler to look at, or it has not been looked at yet: that is done with each record of the "
            "history, by the first process, for a student that is not sharded."
        )
        return
    if "step" in found:
        page.text(f"As it was at step {found['step']:,}, of {found['examples']} examples of the first batch.")
    pictures = found.get("pictures", {})
    if "error" in pictures:
        page.text(f"There are no pictures: {pictures['error']}.")
    elif pictures:
        _pictures(page, pictures)
    path = found.get("ascent", {})
    if "error" in path:
        page.text(f"No climb could be made: {path['error']}.")
    elif path:
        unit = "standard deviations" if path["units"] == "std" else "units"
        curve: story.Curve = [(step, value) for step, value in enumerate(path["values"]) if value is not None]
        series = [_series("", curve, _COLORS[0])] if curve else []
        axis = f"step of {path['step_size']:g} {unit} along the gradient"
        draw(
            lambda: page.figure(
                "ascent",
                plots.lines(series, "Disagreement over ascent steps", axis, "mean disagreement"),
                "Line chart of the disagreement of student and labeler over ascent steps",
                "From real examples plus noise: how far a climb through both models drives student and labeler apart. "
                "Flat: there is nothing left to find nearby, or no gradient arrives.",
            )
        )
    _replay(page, found.get("replay", {}))
    _sources(page, found.get("sources", []), draw)


def _replay(page: Page, found: Mapping[str, Any]) -> None:
    names = [name for name, value in found.items() if not isinstance(value, (list, str))]
    if names:
        shares = ", ".join(f"{100 * share:.1f} %" for share in found.get("share_by_class", []))
        page.table(
            [name.replace("_", " ") for name in names],
            [[_number(found[name]) for name in names]],
            "Replay so far: rows explored and served, their mean uses and age in calls, the rows held, and the mean "
            "disagreement of the last call's fresh rows and of those served again."
            + (f" Served by the labeler's class: {shares}." if shares else ""),
        )


def _pictures(page: Page, pictures: Mapping[str, Any]) -> None:
    rows = [
        (
            str(name),
            [
                Cell(
                    text=tile.get("text", f"example {place}"),
                    png=base64.b64decode(tile.get("image", "")),
                    note=f"class {tile['opinion']} · {100 * tile['confidence']:.0f} %" if "opinion" in tile else "",
                    marked=bool(tile.get("differs")),
                )
                for place, tile in enumerate(tiles, 1)
            ],
        )
        for name, tiles in pictures["rows"]
    ]
    caption = "Below each: the labeler's class and its probability, in colour where that is not the example's label."
    if pictures["kind"] == "images":
        page.cells((), [[Cell(name), *tiles] for name, tiles in rows], caption)
    else:
        columns = zip(*(tiles for _, tiles in rows), strict=True)
        page.cells([name for name, _ in rows], [list(column) for column in columns], caption)


def _sources(page: Page, sources: Any, draw: _Drawing) -> None:
    page.section("Diagnostics")
    page.text(MEANING)
    if isinstance(sources, Mapping) or not sources:
        page.text(f"They could not be measured here: {sources.get('error') if sources else 'there are none'}.")
        return
    names = [name for name in sources[0] if name != "source"]
    measured = {
        row["source"]: {name: [row[name]] if row[name] is not None else [] for name in names} for row in sources
    }
    colors = dict(zip(measured, _COLORS, strict=False))
    draw(
        lambda: diagnostics(
            page,
            measured,
            colors,
            caption="With the student as it was then. The reconstruction error is a root mean square of "
            "Dec(Enc(x)) - x, of texts the share of tokens that differ.",
            table_caption="The labeler's error is known only where there are true labels.",
        )
    )  # fmt: skip


def _setup(page: Page, told: Story) -> None:
    page.section("Settings")
    if told.settings:
        page.table(("setting", "value"), [[str(name), str(value)] for name, value in told.settings.items()], prose=True)
    page.table(("package", "version"), [[str(n), str(v)] for n, v in told.versions.items()], prose=True)
    page.footer("Made by tgt-fast. This page needs nothing beside it and nothing from the net.")


def _plain(text: str) -> str:
    """For matplotlib, which reads formulas between dollar signs."""
    return text.replace("$", r"\$")
