"""Outputs of commands: found writable before the work begins, written whole or not at all."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

from tgt_fast.errors import ArgumentError
from tgt_fast.train.files import make_writable, replace_file, standard_json

written: dict[Path, None] = {}  # what was put in its place in this process, in that order

NEEDED_BYTES = 8 << 20  # a page with its plots takes 1 to 3 MB


def prepare_folder(folder: str | os.PathLike[str], needed: int = NEEDED_BYTES) -> Path:
    """Make the folder and prove that files can be put there, before minutes are spent on what they would hold.

    Raises:
        ArgumentError: a file stands in its place, or the disk has too little room.
        CheckpointError: it cannot be made or written to.
    """
    path = Path(folder).expanduser()
    if path.exists() and not path.is_dir():
        raise ArgumentError(f"cannot write to {path}: it is a file, not a folder")
    make_writable(path)
    free = shutil.disk_usage(path).free
    if free < needed:
        raise ArgumentError(
            f"cannot write to {path}: {free / 2**20:.1f} MB are free, {needed / 2**20:.0f} MB are needed"
        )
    return path


def prepare_file(file: str | os.PathLike[str]) -> Path:
    """The same for a single small file.

    Raises:
        ArgumentError: a folder stands in its place, or the disk is full.
        CheckpointError: its folder cannot be made or written to.
    """
    path = Path(file).expanduser()
    if path.is_dir():
        raise ArgumentError(f"cannot write {path}: it is a folder, not a file")
    prepare_folder(path.parent, needed=1 << 16)
    return path


def write_bytes(path: Path, content: bytes) -> None:
    """The file, whole or not at all; an older one is replaced only by a complete new one.

    Raises:
        CheckpointError: it cannot be written.
    """
    _replace(path, content)


def write_json(path: Path, value: Any) -> None:
    """Standard JSON, so NaN and infinities, which it does not have, become null.

    Raises:
        CheckpointError: it cannot be written.
    """
    text = json.dumps(standard_json(value), indent=2, allow_nan=False) + "\n"
    _replace(path, text.encode())


def _replace(path: Path, content: bytes) -> None:
    before = _identity(path)
    try:
        replace_file(path, lambda file: file.write(content))
    finally:  # an interruption may come when it has its name already
        if _identity(path) not in (None, before):
            written[path] = None


def _identity(path: Path) -> tuple[int, int] | None:
    """Another file is another one; None where there is none."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_ino, found.st_mtime_ns
