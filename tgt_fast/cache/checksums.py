"""Checksums of a shard's data: a CRC-32 of each piece, compared before the first of its rows is used.

Of a piece and not of the whole, so that a first batch out of a large cache costs the pieces that it touches and not the
reading of whole shards. Where rows are asked for in order, the system reads ahead by itself; threads that did so, or
that compared the next pieces meanwhile, took more from the copying of rows than they gave.
"""

from __future__ import annotations

import zlib
from typing import Final

import numpy as np
from numpy.typing import NDArray

from tgt_fast.cache.index import Places
from tgt_fast.cache.layout import Bytes

PIECE: Final = 1 << 17  # bytes


class TornError(Exception):
    """A file that is no whole shard; the message says what is wrong with it."""


def crcs(data: Bytes) -> NDArray[np.uint32]:
    """One a piece, of all bytes of an array."""
    view = np.ascontiguousarray(data).reshape(-1).data
    return np.array([zlib.crc32(view[at : at + PIECE]) for at in range(0, len(view), PIECE)], "<u4")


class Checked:
    """Rows in a memory map, and which pieces of them are known to be sound.

    Args:
        rows: uint8 [N, bytes of a row].
        expected: the CRC of each piece, as hexadecimal digits.

    Raises:
        TornError: there are not so many pieces.
    """

    def __init__(self, rows: Bytes, expected: str) -> None:
        self._view, self._row_bytes = rows.reshape(-1).data, rows.shape[1]
        try:
            self._expected: list[int] = np.frombuffer(bytes.fromhex(expected), "<u4").tolist()
        except ValueError as error:
            raise TornError("its checksums are not readable") from error
        count = -(-rows.size // PIECE)
        if len(self._expected) != count:
            raise TornError(f"it has {len(self._expected)} checksums for {count} pieces of data")
        self._sound = np.zeros(count, bool)
        self.done = count == 0  # all pieces are known to be sound

    def check(self, rows: slice | Places | None = None) -> None:
        """Have the pieces of these rows compared, or all pieces, when this returns.

        Raises:
            TornError: a checksum is another.
        """
        lacking = self._lacking(rows)
        for piece in lacking:
            if zlib.crc32(self._view[piece * PIECE : (piece + 1) * PIECE]) != self._expected[piece]:
                raise TornError("its checksum is wrong")
            self._sound[piece] = True
        if lacking:
            self.done = bool(self._sound.all())

    def _lacking(self, rows: slice | Places | None) -> list[int]:
        """The pieces, ascending, that hold anything of these rows and are not known to be sound."""
        if self.done:
            return []
        if isinstance(rows, slice):
            pieces = range(rows.start * self._row_bytes // PIECE, (rows.stop * self._row_bytes - 1) // PIECE + 1)
            return [piece for piece in pieces if not self._sound[piece]]
        found = np.full(len(self._sound), rows is None)
        if rows is not None:
            first, last = rows * self._row_bytes // PIECE, ((rows + 1) * self._row_bytes - 1) // PIECE
            found[first] = found[last] = True
            inside = np.flatnonzero(last - first > 1)
            for a, b in zip(first[inside].tolist(), last[inside].tolist(), strict=True):
                found[a:b] = True
        lacking: list[int] = np.flatnonzero(found & ~self._sound).tolist()
        return lacking
