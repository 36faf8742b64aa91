"""The soft-label loss on logits, on a device (csrc/cuda/distill.cu). Nothing waits for the device."""

from __future__ import annotations

import torch
from torch import Tensor

from tgt_fast.kernels.distill_calls import accumulate_dtype, dense, prepare, upstream
from tgt_fast.kernels.native.cuda import Engine
from tgt_fast.kernels.native.distill_calls import core_options, divisor, matrix, pointer
from tgt_fast.kernels.options import DistillOptions, Forward

AUTO_PLAN = (0, 0, True)  # path, blocks a row, bulk copies: chosen by size (csrc/cuda/distill.h)


def forward(
    engine: Engine,
    student: Tensor,  # [N, C] dense rows
    teacher: Tensor,  # [N, C] dense rows
    target: Tensor | None,  # [N] int64
    sample_weight: Tensor | None,  # [N]
    normalizer: float | Tensor | None,
    options: DistillOptions,
    *,
    wanted: tuple[bool, bool] = (False, False),
    keep_rows: bool = False,
    inplace: bool = False,
    want_stats: bool = False,
    plan: tuple[int, int, bool] = AUTO_PLAN,
) -> Forward:
    """Row losses, their reduction and the wanted gradients."""
    rows, classes = student.shape
    accumulate = accumulate_dtype(student, teacher)
    loss, row_loss, target, weight = prepare(student, accumulate, target, sample_weight, options)
    on_device, host_divisor = divisor(normalizer)
    d_student = None
    if wanted[0]:
        d_student = student.detach() if inplace else student.new_empty(rows, classes)
    d_teacher = teacher.new_empty(rows, classes) if wanted[1] else None
    state = student.new_empty(rows, engine.core.ROW_STATE, dtype=torch.float64) if keep_rows else None
    stats = student.new_empty(6, rows, dtype=accumulate) if want_stats else None
    workspace = student.new_empty(1, dtype=torch.float64)
    with engine.current(student) as stream:
        engine.core.cuda_distill_forward(
            core_options(engine.core, options), rows, classes, matrix(student), matrix(teacher), pointer(target),
            pointer(weight), pointer(on_device), host_divisor, pointer(workspace), pointer(row_loss), pointer(loss),
            matrix(d_student), matrix(d_teacher), pointer(state), pointer(stats), plan, stream,
        )  # fmt: skip
    return Forward(loss, d_student, d_teacher, state, stats)


def backward(
    engine: Engine,
    student: Tensor,
    teacher: Tensor,
    target: Tensor | None,
    state: Tensor,  # [N, K] from forward
    d_loss: Tensor,  # 0-d, or [N]
    options: DistillOptions,
    *,
    wanted: tuple[bool, bool],
    inplace: bool = False,
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients from logits and saved row statistics, with the upstream gradient applied before rounding."""
    rows, classes = student.shape
    target, d_loss = dense(target), upstream(d_loss, accumulate_dtype(student, teacher))
    d_student = None
    if wanted[0]:
        d_student = student.detach() if inplace else student.new_empty(rows, classes)
    d_teacher = teacher.new_empty(rows, classes) if wanted[1] else None
    with engine.current(student) as stream:
        engine.core.cuda_distill_backward(
            core_options(engine.core, options), rows, classes, matrix(student), matrix(teacher), pointer(target),
            pointer(state), pointer(d_loss), d_loss.dim() > 0, matrix(d_student), matrix(d_teacher), stream,
        )  # fmt: skip
    return d_student, d_teacher


def scale_(engine: Engine, grad: Tensor, d_loss: Tensor) -> None:
    """grad *= d_loss, a factor for all rows or one a row; reads nothing but the factor when that is 1."""
    d_loss = upstream(d_loss, accumulate_dtype(grad, grad))
    with engine.current(grad) as stream:
        engine.core.cuda_distill_scale(*grad.shape, matrix(grad), pointer(d_loss), d_loss.dim() > 0, stream)
