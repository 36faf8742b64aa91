"""``tgt-fast demo digits``: checks first, then the run under a progress bar, then table, page and JSON."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from tgt_fast.demos.command import Outputs, chosen, print_findings, result_table
from tgt_fast.demos.progress import bars

if TYPE_CHECKING:
    from tgt_fast.demos.digits.results import DemoResult

_HEADER = ("method", "accuracy", "head", "mid", "tail", "agree", "KL", "seconds")  # fits 80 columns
_NEEDED = {"sklearn": "scikit-learn", "matplotlib": "matplotlib"}


def run_command(
    seeds: Sequence[int] | None,
    quick: bool,
    curve: bool,
    out: Path,
    json_file: Path | None,
    console: Console,
) -> None:
    """Run the demo and write its report.

    Raises:
        ArgumentError, CheckpointError: a missing package, or an output that cannot be written; both found before the
            work begins.
    """
    outputs = Outputs.prepare(_NEEDED, out, json_file)

    from tgt_fast.demos.digits import page, results, run, settings

    its_settings, seeds = chosen(settings, seeds, quick)
    with bars(console) as progress:
        result = run.run_demo(seeds, its_settings, curve=curve, progress=progress)
    outputs.write_numbers(results.as_json(result))
    index = page.write_page(result, outputs.folder)
    print_result(result, console)
    outputs.say_where(index, console)


def print_result(result: DemoResult, console: Console) -> None:
    """The table and what it says."""
    from tgt_fast.demos.digits import findings, page
    from tgt_fast.demos.digits.settings import BASELINES, METHODS

    seeds = len(result.seeds)
    title = f"Test accuracy in percent: 897 digits, {sum(result.counts)} labelled, {seeds} seed{'s' * (seeds > 1)}"
    table = result_table(title, _HEADER)
    best = result.best(METHODS)
    for method, row in zip(METHODS, page.table_rows(result), strict=True):
        last = method == BASELINES[-1]
        table.add_row(*row, style="bold" if method == best else None, end_section=last)
    print_findings(table, findings.findings(result), result.seconds, console)
