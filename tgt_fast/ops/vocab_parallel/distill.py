"""The soft-label loss on logits of which each process has some classes: arguments, and the way to the kernels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tgt_fast.errors import ArgumentError, ShapeError
from tgt_fast.kernels import select
from tgt_fast.kernels.calls import DistillCall, is_soft
from tgt_fast.kernels.late import beside, is_on
from tgt_fast.kernels.options import DistillOptions, DistillStats
from tgt_fast.ops import _checks
from tgt_fast.ops._checks import check_entries, check_ids, check_row_values
from tgt_fast.ops._distill_arguments import (
    OP,
    as_mask,
    as_rows,
    check_classes,
    check_inplace,
    check_rows,
    check_topk,
    flat_target,
    packed,
)
from tgt_fast.ops._distill_op import dense_rows, packed_call, tensors_of, with_graph
from tgt_fast.ops.counts import divisor_over
from tgt_fast.ops.library import graph_wanted, seen_by_dispatcher
from tgt_fast.ops.topk import TeacherTopK, check_where_asked, rows_of, warn_where_small
from tgt_fast.ops.vocab_parallel import library as vocab_library
from tgt_fast.ops.vocab_parallel.kernel import row_kernel, served
from tgt_fast.ops.vocab_parallel.shards import Shards, local_target


def distillation_loss(
    shards: Shards, student_logits: Tensor, teacher: Tensor | TeacherTopK, target: Tensor | None,
    options: DistillOptions, sample_weight: Tensor | None, normalizer: float | Tensor | None, count_group: Any,
    inplace: bool, return_stats: bool, backend: str,
) -> Tensor | tuple[Tensor, DistillStats]:  # fmt: skip
    """The loss of all classes, of those that this process has."""
    if isinstance(teacher, TeacherTopK):
        return _of_record(  # type: ignore[no-any-return]
            shards, student_logits, teacher, target, options, sample_weight, normalizer, count_group, inplace,
            return_stats, backend,
        )  # fmt: skip
    _check(shards, student_logits, teacher, target, sample_weight, normalizer, options)
    shape = student_logits.shape
    if sample_weight is not None:
        sample_weight = sample_weight.reshape(-1)
    if target is not None:
        target = flat_target(target, len(shape) - 1, student_logits)
        target, options = labels(OP, shards, target, sample_weight, options)
    normalizer = divisor_over(OP, count_group, normalizer, student_logits, target, sample_weight, shape[-1], options)
    if seen_by_dispatcher(student_logits, teacher, target, sample_weight):
        call = DistillCall(
            packed(options), as_rows(student_logits), as_rows(teacher), target, sample_weight,
            beside(normalizer, student_logits),
        )  # fmt: skip
        loss, rows = vocab_library.vocab_distillation_loss(
            *packed_call(call), return_stats, backend, *vocab_library.as_arguments(shards)
        )
        return _shaped(loss, rows if return_stats else None, shape, options)
    student, given = dense_rows(student_logits), dense_rows(teacher)
    if inplace and student.numel():
        check_inplace(student_logits, student)
    inputs = (options, student, given, target, sample_weight, normalizer)
    direct = row_kernel("distill", chosen(backend, tensors_of(student, given)))
    kernel = vocab_library.sharded(DistillCall(*inputs), (direct, direct), shards)
    if graph_wanted(student, given):
        loss, rows = with_graph(kernel, *inputs, return_stats, inplace)
    else:
        loss, rows, *_ = kernel.forward(DistillCall(*inputs, want_stats=return_stats))
    return _shaped(loss, rows, shape, options)


def _of_record(
    shards: Shards, student_logits: Tensor, record: TeacherTopK, target: Tensor | None, options: DistillOptions,
    sample_weight: Tensor | None, normalizer: float | Tensor | None, count_group: Any, inplace: bool,
    return_stats: bool, backend: str,
) -> Any:  # fmt: skip
    """The same against a record, whose ids are of all classes and which is whole in each process."""
    _checks.floating(OP, "student_logits", student_logits)
    shape = student_logits.shape
    # All that is asked of it is its shape, which is that of all classes.
    whole = student_logits.detach().new_zeros(()).expand(*shape[:-1], shards.classes)
    asked = target if target is None or target.shape != shape else target.detach().new_zeros(()).expand(whole.shape)
    if return_stats:
        raise ArgumentError(
            f"{OP}: return_stats=True needs the teacher's logits with classes in several processes, got a top-k record"
        )
    check_topk(whole, record, asked, sample_weight, normalizer, options)
    check_where_asked(record)
    topk = rows_of(record)
    if sample_weight is not None:
        sample_weight = sample_weight.reshape(-1)
    if target is not None:
        target = flat_target(target, len(shape) - 1, student_logits)
    if _checks.on_plain_cpu(student_logits):
        check_ids(OP, topk, shards.classes, target, sample_weight, options)
    if target is not None:
        target, options = labels(OP, shards, target, sample_weight, options)
    check_entries(OP, topk, target, sample_weight, options)
    warn_where_small(OP, record, topk, target, sample_weight, options, stacklevel=4)
    divisor = divisor_over(OP, count_group, normalizer, student_logits, target, sample_weight, shape[-1], options)
    if seen_by_dispatcher(student_logits, topk.log_probs, target, sample_weight):
        divisor = beside(divisor, student_logits)
        call = DistillCall(packed(options), as_rows(student_logits), topk, target, sample_weight, divisor)
        loss, _ = vocab_library.vocab_distillation_loss(
            *packed_call(call), False, backend, *vocab_library.as_arguments(shards)
        )
        return _shaped(loss, None, shape, options)
    student = dense_rows(student_logits)
    if inplace and student.numel():
        check_inplace(student_logits, student)
    name = chosen(backend, tensors_of(student, topk), select.TOPK)
    kernels = [row_kernel(op, name) for op in (select.TOPK, "distill")]
    kernel = vocab_library.sharded(DistillCall(options, student, topk, target), kernels, shards)
    if graph_wanted(student):
        loss, _ = with_graph(kernel, options, student, topk, target, sample_weight, divisor, False, inplace)
    else:
        loss = kernel.forward(DistillCall(options, student, topk, target, sample_weight, divisor)).loss
    return _shaped(loss, None, shape, options)


def _shaped(
    loss: Tensor, rows: Tensor | None, shape: torch.Size, options: DistillOptions
) -> Tensor | tuple[Tensor, DistillStats]:
    """The results for the caller."""
    if options.reduction == "none":
        loss = loss.reshape(shape[:-1])
    if rows is None:
        return loss
    return loss, DistillStats(*(value.reshape(shape[:-1]) for value in DistillStats.from_rows(rows)))


def labels(
    op: str, shards: Shards, target: Tensor, sample_weight: Tensor | None, options: DistillOptions
) -> tuple[Tensor | None, DistillOptions]:
    """Global labels as those of this process, and the options that they are read by; shares are of its classes."""
    if is_soft(target):
        return (target, options) if is_on(options.hard_weight) else (None, options)
    if not is_on(options.hard_weight):
        return as_mask(op, shards.classes, target, sample_weight, options)
    if _checks.on_plain_cpu(target):
        check_row_values(op, shards.classes, target, sample_weight, options)
    return local_target(target, options, shards), options._replace(ignore_index=-100, unlabeled_index=-1)


def chosen(backend: str, tensors: list[Tensor], op: str = "distill") -> str:
    """The backend that runs the rows of this process.

    Raises:
        BackendError: one whose row states are not merged.
    """
    return served(select.choose(op, backend, tensors), op)


def _check(
    shards: Shards, student: Tensor, teacher: Tensor, target: Tensor | None, sample_weight: Tensor | None,
    normalizer: float | Tensor | None, options: DistillOptions,
) -> None:  # fmt: skip
    _checks.floating(OP, "student_logits", student)
    _checks.floating(OP, "teacher_logits", teacher)
    if not student.dim() or student.shape != teacher.shape:
        raise ShapeError(
            f"{OP}: student_logits {tuple(student.shape)} and teacher_logits {tuple(teacher.shape)} differ: with "
            "vocab_group each process passes the same classes of both"
        )
    if not shards.classes:
        raise ShapeError(f"{OP}: the processes of vocab_group have no class between them")
    check_classes(OP, "student_logits", shards.classes, options)
    _checks.same_device(OP, "student_logits", student, "teacher_logits", teacher)
    check_rows(OP, "student_logits", student, target, sample_weight, normalizer, options)
