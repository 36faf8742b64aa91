"""Progress of a demo, as it is told."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Shown

Progress = Callable[[str, int, int], None]  # phase, done, total


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
