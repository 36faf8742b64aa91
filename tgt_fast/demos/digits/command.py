"""``tgt-fast demo digits``: checks first, then the run under a progress bar, then table, page and JSON."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from tgt_fast.demos.progress import bars, need
from tgt_fast.report import prepare_file, prepare_folder, write_json

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
    need(_NEEDED)
    folder = prepare_folder(out)
    file = None if json_file is None else prepare_file(json_file)

    from tgt_fast.demos.digits import page, results, run, settings

    chosen = settings.Settings()
    if quick:
        chosen = settings.quick(chosen)
    if seeds is None:
        seeds = (0,) if quick else (0, 1, 2)
    with bars(console) as progress:
        result = run.run_demo(seeds, chosen, curve=curve, progress=progress)
    if file is not None:
        write_json(file, results.as_json(result))
    index = page.write_page(result, folder)
    print_result(result, console)
    console.print(f"\nReport: {index}", highlight=False, soft_wrap=True)
    if file is not None:
        console.print(f"Numbers: {file}", highlight=False, soft_wrap=True)


def print_result(result: DemoResult, console: Console) -> None:
    """The table and what it says."""
    from tgt_fast.demos.digits import findings, page
    from tgt_fast.demos.digits.settings import BASELINES, METHODS

    seeds = len(result.seeds)
    table = Table(
        title=f"Test accuracy in percent: 897 digits, {sum(result.counts)} labelled, {seeds} seed{'s' * (seeds > 1)}",
        title_justify="left",
        title_style="bold",
        box=SIMPLE_HEAD,
        pad_edge=False,
        padding=(0, 1, 0, 0),
    )
    for number, name in enumerate(_HEADER):
        table.add_column(name, justify="right" if number else "left", no_wrap=True)
    best = result.best(METHODS)
    for method, row in zip(METHODS, page.table_rows(result), strict=True):
        last = method == BASELINES[-1]
        table.add_row(*row, style="bold" if method == best else None, end_section=last)
    console.print()
    console.print(table)
    for sentence in findings.findings(result):
        console.print(f"• {sentence}", highlight=False)
    console.print(f"{result.seconds:.0f} s in all.", highlight=False)
