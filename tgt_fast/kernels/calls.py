"""A call of the soft-label loss: what goes in, what comes out, and who computes it.

The same record travels from the public function to the kernels. Results are allocated here alone, also the empty ones
that a compiler plans with; a backend fills what it is given.
"""

from __future__ import annotations

import importlib
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tgt_fast.kernels.adjust import Adjustments
from tgt_fast.kernels.memory import gradient_like
from tgt_fast.kernels.options import ROW_STATE, DistillOptions, TopK


class DistillCall(NamedTuple):
    """Inputs of a kernel, and what is wanted of it."""

    options: DistillOptions
    student: Tensor  # [N, C] dense rows
    teacher: Tensor | TopK  # [N, C] dense rows, or a record
    target: Tensor | None = None  # [N] int64, or [N, C] shares of the classes, floating point
    sample_weight: Tensor | None = None  # [N]
    divisor: float | Tensor | None = None  # of the mean; None: what counts is counted
    want_d_student: bool = False  # for an upstream gradient of 1
    want_d_teacher: bool = False
    want_row_state: bool = False  # what backward needs to make the gradients again
    want_stats: bool = False
    inplace: bool = False  # the student's gradient is written over its logits
    adjust: Adjustments | None = None


class Outputs(NamedTuple):
    """Results of one pass over the logits."""

    loss: Tensor  # 0-d, or [N]
    stats: Tensor | None = None  # [6, N], the fields of DistillStats in their order
    d_student: Tensor | None = None  # [N, C] like the student
    d_teacher: Tensor | None = None  # [N, C] like the teacher
    row_state: Tensor | None = None  # [N, ROW_STATE] float64, in the kernel's own form


_FP64, _FP32 = torch.float64, torch.float32
Gradients = tuple[Tensor | None, Tensor | None]  # to student and teacher


def accumulate_dtype(student: Tensor, teacher: Tensor | TopK) -> torch.dtype:
    """The dtype of the arithmetic, the losses and the statistics."""
    other = teacher if isinstance(teacher, Tensor) else teacher.log_probs
    return _FP64 if student.dtype == _FP64 or other.dtype == _FP64 else _FP32


def outputs(call: DistillCall) -> Outputs:
    """Room for all that is wanted."""
    options, student, teacher, _, _, _, want_d_student, want_d_teacher, want_row_state, want_stats, *_ = call
    count = student.shape[0]
    dtype = accumulate_dtype(student, teacher)
    loss = student.new_empty(count if options.reduction == "none" else (), dtype=dtype)
    if not (want_d_student or want_d_teacher or want_row_state or want_stats):
        return Outputs(loss)
    d_student, d_teacher = gradients(call)
    return Outputs(
        loss,
        student.new_empty((6, count), dtype=dtype) if want_stats else None,
        d_student,
        d_teacher,
        student.new_empty((count, ROW_STATE + is_soft(call.target)), dtype=torch.float64) if want_row_state else None,
    )


def is_soft(target: Tensor | None) -> bool:
    """True if a target is shares of the classes, [..., C], which are floating point; labels are integers."""
    return target is not None and target.is_floating_point()


def labels_of(target: Tensor | None) -> Tensor | None:
    """The target, where it is labels: they say which rows count, shares do not."""
    return None if is_soft(target) else target


def gradients(call: DistillCall) -> Gradients:
    """Room for the gradients that are wanted."""
    d_student = d_teacher = None
    if call.want_d_student:
        d_student = call.student.detach() if call.inplace else gradient_like(call.student)
    if call.want_d_teacher and isinstance(call.teacher, Tensor):
        d_teacher = gradient_like(call.teacher)
    return d_student, d_teacher


def soft_target() -> Any:
    """The module for shares, which is made of what stands here."""
    return importlib.import_module("tgt_fast.kernels.soft_target")


def composed() -> Any:
    """The module for adjustments that a kernel does not take, likewise."""
    return importlib.import_module("tgt_fast.kernels.composed")


class Direct:
    """A backend's kernel, called from Python."""

    __slots__ = ("kernel",)

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel

    def forward(self, call: DistillCall) -> Outputs:
        """One pass over the logits."""
        out = outputs(call)
        if call.adjust is not None and not composed().serves(self.kernel, call):
            composed().forward(self.kernel, call, out)
        elif call.target is not None and is_soft(call.target):
            soft_target().forward(self.kernel, call, out)
        else:
            self.kernel.forward(call, out)
        return out

    def backward(self, call: DistillCall, row_state: Tensor, d_loss: Tensor) -> Gradients:
        """The gradients from logits and the rows' state; ``d_loss`` is 0-d, or [N]."""
        made = gradients(call)
        if call.want_d_student or call.want_d_teacher:
            if call.adjust is not None and not composed().serves(self.kernel, call):
                composed().backward(self.kernel, call, row_state, d_loss, made)
            elif is_soft(call.target):
                soft_target().backward(self.kernel, call, row_state, d_loss, made)
            else:
                self.kernel.backward(call, row_state, d_loss, made)
        return made

    def sums(self, call: DistillCall, row_state: Tensor) -> bool:
        """Sums of jsd or tvd into rows' state, from the normalisers that it holds; False where no kernel does this."""
        asked = getattr(self.kernel, "sums", None)
        return asked is not None and bool(asked(call, row_state))

    def scale_(self, grad: Tensor, d_loss: Tensor) -> None:
        """grad *= d_loss, a factor for all rows or one a row."""
        self.kernel.scale_(grad, d_loss)


# What kernels do before they run, whichever backend they belong to


def prepared(call: DistillCall, out: Outputs) -> tuple[Tensor | None, Tensor | None, Tensor]:
    """The target and the float64 weight of every row, and where its loss goes, [N] each.

    The row losses are the loss itself where nothing is reduced.
    """
    options, student, _, target, weight, *_ = call
    if weight is not None:
        weight = weight.detach().to(torch.float64).contiguous()
    row_loss = out.loss
    if options.reduction != "none":
        row_loss = row_loss.new_empty(student.shape[0])
    return None if target is None else dense(target), weight, row_loss


def dense(target: Tensor | None) -> Tensor | None:
    """The target of every row, one after the other; shares of the classes in dense rows."""
    if target is None or (is_soft(target) and (target.stride(-1) == 1 or target.shape[-1] == 1)):
        return target
    return target.contiguous()


def upstream(d_loss: Tensor, dtype: torch.dtype) -> Tensor:
    """The gradient of the loss, 0-d or [N], in the dtype of the arithmetic."""
    plain = d_loss.detach() if d_loss.requires_grad else d_loss
    return plain if plain.dtype == dtype and plain.is_contiguous() else plain.to(dtype).contiguous()
