"""``tgt-fast demo retrieval``: checks first, then the run under a progress bar, then table, page and JSON."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from tgt_fast.demos.artifacts import Artifacts, cache_folder
from tgt_fast.demos.command import Outputs, chosen, print_findings, result_table
from tgt_fast.demos.progress import bars
from tgt_fast.demos.text import NEEDED

if TYPE_CHECKING:
    from tgt_fast.demos.retrieval.results import DemoResult

_HEADER = ("method", "recall@1", "recall@20", "recall@100", "seconds")  # fits 80 columns


def run_command(
    seeds: Sequence[int] | None, quick: bool, out: Path, json_file: Path | None, cache: bool, console: Console
) -> None:
    """Run the demo and write its report.

    Args:
        cache: use what an earlier run made and kept, and keep what this one makes.

    Raises:
        ArgumentError, CheckpointError: a missing package, or an output that cannot be written; both found before the
            work begins.
    """
    outputs = Outputs.prepare(NEEDED, out, json_file, extra="text")

    from tgt_fast.demos.retrieval import page, results, run, settings

    its_settings, seeds = chosen(settings, seeds, quick)
    artifacts = Artifacts(cache_folder() if cache else None)
    with bars(console) as progress:
        result = run.run_demo(seeds, its_settings, artifacts=artifacts, progress=progress)
    outputs.write_numbers(results.as_json(result))
    index = page.write_page(result, outputs.folder)
    print_result(result, console)
    outputs.say_where(index, console)


def print_result(result: DemoResult, console: Console) -> None:
    """The table and what it says."""
    from tgt_fast.demos.retrieval import findings, page
    from tgt_fast.demos.retrieval.settings import BASELINES, METHODS

    seeds = len(result.seeds)
    table = result_table(
        f"Test recall in percent: {result.pairs.test} pairs, {result.pairs.labelled} labelled, "
        f"{seeds} seed{'s' * (seeds > 1)}",
        _HEADER,
    )
    best = result.best(METHODS)
    for method, row in zip(METHODS, page.table_rows(result), strict=True):
        table.add_row(*row, style="bold" if method == best else None, end_section=method == BASELINES[-1])
    print_findings(table, findings.findings(result), result.seconds, console)
