"""The way of one soft-label loss to its kernel: through the dispatcher, straight to a backend, or the reference."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tgt_fast.kernels import select
from tgt_fast.kernels.adjust import Adjustments
from tgt_fast.kernels.calls import Direct, DistillCall, accumulate_dtype
from tgt_fast.kernels.late import beside
from tgt_fast.kernels.options import DistillOptions, DistillStats, TopK
from tgt_fast.kernels.record_stats import record_stats
from tgt_fast.kernels.reference import distill as reference_distill
from tgt_fast.kernels.reference import topk as reference_topk
from tgt_fast.ops import _distill_op
from tgt_fast.ops._checks import check_entries
from tgt_fast.ops._distill_arguments import OP, check_inplace, check_values, packed
from tgt_fast.ops._distill_op import dense_rows, packed_call, tensors_of, with_graph
from tgt_fast.ops.library import seen_by_dispatcher
from tgt_fast.ops.record_stats import RecordStats
from tgt_fast.ops.topk import TeacherTopK, warn_where_small


def run(
    student_logits: Tensor, teacher: Any, target: Tensor | None, sample_weight: Tensor | None,
    divisor: float | Tensor | None, options: DistillOptions, adjust: Adjustments | None, *,
    record: TeacherTopK | None, rest: Tensor | None, want_stats: bool, inplace: bool, backend: str,
) -> tuple[Tensor, DistillStats | RecordStats | None]:  # fmt: skip
    """The loss, 0-d or [N], and each row's statistics; ``record``: what the teacher's rows are of, with its tail."""
    of_teacher = teacher if record is None else teacher.log_probs
    classes = student_logits.shape[-1]
    stats: DistillStats | RecordStats | None = None
    if want_stats and record is not None:  # before the logits are overwritten in place
        stats = RecordStats(
            *record_stats(
                student_logits.reshape(-1, classes), teacher, target, sample_weight, divisor, options,
                accumulate_dtype(student_logits, teacher.log_probs),
            )
        )  # fmt: skip
        want_stats = False
    loss: Tensor
    if backend != "reference" and seen_by_dispatcher(student_logits, of_teacher, rest, target, sample_weight):
        # inplace is a permission: whoever traces plans the memory.
        student = student_logits.reshape(-1, classes)
        if record is None:
            teacher = teacher.reshape(-1, classes)
        divisor = beside(divisor, student_logits)
        call = DistillCall(packed(options), student, teacher, target, sample_weight, divisor, adjust=adjust)
        loss, rows = _distill_op.distillation_loss(*packed_call(call), want_stats, backend)
        return loss, DistillStats.from_rows(rows) if want_stats else stats
    student = dense_rows(student_logits)
    if inplace:
        check_inplace(student_logits, student)
    if record is None:
        teacher = dense_rows(teacher)
        form, chosen = "distill", select.choose("distill", backend, (student, teacher))
    else:
        check_entries(OP, teacher, target, sample_weight, options)
        warn_where_small(OP, record, teacher, target, sample_weight, options, stacklevel=4)
        form, chosen = select.TOPK, select.choose(select.TOPK, backend, tensors_of(student, teacher))
    call = DistillCall(options, student, teacher, target, sample_weight, divisor, want_stats=want_stats, adjust=adjust)
    if chosen == "reference":
        loss, found = _run_reference(call)
        return loss, found if stats is None else stats
    kernel = Direct(select.kernel(form, chosen))
    if adjust is not None:
        check_values(call, "reference")
    if (student.requires_grad or of_teacher.requires_grad) and torch.is_grad_enabled():
        loss, rows = with_graph(kernel, *call[:6], want_stats, inplace, adjust)
    else:
        loss, rows, *_ = kernel.forward(call)
    return loss, stats if rows is None else DistillStats.from_rows(rows)


def _run_reference(call: DistillCall) -> tuple[Tensor, DistillStats | None]:
    """Plain PyTorch, which anything can differentiate and transform."""
    check_values(call, "reference")
    options, student, teacher, target, sample_weight, divisor = call[:6]
    if isinstance(teacher, TopK):
        return reference_topk.distillation_loss(student, teacher, target, sample_weight, divisor, options), None
    return reference_distill.distillation_loss(
        student, teacher, target, sample_weight, divisor, options, want_stats=call.want_stats, adjust=call.adjust
    )
