"""The terms of the objective where a teacher has several opinions: one soft term each, and one hard term."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from tgt_fast.kernels.calls import labels_of
from tgt_fast.kernels.options import DistillOptions
from tgt_fast.ops.counts import weight_of_rows
from tgt_fast.ops.distill import distillation_loss
from tgt_fast.teacher.teacher import Opinion


def soft_of(
    soft: Callable[..., Any], options: DistillOptions, logits: Tensor, opinions: Sequence[Opinion],
    weight: Tensor | None, normalizer: float | Tensor | None, y: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """``sum_k w_k D(h_k, f)``, divided by the rows that count, whatever their weights for a teacher are.

    Args:
        soft: (logits, teacher's logits, sample_weight=, normalizer=) -> the loss of one soft term, 0-d.
        y: labels, of which ``ignore_index`` drops rows; or None.
    """
    rows = logits.shape[:-1]
    if normalizer is None:
        normalizer = weight_of_rows(rows, logits.device, y, weight, logits.shape[-1], options)
    counts = torch.ones(rows, dtype=torch.float64, device=logits.device)
    if weight is not None:
        counts = weight.detach().to(torch.float64)
    labels = labels_of(y)
    if labels is not None:
        counts = torch.where(labels == options.ignore_index, 0.0, counts)
    total = torch.zeros((), device=logits.device)
    for theirs, share, known in opinions:
        ours = logits.clone()  # a loss may write over what it is given
        if known is not None:
            ours = ours.masked_fill(~known, -math.inf)
        if isinstance(share, Tensor):
            share = share.to(counts.dtype).reshape(-1, *(1,) * (len(rows) - 1))
        total = total + soft(
            ours, theirs, sample_weight=counts * (1.0 if share is None else share), normalizer=normalizer
        )
    return total


def hard_of(
    options: DistillOptions, logits: Tensor, y: Tensor, weight: Tensor | None, normalizer: float | Tensor | None,
    backend: str,
) -> Tensor:  # fmt: skip
    """The hard term alone."""
    return distillation_loss(
        logits, logits.detach(), y, soft_weight=0.0, hard_weight=options.hard_weight,
        label_smoothing=options.label_smoothing, sample_weight=weight, ignore_index=options.ignore_index,
        unlabeled_index=options.unlabeled_index, normalizer=normalizer, backend=backend,
    )  # fmt: skip
