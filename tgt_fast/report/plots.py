"""Plots in one hand: the same fonts, lines and colours everywhere, drawn without a display or global state."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tgt_fast.errors import ArgumentError
from tgt_fast.report.numbers import mean

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Curve = Sequence[tuple[int, float]]  # (step, value), ...

INK, SOFT, LINE = "#1c2733", "#5b6b7b", "#dde3ea"
_STYLE: Any = {  # Any: its keys are a literal type in some versions of matplotlib alone
    "font.family": "DejaVu Sans",  # comes with matplotlib, so that the plots look alike everywhere
    "font.size": 10.5,
    "text.color": INK,
    "axes.labelcolor": SOFT,
    "axes.edgecolor": LINE,
    "axes.titlecolor": INK,
    "axes.titlesize": 13,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 12,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "grid.color": LINE,
    "grid.linewidth": 0.8,
    "xtick.color": SOFT,
    "ytick.color": SOFT,
    "legend.frameon": False,
}


@contextmanager
def figure(width: float, height: float, rows: int = 1, columns: int = 1) -> Iterator[tuple[Figure, Any]]:
    """A figure of so many inches and its axes (one, or an array [rows, columns]), in the common style.

    Raises:
        ArgumentError: matplotlib is not installed.
    """
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ArgumentError("plots need matplotlib: pip install 'tgt-fast[demo]'") from error
    with matplotlib.rc_context(_STYLE):
        made = Figure(figsize=(width, height), dpi=160, layout="constrained")
        axes = made.subplots(rows, columns, squeeze=rows == columns == 1)
        yield made, axes


def png(figure: Figure) -> bytes:
    """The figure as a PNG file; the same bytes for the same figure and matplotlib."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", facecolor="white", metadata={"Software": None})
    return buffer.getvalue()


@dataclass(frozen=True)
class Bar:
    """One bar: its height is the points' mean."""

    label: str
    points: Sequence[float]
    color: str

    @property
    def mean(self) -> float:
        return sum(self.points) / len(self.points)


def bars(
    items: Sequence[Bar], title: str, unit: str, low: float = 0.0, high: float | None = None, form: str = ".1f"
) -> bytes:
    """Horizontal bars from top to bottom with every single point and, in ``form``, the mean as a number.

    Where the axis begins above 0, at ``low``, the lengths of bars would mislead: there stands a dot at the mean, on a
    line from the lowest point to the highest.
    """
    with figure(9, 0.9 + 0.46 * len(items)) as (made, axes):
        top = max(max(item.points) for item in items) if high is None else high
        for row, item in enumerate(items):
            if low == 0:
                axes.barh(row, item.mean, height=0.66, color=item.color)
            else:
                axes.plot([min(item.points), max(item.points)], [row, row], color=item.color, lw=5, alpha=0.3)
                axes.plot([item.mean], [row], "o", ms=12, color=item.color)
            axes.plot(item.points, [row] * len(item.points), "o", ms=5, mfc="white", mec=INK, mew=1.0, zorder=3)
            end = max(item.mean, *item.points)
            axes.annotate(
                format(item.mean, form), (end, row), xytext=(9, 0), textcoords="offset points",
                va="center", ha="left", fontweight="bold", fontsize=10.5,
            )  # fmt: skip
        axes.set_yticks(range(len(items)), [item.label for item in items])
        axes.tick_params(axis="y", length=0, labelcolor=INK)
        axes.set_ylim(len(items) - 0.45, -0.55)
        axes.set_xlim(low, low + 1.06 * ((top - low) or 1.0))
        axes.grid(axis="x")
        axes.spines["left"].set_visible(False)
        axes.set_xlabel(unit)
        axes.set_title(title)
        return png(made)


@dataclass(frozen=True)
class Series:
    """One line, with the band between its lowest and highest where these are given."""

    label: str
    x: Sequence[float]
    y: Sequence[float]
    color: str
    low: Sequence[float] = ()
    high: Sequence[float] = ()
    dashed: bool = False
    marker: str = ""

    @classmethod
    def of_seeds(
        cls, label: str, curves: Sequence[Curve], color: str, dashed: bool = False, marker: str = ""
    ) -> Series:
        """The mean of curves over the same steps, with the band between their lowest and highest."""
        by_step = [dict(curve) for curve in curves]
        steps = sorted(by_step[0])
        values = [[curve[step] for curve in by_step] for step in steps]
        means, lows, highs = ([f(v) for v in values] for f in (mean, min, max))
        return cls(label, steps, means, color, lows, highs, dashed, marker)


def lines(
    items: Sequence[Series],
    title: str,
    x_label: str,
    y_label: str,
    *,
    log_x: bool = False,
    y_limits: tuple[float, float] | None = None,
    x_ticks: Sequence[float] | None = None,
    height: float = 4.6,
) -> bytes:
    """Lines, each named at its right end in its own colour; names that would overlap are moved apart."""
    with figure(9, height) as (made, axes):
        for item in items:
            axes.plot(
                item.x, item.y, color=item.color, lw=2, ls="--" if item.dashed else "-", marker=item.marker, ms=5
            )  # fmt: skip
            if item.low:
                axes.fill_between(item.x, item.low, item.high, color=item.color, alpha=0.14, lw=0)
        if log_x:
            axes.set_xscale("log")
        if x_ticks is not None:
            axes.set_xticks(list(x_ticks), [f"{tick:g}" for tick in x_ticks])
            axes.set_xticks([], minor=True)
        if y_limits is not None:
            axes.set_ylim(*y_limits)
        axes.grid(axis="y")
        axes.set_xlabel(x_label)
        axes.set_ylabel(y_label)
        axes.set_title(title)
        _name_at_end(axes, items)
        return png(made)


def _name_at_end(axes: Axes, items: Sequence[Series]) -> None:
    low, high = axes.get_ylim()
    ends = [(item.y[-1] - low) / (high - low) for item in items]
    for item, place in zip(items, spread(ends, 0.056), strict=True):
        axes.annotate(
            item.label, (1, place), xycoords="axes fraction", xytext=(8, 0), textcoords="offset points",
            va="center", color=item.color, fontsize=10.5, annotation_clip=False,
        )  # fmt: skip


def spread(places: Sequence[float], gap: float) -> list[float]:
    """Places in [0, 1], moved as little as it takes for neighbours to lie at least ``gap`` apart, in the same order."""
    order = sorted(range(len(places)), key=lambda number: places[number])
    moved: list[float] = []
    for number in order:
        place = min(max(places[number], 0.0), 1.0)
        moved.append(place if not moved else max(place, moved[-1] + gap))
    limit = 1.0  # what was pushed beyond the top comes down, and pushes in turn
    for row in range(len(moved) - 1, -1, -1):
        moved[row] = min(moved[row], limit)
        limit = moved[row] - gap
    found = [0.0] * len(places)
    for number, place in zip(order, moved, strict=True):
        found[number] = place
    return found


def heatmap(
    rows: Sequence[str],
    columns: Sequence[str],
    values: Sequence[Sequence[float]],
    title: str,
    x_label: str,
    limits: tuple[float, float] = (0.0, 100.0),
) -> bytes:
    """Numbers in coloured cells, dark for high."""
    with figure(9, 1.5 + 0.44 * len(rows)) as (made, axes):
        axes.imshow(values, cmap="YlGnBu", vmin=limits[0], vmax=limits[1], aspect="auto")
        middle = limits[0] + 0.6 * (limits[1] - limits[0])
        for row, line in enumerate(values):
            for column, value in enumerate(line):
                color = "white" if value > middle else INK
                axes.text(column, row, f"{value:.0f}", ha="center", va="center", color=color, fontsize=10)
        axes.set_xticks(range(len(columns)), columns)
        axes.set_yticks(range(len(rows)), rows)
        axes.tick_params(length=0, labelcolor=INK)
        axes.set_xticks([c - 0.5 for c in range(1, len(columns))], minor=True)
        axes.set_yticks([r - 0.5 for r in range(1, len(rows))], minor=True)
        axes.grid(which="minor", color="white", linewidth=2)
        axes.tick_params(which="minor", length=0)
        for spine in axes.spines.values():
            spine.set_visible(False)
        axes.set_xlabel(x_label)
        axes.set_title(title)
        return png(made)


@dataclass(frozen=True)
class Tile:
    """One image, its caption, and whether the caption is to be set off."""

    pixels: Any  # [H, W] in [0, 1]
    caption: str = ""
    marked: bool = False


def image_grid(rows: Sequence[tuple[str, Sequence[Tile]]], title: str, mark_color: str = "#c1440e") -> bytes:
    """Rows of images, each row with its name on the left."""
    columns = max(len(tiles) for _, tiles in rows)
    with figure(0.9 * columns + 1.6, 1.12 * len(rows) + 0.5, len(rows), columns) as (made, axes):
        grid = [[axes]] if len(rows) == columns == 1 else axes
        for row, (name, tiles) in enumerate(rows):
            for column in range(columns):
                ax = grid[row][column]
                ax.set_xticks([])
                ax.set_yticks([])
                for spine in ax.spines.values():
                    spine.set_visible(False)
                if column >= len(tiles):
                    continue
                tile = tiles[column]
                ax.imshow(tile.pixels, cmap="gray_r", vmin=0, vmax=1, interpolation="nearest")
                ax.set_xlabel(
                    tile.caption, fontsize=8.5, labelpad=3, color=mark_color if tile.marked else SOFT,
                    fontweight="bold" if tile.marked else "normal",
                )  # fmt: skip
            grid[row][0].set_ylabel(name, rotation=0, ha="right", va="center", labelpad=10, color=INK, fontsize=10.5)
        made.suptitle(title, x=0.01, ha="left", fontweight="bold", fontsize=13)
        return png(made)


def panels(items: Sequence[tuple[str, str, Sequence[Bar]]], title: str) -> bytes:
    """Small bar charts side by side over the same rows: (heading, number format, bars)."""
    count = len(items[0][2])
    with figure(9.6, 1.2 + 0.4 * count, 1, len(items)) as (made, axes):
        for number, (heading, form, items_here) in enumerate(items):
            ax = axes[0][number] if len(items) > 1 else axes
            top = max((item.mean for item in items_here if item.points), default=1.0)
            for row, item in enumerate(items_here):
                if not item.points:
                    ax.annotate("-", (0, row), xytext=(5, 0), textcoords="offset points", va="center", color=SOFT)
                    continue
                ax.barh(row, item.mean, height=0.64, color=item.color)
                ax.annotate(
                    format(item.mean, form), (item.mean, row), xytext=(5, 0), textcoords="offset points",
                    va="center", fontsize=9.5,
                )  # fmt: skip
            ax.set_xlim(0, top * 1.38 if top > 0 else 1)
            ax.set_yticks(range(count), [item.label for item in items_here] if number == 0 else [""] * count)
            ax.tick_params(axis="y", length=0, labelcolor=INK)
            ax.set_xticks([])
            ax.invert_yaxis()
            for spine in ax.spines.values():
                spine.set_visible(False)
            ax.set_title(heading, fontsize=10, fontweight="normal", color=SOFT, pad=6)
        made.suptitle(title, x=0.01, ha="left", fontweight="bold", fontsize=13)
        return png(made)
