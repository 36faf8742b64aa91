"""What the launchers of the soft-label loss's Triton kernels share: sizes, the divisor of the mean, the reduction."""

from __future__ import annotations

import torch
from torch import Tensor

from tgt_fast.kernels.calls import DistillCall
from tgt_fast.kernels.options import DistillOptions
from tgt_fast.kernels.triton import Kernels, launch, two_floats

_REDUCE_BLOCK = 2048


def stride_of(matrix: Tensor | None) -> int:
    return 0 if matrix is None else matrix.stride(0)


def grain_of(*counts: int) -> int:
    """What classes and strides are counted by, for a kernel to know by what they divide: 8 elements, 16 bytes of half
    precision, are read at once."""
    return 1 if any(count % 8 for count in counts) else 8


def sides_of(call: DistillCall) -> tuple[Tensor, Tensor]:
    assert isinstance(call.teacher, Tensor)
    return call.student.detach(), call.teacher.detach()


def divisor_of(
    loaded: Kernels, student: Tensor, target: Tensor | None, sample_weight: Tensor | None,
    given: float | Tensor | None, options: DistillOptions,
) -> tuple[Tensor | None, float]:  # fmt: skip
    """The divisor of the mean: a float64 number on the device, else the number beside it."""
    if options.reduction != "mean":
        return None, 1.0
    if isinstance(given, Tensor):
        return given.detach().to(torch.float64), 1.0
    if given is not None:
        divisor = float(given)
        if divisor == 0 or 1e-30 <= divisor <= 1e30:
            return None, divisor
        return student.new_full((), divisor, dtype=torch.float64), 1.0  # two float32 could not hold it
    rows, classes = student.shape
    if target is None and sample_weight is None:
        return None, float(rows)
    counted = student.new_empty((), dtype=torch.float64)
    launch(
        loaded.distill.distill_count_kernel, 1, target, sample_weight, counted, rows, classes, options.ignore_index,
        options.unlabeled_index, BLOCK=_REDUCE_BLOCK, warps=8,
    )  # fmt: skip
    return counted, 1.0


def reduce(loaded: Kernels, row_loss: Tensor, divisor_at: Tensor | None, divisor: float, loss: Tensor) -> None:
    """The loss from those of the rows, which are divided."""
    launch(
        loaded.distill.distill_reduce_kernel, 1, row_loss, divisor_at, *two_floats(divisor), loss, len(row_loss),
        BLOCK=_REDUCE_BLOCK, warps=8,
    )  # fmt: skip
