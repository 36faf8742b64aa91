"""Forked children, in which PyTorch's own parallel loops wait for threads that only the parent has.

The compiled core has threads for them (``csrc/cpu/thread_pool.h``); what an op asks of PyTorch runs on one.
"""

from __future__ import annotations

import functools
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")

_forked = False


class _Held(threading.local):
    threads: int | None = None  # that the user wants, while PyTorch is held to one


_held = _Held()


def _after_fork() -> None:
    global _forked
    _forked = True


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def forked() -> bool:
    """True if this process was forked from one that had imported this package."""
    return _forked


def threads() -> int:
    """The threads that the user wants of the core: ``torch.get_num_threads()``."""
    return torch.get_num_threads() if _held.threads is None else _held.threads


def one_thread_in_forks(function: Callable[P, R]) -> Callable[P, R]:
    """In a forked child PyTorch's own ops run on one thread inside ``function``."""

    @functools.wraps(function)
    def held(*arguments: P.args, **options: P.kwargs) -> R:
        if not _forked or torch.compiler.is_compiling():
            return function(*arguments, **options)
        with one_thread():
            return function(*arguments, **options)

    return held


@contextmanager
def one_thread() -> Iterator[None]:
    """Within it PyTorch's own ops run on one thread, and the core on as many as before."""
    if _held.threads is not None:
        yield
        return
    _held.threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        yield
    finally:
        torch.set_num_threads(_held.threads)
        _held.threads = None
