"""``tgt-fast demo lm``: checks first, then the run under a progress bar, then table, page and JSON."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from tgt_fast.demos.command import Outputs, chosen, print_findings, result_table
from tgt_fast.demos.progress import bars

if TYPE_CHECKING:
    from tgt_fast.demos.lm.results import DemoResult

_HEADER = ("method", "bits/byte", "before", "windows", "steps", "ms/step", "seconds")  # fits 80 columns
_NEEDED = {"matplotlib": "matplotlib"}


def run_command(seeds: Sequence[int] | None, quick: bool, out: Path, json_file: Path | None, console: Console) -> None:
    """Run the demo and write its report.

    Raises:
        ArgumentError, CheckpointError: a missing package, or an output that cannot be written; both found before the
            work begins.
    """
    outputs = Outputs.prepare(_NEEDED, out, json_file)

    from tgt_fast.demos.lm import page, results, run, settings

    its_settings, seeds = chosen(settings, seeds, quick)
    with bars(console) as progress:
        result = run.run_demo(seeds, its_settings, progress=progress)
    outputs.write_numbers(results.as_json(result))
    index = page.write_page(result, outputs.folder)
    print_result(result, console)
    outputs.say_where(index, console)


def print_result(result: DemoResult, console: Console) -> None:
    """The table and what it says."""
    from tgt_fast.demos.lm import findings, page
    from tgt_fast.demos.lm.settings import FEW

    seeds = len(result.seeds)
    table = result_table(f"Bits per byte of test text (fewer are better), {seeds} seed{'s' * (seeds > 1)}", _HEADER)
    rows = page.table_rows(result)
    for number, row in enumerate(rows):
        table.add_row(*row, end_section=number in (0, len(FEW)))
    print_findings(table, findings.findings(result), result.seconds, console)
