"""``tgt-fast bench``: measure, print, write."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console

from tgt_fast.bench.copying import copy_rate
from tgt_fast.bench.load import Watch
from tgt_fast.bench.record import hardware, origin
from tgt_fast.bench.row import Row
from tgt_fast.bench.run import Plan, measure
from tgt_fast.bench.table import line, print_rows
from tgt_fast.report.output import prepare_file, write_bytes, write_json


def run_bench(
    plan: Plan, console: Console, *, command: str, json: Path | None = None, plot: Path | None = None
) -> tuple[list[Row], dict[str, Any]]:
    """Measure and print; the rows and the record of them. The JSON file is complete after every case.

    Raises:
        ArgumentError, CheckpointError: a file that cannot be written, before anything is measured.
    """
    json = None if json is None else prepare_file(json)
    plot = None if plot is None else prepare_file(plot)
    if plot is not None:
        import tgt_fast.report.plots as plots

        with plots.figure(1, 1):  # matplotlib is missing now, not after minutes of measuring
            pass
    watch = Watch()
    roof = copy_rate(plan.device)
    load = watch.load()
    console.print(
        f"{hardware(plan.device)}; a plain copy moves {roof / 1e9:.4g} GB/s; {load}", markup=False, highlight=False
    )
    rows: list[Row] = []
    made = origin(plan.device, roof, command)
    made["load"] = load.to_json()
    made["rows"] = []
    for row in measure(plan, roof):  # no progress bar: its thread would take turns with what is timed
        rows.append(row)
        made["rows"].append(row.to_json())
        console.print(line(row), markup=False, highlight=False, soft_wrap=True)
        if json is not None:
            write_json(json, made)
    console.print()
    print_rows(console, rows)
    if plot is not None:
        from tgt_fast.bench.roofline import roofline

        write_bytes(plot, roofline(rows, roof, hardware(plan.device)))
        console.print(f"wrote {plot}", markup=False, highlight=False, soft_wrap=True)
    if json is not None:
        console.print(f"wrote {json}", markup=False, highlight=False, soft_wrap=True)
    failed = sum(row.failed for row in rows)
    if failed:
        console.print(f"{failed} of {len(rows)} rows are wrong or failed", markup=False, highlight=False)
    return rows, made
