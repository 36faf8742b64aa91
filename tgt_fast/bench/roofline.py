"""The plot of ``tgt-fast bench``: how near each operation comes to the speed of the memory that it has to read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

from tgt_fast.bench.row import Row
from tgt_fast.report.plots import INK, SOFT, figure, png

_COLORS: Final = ("#0b6e99", "#c1440e", "#4f7942", "#7b4fa3", "#b8860b", "#a23b72")
_MARKS: Final = {"eager": "o", "compile": "^", "liger": "s", "orda": "D", "quack": "P", "cce": "X"}
_TITLES: Final = {
    "distill": "distillation loss",
    "latent": "moves in a latent space",
    "explore": "exploration by gradient",
    "linear": "loss from hidden states",
    "topk": "loss against top-k records",
    "tokens": "drawing tokens",
    "contrast": "retrieval loss within a batch",
    "listwise": "loss of the teacher's order",
    "step": "whole training step",
}
_PANEL: Final = 2.9  # inches at the most
_PANELS: Final = 12.0  # of a column of them: it fits a screen that is turned, or a page
_HEAD: Final = 1.0


def roofline(rows: Sequence[Row], copy_rate: float, hardware: str) -> bytes:
    """A PNG, one panel a noun, two in a line. Ours are filled, an operation a colour; rivals are hollow."""
    timed = [row for row in rows if row.rate is not None]
    nouns = list(dict.fromkeys(row.case.noun for row in timed)) or [""]
    columns = min(2, len(nouns))
    lines = -(-len(nouns) // columns)
    height = min(_PANEL * lines, _PANELS) + _HEAD
    with figure(6.2 * columns + 0.4, height, lines, columns) as (made, axes):
        panels = [axes] if lines == columns == 1 else list(axes.flat)
        seen: dict[str, Any] = {}
        for panel, noun in zip(panels, nouns, strict=False):
            _panel(panel, noun, [row for row in timed if row.case.noun == noun], copy_rate, seen)
        for panel in panels[len(nouns) :]:
            panel.set_axis_off()
        for place, panel in enumerate(panels[: len(nouns)]):
            if place + columns >= len(nouns):
                panel.set_xlabel("bytes to be read and written")
            if place % columns == 0:
                panel.set_ylabel("GB a second")
        made.suptitle(
            "How near each operation comes to the speed of memory", x=0.01, ha="left", fontweight="bold", fontsize=13
        )
        marks = made.legend(
            list(seen.values()), list(seen), loc="outside lower left", ncols=4 if columns > 1 else 2, fontsize=9,
            title=hardware, title_fontsize=9, alignment="left",
        )  # fmt: skip
        marks.get_title().set_color(SOFT)
        return png(made)


def _panel(axes: Any, noun: str, rows: Sequence[Row], copy_rate: float, seen: dict[str, Any]) -> None:
    """One noun's; adds what its marks mean to ``seen``."""
    axes.set_xscale("log")
    axes.set_yscale("log")
    (line,), (mine,) = axes.plot([], [], color=INK, lw=1.4), axes.plot([], [], "o", ms=7, color=SOFT)
    axes.axhline(copy_rate / 1e9, color=INK, lw=1.4)
    seen.setdefault(f"plain copy of the memory, {copy_rate / 1e9:.0f} GB a second", line)
    seen.setdefault("tgt-fast, an operation a colour", mine)
    colors = {op: _COLORS[number % len(_COLORS)] for number, op in enumerate(dict.fromkeys(r.case.op for r in rows))}
    for row in rows:
        for name, standing in row.rivals.items():
            rate = row.rate_of(standing)
            if rate is not None:
                (mark,) = axes.plot(
                    row.case.bytes_moved, rate / 1e9, _MARKS.get(name, "v"), ms=5, mfc="none", mec=SOFT, alpha=0.6
                )
                seen.setdefault(f"the same by {name}", mark)
    named: dict[str, Any] = {}
    for row in rows:
        (mark,) = axes.plot(
            row.case.bytes_moved, (row.rate or 0.0) / 1e9, "o", ms=7, color=colors[row.case.op], zorder=3
        )
        named.setdefault(row.case.op, mark)
    low, high = axes.get_ylim()
    axes.set_ylim(low / 1.5, max(high, copy_rate / 1e9) * 1.5)
    left, right = axes.get_xlim()
    axes.set_xlim(left / 1.3, right * 1.3)
    axes.grid(axis="y")
    axes.set_title(_TITLES.get(noun, noun), fontsize=11)
    if named:
        names = axes.legend(list(named.values()), list(named), loc="best", fontsize=8, frameon=True, edgecolor="none")
        names.get_frame().set_alpha(0.85)
