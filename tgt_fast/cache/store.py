"""The rows of a folder: shards of all writers, what this process has yet to write, and where each sample lies."""

from __future__ import annotations

import itertools
import os
import time
import warnings
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Final

import numpy as np

from tgt_fast._files import remove_dead
from tgt_fast.cache.checksums import TornError
from tgt_fast.cache.fingerprint import Fingerprint
from tgt_fast.cache.index import MISSING, ROW_BITS, ROW_MASK, Ids, Index, Places, in_order, places
from tgt_fast.cache.keys import SAMPLES, Keys
from tgt_fast.cache.layout import Bytes, Layout, Rows
from tgt_fast.cache.manifest import Manifest
from tgt_fast.cache.pending import Pending
from tgt_fast.cache.processes import close_at_exit
from tgt_fast.cache.shard import TORN, Shard, is_shard, write_shard
from tgt_fast.errors import CacheError, ShapeError, StaleCacheError

_LARGE_ROW: Final = 4096  # bytes, from which a copy a row costs less than copying everything twice


class Store:
    """The storage of :class:`TeacherCache`'s rows; knows bytes and ids, but no teacher.

    Args:
        folder: of the cache.
        fingerprint: of the rows; None: whatever the folder holds.
        writable: whether rows may be added, and torn shards be set aside.
        shard_bytes, shard_seconds: rows wait in memory until they are so many bytes, or the first of them so old.
        checksums: compare a shard's checksum before its first row is read.
        keys: what tells rows apart.
        op: whose rows they are, for messages.
        notes: for the manifest, if this process is the one that writes it.
    """

    def __init__(
        self,
        folder: Path,
        fingerprint: Fingerprint | None,
        *,
        writable: bool,
        shard_bytes: int,
        shard_seconds: float,
        checksums: bool,
        keys: Keys = SAMPLES,
        op: str = "TeacherCache",
        notes: Mapping[str, Any] | None = None,
    ) -> None:
        self.folder, self.writable = folder, writable
        self._keys, self._op, self._notes = keys, op, notes or {}
        self._shard_bytes, self._shard_seconds, self.checksums = shard_bytes, shard_seconds, checksums
        self._process = os.getpid()
        self._watched: int | None = None  # the process whose end is waited for
        self._segments: list[Shard | Pending | None] = []  # None: a shard that was dropped
        self._unchecked: set[int] = set()
        self._seen: set[str] = set()  # names of files
        self._index = Index(self._keys)
        self._pending: int | None = None  # its segment
        self.torn: dict[str, str] = {}  # what is wrong with each shard that was dropped, by name
        if writable:
            with reported(folder, "write to"):
                folder.mkdir(parents=True, exist_ok=True)
            remove_dead(folder)
        self.manifest = Manifest.read(folder)
        if self.manifest is None and not writable:
            raise CacheError(f"there is no {keys.rows} in {folder}")
        if self.manifest is not None and self.manifest.layout.keys != keys:
            raise CacheError(f"{op}: {folder} holds a {self.manifest.layout.keys.rows}, and no {keys.rows}")
        if self.manifest is not None and fingerprint is not None:
            self.manifest.accept(folder, fingerprint)
        self.fingerprint = fingerprint
        self.refresh()

    @property
    def options(self) -> dict[str, Any]:
        """Settings beside the folder and the fingerprint."""
        return {
            "writable": self.writable, "shard_bytes": self._shard_bytes, "shard_seconds": self._shard_seconds,
            "checksums": self.checksums,
        }  # fmt: skip

    # What there is

    @property
    def layout(self) -> Layout | None:
        return None if self.manifest is None else self.manifest.layout

    @property
    def stored_fingerprint(self) -> Fingerprint | None:
        """That of the rows in the folder."""
        return None if self.manifest is None else self.manifest.fingerprint

    @property
    def shards(self) -> list[Shard]:
        return [segment for segment in self._segments if isinstance(segment, Shard)]

    def __len__(self) -> int:
        return len(self.ids())

    def ids(self) -> Ids:
        """All of them, ascending."""
        pending = self._waiting()
        return self._index.ids.copy() if pending is None else np.union1d(self._index.ids, pending.ids)

    def refresh(self) -> None:
        """Take in the shards that other writers have finished since."""
        if self.manifest is None:
            self.manifest = Manifest.read(self.folder)
        if self.manifest is None:
            return
        if self.fingerprint is not None:
            self.manifest.accept(self.folder, self.fingerprint)
        with reported(self.folder, "read"):
            names = [name for name in os.listdir(self.folder) if is_shard(name)]
        for name in sorted(set(names) - self._seen):  # by the time of writing: of two rows the older one counts
            self._seen.add(name)
            self._take(self.folder / name, self.manifest)

    def _take(self, path: Path, manifest: Manifest) -> None:
        try:
            with reported(path, "read", but=(FileNotFoundError,)):
                shard = Shard(path, manifest.layout)
            if shard.fingerprint != manifest.fingerprint:
                raise StaleCacheError(
                    f"{path} was made under fingerprint {shard.fingerprint}, but the manifest beside it names "
                    f"{manifest.fingerprint}: move one of them to a folder of its own"
                )
        except FileNotFoundError:  # another process found it torn
            return
        except TornError as error:
            self._set_aside(path, str(error))
            return
        self._attach(shard)

    def _attach(self, shard: Shard) -> None:
        number = len(self._segments)
        self._segments.append(shard)
        if self.checksums:
            self._unchecked.add(number)
        self._index.add(shard.ids, places(number, shard.rows))

    def find(self, ids: Ids) -> Places:
        """Places of the samples, in shards that are whole. What a torn one held is missing."""
        while True:
            where = self._index.find(ids)
            pending = self._waiting()
            if pending is not None:
                pending.find(ids, where, number=self._pending)
            # Each one of them, so that a list and no generator.
            if all([self._is_there(number) for number in _segments_of(where)]) and (  # noqa: C419
                not self._unchecked or all([self._is_sound(number, rows) for number, rows in self._to_check(where)])  # noqa: C419
            ):
                return where

    def _is_there(self, number: int) -> bool:
        """True if a segment is as long as it was; a shard that is not is dropped."""
        shard = self._segments[number]
        if isinstance(shard, Shard):
            try:
                shard.check_size()
            except TornError as error:
                self._drop(number, shard, error)
                return False
        return True

    def _to_check(self, where: Places) -> list[tuple[int, slice | Places]]:
        """Of these places the rows of each segment that is not known to be sound."""
        together = in_order(where)
        if together is not None:
            return [together] if together[0] in self._unchecked else []
        present = where[where >= 0]
        numbers = present >> ROW_BITS
        wanted = [number for number in np.unique(numbers).tolist() if number in self._unchecked]
        return [(number, present[numbers == number] & ROW_MASK) for number in wanted]

    def _is_sound(self, number: int, rows: slice | Places | None = None) -> bool:
        """True if these rows of a shard are, or all; one that is not is dropped."""
        shard = self._segments[number]
        assert isinstance(shard, Shard)
        try:
            shard.check_size()
            shard.check(rows)
        except TornError as error:
            self._drop(number, shard, error)
            return False
        if shard.checked:
            self._unchecked.discard(number)
        return True

    def _drop(self, number: int, shard: Shard, error: TornError) -> None:
        self._unchecked.discard(number)
        self._segments[number] = None
        self._reindex()
        self._set_aside(shard.path, str(error))

    def _reindex(self) -> None:
        self._index = Index(self._keys)
        for number, segment in enumerate(self._segments):
            if segment is not None and number != self._pending:
                self._index.add(segment.ids, places(number, len(segment.ids)))

    def _set_aside(self, path: Path, reason: str) -> None:
        self.torn[path.name] = reason
        if self.writable:
            with reported(path, "rename"), suppress(FileNotFoundError):  # another process did
                os.replace(path, path.with_name(path.name + TORN))
        then = "its rows count as missing" if self.writable else "its rows are left out"
        warnings.warn(f"the shard {path} of a {self._keys.rows} is torn: {reason}; {then}", stacklevel=2)

    def check(self) -> dict[str, str]:
        """Compare every checksum now; what is wrong with each torn shard, by name."""
        self.refresh()
        for number, segment in enumerate(self._segments):
            if isinstance(segment, Shard):
                self._is_sound(number)
        return dict(self.torn)

    # Rows out and in

    def gather(self, where: Places, names: Collection[str]) -> Rows:
        """The blocks ``names`` of the rows at these places, none of which is missing, in the order asked.

        Rows that lie one behind the other are not copied: one sees what the file or the waiting rows hold, read-only.
        """
        layout = self.layout
        assert layout is not None
        if (together := in_order(where)) is not None:
            segment = self._segments[together[0]]
            assert segment is not None
            found = {name: segment.blocks[name][together[1]] for name in names}
            for block in found.values():
                block.flags.writeable = False
            return found
        if len(where) and (first := int(where.min()) >> ROW_BITS) == int(where.max()) >> ROW_BITS:
            segment, rows = self._segments[first], where & ROW_MASK
            assert segment is not None
            return {name: segment.blocks[name].take(rows, axis=0) for name in names}
        out = layout.empty(len(where), names)
        order = np.argsort(where, kind="stable")  # by shard, and in the order of the file
        ordered = where[order]
        numbers = ordered >> ROW_BITS
        cuts = [0, *(np.flatnonzero(numbers[1:] != numbers[:-1]) + 1).tolist(), len(where)]
        for start, stop in itertools.pairwise(cuts):
            if start == stop:
                continue
            segment = self._segments[int(numbers[start])]
            assert segment is not None
            to, rows = order[start:stop], ordered[start:stop] & ROW_MASK
            for name in out:
                _copy(segment.blocks[name], rows, out[name], to)
        return out

    def append(self, ids: Ids, rows: Rows, layout: Layout) -> int:
        """Store samples; of ids that are there already the first rows stay. Returns how many were new.

        Raises:
            CacheError: the folder is read only, or cannot be written.
            ShapeError: the rows are of another layout than those in the folder.
        """
        self._own()
        self.agree(layout)
        new = np.flatnonzero(self.find(ids) == MISSING)
        new = new[np.sort(np.unique(ids[new], return_index=True)[1])]
        if not len(new):
            return 0
        pending = self._waiting()
        if pending is None:
            pending = Pending(layout)
            self._pending = len(self._segments)
            self._segments.append(pending)
        pending.append(ids[new], {name: rows[name][new] for name in layout.blocks})
        if pending.bytes >= self._shard_bytes or time.monotonic() - pending.since > self._shard_seconds:
            self.flush()
        return len(new)

    def agree(self, layout: Layout) -> None:
        """
        Raises:
            ShapeError: rows of this layout do not belong here.
        """
        if self.manifest is None:
            assert self.fingerprint is not None
            with reported(self.folder, "write to"):
                self.manifest = Manifest(self.fingerprint, layout, self._notes).create(self.folder)
            self.manifest.accept(self.folder, self.fingerprint)
            self.refresh()
        difference = self.manifest.layout.difference(layout)
        if difference:
            raise ShapeError(
                f"{self._op}: all rows of a {self._keys.rows} share one layout; those in {self.folder} and these "
                f"differ in {difference}. Pad samples to one size, or keep a folder a size"
            )

    def flush(self) -> None:
        """Write what waits in memory as a shard.

        Raises:
            CacheError: it cannot be written; the rows still wait.
        """
        self._own()
        pending, number, manifest = self._waiting(), self._pending, self.manifest
        if pending is None or number is None or manifest is None:
            return
        ids, rows = pending.ids, pending.blocks
        with reported(self.folder, "write to"):
            path = write_shard(self.folder, ids, rows, manifest.layout, manifest.fingerprint)
        self._seen.add(path.name)
        with reported(path, "read"):
            self._segments[number] = Shard(path, manifest.layout)
        # Its checksums need no look: these bytes were in memory a moment ago.
        self._pending = None
        # What was served from memory goes on being served, also where another writer has finished the id meanwhile.
        self._index.add(ids, places(number, len(ids)), replace=True)

    def close(self) -> None:
        """Write what waits; let go of the maps."""
        if os.getpid() == self._process:
            self.flush()
        self._segments, self._index, self._pending = [], Index(self._keys), None

    def _waiting(self) -> Pending | None:
        segment = None if self._pending is None else self._segments[self._pending]
        return segment if isinstance(segment, Pending) else None

    def _own(self) -> None:
        """Before a write. After a fork what the parent had waiting is read here, but is for the parent to write."""
        if self._watched != os.getpid():  # not at construction: a process that unpickles its task has not begun
            close_at_exit(self)
            self._watched = os.getpid()
        if os.getpid() == self._process:
            return
        self._process = os.getpid()
        pending, number = self._waiting(), self._pending
        if pending is not None and number is not None:
            self._index.add(pending.ids, places(number, len(pending.ids)), replace=True)
        self._pending = None


def _segments_of(where: Places) -> list[int]:
    """The numbers of the segments that these places lie in."""
    numbers = (where >> ROW_BITS) + 1  # of what is missing, 0
    return [number - 1 for number in np.bincount(numbers).nonzero()[0].tolist() if number]


def _copy(source: Bytes, rows: Places, out: Bytes, to: Places) -> None:
    """``out[to] = source[rows]``"""
    if source.shape[1] >= _LARGE_ROW:
        for row, place in zip(rows.tolist(), to.tolist(), strict=True):
            out[place] = source[row]
    else:
        out[to] = source.take(rows, axis=0)


@contextmanager
def reported(path: Path, verb: str, but: tuple[type[OSError], ...] = ()) -> Iterator[None]:
    """An error of the file system becomes a CacheError, but for those that the caller wants to see."""
    try:
        yield
    except but:
        raise
    except OSError as error:
        raise CacheError(f"cannot {verb} {path}: {error.strerror or error}") from error
