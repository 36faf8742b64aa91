"""What a demo makes and can use again: kept in the user's cache folder, found by what it was made from."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


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

        def write(file: Path, value: Any) -> None:
            file.write_text(json.dumps(value), encoding="utf-8")

        return self._get(kind, identity, make, ".json", read, write)

    def tensors(self, kind: str, identity: Any, make: Callable[[], Any]) -> Any:
        """As ``json``, for a tree of tensors, numbers and strings."""

        def read(file: Path) -> Any:
            return torch.load(file, weights_only=True, map_location="cpu")

        def write(file: Path, value: Any) -> None:
            torch.save(value, file)

        return self._get(kind, identity, make, ".pt", read, write)

    def _get(
        self,
        kind: str,
        identity: Any,
        make: Callable[[], Any],
        suffix: str,
        read: Callable[[Path], Any],
        write: Callable[[Path, Any], None],
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
            # Written beside and renamed, so that a run that is stopped leaves no half of a file under the name.
            part = file.with_name(f"{file.name}.{os.getpid()}.part")
            write(part, value)
            part.replace(file)
        except OSError:  # a cache that cannot be written costs time and nothing else
            pass
        return value


def cache_folder() -> Path:
    """The folder of the demos' artifacts: under ``$XDG_CACHE_HOME``, by default ``~/.cache``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tgt-fast" / "demos"


def fingerprint(identity: Any) -> str:
    """16 hexadecimal digits of what ``repr`` says."""
    return hashlib.sha256(repr(identity).encode()).hexdigest()[:16]
