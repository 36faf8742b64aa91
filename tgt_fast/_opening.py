"""Opening what lies in a folder of files of ours, which may be anything."""

from __future__ import annotations

import errno
import json
import os
import stat
from pathlib import Path
from typing import Any, BinaryIO

from tgt_fast.errors import ArgumentError


def as_path(op: str, name: str, value: Any) -> Path:
    """
    Raises:
        ArgumentError: it is none.
    """
    if not isinstance(value, (str, os.PathLike)) or not isinstance(text := os.fspath(value), str) or "\0" in text:
        raise ArgumentError(f"{op}: {name} must be a path, got {value!r}")
    return Path(text)


def open_file(path: Path) -> BinaryIO:
    """A regular file, to be read. A FIFO would wait for a writer that never comes.

    Raises:
        OSError: it cannot be opened, or is something else.
    """
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, "it is no regular file", str(path))
        return os.fdopen(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def parse_json(text: bytes | str) -> Any:
    """
    Raises:
        ValueError: it is none, or nested too deep.
    """
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("it is nested too deep") from error
