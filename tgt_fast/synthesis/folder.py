"""The rows of a folder, in either form of file: what a synthesis writes to and a data set reads from."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, Final, Protocol

from tgt_fast._opening import as_path
from tgt_fast.cache.fingerprint import Fingerprint
from tgt_fast.cache.index import Ids, Places
from tgt_fast.cache.keys import SYNTHETIC
from tgt_fast.cache.layout import Layout, Rows
from tgt_fast.cache.store import Store
from tgt_fast.errors import ArgumentError
from tgt_fast.synthesis.parquet import SUFFIX, ParquetRows, is_address

FORMATS: Final = ("safetensors", "parquet")
DROPPED: Final = "dropped"  # a folder in the folder, of the keys of examples that filters refused
SHARD_SECONDS: Final = 60.0  # of work that a killed process loses at the most
SHARD_BYTES: Final = 64 << 20


class RowStore(Protocol):
    """What both forms of files do; see :class:`tgt_fast.cache.store.Store`."""

    @property
    def stored_fingerprint(self) -> Fingerprint | None: ...
    @property
    def layout(self) -> Layout | None: ...
    def ids(self) -> Ids: ...
    def find(self, ids: Ids) -> Places: ...
    def gather(self, where: Places, names: Collection[str]) -> Rows: ...
    def append(self, ids: Ids, rows: Rows, layout: Layout) -> int: ...
    def refresh(self) -> None: ...
    def flush(self) -> None: ...
    def close(self) -> None: ...


def open_rows(
    op: str,
    folder: Any,
    fingerprint: Fingerprint | None,
    *,
    format: str,
    shard_bytes: int = SHARD_BYTES,
    notes: Mapping[str, Any] | None = None,
) -> RowStore:
    """The rows of a folder: with a fingerprint to write to, without to read from.

    Raises:
        ArgumentError: no path; a folder of the other form.
        CacheError, StaleCacheError: it cannot be used, or was made by another teacher or with other options.
    """
    if format == "parquet":
        return ParquetRows(op, folder, fingerprint, shard_bytes=shard_bytes, shard_seconds=SHARD_SECONDS, notes=notes)
    if is_address(folder):
        raise ArgumentError(
            f"{op}: shards of safetensors are read through memory maps, so in a folder; give {folder!r} "
            'format="parquet"'
        )
    path = as_path(op, "a folder", folder)
    if fingerprint is not None and any(path.glob(f"*{SUFFIX}")):
        raise ArgumentError(f'{op}: {path} holds Parquet files; go on with format="parquet", or use another folder')
    store = Store(
        path, fingerprint, writable=fingerprint is not None, shard_bytes=shard_bytes, shard_seconds=SHARD_SECONDS,
        checksums=True, keys=SYNTHETIC, op=op, notes=notes,
    )  # fmt: skip
    return store


def beneath(folder: Any, name: str) -> Any:
    """A folder in a folder, which may be one of another file system."""
    return f"{folder.rstrip('/')}/{name}" if is_address(folder) else as_path("synthesize", "a folder", folder) / name
