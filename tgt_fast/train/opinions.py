"""The objective's own terms of given logits; where a teacher has several opinions, one soft term each."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from tgt_fast.errors import ArgumentError
from tgt_fast.kernels.calls import labels_of
from tgt_fast.kernels.late import is_on
from tgt_fast.kernels.options import DistillOptions
from tgt_fast.losses.distill import DistillationLoss
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
    loss: DistillationLoss,
) -> Tensor:  # fmt: skip
    """The hard term alone, of a loss with these options."""
    return distillation_loss(
        logits, logits.detach(), y, soft_weight=0.0, hard_weight=options.hard_weight,
        label_smoothing=options.label_smoothing, sample_weight=weight, ignore_index=options.ignore_index,
        unlabeled_index=options.unlabeled_index, normalizer=normalizer, backend=loss.backend,
        student_bias=getattr(loss, "student_bias", None), label_margin=getattr(loss, "label_margin", None),
    )  # fmt: skip


def real_of(
    module: DistillationLoss, options: DistillOptions, logits: Tensor, opinions: Sequence[Opinion], y: Tensor | None,
    weight: Tensor | None, normalizer: float | Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The first sum of the objective, and (detached) the hard term in it."""
    hard = None
    if opinions[0].weight is not None:
        for name in ("decoupled", "correct_teacher"):
            if getattr(module, name, None) is not None:
                raise ArgumentError(f"TGTObjective: {name} is for a teacher of one opinion, this one has several")
        loss = soft_part(module, options, logits, opinions, weight, normalizer, y)
        if y is not None and is_on(options.hard_weight):
            hard = hard_of(options, logits, y, weight, normalizer, module)
            loss, hard = loss + hard, hard.detach()
    elif y is None:
        loss = soft_part(module, options, logits, opinions, weight, normalizer)
    else:
        if is_on(options.hard_weight) and is_on(options.soft_weight):
            with torch.no_grad():  # before the loss, which may write over the logits
                hard = hard_of(options, logits, y, weight, normalizer, module)
        # Without a hard weight the labels say which rows count, and nothing else.
        given = laid_out(module, logits, opinions[0].logits, y)
        loss = cast(Tensor, module(*given, sample_weight=weight, normalizer=normalizer))
        if is_on(options.hard_weight) and not is_on(options.soft_weight):
            hard = loss.detach()
    return loss, torch.zeros_like(loss.detach()) if hard is None else hard


def soft_part(
    module: DistillationLoss, options: DistillOptions, logits: Tensor, opinions: Sequence[Opinion],
    weight: Tensor | None, normalizer: float | Tensor | None, y: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """The soft term, or the soft terms."""

    def one(ours: Tensor, theirs: Tensor, **options: Any) -> Tensor:
        # A pair only with return_stats, which the objective refuses.
        return cast(Tensor, module.soft(*laid_out(module, ours, theirs), **options))

    if opinions[0].weight is None:
        return one(logits, opinions[0].logits, sample_weight=weight, normalizer=normalizer)
    return soft_of(one, options, logits, opinions, weight, normalizer, y)


def laid_out(module: DistillationLoss, logits: Tensor, *others: Tensor | None) -> tuple[Any, ...]:
    """Logits and shares with their classes where the loss has them; views, which it looks at the other way."""
    class_dim = getattr(module, "class_dim", -1)
    if class_dim == -1:
        return logits, *others
    dims = logits.dim()
    moved = (x if not isinstance(x, Tensor) or x.dim() != dims else x.movedim(-1, class_dim) for x in (logits, *others))
    return tuple(moved)
