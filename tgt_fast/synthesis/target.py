"""The folder that a synthesis writes to."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

import tgt_fast
from tgt_fast.cache.fingerprint import Fingerprint
from tgt_fast.cache.index import MISSING, Ids
from tgt_fast.cache.keys import SYNTHETIC
from tgt_fast.cache.layout import Layout
from tgt_fast.ops import _checks
from tgt_fast.synthesis.folder import DROPPED, FORMATS, RowStore, beneath, open_rows
from tgt_fast.synthesis.maker import OP, Batch
from tgt_fast.synthesis.rows import data_of
from tgt_fast.synthesis.summary import Dropped, SynthesisSummary


class Target:
    """The rows that are kept, and, where there are filters, the keys of those that are not."""

    def __init__(
        self, fingerprint: Fingerprint, names: tuple[str, ...], folder: Any, *, format: str, shard_bytes: int
    ) -> None:
        _checks.choice(OP, "format", format, FORMATS)
        shard_bytes = _checks.integer(OP, "shard_bytes", shard_bytes, 1, 1 << 40)
        self._names = names  # of the filters
        options: dict[str, Any] = {"format": format, "shard_bytes": shard_bytes, "notes": notes()}
        self.rows: RowStore = open_rows(OP, folder, fingerprint, **options)
        self.dropped: RowStore | None = None
        if self._names:
            self.dropped = open_rows(OP, beneath(folder, DROPPED), fingerprint, **options)

    def lacks(self, keys: Ids) -> bool:
        """True if any of these rows has still to be made. What other processes have finished since counts."""
        if not self._missing(keys).any():
            return False
        self.rows.refresh()
        if self.dropped is not None:
            self.dropped.refresh()
        return bool(self._missing(keys).any())

    def _missing(self, keys: Ids) -> Any:
        missing = self.rows.find(keys) == MISSING
        if self.dropped is not None:
            missing &= self.dropped.find(keys) == MISSING
        return missing

    def take(self, batch: Batch, summary: SynthesisSummary) -> None:
        """Keep what is to be kept of a batch, and count it."""
        new = self._missing(batch.keys)
        kept = np.ones(len(batch.keys), bool) if batch.place is None else (batch.place < 0).numpy()
        summary.found += len(set(batch.keys[~new].tolist()))
        if kept.any():
            rows = {name: block[kept] for name, block in batch.layout.pack(batch.tensors).items()}
            summary.computed += self.rows.append(batch.keys[kept], rows, batch.layout)
        if kept.all() or self.dropped is None or batch.place is None or batch.value is None:
            return
        which = np.flatnonzero(~kept)
        tensors = {"filter": batch.place[which].to(torch.uint8), "value": batch.value[which]}
        layout = Layout.of(tensors, len(self._names), op=OP, keys=SYNTHETIC)
        self.dropped.append(batch.keys[which], layout.pack(tensors), layout)
        first = np.unique(batch.keys[which], return_index=True)[1]
        numbers = SYNTHETIC.unpack(batch.keys)
        for row in which[np.sort(first)].tolist():
            if new[row]:
                one = {name: leaf[row].cpu() for name, leaf in batch.tensors.items()}
                x = data_of(batch.layout, one)
                key = tuple(numbers[row].tolist())
                name = self._names[int(batch.place[row])]
                summary.drop(name, Dropped(key, float(batch.value[row]), x))  # type: ignore[arg-type]

    def flush(self) -> None:
        for store in (self.rows, self.dropped):
            if store is not None:
                store.flush()

    def __enter__(self) -> Target:
        return self

    def __exit__(self, *_: object) -> None:
        """Also after a failure and an interruption: what was made is kept."""
        try:
            self.rows.close()
        finally:
            if self.dropped is not None:
                self.dropped.close()


def notes() -> dict[str, Any]:
    """What a folder tells about its making, and need not agree about."""
    return {"made_by": f"tgt_fast {tgt_fast.__version__}", "torch": torch.__version__}
