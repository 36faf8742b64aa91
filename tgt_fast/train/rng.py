"""The states of the process-wide random number generators, under the name that training uses; whose turn they are."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from tgt_fast._rng import get_rng_state, isolated_rng, set_rng_state
from tgt_fast.errors import ArgumentError

__all__ = ["get_rng_state", "isolated_rng", "set_rng_state", "turn"]


class _Runs:
    """Under way in this process: by an object of each run its thread, and whether it set the generators."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.threads: dict[object, tuple[int, bool]] = {}


_runs = _Runs()

if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_runs.__init__)  # type: ignore[misc]  # other threads' runs are not there


@contextmanager
def turn(op: str, *, seeded: bool) -> Iterator[None]:
    """Inside, no run of another thread draws from the generators if one of the two set them.

    Raises:
        ArgumentError: another is under way.
    """
    run, here = object(), threading.get_ident()
    try:
        try:
            with _runs.lock:
                others = [other for thread, other in _runs.threads.values() if thread != here]
                if any(others) or (others and seeded):
                    raise ArgumentError(
                        f"{op}: a run of another thread is under way, and {'that' if any(others) else 'this'} one has "
                        "a seed: both draw from torch's, numpy's and Python's global generators, of which a process "
                        "has one each; run them one after the other, in processes of their own, or without a seed"
                    )
                _runs.threads[run] = here, seeded
            yield
        finally:
            _runs.threads.pop(run, None)
    except BaseException:  # perhaps an interruption of what pops
        _runs.threads.pop(run, None)
        raise
