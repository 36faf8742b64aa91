"""What a loader's batch looks like, for calibration, training and evaluation alike."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

from tgt_fast.errors import ArgumentError


class Batch(NamedTuple):
    """One batch of a loader, by name."""

    sample_ids: Tensor | None  # (B,) int64
    x: Any  # a tensor or a pytree of tensors
    y: Tensor | None  # (B, ...) int64


def split_batch(batch: Any) -> Batch:
    """``(ids, x, y)``, ``(x, y)``, ``(x,)`` or ``x`` -> ``Batch``. Only tuples and lists are taken apart.

    Raises:
        ArgumentError: a tuple or list of another length.
    """
    if not isinstance(batch, (tuple, list)):
        return Batch(None, batch, None)
    if len(batch) == 3:
        return Batch(*batch)
    if len(batch) in (1, 2):
        return Batch(None, batch[0], batch[1] if len(batch) == 2 else None)
    raise ArgumentError(
        f"a batch is x, (x, y) or (ids, x, y); the loader gave a {type(batch).__name__} of {len(batch)}"
    )
