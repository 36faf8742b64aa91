"""The tables of ``tgt-fast bench``: one a noun, and below it who is left out, and why."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Final

from rich.console import Console
from rich.measure import Measurement
from rich.table import Table

from tgt_fast.bench.case import dtype_name
from tgt_fast.bench.row import OK, Row

_WIDTH: Final = 112
_WIDEST: Final = 400


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
    others = row.load.others if row.load is not None else None
    busy = "" if not row.busy else ", busy" if others is None else f", busy: others used {others:.1f} cores"
    return f"{made}, {row.ours.timing.total:.3g} ms{_spread(row, ' ± ')}{share}{busy}"


def print_rows(console: Console, rows: Sequence[Row]) -> None:
    """A table a noun."""
    for noun in dict.fromkeys(row.case.noun for row in rows):
        _print_noun(console, noun, [row for row in rows if row.case.noun == noun])


def _print_noun(console: Console, noun: str, rows: Sequence[Row]) -> None:
    timed = [name for name in _rivals(rows) if any(row.over(name) is not None for row in rows)]
    columns: dict[str, list[str]] = {
        "op": [row.case.op for row in rows],
        "case": [f"{row.case.shape} {dtype_name(row.case.dtype)}" for row in rows],
        "backend": [row.backend for row in rows],
        "ms": [_number(None if row.ours.timing is None else row.ours.timing.total, ".3g", row.busy) for row in rows],
        "spread": [_spread(row) or "-" for row in rows],
        "GB/s": [_number(None if row.rate is None else row.rate / 1e9, ".4g") for row in rows],
        "of copy": [_number(row.of_copy, ".0%") for row in rows],
        **{f"over {name}": [_times(row.over(name)) for row in rows] for name in timed},
        "extra MiB": [_number(None if (m := row.extra_memory) is None else m / 2**20, ".1f") for row in rows],
        "ok": ["yes" if row.ours.status == OK else row.ours.status for row in rows],
    }
    columns = {name: cells for name, cells in columns.items() if set(cells) != {"-"}}
    notes = {
        "over": "times as fast as",
        "extra": "peak memory beyond the results",
        "spread": "between the quartiles, of the time",
    }
    told = [f"{name}: {note}" for name, note in notes.items() if any(c.split()[0] == name for c in columns)]
    table = Table(title=f"{noun} ({'; '.join(told)})" if told else noun, title_justify="left", title_style="bold")
    for name in columns:
        table.add_column(name, justify="left" if name in ("op", "case", "backend") else "right", no_wrap=True)
    for cells in zip(*columns.values(), strict=True):
        table.add_row(*cells)
    wide = Measurement.get(console, console.options.update(max_width=_WIDEST), table).maximum
    console.width = max(console.width, wide)  # a terminal may break a line; the table breaks no name
    console.print(table, markup=False, highlight=False)
    for line in remarks(rows):
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    console.print()


def remarks(rows: Sequence[Row]) -> list[str]:
    """Failures, and rivals that are left out, each reason once."""
    lines = [f"{row.case.title} [{row.backend}] {s.status}: {s.reason}" for row in rows if (s := row.ours).reason]
    busy = [row for row in rows if row.busy and row.ours.timing is not None]
    if busy:
        most = max((row.load.others for row in busy if row.load and row.load.others is not None), default=None)
        used = "took much of the machine" if most is None else f"used up to {most:.1f} cores"
        lines.insert(0, f"* measured while other processes {used}: a rough number")
    lines += [f"{row.case.title}: {name} spends {_spent(row.parts[name])}" for row in rows for name in row.parts]
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


def _spent(parts: Mapping[str, float]) -> str:
    """The shares of a call's time, the largest first."""
    whole = sum(parts.values()) or 1.0
    ordered = sorted(parts.items(), key=lambda part: -part[1])
    return ", ".join(f"{value / whole:.0%} in {name}" for name, value in ordered if value / whole >= 0.005)


def _rivals(rows: Iterable[Row]) -> list[str]:
    return list(dict.fromkeys(name for row in rows for name in row.rivals))


def _number(value: float | None, form: str, marked: bool = False) -> str:
    return "-" if value is None else f"{value:{form}}{' *' if marked else ''}"


def _spread(row: Row, before: str = "") -> str:
    found = None if row.ours.timing is None else row.ours.timing.spread
    return "" if found is None else f"{before}{found:.0%}"


def _times(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}x"


def _few(cases: Sequence[str]) -> str:
    return ", ".join(cases) if len(cases) <= 3 else f"{', '.join(cases[:2])} and {len(cases) - 2} more"
