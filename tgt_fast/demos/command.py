"""What the command of every demo does around its run: checks before it, table and files after it."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from tgt_fast.errors import ArgumentError
from tgt_fast.report import prepare_file, prepare_folder, write_json


@dataclass(frozen=True)
class Outputs:
    """Where the results of a demo go."""

    folder: Path
    file: Path | None

    @classmethod
    def prepare(cls, packages: Mapping[str, str], folder: Path, file: Path | None, extra: str = "demo") -> Outputs:
        """Find out, before minutes are spent, that all is there and can be written.

        Args:
            packages: what the demo needs, module: the name it is installed under; nothing is imported.
            folder: of the report.
            file: for the numbers, if they are wanted.
            extra: brings the packages.

        Raises:
            ArgumentError, CheckpointError: a missing package, or an output that cannot be written.
        """
        missing = [name for module, name in packages.items() if importlib.util.find_spec(module) is None]
        if missing:
            raise ArgumentError(f"the demo needs {' and '.join(missing)}: pip install 'tgt-fast[{extra}]'")
        return cls(prepare_folder(folder), None if file is None else prepare_file(file))

    def write_numbers(self, numbers: Mapping[str, Any]) -> None:
        if self.file is not None:
            write_json(self.file, numbers)

    def say_where(self, index: Path, console: Console) -> None:
        console.print(f"\nReport: {index}", highlight=False, soft_wrap=True)
        if self.file is not None:
            console.print(f"Numbers: {self.file}", highlight=False, soft_wrap=True)


def result_table(title: str, header: Sequence[str]) -> Table:
    """A table of methods, without rows as yet; all but the first column hold numbers."""
    table = Table(
        title=title, title_justify="left", title_style="bold", box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0)
    )
    for number, name in enumerate(header):
        table.add_column(name, justify="right" if number else "left", no_wrap=True)
    return table


def chosen(settings: Any, seeds: Sequence[int] | None, quick: bool) -> tuple[Any, Sequence[int]]:
    """The settings and the seeds of a run. ``settings``: the demo's module of that name."""
    made = settings.Settings()
    if quick:
        made = settings.quick(made)
    if seeds is None:
        seeds = (0,) if quick else (0, 1, 2)
    return made, seeds


def print_findings(table: Table, sentences: Sequence[str], seconds: float, console: Console) -> None:
    """A filled table and what it says."""
    console.print()
    console.print(table)
    for sentence in sentences:
        console.print(f"• {sentence}", highlight=False)
    console.print(f"{seconds:.0f} s in all.", highlight=False)
