"""Tasks in worker processes of one thread each: all cores are used, and the numbers do not depend on how many."""

from __future__ import annotations

import multiprocessing
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from typing import Any, TypeVar

import torch

from tgt_fast._processes import end_with_parent
from tgt_fast._threads import threads
from tgt_fast.errors import TgtError

Result = TypeVar("Result")


class WorkerError(TgtError, RuntimeError):
    """A worker process ended before its work."""


class Crew:
    """Runs tasks and, as each is done, what is to follow from it.

    A task's function and its arguments must be importable and picklable. With ``workers=0`` everything runs in this
    process, one after the other.
    """

    def __init__(self, executor: Executor) -> None:
        self._executor = executor
        self._waiting: dict[Future[Any], Callable[[Any], None]] = {}

    def submit(self, task: Callable[..., Result], *arguments: Any, then: Callable[[Result], None]) -> None:
        """Queue ``task(*arguments)``; ``then(its result)`` runs in this process, and may queue more."""
        self._waiting[self._executor.submit(task, *arguments)] = then

    def finish(self) -> None:
        """Return when every task, those queued meanwhile included, is done.

        Raises:
            WorkerError: a worker process died. What a task raises is passed on.
        """
        while self._waiting:
            done, _ = wait(self._waiting, return_when=FIRST_COMPLETED)
            for future in done:
                then = self._waiting.pop(future)
                try:
                    result = future.result()
                except BrokenProcessPool as error:
                    raise WorkerError(
                        "a worker process died (killed, or out of memory?); no result was written"
                    ) from error
                then(result)


@contextmanager
def crew(workers: int) -> Iterator[Crew]:
    """A crew of ``workers`` processes, stopped on leaving, an exception's way out included."""
    if workers == 0:
        with threads(1):
            yield Crew(_Inline())
        return
    # Spawned: a fork would copy the threads' locks of whatever this process has run.
    executor = ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn"), initializer=_start_worker)
    try:
        yield Crew(executor)
    finally:
        executor.shutdown(wait=True, cancel_futures=True)


def _start_worker() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent hears it, and ends the work
    end_with_parent()
    torch.set_num_threads(1)


class _Inline(Executor):
    """Runs a task when it is submitted."""

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        try:
            future.set_result(fn(*args, **kwargs))
        except Exception as error:
            future.set_exception(error)
        return future
