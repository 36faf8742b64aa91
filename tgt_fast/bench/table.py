"""The tables of ``tgt-fast bench``: one a noun, and below it who is left out, and why."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Final

from rich.console import Console
from rich.table import Table

from tgt_fast.bench.case import dtype_name
from tgt_fast.bench.row import OK, Row

_WIDTH: Final = 112


def bench_console() -> Console:
    """Wide enough for a table's numbers, also where the output is a file or a narrow terminal."""
    console = Console()
    console.width = max(console.width, _WIDTH)
    return console


def line(row: Row) -> str:
    """A row as soon as it is there."""
    made = f"{row.case.title} [{row.backend}]: {row.ours.status}"
    if row.ours.timing is None:
        return made
    share = "" if row.of_copy is None else f", {row.of_copy:.0%} of copy"
    return f"{made}, {row.ours.timing.total:.3g} ms{share}"


def print_rows(console: Console, rows: Sequence[Row]) -> None:
    """A table a noun."""
    for noun in dict.fromkeys(row.case.noun for row in rows):
        _print_noun(console, noun, [row for row in rows if row.case.noun == noun])


def _print_noun(console: Console, noun: str, rows: Sequence[Row]) -> None:
    timed = [name for name in _rivals(rows) if any(row.over(name) is not None for row in rows)]
    title = f"{noun} (over: times as fast as; extra: peak memory beyond the results)"
    table = Table(title=title, title_justify="left", title_style="bold")
    table.add_column("op", overflow="fold")
    table.add_column("case", no_wrap=True)
    table.add_column("backend", no_wrap=True)
    for name in ("ms", "GB/s", "of copy", *(f"over {name}" for name in timed), "extra MiB", "ok"):
        table.add_column(name, justify="right", no_wrap=" " not in name)
    for row in rows:
        case = row.case
        memory = row.extra_memory
        table.add_row(
            case.op, f"{case.shape} {dtype_name(case.dtype)}", row.backend,
            "-" if row.ours.timing is None else f"{row.ours.timing.total:.3g}",
            "-" if row.rate is None else f"{row.rate / 1e9:.4g}",
            "-" if row.of_copy is None else f"{row.of_copy:.0%}",
            *(_times(row.over(name)) for name in timed),
            "-" if memory is None else f"{memory / 2**20:.1f}",
            "yes" if row.ours.status == OK else row.ours.status,
        )  # fmt: skip
    console.print(table, markup=False, highlight=False)
    for line in remarks(rows):
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    console.print()


def remarks(rows: Sequence[Row]) -> list[str]:
    """Failures, and rivals that are left out, each reason once."""
    lines = [f"{row.case.title} [{row.backend}] {s.status}: {s.reason}" for row in rows if (s := row.ours).reason]
    reasons: dict[tuple[str, str, str], list[str]] = {}
    for row in rows:
        for name, standing in row.rivals.items():
            if standing.status != OK:
                cases = reasons.setdefault((name, standing.status, standing.reason), [])
                if row.case.title not in cases:
                    cases.append(row.case.title)
    whole = len({row.case.title for row in rows})
    for (name, status, reason), cases in reasons.items():
        where = "" if len(cases) == whole else f" ({_few(cases)})"
        lines.append(f"{name} {status}: {reason}{where}")
    return lines


def _rivals(rows: Iterable[Row]) -> list[str]:
    return list(dict.fromkeys(name for row in rows for name in row.rivals))


def _times(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}x"


def _few(cases: Sequence[str]) -> str:
    return ", ".join(cases) if len(cases) <= 3 else f"{', '.join(cases[:2])} and {len(cases) - 2} more"
