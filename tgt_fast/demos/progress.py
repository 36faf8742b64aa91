"""How a demo says how far it is, and that it cannot begin."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Shown

from tgt_fast.errors import ArgumentError

Progress = Callable[[str, int, int], None]  # phase, done, total


def need(packages: Mapping[str, str], extra: str = "demo") -> None:
    """That all of ``packages`` (module: the name it is installed under) are there; nothing is imported.

    Raises:
        ArgumentError: some are not; it names them and the extra that brings them.
    """
    missing = [name for module, name in packages.items() if importlib.util.find_spec(module) is None]
    if missing:
        raise ArgumentError(f"the demo needs {' and '.join(missing)}: pip install 'tgt-fast[{extra}]'")


@contextmanager
def bars(console: Console) -> Iterator[Progress]:
    """A bar a phase; plain lines where the output is no terminal."""
    if not console.is_terminal:

        def say(phase: str, done: int, total: int) -> None:
            if done and (done == total or done % 7 == 0):
                console.print(f"{phase}: {done} of {total}", highlight=False)

        yield say
        return
    name = TextColumn("{task.description:12s}")
    columns = (SpinnerColumn(), name, BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Shown(*columns, console=console) as shown:
        tasks: dict[str, TaskID] = {}

        def advance(phase: str, done: int, total: int) -> None:
            if phase not in tasks:
                tasks[phase] = shown.add_task(phase, total=total)
            shown.update(tasks[phase], completed=done)

        yield advance
