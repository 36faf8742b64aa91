"""Keys of rows: one number a row, or several, as one sortable value in memory and as columns of int64 in a file."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

Packed = NDArray[Any]  # [n], of which equal ones are one row, and whose order is that of the columns


@dataclass(frozen=True)
class Keys:
    """What tells the rows of a store apart.

    Several columns are in memory one string of bytes a row, most significant first, so that strings are in the order of
    the columns, the first column first.
    """

    tensor: str  # the name in a shard
    columns: tuple[str, ...]
    widths: tuple[int, ...]  # bytes that a value of each takes in memory
    rows: str  # what a folder of such rows is called in messages

    @property
    def dtype(self) -> np.dtype[Any]:
        return np.dtype(np.int64) if len(self.columns) == 1 else np.dtype(f"S{sum(self.widths)}")

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one key in a file."""
        return () if len(self.columns) == 1 else (len(self.columns),)

    def pack(self, numbers: NDArray[np.int64]) -> Packed:
        """int64 [n, columns] -> [n]; the numbers must fit."""
        if len(self.columns) == 1:
            return np.ascontiguousarray(numbers[:, 0])
        digits = np.ascontiguousarray(numbers.astype(">i8")).view(np.uint8).reshape(len(numbers), len(self.columns), 8)
        kept = [digits[:, column, 8 - width :] for column, width in enumerate(self.widths)]
        return np.ascontiguousarray(np.concatenate(kept, axis=1)).view(self.dtype)[:, 0]

    def unpack(self, keys: Packed) -> NDArray[np.int64]:
        """[n] -> int64 [n, columns]"""
        if len(self.columns) == 1:
            return keys[:, None]
        digits = np.ascontiguousarray(keys).view(np.uint8).reshape(len(keys), sum(self.widths))
        found = np.zeros((len(keys), len(self.columns), 8), np.uint8)
        at = 0
        for column, width in enumerate(self.widths):
            found[:, column, 8 - width :] = digits[:, at : at + width]
            at += width
        return found.view(">i8")[:, :, 0].astype(np.int64)


SAMPLES: Final = Keys("sample_ids", ("sample_id",), (8,), "teacher cache")
SYNTHETIC: Final = Keys("keys", ("sample_id", "replica", "step"), (6, 2, 4), "set of synthetic examples")
KINDS: Final = (SAMPLES, SYNTHETIC)
