"""Files that appear whole or not at all, and the file system's errors as ``CheckpointError``."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

from tgt_fast._files import sha256, sync, write_text
from tgt_fast.errors import CheckpointError

__all__ = [
    "make_writable",
    "replace_file",
    "reported",
    "sha256",
    "sync",
    "temporary_name",
    "write_tensors",
    "write_text",
]


@contextmanager
def reported(path: Path, verb: str) -> Iterator[None]:
    """Inside ``with reported(path, "write"):`` an error of the file system becomes a CheckpointError."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"cannot {verb} {path}: {getattr(error, 'strerror', None) or error}") from error


def make_writable(folder: Path) -> None:
    """Make ``folder`` and prove that it can be written to, before work is spent that could not be saved.

    Raises:
        CheckpointError: it cannot.
    """
    probe = folder / ".probe.tmp"
    with reported(folder, "write to"):
        folder.mkdir(parents=True, exist_ok=True)
        probe.write_bytes(b"\0")
        probe.unlink()


def replace_file(path: Path, write: Callable[[Path], None]) -> None:
    """Write beside ``path``, then rename over it: a reader, or a crash, meets the old file or the new, whole.

    Raises:
        CheckpointError: it cannot be written; an older file of that name is then intact.
    """
    temporary = temporary_name(path)
    with reported(path, "write"):
        try:
            write(temporary)
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        sync(path.parent)


def temporary_name(path: Path) -> Path:
    """Always the same one, so that what a killed process left is overwritten by the next."""
    return path.parent / f".{path.name}.tmp"


def write_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    safetensors.torch.save_file(tensors, path)
    sync(path)
