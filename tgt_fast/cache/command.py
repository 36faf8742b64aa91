"""``tgt-fast cache build``, ``info`` and ``verify``."""

from __future__ import annotations

import importlib
import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from tgt_fast._files import TEMPORARY
from tgt_fast.cache.cache import TeacherCache
from tgt_fast.cache.shard import TORN
from tgt_fast.errors import ArgumentError


def build(
    folder: Path, teacher: str, data: str, console: Console, *, batch_size: int | None = None, **settings: Any
) -> None:
    """Label what is missing of a data set.

    Args:
        folder: of the cache.
        teacher, data: ``package.module:factory``; called without arguments they give a teacher, and an iterable of
            batches ``(ids, x)`` or ``(ids, x, y)``.
        batch_size: samples that the teacher is given at a time.
        settings: those of :class:`TeacherCache`.

    Raises:
        ArgumentError: a factory that cannot be found.
        What :class:`TeacherCache` and its ``fill`` raise.
    """
    make_teacher, make_data = factory("--teacher", teacher), factory("--data", data)
    with TeacherCache(folder, make_teacher(), **settings) as cache:
        console.print(f"fingerprint {cache.fingerprint}", markup=False, highlight=False, soft_wrap=True)
        computed = cache.fill(make_data(), batch_size=batch_size, progress=sys.stderr.isatty())
        told = f"{computed} samples computed, {len(cache)} in {folder}"
    console.print(told, markup=False, highlight=False, soft_wrap=True)


def factory(option: str, text: str) -> Callable[[], Any]:
    """The object that ``package.module:name`` names; modules in the current folder are found, too.

    Raises:
        ArgumentError: there is no such thing, or it cannot be called.
    """
    module, colon, name = text.partition(":")
    if not (module and colon and name):
        raise ArgumentError(f"{option}: expected package.module:factory, got {text!r}")
    here = os.getcwd()
    if here not in sys.path:  # as `python -m` has it
        sys.path.insert(0, here)
    try:
        found: Any = importlib.import_module(module)
        for part in name.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError) as error:
        raise ArgumentError(f"{option}: cannot load {text}: {error}") from error
    if not callable(found):
        raise ArgumentError(f"{option}: {text} is a {type(found).__name__}, and must be a function without arguments")
    made: Callable[[], Any] = found
    return made


def info(folder: Path, console: Console) -> None:
    """Show what a folder holds."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torn shards have a line of their own
        cache = TeacherCache.open(folder)
    with cache:
        layout, shards, torn = cache.contents()
        table = Table(title=str(folder), show_header=False, title_justify="left")
        table.add_column()
        table.add_column(overflow="fold")
        table.add_row("samples", str(len(cache)))
        table.add_row("shards", f"{len(shards)}, {sum(shards.values()) / 1e6:.4g} MB")
        table.add_row("a sample", f"{layout.row_bytes} bytes")
        for name, field in layout.fields.items():
            table.add_row(name, f"{field} a sample, {field.row_bytes} bytes")
        table.add_row("classes", str(layout.classes))
        for name, value in cache.fingerprint.parts.items():
            table.add_row(name, "-" if value is None else str(value))
        table.add_row("fingerprint", cache.fingerprint)
        left = [path.name for path in folder.iterdir() if path.name.endswith((TORN, TEMPORARY))]
        table.add_row("torn", ", ".join(torn) or "none seen (tgt-fast cache verify reads all)")
        table.add_row("left by torn or killed writers", str(len(left)))
    console.print(table, markup=False, highlight=False)


def verify(folder: Path, console: Console) -> bool:
    """Read every shard and compare its checksum; whether all are whole. Changes nothing."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with TeacherCache.open(folder) as cache:
            torn = cache.verify()
            whole, samples = len(cache.contents().shards), len(cache)
    for name, reason in sorted(torn.items()):
        console.print(f"{folder / name}: {reason}", markup=False, highlight=False, soft_wrap=True)
    told = f"{whole} shards are whole, with {samples} samples; {len(torn)} are torn"
    if torn:
        told += ": the next cache that may write sets them aside and computes their rows again"
    console.print(told, markup=False, highlight=False, soft_wrap=True)
    return not torn


def dtype_named(name: str | None) -> torch.dtype | None:
    return None if name is None else getattr(torch, name)
