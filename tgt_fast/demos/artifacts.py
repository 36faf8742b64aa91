"""Products of a demo that it can use again: kept in the user's cache folder, found by what it was made from."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import torch

from tgt_fast._files import new_file, remove_dead


class Artifacts:
    """Files in a folder, each named by a kind and a fingerprint of what it was made from.

    With ``folder=None`` nothing is kept, and everything is made anew.
    """

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder

    def json(self, kind: str, identity: Any, make: Callable[[], Any]) -> Any:
        """The value made from ``identity``, which JSON can hold; made by ``make()`` where it is not there."""

        def read(file: Path) -> Any:
            return json.loads(file.read_text(encoding="utf-8"))

        def write(file: BinaryIO, value: Any) -> None:
            file.write(json.dumps(value).encode())

        return self._get(kind, identity, make, ".json", read, write)

    def tensors(self, kind: str, identity: Any, make: Callable[[], Any]) -> Any:
        """As ``json``, for a tree of tensors, numbers and strings."""

        def read(file: Path) -> Any:
            return torch.load(file, weights_only=True, map_location="cpu")

        def write(file: BinaryIO, value: Any) -> None:
            torch.save(value, file)

        return self._get(kind, identity, make, ".pt", read, write)

    def _get(
        self,
        kind: str,
        identity: Any,
        make: Callable[[], Any],
        suffix: str,
        read: Callable[[Path], Any],
        write: Callable[[BinaryIO, Any], None],
    ) -> Any:
        if self.folder is None:
            return make()
        file = self.folder / f"{kind}-{fingerprint(identity)}{suffix}"
        if file.exists():
            try:
                return read(file)
            except (OSError, ValueError, RuntimeError, EOFError):  # cut short or not ours: made again
                pass
        value = make()
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            remove_dead(self.folder)
            with new_file(self.folder) as new:
                write(new.file, value)
                new.take_name(file)
        except OSError:  # a cache that cannot be written costs time and nothing else
            pass
        return value


def cache_folder() -> Path:
    """The folder of the demos' artifacts: under ``$XDG_CACHE_HOME``, by default ``~/.cache``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tgt-fast" / "demos"


def fingerprint(identity: Any) -> str:
    """16 hexadecimal digits of what ``repr`` says."""
    return hashlib.sha256(repr(identity).encode()).hexdigest()[:16]
