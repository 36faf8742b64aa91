"""Ctrl-C during the seconds in which the command line imports its packages: a line and a status, no traceback.

Nothing is changed in a process that only imports the package.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
from pathlib import Path
from typing import Any, Final, NoReturn

STATUS: Final = 130  # as shells say it
NOTHING: Final = "no result was written"


def say(what: str) -> None:
    print("tgt-fast: interrupted" + (f"; {what}" if what else ""), file=sys.stderr, flush=True)


def leave_to_main() -> None:
    """From here on an interruption is a KeyboardInterrupt again."""
    if signal.getsignal(signal.SIGINT) is _end:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _end(*_: Any) -> NoReturn:
    """An exception would come out of any of a thousand modules, or be lost in one."""
    say(NOTHING)
    os._exit(STATUS)


def _is_command() -> bool:
    """True if this process is ``tgt-fast`` or ``python -m tgt_fast``, and none that one of these started."""
    if multiprocessing.parent_process() is not None or threading.current_thread() is not threading.main_thread():
        return False
    name = (getattr(sys, "argv", None) or [""])[0]
    if name == "-m":  # as long as the package of the module is imported
        words = sys.orig_argv
        return "tgt_fast" in words[words.index("-m") + 1 :][:1]
    return Path(name).stem == "tgt-fast"


if _is_command() and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, _end)
