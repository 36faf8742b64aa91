"""A process of a run that fails ends the others, too, with its error, instead of leaving them to wait for it."""

from __future__ import annotations

import itertools
import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final

import torch

from tgt_fast.errors import CheckpointError, ProcessError, TgtError

_LOOK: Final = 0.25  # seconds between two looks at what the others say
_HEARD: Final = 2.0  # how long one that fails waits until the others know
_LEAVE: Final = 10.0  # how long one that knows may go on waiting for the others inside a collective
_runs = itertools.count()  # so that the runs of a program that all processes run find each other


@contextmanager
def one_for_all(rank: int, count: int, group: Any = None) -> Iterator[None]:
    """Inside, in each of ``count`` processes that wait for each other (of ``group``), an error in one ends all.

    The first that fails writes its error into the process group's store. The others look there from a thread, and what
    breaks in them for want of the first is raised as a :class:`ProcessError` that says what it was. One that hangs in a
    collective, which nothing can interrupt, says so and ends.
    """
    if count == 1:
        yield
        return
    ranks = [] if group is None else torch.distributed.get_process_group_ranks(group)
    watch = _Watch(rank, count, f"{next(_runs)}/{min(ranks, default=0)}")
    try:
        yield
    except BaseException as error:
        first = watch.fail(error)
        if first is not None and _follows(error):
            raise ProcessError(f"in process {first[0]} of {count}: {first[1]}") from error
        raise
    finally:
        watch.stop()


def _follows(error: BaseException) -> bool:
    """True if an error may be no more than that another process is gone."""
    if isinstance(error, TgtError):
        return isinstance(error, CheckpointError) and "do not come together" in str(error)
    return isinstance(error, RuntimeError)


class _Watch:
    def __init__(self, rank: int, count: int, name: str) -> None:
        self._rank, self._count = rank, count
        self._failed, self._heard = f"tgt_fast/run/{name}/failed", f"tgt_fast/run/{name}/heard"
        store = torch.distributed.distributed_c10d._get_default_store()
        try:
            self._store: Any = store.clone()  # type: ignore[attr-defined]  # a connection of its own: the other may be in use
        except (AttributeError, RuntimeError, NotImplementedError):
            self._store = store
        self._first: tuple[int, str] | None = None  # who failed first, and how
        self._told = False
        self._lock, self._over = threading.Lock(), threading.Event()
        self._thread = threading.Thread(target=self._look, name="tgt_fast: other processes", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._over.set()
        self._thread.join(2 * _LOOK)

    def fail(self, error: BaseException) -> tuple[int, str] | None:
        """Tell the others; whose failure came first, if it was another's."""
        mine = f"{self._rank}\n{type(error).__name__}: {error}"
        try:
            self._take(self._store.compare_set(self._failed, "", mine))
            if self._first is not None and self._first[0] == self._rank:
                end = time.monotonic() + _HEARD
                while self._store.add(self._heard, 0) < self._count and time.monotonic() < end:
                    time.sleep(_LOOK / 5)
        except Exception:  # the store is gone, with the process that had it: what is known is known
            pass
        return None if self._first is None or self._first[0] == self._rank else self._first

    def _take(self, said: Any) -> None:
        with self._lock:
            if self._told:
                return
            self._told = True
            rank, _, text = bytes(said).decode(errors="replace").partition("\n")
            self._first = int(rank), text
            self._store.add(self._heard, 1)

    def _look(self) -> None:
        while not self._over.wait(_LOOK):
            try:
                if not self._told and self._store.check([self._failed]):
                    self._take(self._store.get(self._failed))
            except Exception:
                return  # the main thread will find out by itself
            if self._first is not None and not self._over.wait(_LEAVE):
                rank, text = self._first
                print(f"fit: in process {rank} of {self._count}: {text}; this process waits for it and ends",
                      file=sys.stderr, flush=True)  # fmt: skip
                os._exit(1)
