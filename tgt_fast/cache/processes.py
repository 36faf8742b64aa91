"""A cache in other processes: what goes with it when it is pickled, and its rows when such a process ends."""

from __future__ import annotations

import multiprocessing
import multiprocessing.util
import pickle
import weakref
from collections.abc import Callable
from multiprocessing.context import get_spawning_popen
from multiprocessing.reduction import ForkingPickler
from typing import Any, Protocol


class Writer(Protocol):
    """A holder of rows to write."""

    def close(self) -> None: ...


def close_at_exit(writer: Writer) -> None:
    """In a process that multiprocessing started, whose end runs no ``atexit``: close the writer when it ends."""
    if multiprocessing.parent_process() is not None:
        multiprocessing.util.Finalize(None, _close, (weakref.ref(writer),), exitpriority=0)


def _close(reference: Callable[[], Writer | None]) -> None:
    writer = reference()
    if writer is not None:
        writer.close()


def packed(teacher: Any) -> tuple[bytes | None, str]:
    """A teacher for another process; None where it cannot go there, and the end of a sentence that says why."""
    if teacher is None:
        return None, ""
    # To a process that is being started tensors go as shared memory.
    dumps = pickle.dumps if get_spawning_popen() is None else ForkingPickler.dumps
    try:
        return bytes(dumps(teacher)), ""
    except Exception as error:  # whatever a part of it raises
        return None, (
            f": it could not be pickled ({type(error).__name__}: {error}). A module, or a function at the top of a "
            "file, can be; or fill the cache before"
        )


def unpacked(teacher: bytes | None) -> Any:
    return None if teacher is None else pickle.loads(teacher)
