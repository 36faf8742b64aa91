"""What the kernels of the soft-label losses have in common before they run, whichever backend they belong to."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from tgt_fast.kernels.options import DistillOptions


class Prepared(NamedTuple):
    """Where losses go, and the labels as every kernel reads them."""

    loss: Tensor  # 0-d, or [N]
    row_loss: Tensor  # [N]; the loss itself where nothing is reduced
    target: Tensor | None  # [N] int64
    weight: Tensor | None  # [N] float64


def accumulate_dtype(student: Tensor, teacher: Tensor) -> torch.dtype:
    """The dtype of the arithmetic, the losses and the statistics."""
    return torch.float64 if torch.float64 in (student.dtype, teacher.dtype) else torch.float32


def prepare(
    student: Tensor,  # [N, C]
    dtype: torch.dtype,  # of the losses
    target: Tensor | None,  # [N] int64
    sample_weight: Tensor | None,  # [N]
    options: DistillOptions,
) -> Prepared:
    """Room for the losses on the student's device, and dense labels and weights."""
    rows = student.shape[0]
    loss = student.new_empty(rows if options.reduction == "none" else (), dtype=dtype)
    row_loss = loss if options.reduction == "none" else student.new_empty(rows, dtype=dtype)
    weight = None if sample_weight is None else sample_weight.detach().to(torch.float64).contiguous()
    return Prepared(loss, row_loss, dense(target), weight)


def dense(target: Tensor | None) -> Tensor | None:
    """The target of every row, one after the other."""
    return None if target is None else target.contiguous()


def upstream(d_loss: Tensor, dtype: torch.dtype) -> Tensor:
    """The gradient of the loss, 0-d or [N], in the dtype of the arithmetic."""
    plain = d_loss.detach() if d_loss.requires_grad else d_loss
    return plain if plain.dtype == dtype and plain.is_contiguous() else plain.to(dtype).contiguous()
