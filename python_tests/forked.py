"""The words of a forked child; for scripts that tests run in processes of their own."""

from __future__ import annotations

import os
from collections.abc import Callable


def said_by_child(say: Callable[[], str]) -> str:
    """The result of ``say`` in a forked child, or how that ended."""
    reader, writer = os.pipe()
    pid = os.fork()
    if not pid:
        os.write(writer, say().encode())
        os._exit(0)
    os.close(writer)
    with open(reader) as file:
        said = file.read()
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    return said or f"ended with {code}"
