"""Rows that wait in memory until there are enough of them for a shard."""

from __future__ import annotations

import time

import numpy as np

from tgt_fast.cache.index import MISSING, Ids, Places, places
from tgt_fast.cache.layout import Layout, Rows


class Pending:
    """A segment that grows; no id twice."""

    def __init__(self, layout: Layout) -> None:
        self._layout = layout
        self._ids: Ids = np.empty(0, layout.keys.dtype)
        self._blocks = layout.empty(0)
        self._rows: dict[int, int] = {}
        self.since = time.monotonic()

    @property
    def ids(self) -> Ids:
        return self._ids[: len(self._rows)]

    @property
    def blocks(self) -> Rows:
        return {name: rows[: len(self._rows)] for name, rows in self._blocks.items()}

    @property
    def bytes(self) -> int:
        return len(self._rows) * (self._layout.row_bytes + 8 * len(self._layout.keys.columns))

    def find(self, ids: Ids, where: Places, number: int | None) -> None:
        """Write the places of those ids that are here into ``where``; the segment's number is ``number``."""
        assert number is not None
        found = [self._rows.get(i, MISSING) for i in ids.tolist()]
        rows = np.array(found, np.int64).reshape(len(ids))
        here = rows != MISSING
        where[here] = places(number, 1)[0] + rows[here]

    def append(self, ids: Ids, rows: Rows) -> None:
        start, stop = len(self._rows), len(self._rows) + len(ids)
        if stop > len(self._ids):
            self._grow(max(stop, 2 * len(self._ids)))
        self._ids[start:stop] = ids
        for name, block in self._blocks.items():
            block[start:stop] = rows[name]
        self._rows.update(zip(ids.tolist(), range(start, stop), strict=True))

    def _grow(self, capacity: int) -> None:
        used = len(self._rows)
        blocks, ids = self._layout.empty(capacity), np.empty(capacity, self._ids.dtype)
        ids[:used] = self._ids[:used]
        for name, rows in self._blocks.items():
            blocks[name][:used] = rows[:used]
        self._ids, self._blocks = ids, blocks
