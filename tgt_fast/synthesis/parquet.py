"""Rows in Parquet files, in a folder or at an address that fsspec knows.

A file is written whole, under a name that its keys give it: a worker that makes the same rows again, because nobody saw
the first one finish, puts the same file in the same place. Readers of other kinds so meet no row twice.
"""

from __future__ import annotations

import hashlib
import io
import os
import time
import warnings
from collections import OrderedDict
from collections.abc import Collection, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from tgt_fast._files import new_file, remove_dead, sync
from tgt_fast._opening import as_path
from tgt_fast._optional import optional
from tgt_fast.cache.fingerprint import Fingerprint, differences
from tgt_fast.cache.index import MISSING, ROW_BITS, ROW_MASK, Ids, Index, Places, places
from tgt_fast.cache.keys import SYNTHETIC
from tgt_fast.cache.layout import Layout, Rows
from tgt_fast.cache.manifest import NAME as MANIFEST
from tgt_fast.cache.pending import Pending
from tgt_fast.cache.shard import TORN
from tgt_fast.cache.store import reported
from tgt_fast.errors import ArgumentError, CacheError, ShapeError, StaleCacheError
from tgt_fast.synthesis import arrow

SUFFIX: Final = ".parquet"
_GROUP_BYTES: Final = 1 << 20  # of rows that are decoded together
_KEPT: Final = 16  # decoded groups


class _File(NamedTuple):
    name: str
    starts: list[int]  # the first row of each group, and the number of rows
    ids: Ids


class Place:
    """A folder on this machine, or one of another file system."""

    def __init__(self, op: str, folder: Any) -> None:
        self._files: Any = None
        if is_address(folder):
            self.shown = folder
            self._files, self._path = optional("fsspec.core", "parquet", op).url_to_fs(folder)
        else:
            self.local = as_path(op, "a folder", folder)
            self.shown = str(self.local)

    def make(self) -> None:
        if self._files is not None:
            self._files.makedirs(self._path, exist_ok=True)
            return
        with reported(self.local, "write to"):
            self.local.mkdir(parents=True, exist_ok=True)
        remove_dead(self.local)

    def names(self) -> list[str]:
        try:
            if self._files is not None:
                self._files.invalidate_cache(self._path)
                return sorted(str(found).rsplit("/", 1)[-1] for found in self._files.ls(self._path, detail=False))
            with reported(self.local, "read", but=(FileNotFoundError,)):
                return sorted(os.listdir(self.local))
        except FileNotFoundError:
            return []

    def open(self, name: str) -> Any:
        if self._files is not None:
            return self._files.open(f"{self._path}/{name}", "rb")
        return open(self.local / name, "rb")

    def write(self, name: str, content: Any) -> None:
        if self._files is not None:
            self._files.pipe_file(f"{self._path}/{name}", bytes(content))
            return
        with reported(self.local, "write to"):
            with new_file(self.local) as new:
                new.file.write(content)
                new.sync()
                new.take_name(self.local / name)
            sync(self.local)

    def remove(self, name: str) -> None:
        if self._files is not None:
            self._files.rm_file(f"{self._path}/{name}")
            return
        with reported(self.local, "write to"), suppress(FileNotFoundError):
            os.unlink(self.local / name)

    def set_aside(self, name: str) -> None:
        if self._files is not None:
            self._files.mv(f"{self._path}/{name}", f"{self._path}/{name}{TORN}")
            return
        with reported(self.local, "rename"), suppress(FileNotFoundError):
            os.replace(self.local / name, self.local / (name + TORN))


class ParquetRows:
    """As :class:`tgt_fast.cache.store.Store`, of files that other programs read.

    Raises:
        DependencyError: pyarrow is not installed.
        CacheError, StaleCacheError, ArgumentError: a folder that cannot be used, or was made otherwise.
    """

    def __init__(
        self,
        op: str,
        folder: Any,
        fingerprint: Fingerprint | None,
        *,
        shard_bytes: int,
        shard_seconds: float,
        notes: Mapping[str, Any] | None = None,
    ) -> None:
        self._pa, self._pq = arrow.modules(op)
        self._op, self._given, self._notes = op, fingerprint, dict(notes or {})
        self._shard_bytes, self._shard_seconds = shard_bytes, shard_seconds
        self._place = Place(op, folder)
        self.layout: Layout | None = None
        self.stored_fingerprint: Fingerprint | None = None
        self._segments: list[_File] = []
        self._index = Index(SYNTHETIC)
        self._seen: set[str] = set()
        self._twice: dict[str, NDArray[np.bool_]] = {}  # of a file the rows that an earlier one holds, too
        self._pending: Pending | None = None
        self._decoded: OrderedDict[tuple[int, int], Rows] = OrderedDict()
        if fingerprint is not None:
            self._place.make()
            if MANIFEST in self._place.names():
                raise ArgumentError(
                    f'{op}: {self._place.shown} holds shards of safetensors; go on with format="safetensors", or use '
                    "another folder"
                )
        self.refresh()
        if fingerprint is None and self.layout is None:
            raise CacheError(f"there is no {SYNTHETIC.rows} in {self._place.shown}")

    def refresh(self) -> None:
        """Take in the files that other writers have finished since."""
        for name in self._place.names():
            if name.endswith(SUFFIX) and not name.startswith(".") and name not in self._seen:
                self._seen.add(name)
                self._take(name)

    def _take(self, name: str) -> None:
        try:
            with self._place.open(name) as opened:
                file = self._pq.ParquetFile(opened)
                fingerprint, layout = arrow.about(file.schema_arrow)
                keys = arrow.keys_of(file.read(columns=arrow.key_columns()))
                groups = [file.metadata.row_group(i).num_rows for i in range(file.metadata.num_row_groups)]
        except FileNotFoundError:
            return
        except (OSError, ValueError, self._pa.ArrowException) as error:
            if self._given is not None:
                self._place.set_aside(name)
            then = "its rows count as missing" if self._given is not None else "its rows are left out"
            shown = f"{self._place.shown}/{name}"
            warnings.warn(f"the file {shown} of a {SYNTHETIC.rows} is torn: {error}; {then}", stacklevel=2)
            return
        standing = self._given if self._given is not None else self.stored_fingerprint
        if standing is not None and fingerprint != standing:
            raise StaleCacheError(
                f"{self._place.shown}/{name} was made under fingerprint {fingerprint}, but here it is {standing}: "
                f"{differences(fingerprint, standing)}. Use another folder, or delete this one"
            )
        self._agree(layout)
        self.stored_fingerprint = fingerprint
        twice = self._index.find(keys) != MISSING
        if twice.any():
            self._twice[name] = twice
        self._attach(name, keys, groups)

    def _attach(self, name: str, keys: Ids, groups: list[int]) -> None:
        number = len(self._segments)
        self._segments.append(_File(name, [0, *np.cumsum(groups).tolist()], keys))
        self._index.add(keys, places(number, len(keys)))

    def _agree(self, layout: Layout) -> None:
        if self.layout is None:
            self.layout = layout
        difference = self.layout.difference(layout)
        if difference:
            raise ShapeError(
                f"{self._op}: all rows of a {SYNTHETIC.rows} share one layout; those in {self._place.shown} and these "
                f"differ in {difference}. Pad samples to one size, or keep a folder a size"
            )

    def ids(self) -> Ids:
        found = self._index.ids.copy()
        return found if self._pending is None else np.union1d(found, self._pending.ids)

    def find(self, ids: Ids) -> Places:
        where = self._index.find(ids)
        if self._pending is not None:
            self._pending.find(ids, where, number=len(self._segments))
        return where

    def gather(self, where: Places, names: Collection[str]) -> Rows:
        """The blocks of rows in files, in the order asked."""
        assert self.layout is not None
        out = self.layout.empty(len(where), names)
        numbers, rows = where >> ROW_BITS, where & ROW_MASK
        groups = np.empty(len(where), np.int64)
        for number in np.unique(numbers).tolist():
            here = numbers == number
            groups[here] = np.searchsorted(self._segments[number].starts, rows[here], side="right") - 1
        for number, group in sorted(set(zip(numbers.tolist(), groups.tolist(), strict=True))):
            here = np.flatnonzero((numbers == number) & (groups == group))
            decoded = self._group(number, group)
            for name in out:
                out[name][here] = decoded[name][rows[here] - self._segments[number].starts[group]]
        return out

    def _group(self, number: int, group: int) -> Rows:
        key = (number, group)
        if key in self._decoded:
            self._decoded.move_to_end(key)
            return self._decoded[key]
        assert self.layout is not None
        name = self._segments[number].name
        try:
            with self._place.open(name) as opened:
                file = self._pq.ParquetFile(opened, page_checksum_verification=True)
                table = file.read_row_group(group, columns=list(self.layout.fields))
        except (OSError, self._pa.ArrowException) as error:
            raise CacheError(f"cannot read {self._place.shown}/{name}: {error}; make its rows again") from error
        rows = self._decoded[key] = self.layout.pack(arrow.tensors_of(table, self.layout))
        while len(self._decoded) > _KEPT:
            self._decoded.popitem(last=False)
        return rows

    def append(self, ids: Ids, rows: Rows, layout: Layout) -> int:
        """Store rows; of keys that are there already the first stay. Returns how many were new."""
        self._agree(layout)
        new = np.flatnonzero(self.find(ids) == MISSING)
        new = new[np.sort(np.unique(ids[new], return_index=True)[1])]
        if not len(new):
            return 0
        if self._pending is None:
            self._pending = Pending(layout)
        self._pending.append(ids[new], {name: rows[name][new] for name in layout.blocks})
        old = time.monotonic() - self._pending.since > self._shard_seconds
        if self._pending.bytes >= self._shard_bytes or old:
            self.flush()
        return len(new)

    def drop_repeated(self) -> int:
        """Write files anew without the rows that others hold, too, and say how many; for when nobody else writes.

        Two workers that do not see each other may make the same rows in other company. Here the first count; a program
        that reads all files would meet them twice.
        """
        self.refresh()
        dropped = 0
        for name, twice in sorted(self._twice.items()):
            with self._place.open(name) as opened:
                table = self._pq.ParquetFile(opened).read()
            rest = table.filter(self._pa.array(~twice))
            if len(rest):
                self._write(rest, arrow.keys_of(rest))
            self._place.remove(name)
            dropped += int(twice.sum())
        self._twice = {}
        return dropped

    def _write(self, table: Any, ids: Ids) -> tuple[str, int]:
        """Write a file, under the name that its keys give it; that and the rows of a group."""
        assert self.layout is not None
        group = max(1, min(len(ids), _GROUP_BYTES // max(1, self.layout.row_bytes)))
        content = io.BytesIO()
        self._pq.write_table(
            table, content, row_group_size=group, use_dictionary=False, write_page_checksum=True, store_schema=True
        )
        name = f"rows-{hashlib.sha256(ids.tobytes()).hexdigest()[:24]}{SUFFIX}"
        self._place.write(name, content.getbuffer())
        return name, group

    def flush(self) -> None:
        """Write what waits in memory as a file."""
        pending, layout, fingerprint = self._pending, self.layout, self._given
        if pending is None or layout is None or fingerprint is None:
            return
        ids = pending.ids
        table = arrow.table_of(self._pa, ids, layout.unpack(pending.blocks), layout, fingerprint, self._notes)
        name, group = self._write(table, ids)
        self._seen.add(name)
        self._pending = None
        self.stored_fingerprint = fingerprint
        whole, rest = divmod(len(ids), group)
        self._attach(name, ids.copy(), [group] * whole + ([rest] if rest else []))

    def close(self) -> None:
        self.flush()


def is_address(folder: Any) -> bool:
    """True if it is one that fsspec knows, and no folder of this machine."""
    return isinstance(folder, str) and "://" in folder


def is_parquet(folder: Any) -> bool:
    """True if a folder is one of Parquet files, as far as can be seen."""
    if is_address(folder):
        return True
    try:
        return any(Path(folder).glob(f"*{SUFFIX}"))
    except (TypeError, ValueError, OSError):
        return False  # which is refused by name
