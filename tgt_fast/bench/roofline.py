"""The roofline: what each op has to move against how fast it moves it, with plain copies as the roof."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tgt_fast.bench.case import dtype_name
from tgt_fast.bench.row import Row
from tgt_fast.report.plots import INK, LINE, SOFT, figure, png, spread

_COLORS = ("#0b6e99", "#c1440e", "#4f7942", "#7b4fa3", "#b8860b", "#a23b72")
_MARKS = {"eager": "o", "compile": "^", "liger": "s", "orda": "D", "quack": "P", "cce": "X"}


def roofline(rows: Sequence[Row], copy_rate: float, hardware: str) -> bytes:
    """A PNG, one panel a noun. Ours are filled and named; rivals stand faintly at the same place of the axis."""
    timed = [row for row in rows if row.rate is not None]
    nouns = list(dict.fromkeys(row.case.noun for row in timed)) or [""]
    longest = max((sum(row.case.noun == noun for row in timed) for noun in nouns), default=1)
    with figure(11.5, len(nouns) * max(3.6, 1.2 + 0.21 * longest), len(nouns), 1) as (made, axes):
        panels = list(axes[:, 0]) if len(nouns) > 1 else [axes]
        for panel, noun in zip(panels, nouns, strict=True):
            _panel(panel, noun, [row for row in timed if row.case.noun == noun], copy_rate)
        made.suptitle(f"Achieved bytes a second at the floor's bytes: {hardware}", x=0.01, ha="left", fontsize=12)
        return png(made)


def _panel(axes: Any, noun: str, rows: Sequence[Row], copy_rate: float) -> None:
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.axhline(copy_rate / 1e9, color=INK, lw=1.4)
    axes.annotate(
        f"copy, {copy_rate / 1e9:.0f} GB/s", (0, copy_rate / 1e9), xycoords=("axes fraction", "data"), xytext=(6, 4),
        textcoords="offset points", fontsize=9,
    )  # fmt: skip
    seen: set[str] = set()
    for row in rows:
        for name, standing in row.rivals.items():
            rate = row.rate_of(standing)
            if rate is not None:
                axes.plot(
                    row.case.bytes_moved, rate / 1e9, _MARKS.get(name, "v"), ms=5, mfc="none", mec=SOFT, alpha=0.45,
                    label=None if name in seen else name,
                )  # fmt: skip
                seen.add(name)
    colors = {op: _COLORS[number % len(_COLORS)] for number, op in enumerate(dict.fromkeys(r.case.op for r in rows))}
    for row in rows:
        axes.plot(row.case.bytes_moved, (row.rate or 0.0) / 1e9, "o", ms=7, color=colors[row.case.op], zorder=3)
    low, high = axes.get_ylim()
    axes.set_ylim(low / 1.3, max(high, copy_rate / 1e9) * 1.5)
    left, right = axes.get_xlim()
    axes.set_xlim(left / 1.3, right * 1.3)
    _names(axes, rows, colors)
    axes.grid(axis="y")
    axes.set_xlabel("bytes that have to move")
    axes.set_ylabel("GB/s")
    axes.set_title(noun)
    if seen:
        axes.legend(loc="lower right", fontsize=9)


def _names(axes: Any, rows: Sequence[Row], colors: dict[str, str]) -> None:
    """Each point's name at the right, in the order of their heights, with a thin line to the point."""
    points = [axes.transLimits.transform(axes.transScale.transform((r.case.bytes_moved, (r.rate or 1) / 1e9)))
              for r in rows]  # fmt: skip
    places = spread([float(point[1]) for point in points], 0.97 / max(len(rows), 20))
    several = len({row.backend for row in rows}) > 1
    for row, place in zip(rows, places, strict=True):
        name = f"{row.case.op}, {row.case.shape} {dtype_name(row.case.dtype)}" + (
            f" [{row.backend}]" if several else ""
        )
        axes.annotate(
            name, (row.case.bytes_moved, (row.rate or 0.0) / 1e9), xytext=(1.02, place), textcoords="axes fraction",
            va="center", fontsize=8, color=colors[row.case.op], annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": LINE, "lw": 0.8, "shrinkA": 0, "shrinkB": 4},
        )  # fmt: skip
