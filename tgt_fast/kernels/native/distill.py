"""The soft-label loss on logits, in the compiled core (csrc/cpu/distill.cpp); CUDA tensors go to cuda_distill."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from tgt_fast._forks import threads
from tgt_fast.errors import ArgumentError
from tgt_fast.kernels.distill_calls import accumulate_dtype, dense, prepare, upstream
from tgt_fast.kernels.native import core, cuda, cuda_distill
from tgt_fast.kernels.native.distill_calls import core_options, matrix, pointer
from tgt_fast.kernels.options import DistillOptions, Forward


def bad_weight(row: int, value: float, op: str = "distillation_loss") -> str:
    return f"{op}: sample_weight[{row}] = {value} must be finite and >= 0"


def bad_target(row: int, value: int, classes: int, options: DistillOptions, op: str = "distillation_loss") -> str:
    return (
        f"{op}: target[{row}] = {value} is not in [0, {classes}), "
        f"nor ignore_index ({options.ignore_index}), nor unlabeled_index ({options.unlabeled_index})"
    )


_LARGE = 1 << 20  # bytes: below it the allocator of the C library keeps freed memory by itself


def workspace(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Memory on a CPU, contiguous. A large piece of it the core uses again from call to call."""
    bytes_needed = math.prod(shape) * dtype.itemsize
    if bytes_needed < _LARGE:
        return torch.empty(shape, dtype=dtype, device="cpu")
    return torch.frombuffer(core().Buffer(bytes_needed), dtype=dtype).view(shape)


def gradient_like(logits: Tensor) -> Tensor:
    """Room for the gradient of logits [N, C] on a CPU."""
    return workspace(logits.shape, logits.dtype)


def empty_state(student: Tensor, teacher: Tensor) -> Tensor:
    """Room for what :func:`backward` needs of the rows (csrc/common/row_stats.h)."""
    return student.new_empty(student.shape[0], core().ROW_STATE, dtype=torch.float64)


def forward(
    student: Tensor,  # [N, C] dense rows
    teacher: Tensor,  # [N, C] dense rows
    target: Tensor | None,  # [N] int64
    sample_weight: Tensor | None,  # [N]
    normalizer: float | Tensor | None,
    options: DistillOptions,
    *,
    wanted: tuple[bool, bool] = (False, False),  # gradients to (student, teacher)
    keep_rows: bool = False,
    inplace: bool = False,
    want_stats: bool = False,
) -> Forward:
    """Row losses, their reduction and the wanted gradients, in one pass over the logits."""
    engine = cuda.engine(student)
    if engine is not None:
        return cuda_distill.forward(
            engine, student, teacher, target, sample_weight, normalizer, options,
            wanted=wanted, keep_rows=keep_rows, inplace=inplace, want_stats=want_stats,
        )  # fmt: skip
    rows, classes = student.shape
    accumulate = accumulate_dtype(student, teacher)
    loss, row_loss, target, weight = prepare(student, accumulate, target, sample_weight, options)
    d_student = None
    if wanted[0]:
        d_student = student.detach() if inplace else gradient_like(student)
    d_teacher = gradient_like(teacher) if wanted[1] else None
    compiled = core()
    state = empty_state(student, teacher) if keep_rows else None
    stats = torch.empty(6, rows, dtype=accumulate, device="cpu") if want_stats else None
    status, row = compiled.distill_forward(
        core_options(compiled, options), rows, classes, matrix(student), matrix(teacher), pointer(target),
        pointer(weight), -1.0 if normalizer is None else float(normalizer), pointer(row_loss), pointer(loss),
        matrix(d_student), matrix(d_teacher), pointer(state), pointer(stats), threads(),
    )  # fmt: skip
    if status == compiled.BAD_TARGET and target is not None:
        raise ArgumentError(bad_target(row, int(target[row]), classes, options))
    if status == compiled.BAD_WEIGHT and weight is not None:
        raise ArgumentError(bad_weight(row, float(weight[row])))
    return Forward(loss, d_student, d_teacher, state, stats)


def backward(
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
    engine = cuda.engine(student)
    if engine is not None:
        return cuda_distill.backward(
            engine, student, teacher, target, state, d_loss, options, wanted=wanted, inplace=inplace
        )  # fmt: skip
    compiled = core()
    rows, classes = student.shape
    target, d_loss = dense(target), upstream(d_loss, accumulate_dtype(student, teacher))
    d_student = None
    if wanted[0]:
        d_student = student.detach() if inplace else gradient_like(student)
    d_teacher = gradient_like(teacher) if wanted[1] else None
    compiled.distill_backward(
        core_options(compiled, options), rows, classes, matrix(student), matrix(teacher), pointer(target),
        pointer(state), pointer(d_loss), int(d_loss.dim() > 0), matrix(d_student), matrix(d_teacher),
        threads(),
    )  # fmt: skip
    return d_student, d_teacher


def scale_(grad: Tensor, d_loss: Tensor) -> None:
    """grad *= d_loss, a factor for all rows or one a row; reads nothing but the factor when that is 1."""
    engine = cuda.engine(grad)
    if engine is not None:
        return cuda_distill.scale_(engine, grad, d_loss)
    d_loss = upstream(d_loss, accumulate_dtype(grad, grad))
    core().distill_scale(
        *grad.shape, matrix(grad), pointer(d_loss), int(d_loss.dim() > 0), threads()
    )  # fmt: skip
