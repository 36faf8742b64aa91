"""Files that appear whole or not at all, and the file system's errors as ``CheckpointError``."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

from tgt_fast.errors import CheckpointError


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


def write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
    sync(path)


def write_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    safetensors.torch.save_file(tensors, path)
    sync(path)


def sync(path: Path) -> None:
    """Have the data of a file, or the names in a folder, on the disk before the next step relies on it."""
    if os.name == "nt" and path.is_dir():
        return  # Windows opens no folder
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
