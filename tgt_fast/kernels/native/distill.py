"""The soft-label loss on logits, in the compiled core (csrc/cpu/distill.cpp)."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tgt_fast.errors import ArgumentError
from tgt_fast.kernels.native import DTYPES, core
from tgt_fast.kernels.options import DIVERGENCES, REDUCTIONS, DistillOptions, DistillStats

_LARGE = 1 << 20  # bytes: below it the allocator of the C library keeps freed memory by itself


class Forward(NamedTuple):
    """What one pass over the logits returns."""

    loss: Tensor  # 0-d, or [N]
    d_student: Tensor | None  # [N, C] like the student, for an upstream gradient of 1
    d_teacher: Tensor | None  # [N, C] like the teacher
    rows: Tensor | None  # [N, K] float64, a row's statistics: enough to make its gradients again
    stats: DistillStats | None


def bad_weight(row: int, value: float) -> str:
    return f"distillation_loss: sample_weight[{row}] = {value} must be finite and >= 0"


def bad_target(row: int, value: int, classes: int, options: DistillOptions) -> str:
    return (
        f"distillation_loss: target[{row}] = {value} is not in [0, {classes}), "
        f"nor ignore_index ({options.ignore_index}), nor unlabeled_index ({options.unlabeled_index})"
    )


@functools.lru_cache(maxsize=256)
def _core_options(options: DistillOptions) -> Any:
    made = core().DistillOptions()
    made.divergence = DIVERGENCES.index(options.divergence)
    made.reduction = REDUCTIONS.index(options.reduction)
    for name in (
        "beta", "temperature", "teacher_temperature", "soft_weight", "hard_weight", "label_smoothing",
        "ignore_index", "unlabeled_index",
    ):  # fmt: skip
        setattr(made, name, getattr(options, name))
    return made


def _accumulate(student: Tensor, teacher: Tensor) -> torch.dtype:
    """The dtype of the arithmetic, the losses and the statistics."""
    return torch.float64 if torch.float64 in (student.dtype, teacher.dtype) else torch.float32


def _pointer(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _matrix(tensor: Tensor | None) -> tuple[int, int, int]:
    """(pointer, row stride, dtype code) of a matrix with dense rows; zeros for none."""
    return (0, 0, 0) if tensor is None else (tensor.data_ptr(), tensor.stride(0), DTYPES[tensor.dtype])


def _gradient_like(logits: Tensor) -> Tensor:
    """[N, C] for a gradient, contiguous. A large one lies in memory that the core uses again from call to call."""
    bytes_needed = logits.numel() * logits.element_size()
    if bytes_needed < _LARGE:
        return torch.empty(logits.shape, dtype=logits.dtype)
    return torch.frombuffer(core().Buffer(bytes_needed), dtype=logits.dtype).view(logits.shape)


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
    rows, classes = student.shape
    accumulate = _accumulate(student, teacher)
    loss = torch.empty(rows if options.reduction == "none" else (), dtype=accumulate)
    row_loss = loss if options.reduction == "none" else torch.empty(rows, dtype=accumulate)
    if sample_weight is not None:
        sample_weight = sample_weight.detach().to(torch.float64).contiguous()
    if target is not None:
        target = target.contiguous()
    d_student = None
    if wanted[0]:
        d_student = student.detach() if inplace else _gradient_like(student)
    d_teacher = _gradient_like(teacher) if wanted[1] else None
    compiled = core()
    state = torch.empty(rows, compiled.ROW_STATE, dtype=torch.float64) if keep_rows else None
    stats = torch.empty(6, rows, dtype=accumulate) if want_stats else None
    status, row = compiled.distill_forward(
        _core_options(options), rows, classes, _matrix(student), _matrix(teacher), _pointer(target),
        _pointer(sample_weight), -1.0 if normalizer is None else float(normalizer), _pointer(row_loss), _pointer(loss),
        _matrix(d_student), _matrix(d_teacher), _pointer(state), _pointer(stats), torch.get_num_threads(),
    )  # fmt: skip
    if status == compiled.BAD_TARGET and target is not None:
        raise ArgumentError(bad_target(row, int(target[row]), classes, options))
    if status == compiled.BAD_WEIGHT and sample_weight is not None:
        raise ArgumentError(bad_weight(row, float(sample_weight[row])))
    return Forward(loss, d_student, d_teacher, state, None if stats is None else _named(stats))


def _named(stats: Tensor) -> DistillStats:
    student_entropy, teacher_entropy, kl, agreement, student_lse, teacher_lse = stats.unbind(0)
    return DistillStats(student_entropy, teacher_entropy, kl, agreement != 0, student_lse, teacher_lse)


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
    rows, classes = student.shape
    d_loss = d_loss.detach().to(_accumulate(student, teacher)).contiguous()
    d_student = None
    if wanted[0]:
        d_student = student.detach() if inplace else _gradient_like(student)
    d_teacher = _gradient_like(teacher) if wanted[1] else None
    core().distill_backward(
        _core_options(options), rows, classes, _matrix(student), _matrix(teacher), _pointer(target), _pointer(state),
        _pointer(d_loss), int(d_loss.dim() > 0), _matrix(d_student), _matrix(d_teacher), torch.get_num_threads(),
    )  # fmt: skip
    return d_student, d_teacher


def scale_(grad: Tensor, d_loss: Tensor) -> None:
    """grad *= d_loss, a factor for all rows or one a row; reads nothing but the factor when that is 1."""
    d_loss = d_loss.detach().to(torch.float64 if grad.dtype == torch.float64 else torch.float32).contiguous()
    core().distill_scale(
        *grad.shape, _matrix(grad), _pointer(d_loss), int(d_loss.dim() > 0), torch.get_num_threads()
    )  # fmt: skip
