"""``tgt-fast demo digits``: checks first, then the run under a progress bar, then table, page and JSON."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table

from tgt_fast.errors import ArgumentError
from tgt_fast.report import prepare_file, prepare_folder, write_json

if TYPE_CHECKING:
    from tgt_fast.demos.digits.results import DemoResult
    from tgt_fast.demos.digits.run import Progress as Report

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
    missing = [name for module, name in _NEEDED.items() if importlib.util.find_spec(module) is None]
    if missing:
        raise ArgumentError(f"the demo needs {' and '.join(missing)}: pip install 'tgt-fast[demo]'")
    folder = prepare_folder(out)
    file = None if json_file is None else prepare_file(json_file)

    from tgt_fast.demos.digits import page, results, run, settings

    chosen = settings.Settings()
    if quick:
        chosen = settings.quick(chosen)
    if seeds is None:
        seeds = (0,) if quick else (0, 1, 2)
    with _bars(console) as progress:
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


@contextmanager
def _bars(console: Console) -> Iterator[Report]:
    """A bar a phase; plain lines where the output is no terminal."""
    if not console.is_terminal:

        def say(phase: str, done: int, total: int) -> None:
            if done and (done == total or done % 7 == 0):
                console.print(f"{phase}: {done} of {total}", highlight=False)

        yield say
        return
    name = TextColumn("{task.description:12s}")
    columns = (SpinnerColumn(), name, BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as shown:
        tasks: dict[str, TaskID] = {}

        def advance(phase: str, done: int, total: int) -> None:
            if phase not in tasks:
                tasks[phase] = shown.add_task(phase, total=total)
            shown.update(tasks[phase], completed=done)

        yield advance
