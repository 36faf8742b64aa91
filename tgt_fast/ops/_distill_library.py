"""The soft-label loss in PyTorch's dispatcher: the op that users call, and the kernels that its autograd calls."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tgt_fast.kernels import select
from tgt_fast.kernels.distill_calls import accumulate_dtype
from tgt_fast.kernels.options import ROW_STATE, DistillOptions, Forward
from tgt_fast.ops import _checks, library
from tgt_fast.ops._distill_arguments import OP, check_values
from tgt_fast.ops._distill_autograd import Call, Distill
from tgt_fast.ops._packing import DIVISOR, OPTIONS, or_nothing, packed, settled, unpacked

_TENSORS = "Tensor student, Tensor teacher, Tensor? target, Tensor? sample_weight"


def dense_rows(logits: Tensor) -> Tensor:
    """(..., C) as (N, C) with dense rows: a view where the strides allow, else one copy."""
    rows = (logits if logits.dim() == 2 else logits.reshape(-1, logits.shape[-1])).resolve_neg()
    return rows if rows.stride(1) == 1 or rows.numel() == 0 or rows.shape[1] == 1 else rows.contiguous()


def _kernel(backend: str, student: Tensor, teacher: Tensor) -> Any:
    return select.kernel("distill", select.choose("distill", backend, (student, teacher)))


def _as_rows(state: Tensor, count: int) -> Tensor:
    """A kernel's own statistics in the form that all kernels' fit into, [N, ROW_STATE] float64."""
    rows = state.new_zeros(count, ROW_STATE, dtype=torch.float64)
    rows.view(-1)[: state.numel()] = state.reshape(-1)
    return rows


def _as_state(rows: Tensor, like: Tensor) -> Tensor:
    """And back, bit for bit."""
    return like.copy_(rows.reshape(-1)[: like.numel()].view(like.shape))


# The kernels


def _forward(
    student: Tensor, teacher: Tensor, target: Tensor | None, sample_weight: Tensor | None, normalizer: Tensor | None,
    divisor: float | None, *rest: Any,
) -> tuple[Tensor, ...]:  # fmt: skip
    options, (want_stats, backend, d_student, d_teacher, keep_rows) = unpacked(rest)
    options, target = settled(OP, options, student.shape[1], target, sample_weight)
    student, teacher = dense_rows(student), dense_rows(teacher)
    chosen = select.choose("distill", backend, (student, teacher))
    if chosen == "reference" and _checks.on_plain_cpu(student):
        check_values(student, target, sample_weight, options)
    out = select.kernel("distill", chosen).forward(
        student, teacher, target, sample_weight, divisor if normalizer is None else normalizer, options,
        wanted=(d_student, d_teacher), keep_rows=keep_rows, want_stats=want_stats,
    )  # fmt: skip
    return (
        out.loss, or_nothing(out.stats, out.loss), or_nothing(out.d_student, student),
        or_nothing(out.d_teacher, teacher),
        or_nothing(out.rows if out.rows is None else _as_rows(out.rows, student.shape[0]), out.loss),
    )  # fmt: skip


def _forward_fake(
    student: Tensor, teacher: Tensor, target: Tensor | None, sample_weight: Tensor | None, normalizer: Tensor | None,
    divisor: float | None, *rest: Any,
) -> tuple[Tensor, ...]:  # fmt: skip
    options, (want_stats, _, d_student, d_teacher, keep_rows) = unpacked(rest)
    rows, classes = student.shape
    loss = student.new_empty(rows if options.reduction == "none" else (), dtype=accumulate_dtype(student, teacher))
    return (
        loss,
        loss.new_empty((6, rows) if want_stats else 0),
        student.new_empty((rows, classes) if d_student else 0),
        teacher.new_empty((rows, classes) if d_teacher else 0),
        loss.new_empty(rows, ROW_STATE, dtype=torch.float64) if keep_rows else loss.new_empty(0),
    )


def _backward(
    student: Tensor, teacher: Tensor, target: Tensor | None, rows: Tensor, d_loss: Tensor, *rest: Any
) -> tuple[Tensor, Tensor]:
    options, (backend, want_student, want_teacher) = unpacked(rest)
    options, target = settled(OP, options, student.shape[1], target, looked_at=True)
    student, teacher = dense_rows(student), dense_rows(teacher)
    kernel = _kernel(backend, student, teacher)
    state = _as_state(rows, kernel.empty_state(student, teacher))
    d_student, d_teacher = kernel.backward(
        student, teacher, target, state, d_loss, options, wanted=(want_student, want_teacher)
    )
    return or_nothing(d_student, student), or_nothing(d_teacher, teacher)


def _backward_fake(
    student: Tensor, teacher: Tensor, target: Tensor | None, rows: Tensor, d_loss: Tensor, *rest: Any
) -> tuple[Tensor, Tensor]:
    _, (_, want_student, want_teacher) = unpacked(rest)
    return (
        student.new_empty(student.shape if want_student else 0),
        teacher.new_empty(teacher.shape if want_teacher else 0),
    )


def _scale_(grad: Tensor, factor: Tensor, backend: str) -> None:
    rows = dense_rows(grad)
    _kernel(backend, rows, rows).scale_(rows, factor)
    if rows.data_ptr() != grad.data_ptr():
        grad.copy_(rows)


def _scale_fake(grad: Tensor, factor: Tensor, backend: str) -> None:
    return None


# The op


def _loss(
    student: Tensor, teacher: Tensor, target: Tensor | None, sample_weight: Tensor | None, normalizer: Tensor | None,
    divisor: float | None, *rest: Any,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    loss, stats, *_ = _forward(
        student, teacher, target, sample_weight, normalizer, divisor, *rest, False, False, False
    )  # fmt: skip
    return loss, stats


def _loss_fake(
    student: Tensor, teacher: Tensor, target: Tensor | None, sample_weight: Tensor | None, normalizer: Tensor | None,
    divisor: float | None, *rest: Any,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    loss, stats, *_ = _forward_fake(
        student, teacher, target, sample_weight, normalizer, divisor, *rest, False, False, False
    )  # fmt: skip
    return loss, stats


def _loss_autograd(
    student: Tensor, teacher: Tensor, target: Tensor | None, sample_weight: Tensor | None, normalizer: Tensor | None,
    divisor: float | None, *rest: Any,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    options, (want_stats, backend) = unpacked(rest)
    call = Call(options, _Dispatched(backend), False, want_stats)
    divide_by = divisor if normalizer is None else normalizer
    loss, stats = library.apply(Distill, student, teacher, target, sample_weight, divide_by, call)
    return loss, or_nothing(stats, loss.detach())


class _Dispatched:
    """The kernels as autograd wants them, each call an op that a tracer can see."""

    def __init__(self, backend: str) -> None:
        self.backend = backend

    def forward(
        self, student: Tensor, teacher: Tensor, target: Tensor | None, sample_weight: Tensor | None,
        normalizer: float | Tensor | None, options: DistillOptions, *, wanted: tuple[bool, bool], keep_rows: bool,
        inplace: bool, want_stats: bool,
    ) -> Forward:  # fmt: skip
        on_device, divisor = library.split(normalizer)
        with torch._C._AutoDispatchBelowAutograd():
            loss, stats, d_student, d_teacher, rows = _distill_forward(
                student, teacher, target, sample_weight, on_device, divisor, *packed(options), want_stats,
                self.backend, *wanted, keep_rows,
            )  # fmt: skip
        return Forward(
            loss,
            d_student if wanted[0] else None,
            d_teacher if wanted[1] else None,
            rows if keep_rows else None,
            stats if want_stats else None,
        )

    def backward(
        self, student: Tensor, teacher: Tensor, target: Tensor | None, state: Tensor, d_loss: Tensor,
        options: DistillOptions, *, wanted: tuple[bool, bool], inplace: bool,
    ) -> tuple[Tensor | None, Tensor | None]:  # fmt: skip
        with torch._C._AutoDispatchBelowAutograd():
            d_student, d_teacher = _distill_backward(
                student, teacher, target, state, d_loss, *packed(options), self.backend, *wanted
            )
        return d_student if wanted[0] else None, d_teacher if wanted[1] else None

    def scale_(self, grad: Tensor, d_loss: Tensor) -> None:
        with torch._C._AutoDispatchBelowAutograd():
            distill_scale_(grad, d_loss, self.backend)


distillation_loss = library.define(
    f"distillation_loss({_TENSORS}, {DIVISOR}, {OPTIONS}, bool want_stats, str backend) -> (Tensor, Tensor)",
    _loss,
    _loss_fake,
    _loss_autograd,
    differentiable=2,
)
_distill_forward = library.define(
    f"distill_forward({_TENSORS}, {DIVISOR}, {OPTIONS}, bool want_stats, str backend, bool want_d_student, "
    "bool want_d_teacher, bool keep_rows) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _forward,
    _forward_fake,
)
_distill_backward = library.define(
    f"distill_backward(Tensor student, Tensor teacher, Tensor? target, Tensor rows, Tensor d_loss, {OPTIONS}, "
    "str backend, bool want_d_student, bool want_d_teacher) -> (Tensor, Tensor)",
    _backward,
    _backward_fake,
)
distill_scale_ = library.define(
    "distill_scale_(Tensor(a!) grad, Tensor factor, str backend) -> ()", _scale_, _scale_fake
)
