"""Ctrl-C at every instruction of some code in turn."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any


def interrupted_at_each_instruction(files: set[str | None], work: Callable[[], None], check: Callable[[], None]) -> int:
    """KeyboardInterrupt at every instruction of these files in turn; how many of them came out of ``work``."""
    came_out = 0
    for at in range(10_000):
        left = at

        def trace(frame: Any, event: str, _: Any) -> Any:
            nonlocal left
            if frame.f_code.co_filename not in files:
                return None
            frame.f_trace_opcodes = True
            if event == "opcode":
                if left == 0:
                    sys.settrace(None)
                    raise KeyboardInterrupt
                left -= 1
            return trace

        sys.settrace(trace)
        try:
            work()
        except KeyboardInterrupt:
            came_out += 1
        finally:
            sys.settrace(None)
        if left > 0:
            return came_out
        check()
    raise AssertionError("it does not end")
