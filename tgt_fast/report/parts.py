"""Sections that reports have in common."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

from tgt_fast.report import plots
from tgt_fast.report.numbers import mean
from tgt_fast.report.page import Page
from tgt_fast.report.plots import Bar

_FIELDS: Final = (  # of a source's measurements: their name, a title of two lines, one in a table, and their form
    ("reconstruction_error", "reconstruction\nerror", "reconstruction error", ".3f"),
    ("wasserstein", "sliced Wasserstein\nto {real}", "Wasserstein", ".3f"),
    ("loss_mean", "mean of the\nsoft-label loss", "mean loss", ".2f"),
    ("loss_variance", "its variance\n ", "loss variance", ".2f"),
    ("agreement", "agreement with\nthe labeler, %", "agreement %", ".0f"),
)
Measured = Mapping[str, Sequence[float]]  # field -> the values of the seeds; none where it is not defined


def percent_chart(page: Page, name: str, bars: Sequence[Bar], title: str, unit: str, caption: str) -> None:
    """A chart of one percentage of each method, from a round number below the lowest on."""
    floor = max(0.0, 10 * ((min(min(bar.points) for bar in bars) - 10) // 10))
    page.figure(
        name,
        plots.bars(bars, title, f"{unit}, percent", low=floor),
        f"Chart of the {inside(title)} of each method",
        f"Dots: means; circles: the seeds. The axis begins at {floor:.0f} %. {caption}",
    )


def diagnostics(
    page: Page,
    sources: Mapping[str, Measured],
    colors: Mapping[str, str],
    *,
    real: str = "the real ones",
    caption: str = "",
    table_caption: str = "",
) -> None:
    """Small charts and a table of what was measured of each source of examples."""
    shown = [field for field in _FIELDS if any(measured[field[0]] for measured in sources.values())]
    page.figure(
        "diagnostics",
        plots.panels(
            [
                (title.format(real=real), form, [Bar(name, one[field], colors[name]) for name, one in sources.items()])
                for field, title, _, form in shown
            ],
            "Diagnostics by source of examples",
        ),
        "Small bar charts of the diagnostics, one row a source of examples",
        caption,
    )
    errors = any(measured["labeler_error"] for measured in sources.values())
    header = ["source", *(short for _, _, short, _ in shown), "mean KL", *(["labeler's error %"] if errors else [])]
    rows = []
    for name, one in sources.items():
        cells = [f"{mean(one[field]):{form.replace('0f', '1f')}}" if one[field] else "-" for field, _, _, form in shown]
        error = one["labeler_error"]
        rows.append(
            [name, *cells, f"{mean(one['mean_kl']):.3f}" if one["mean_kl"] else "-"]
            + ([f"{mean(error):.2f}" if error else "unknown"] if errors else [])
        )
    page.table(header, rows, table_caption)


def inside(title: str) -> str:
    """A title in the middle of a sentence."""
    return title[0].lower() + title[1:]
