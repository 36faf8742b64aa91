"""The processes of a distributed program: which one this is, and what all of them have to say."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable
from multiprocessing.connection import wait
from typing import Any, TypeVar

import torch

T = TypeVar("T")


def connected() -> bool:
    """True if this process has a default process group."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def place() -> tuple[int, int]:
    """This process's rank, and of how many."""
    return (torch.distributed.get_rank(), torch.distributed.get_world_size()) if connected() else (0, 1)


def exchanged(mine: Any, group: Any = None) -> list[Any]:
    """Contributions of each process of the group, by default of all, in the order of ranks."""
    found: list[Any] = [None] * torch.distributed.get_world_size(group)
    torch.distributed.all_gather_object(found, mine, group=group)
    return found


def end_with_parent() -> None:
    """In a worker process: SIGTERM to itself once the process that started it is gone, however that ended."""
    parent = multiprocessing.parent_process()
    if parent is None:
        return
    gone = parent.sentinel

    def watch() -> None:
        wait([gone])
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()


def done_by_each(
    work: Callable[[], T], exchange: Callable[[Any], list[Any]], refusal: Callable[[int, str, str], Exception]
) -> list[T]:
    """Results of ``work`` in each process. Where it fails in one all raise, so that none waits for one that stopped.

    Args:
        exchange: brings together what each has.
        refusal: the error for a failure elsewhere, from the rank, the name of the error's type and its text.
    """
    failure: Exception | None = None
    made: T | None = None
    try:
        made = work()
    except Exception as error:
        failure = error
    found = exchange((None if failure is None else (type(failure).__name__, str(failure)), made))
    if failure is not None:
        raise failure
    for rank, (failed, _) in enumerate(found):
        if failed is not None:
            raise refusal(rank, *failed)
    return [made for _, made in found]
