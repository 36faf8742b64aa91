"""The index of samples: sorted ids, searched for a whole batch at a time."""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import NDArray

from tgt_fast.cache.keys import SAMPLES, Keys, Packed

Ids = Packed
Places = NDArray[np.int64]  # segment << ROW_BITS | row; MISSING where there is none

ROW_BITS: Final = 32
ROW_MASK: Final = (1 << ROW_BITS) - 1
MISSING: Final = -1


def places(segment: int, rows: int) -> Places:
    """Those of a segment's rows, in order."""
    return np.arange(rows, dtype=np.int64) + (segment << ROW_BITS)


def in_order(where: Places) -> tuple[int, slice] | None:
    """Segment and rows, if they lie there one behind the other and none is missing."""
    if not len(where):
        return None
    first, last = int(where[0]), int(where[-1])
    if last - first != len(where) - 1 or first < 0 or first >> ROW_BITS != last >> ROW_BITS:
        return None
    if not (where[1:] > where[:-1]).all():
        return None
    return first >> ROW_BITS, slice(first & ROW_MASK, (last & ROW_MASK) + 1)


class Index:
    """16 bytes a sample, of several numbers a key 20. Of an id that is added twice the first place stays."""

    def __init__(self, keys: Keys = SAMPLES) -> None:
        self.ids: Ids = np.empty(0, keys.dtype)
        self._places: Places = np.empty(0, np.int64)

    def __len__(self) -> int:
        return len(self.ids)

    def find(self, ids: Ids) -> Places:
        """The place of each id, or MISSING."""
        size = len(self.ids)
        if not size:
            return np.full(len(ids), MISSING, np.int64)
        # Consecutive ids, as those of a whole data set: no search.
        if self.ids.dtype == np.int64 and self.ids[-1] - self.ids[0] == size - 1:
            at = ids - self.ids[0]
            if len(at) and at.view(np.uint64).max() < size:  # none is negative, either
                found: Places = self._places.take(at)
                return found
            inside = (at >= 0) & (at < size)
            return np.where(inside, self._places[np.where(inside, at, 0)], MISSING)
        at = np.minimum(np.searchsorted(self.ids, ids), size - 1)
        return np.where(self.ids[at] == ids, self._places[at], MISSING)

    def add(self, ids: Ids, where: Places, *, replace: bool = False) -> None:
        """Take ids in; with ``replace`` those that are there already move to the new place."""
        ids, first = np.unique(ids, return_index=True)
        where = where[first]
        if not len(self.ids):
            self.ids, self._places = ids, where
            return
        at = np.searchsorted(self.ids, ids)
        known = self.ids[np.minimum(at, len(self.ids) - 1)] == ids
        if replace:
            self._places[at[known]] = where[known]
        new = ~known
        if new.any():
            self.ids = np.insert(self.ids, at[new], ids[new])
            self._places = np.insert(self._places, at[new], where[new])
