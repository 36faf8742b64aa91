"""What the tables are made of: a grid, and how numbers and their sources are written."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def grid(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    rule = ["---"] + ["---:"] * (len(header) - 1)
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (header, rule, *rows))


def source(record: dict[str, Any]) -> str:
    versions, commit = record["versions"], f"commit {record['commit']}, {record['date']}"
    return f"`{record['command']}`, {record['hardware']}; torch {versions['torch']}; {commit}."


def measured(record: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows that were not left out, for want of memory for example."""
    return [row for row in record["rows"] if row.get("status", "ok") == "ok"]


def times(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}x"


def ms(value: float) -> str:
    return f"{value:.3g}" if value < 1000 else f"{value:,.0f}"
