"""Classes by how many training examples they have."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from tgt_fast.errors import ArgumentError


class Shots(NamedTuple):
    """Classes in three groups, int64; see :func:`tgt_fast.train.accuracy`, which takes one as ``classes=``."""

    many: Tensor
    medium: Tensor
    few: Tensor


def shots(class_counts: Sequence[int] | Tensor, *, many: int = 100, few: int = 20) -> Shots:
    """Many-, medium- and few-shot classes, as long-tail benchmarks report them.

    Args:
        class_counts: the **training** examples of each class, (C,), whichever list is measured on.
        many: classes with more examples than that are many-shot.
        few: classes with fewer than that are few-shot; those between, both bounds included, are medium-shot.

    Raises:
        ArgumentError: counts that are none.

    >>> import tgt_fast as tgt
    >>> [group.tolist() for group in tgt.data.shots([500, 100, 20, 19, 101])]
    [[0, 4], [1, 2], [3]]
    """
    try:
        counts = torch.as_tensor(class_counts, device="cpu")
    except (TypeError, ValueError, RuntimeError) as error:
        raise ArgumentError(f"shots: class_counts must be counts, got {class_counts!r:.200} ({error})") from None
    if counts.is_floating_point() or counts.is_complex() or counts.dtype == torch.bool or counts.dim() != 1:
        raise ArgumentError(f"shots: class_counts must be counts (C,), got {tuple(counts.shape)} of {counts.dtype}")
    if bool((counts < 0).any()) or not 0 <= few <= many + 1:
        raise ArgumentError(f"shots: counts must be >= 0, and few={few} at most many={many} + 1")
    masks = counts > many, (counts >= few) & (counts <= many), counts < few
    return Shots(*(mask.nonzero().flatten() for mask in masks))
