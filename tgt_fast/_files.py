"""Files that appear whole or not at all.

A file is written beside its place, under a name of ours that nobody can guess, and renamed when it is on the disk.
While it is written its writer holds a lock on it: a file of such a name that nobody holds is what a killed writer left.
"""

from __future__ import annotations

import os
import platform
import re
import secrets
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO, Final

try:
    import fcntl
except ImportError:  # Windows, where a file that is open cannot be removed
    fcntl = None  # type: ignore[assignment]

MARK: Final = "tgt_fast_"  # in the names of our files: a folder may hold those of others
TEMPORARY: Final = ".tmp"
_ABANDONED: Final = 3600.0  # seconds; a file that nobody has written to for so long is no longer being written
_HOST: Final = re.sub("[^A-Za-z0-9]+", "", platform.node())[:20]
_OURS: Final = re.compile(rf"\.{MARK}[0-9a-f]{{16}}-([A-Za-z0-9]*){re.escape(TEMPORARY)}")
_SAFE: Final = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)


class NewFile:
    """A file that is written, and has no name of its own yet."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._path: Path | None = None
        self._file: BinaryIO | None = None

    @property
    def file(self) -> BinaryIO:
        assert self._file is not None
        return self._file

    @property
    def place(self) -> Path:
        """The path at which it lies meanwhile."""
        assert self._path is not None
        return self._path

    def open(self) -> None:
        """Make it, with the permissions that the umask leaves; nothing that exists is opened, and no link followed."""
        while self._file is None:
            self._path = self._folder / f".{MARK}{secrets.token_hex(8)}-{_HOST}{TEMPORARY}"
            try:
                descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_EXCL | _SAFE, 0o666)
            except FileExistsError:
                self._path = None  # not ours to remove
                continue
            self._file = os.fdopen(descriptor, "wb")
            if _locked(descriptor) is False or os.fstat(descriptor).st_nlink == 0:
                self.discard()  # remove_dead() took it for a dead one's before it was locked

    def take_name(self, path: Path) -> None:
        """In the place of an older file. What a crash must not tear is to be synced before."""
        if os.name == "nt":
            self.file.close()
        os.replace(self.place, path)
        self._path = None

    def take_free_name(self, path: Path) -> None:
        """Unless it is taken: of several writers the first one's file stands. To be synced before."""
        try:
            os.link(self.place, path)  # fails where the name is taken
        except FileExistsError:
            pass
        except OSError:  # a file system without hard links: the window between question and answer stays
            if not os.path.lexists(path):
                self.take_name(path)

    def sync(self) -> None:
        """Have what was written on the disk."""
        self.file.flush()
        os.fsync(self.file.fileno())

    def discard(self) -> None:
        """Close it, and remove it unless it has its name. The lock goes last, so that no other takes it for dead."""
        path, file = self._path, self._file
        if path is not None and os.name != "nt":
            path.unlink(missing_ok=True)
        if file is not None:
            with suppress(OSError):  # what is left to write is in the way of closing, and is not wanted
                file.close()
        if path is not None and os.name == "nt":
            path.unlink(missing_ok=True)
        self._path = self._file = None


@contextmanager
def new_file(folder: Path) -> Iterator[NewFile]:
    """A file in ``folder`` that is gone after the block unless it was given a name.

    Raises:
        OSError: it cannot be made.
    """
    new = NewFile(folder)
    try:
        try:
            new.open()
            yield new
        finally:
            new.discard()
    except BaseException:  # perhaps an interruption of discard() itself
        new.discard()
        raise


def remove_dead(folder: Path) -> None:
    """Remove what killed writers left half written in ``folder``; what others are writing stays.

    Locks may not reach other hosts: what one of those left goes when it is an hour old.
    """
    with suppress(OSError), os.scandir(folder) as entries:
        found = [(entry.path, match[1]) for entry in entries if (match := _OURS.fullmatch(entry.name))]
        for path, host in found:
            with suppress(OSError):  # another's, or removed by another
                _remove_if_dead(path, host)


def _remove_if_dead(path: str, host: str) -> None:
    descriptor = os.open(path, os.O_RDWR | getattr(os, "O_NONBLOCK", 0) | _SAFE)
    try:
        found = os.fstat(descriptor)
        lock = _locked(descriptor)
        abandoned = time.time() - found.st_mtime > _ABANDONED
        dead = stat.S_ISREG(found.st_mode) and (abandoned if lock is None or host != _HOST else lock)
        if dead and lock is not False and fcntl is not None:
            os.unlink(path)
    finally:
        os.close(descriptor)
    if dead and fcntl is None:
        os.unlink(path)


def _locked(descriptor: int) -> bool | None:
    """Take the lock; False where another has it, None where the file system has none."""
    if fcntl is None:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def sync(path: Path) -> None:
    """Have the names in a folder on the disk before the next step relies on them."""
    if os.name == "nt":
        return  # Windows opens no folder
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
