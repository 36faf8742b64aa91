"""Interruptions that are not lost: what was made is written before a process ends."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_heard = False


@contextmanager
def interruptible() -> Iterator[None]:
    """Inside, SIGTERM is as Ctrl-C, and :func:`check` knows of both."""
    global _heard
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    numbers = [signal.SIGTERM]
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        numbers.append(signal.SIGINT)
    before = {number: signal.signal(number, interrupt) for number in numbers}
    try:
        yield
    finally:
        _heard = False
        for number, handler in before.items():
            signal.signal(number, handler)


def interrupt(*_: Any) -> None:
    """A handler of signals."""
    global _heard
    _heard = True
    raise KeyboardInterrupt


def check() -> None:
    """KeyboardInterrupt once more, where the first was lost: what ``__del__`` or a garbage collector's callback raises
    goes no further, and a scheduler sends its signal once."""
    global _heard
    if _heard:
        _heard = False
        raise KeyboardInterrupt
