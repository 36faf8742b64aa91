"""The command of a demo: checks first, then the run under a progress bar, then table, page and JSON."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from tgt_fast.bench.record import hardware
from tgt_fast.demos.artifacts import Artifacts, cache_folder
from tgt_fast.demos.catalog import Demo
from tgt_fast.demos.pages import MainTable
from tgt_fast.demos.progress import bars
from tgt_fast.errors import ArgumentError
from tgt_fast.report import prepare_file, prepare_folder, write_json


def run_command(
    demo: Demo,
    seeds: Sequence[int] | None,
    quick: bool,
    out: Path,
    json_file: Path | None,
    console: Console,
    *,
    curve: bool = False,
    cache: bool = True,
    recipes: Sequence[str] = (),
) -> None:
    """Run a demo and write its report.

    Args:
        seeds: those to average; by default 0, 1 and 2, or 0 alone if ``quick``.
        curve: also train on other numbers of labels, where the demo can.
        recipes: methods to train by beside the demo's own, where it has such; "all": every one.
        cache: use what an earlier run made and kept, and keep what this one makes, where the demo does.

    Raises:
        ArgumentError, CheckpointError: a missing package, or an output that cannot be written; both found before the
            work begins.
    """
    outputs = Outputs.prepare(demo, out, json_file)

    run, settings, results, findings, page = (
        import_module(f"tgt_fast.demos.{demo.name}.{part}")
        for part in ("run", "settings", "results", "findings", "page")
    )
    options: dict[str, Any] = {}
    if demo.with_curve:
        options["curve"] = curve
    if demo.with_recipes and recipes:
        options["recipes"] = run.checked_recipes(recipes)
    if demo.with_cache:
        options["artifacts"] = Artifacts(cache_folder() if cache else None)
    chosen = settings.quick(settings.Settings()) if quick else settings.Settings()
    seeds = ((0,) if quick else (0, 1, 2)) if seeds is None else seeds
    with bars(console) as progress:
        result = run.run_demo(seeds, chosen, progress=progress, **options)
    said = _command(demo, seeds, quick, curve=curve, cache=cache, recipes=recipes)
    outputs.write_numbers({"command": said, "hardware": hardware(torch.device("cpu")), **results.as_json(result)})
    index = page.write_page(result, outputs.folder)
    console.print()
    console.print(shown(page.main_table(result), len(seeds)))
    for sentence in findings.findings(result):
        console.print(f"• {sentence}", highlight=False)
    console.print(f"{result.seconds:.0f} s in all.", highlight=False)
    outputs.say_where(index, console)


def _command(demo: Demo, seeds: Sequence[int], quick: bool, *, curve: bool, cache: bool, recipes: Sequence[str]) -> str:
    """The command that gives the same numbers again; where they went is left out."""
    words = [f"tgt-fast demo {demo.name} --seeds {','.join(map(str, seeds))}"]
    words += ["--quick"] * quick + ["--curve"] * curve + ["--no-cache"] * (demo.with_cache and not cache)
    words += [f"--with {name}" for name in recipes]
    return " ".join(words)


@dataclass(frozen=True)
class Outputs:
    """The place of a demo's results."""

    folder: Path
    file: Path | None

    @classmethod
    def prepare(cls, demo: Demo, folder: Path, file: Path | None) -> Outputs:
        """Find out, before minutes are spent, that all is there and can be written; nothing is imported for it.

        Args:
            folder: of the report.
            file: for the numbers, if they are wanted.

        Raises:
            ArgumentError, CheckpointError: a missing package, or an output that cannot be written.
        """
        missing = [name for module, name in demo.packages.items() if importlib.util.find_spec(module) is None]
        if missing:
            raise ArgumentError(f"the demo needs {' and '.join(missing)}: pip install 'tgt-fast[{demo.extra}]'")
        return cls(prepare_folder(folder), None if file is None else prepare_file(file))

    def write_numbers(self, numbers: Mapping[str, Any]) -> None:
        if self.file is not None:
            write_json(self.file, numbers)

    def say_where(self, index: Path, console: Console) -> None:
        console.print(f"\nReport: {index}", highlight=False, soft_wrap=True)
        if self.file is not None:
            console.print(f"Numbers: {self.file}", highlight=False, soft_wrap=True)


def shown(main: MainTable, seeds: int) -> Table:
    """A demo's table for a terminal of 80 columns; all but the first column hold numbers."""
    table = Table(
        title=f"{main.title}, {seeds} seed{'s' * (seeds > 1)}", title_justify="left", title_style="bold",
        box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0),
    )  # fmt: skip
    for number, name in enumerate(main.short_header):
        table.add_column(name, justify="right" if number else "left", no_wrap=True)
    for number, row in enumerate(main.rows):
        table.add_row(*row, style="bold" if number == main.best else None, end_section=number in main.ends)
    return table
