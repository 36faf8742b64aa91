"""The soft-label loss on logits, in the compiled core: csrc/cpu/distill.cpp, and csrc/cuda/distill.cu for CUDA tensors.

On a device nothing waits for it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tgt_fast._forks import threads
from tgt_fast.errors import ArgumentError
from tgt_fast.kernels.calls import (
    DistillCall,
    Gradients,
    Outputs,
    accumulate_dtype,
    dense,
    is_soft,
    prepared,
    upstream,
)
from tgt_fast.kernels.native import core, cuda
from tgt_fast.kernels.native.distill_calls import core_options, matrix, pointer, split_divisor
from tgt_fast.kernels.options import DistillOptions
from tgt_fast.kernels.row_checks import bad_share, bad_target, bad_weight

AUTO_PLAN = (0, 0, True)  # path, blocks a row, bulk copies: chosen by size (csrc/cuda/distill.h)


def takes_shares(call: DistillCall) -> bool:
    """True if a target may be shares of the classes: in the pass over the logits on a CPU."""
    return cuda.engine(call.student) is None


def forward(call: DistillCall, out: Outputs, *, plan: tuple[int, int, bool] = AUTO_PLAN) -> None:
    """Row losses, their reduction and the wanted gradients, in one pass over the logits."""
    options, student, teacher = call.options, call.student, call.teacher
    assert isinstance(teacher, Tensor)
    rows, classes = student.shape
    target, weight, row_loss = prepared(call, out)
    written = (
        pointer(row_loss), pointer(out.loss), matrix(out.d_student), matrix(out.d_teacher), pointer(out.row_state),
        pointer(out.stats),
    )  # fmt: skip
    engine = cuda.engine(student)
    if engine is not None:
        divisor_at, divisor = split_divisor(call.divisor)
        workspace = student.new_empty(1, dtype=torch.float64)
        with engine.current(student) as stream:
            engine.core.cuda_distill_forward(
                core_options(engine.core, options), rows, classes, matrix(student), matrix(teacher), pointer(target),
                pointer(weight), pointer(divisor_at), divisor, pointer(workspace), *written, plan, stream,
            )  # fmt: skip
        return
    compiled, labels, shares = core(), *_labels_or_shares(target)
    status, row = compiled.distill_forward(
        core_options(compiled, options), rows, classes, matrix(student), matrix(teacher), pointer(labels),
        pointer(weight), -1.0 if call.divisor is None else float(call.divisor), *written, matrix(shares), threads(),
    )  # fmt: skip
    if status:
        refuse_row(status, row, classes, target, weight, options)


def refuse_row(
    status: int, row: int, classes: int, target: Tensor | None, weight: Tensor | None, options: DistillOptions
) -> None:
    """The error that the core found in a row's label or weight, if it found one there."""
    if status == core().BAD_TARGET and target is not None:
        raise ArgumentError(bad_target(row, int(target[row]), classes, options))
    if status == core().BAD_SOFT_TARGET and target is not None:
        raise ArgumentError(bad_share(row, target[row]))
    if status == core().BAD_WEIGHT and weight is not None:
        raise ArgumentError(bad_weight(row, float(weight[row])))


def backward(call: DistillCall, row_state: Tensor, d_loss: Tensor, grads: Gradients) -> None:
    """The gradients from logits and saved row statistics, with the upstream gradient applied before rounding."""
    student, teacher = call.student, call.teacher
    assert isinstance(teacher, Tensor)
    target, d_loss = dense(call.target), upstream(d_loss, accumulate_dtype(student, teacher))
    labels, shares = _labels_or_shares(target)
    given = (
        *student.shape, matrix(student), matrix(teacher), pointer(labels), pointer(row_state), pointer(d_loss),
        d_loss.dim() > 0, *map(matrix, grads),
    )  # fmt: skip
    engine = cuda.engine(student)
    if engine is None:
        core().distill_backward(core_options(core(), call.options), *given, matrix(shares), threads())
        return
    with engine.current(student) as stream:
        engine.core.cuda_distill_backward(core_options(engine.core, call.options), *given, stream)


def _labels_or_shares(target: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    return (None, target) if is_soft(target) else (target, None)


def scale_(grad: Tensor, d_loss: Tensor) -> None:
    """grad *= d_loss, a factor for all rows or one a row; reads nothing but the factor when that is 1."""
    d_loss = upstream(d_loss, accumulate_dtype(grad, grad))
    given = (*grad.shape, matrix(grad), pointer(d_loss), d_loss.dim() > 0)
    engine = cuda.engine(grad)
    if engine is None:
        core().distill_scale(*given, threads())
        return
    with engine.current(grad) as stream:
        engine.core.cuda_distill_scale(*given, stream)
