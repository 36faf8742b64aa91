"""Progress bars that leave nothing behind: no thread, and on a terminal no line."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, TypeVar

from tqdm import tqdm

from tgt_fast._processes import place

T = TypeVar("T")

_QUIET: ContextVar[bool] = ContextVar("_QUIET", default=False)
_PATIENCE = 1.0  # seconds; what is over sooner shows no bar of its own accord


class Bar(tqdm):  # type: ignore[misc]
    """A bar without tqdm's monitoring thread: it outlives the run, and DataLoader workers are forked beside it."""

    monitor_interval = 0


@contextmanager
def quiet(wanted: bool) -> Iterator[None]:
    """Inside, if ``wanted``, only bars that are asked for are shown."""
    token = _QUIET.set(wanted or _QUIET.get())
    try:
        yield
    finally:
        _QUIET.reset(token)


def batches(made: Iterable[T], loader: Any, name: str, progress: bool | None) -> Iterator[T]:
    """Results ``made`` of a loader's batches, with a bar beside it, which the first of several processes shows.

    ``progress``: None shows it on a terminal, after a second, where nothing is :func:`quiet`.
    """
    if progress is False or place()[0] != 0 or (progress is None and _QUIET.get()):
        yield from made
        return
    try:
        total = len(loader)
    except (TypeError, NotImplementedError):  # a stream
        total = None
    when: dict[str, Any] = {"disable": None, "delay": _PATIENCE} if progress is None else {}
    with Bar(made, desc=name, unit="batch", total=total, leave=False, **when) as bar:
        yield from bar
