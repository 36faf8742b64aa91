"""The soft-label loss against a teacher's top-k record: making one, arguments, choice of backend."""

from __future__ import annotations

from typing import Any, Final

import torch
from torch import Tensor

from tgt_fast._forks import one_thread_in_forks
from tgt_fast.errors import ShapeError
from tgt_fast.kernels import select
from tgt_fast.kernels.late import beside, is_on
from tgt_fast.kernels.options import TAILS, TEMPERATURES, DistillOptions, Listed
from tgt_fast.kernels.reference import sparse as reference_sparse
from tgt_fast.ops import _checks
from tgt_fast.ops._distill_arguments import (
    OP,
    as_mask,
    check_classes,
    check_inplace,
    check_rows,
    check_student,
    flat_labels,
)
from tgt_fast.ops._distill_autograd import Call, Distill
from tgt_fast.ops._distill_library import dense_rows
from tgt_fast.ops._packing import packed
from tgt_fast.ops._sparse_library import Bound, check_entries, check_values, warn_where_small
from tgt_fast.ops._sparse_library import sparse_distillation_loss as sparse_distillation_loss_op
from tgt_fast.ops._sparse_record import TeacherTopK, check_options, check_where_asked
from tgt_fast.ops.counts import divisor_over
from tgt_fast.ops.library import seen_by_dispatcher, split

# Logits that are looked at at once, of which a copy is made: on a CPU so few that the allocator gives the same memory
# to every piece, elsewhere so many that the work outweighs the launches.
_CPU_PIECE: Final = 1 << 22
_PIECE: Final = 1 << 24


@one_thread_in_forks
def topk_teacher(
    logits: Tensor,  # [..., C]
    k: int,
    temperature: float = 1.0,
    *,
    tail: str = "bucket",
) -> TeacherTopK:
    """``log_softmax(logits / T).topk(k)``, with a log-sum-exp over the classes that are left out as the tail.

    Args:
        logits: ``(..., C)`` float64, float32, bfloat16 or float16. Not differentiable: a record is data.
        k: how many classes to list, 1 to C.
        temperature: T, in [1e-30, 100]. The loss must be taken at the same.
        tail: what the loss makes of the classes that are not listed; see :class:`TeacherTopK`.

    Returns:
        A :class:`TeacherTopK` of int64 ids, most probable first, and float32 log-probabilities (float64 for float64).
        Logits of -inf that come among the k are padding. A row that holds NaN or +inf, or nothing but -inf, gives NaN.

    Raises:
        ShapeError, DTypeError, ArgumentError: with the offending values.

    The tail is summed by itself and not as 1 minus the mass of the top k, of which rounding would leave nothing where
    a teacher is sure. Rows are taken in pieces: the extra memory does not grow with their number. Deterministic, apart
    from the choice among equal logits, which is that of ``torch.topk``; nothing waits for a device.

    >>> import torch, tgt_fast as tgt
    >>> record = tgt.topk_teacher(torch.tensor([[0.0, 30.0, 1.0]]), k=1)
    >>> record.ids.item(), round(record.tail_log_prob.item(), 4)
    (1, -28.6867)
    """
    op = "topk_teacher"
    _checks.not_recorded(op)
    _checks.floating(op, "logits", logits)
    if logits.dim() == 0 or logits.shape[-1] == 0:
        raise ShapeError(f"{op}: logits must be (..., C) with C >= 1, got {tuple(logits.shape)}")
    classes = logits.shape[-1]
    k = _checks.integer(op, "k", k, 1, classes + 1)
    temperature = _checks.number(op, "temperature", temperature, *TEMPERATURES)
    _checks.choice(op, "tail", tail, TAILS)
    with torch.no_grad():
        rows = logits.detach().reshape(-1, classes)
        most = _CPU_PIECE if rows.device.type == "cpu" else _PIECE
        pieces = [_top(piece, k, temperature) for piece in rows.split(max(1, most // classes))]
        ids, log_probs, rest = (torch.cat(parts) for parts in zip(*pieces, strict=True))
    shape = logits.shape[:-1]
    ids, log_probs = ids.reshape(*shape, k), log_probs.reshape(*shape, k)
    return TeacherTopK(ids, log_probs, rest.reshape(shape), temperature, classes, tail)


def _top(logits: Tensor, k: int, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    """ids, log-probabilities and tail of some rows.  [N, C] -> [N, k], [N, k], [N]"""
    wide = logits.to(torch.float64 if logits.dtype == torch.float64 else torch.float32)
    values, ids = wide.topk(k, dim=-1)
    # Relative to the largest: a difference of logits is exact where a tempered logit would be rounded.
    peak = values[:, :1]
    values = (values - peak) / temperature
    if k < logits.shape[1]:
        others = wide.scatter(1, ids, -torch.inf)
        next_largest = others.amax(-1, keepdim=True)
        next_largest = torch.where(next_largest == -torch.inf, 0, next_largest)
        # In place, and relative to the largest of the others, of which much would underflow beside the largest of all.
        others = others.sub_(next_largest).div_(temperature).exp_().sum(-1).log_()
        others = others + ((next_largest - peak) / temperature)[:, 0]
    else:
        others = torch.where(peak[:, 0].isfinite(), -torch.inf, torch.nan).to(wide.dtype)
    total = torch.logaddexp(values.logsumexp(-1), others)
    return ids, values - total[:, None], others - total


def sparse_distillation_loss(
    student_logits: Tensor,  # [..., C]
    record: TeacherTopK,
    target: Tensor | None,  # [...]
    sample_weight: Tensor | None,  # [...]
    normalizer: float | Tensor | None,
    options: DistillOptions,
    *,
    inplace: bool,
    backend: str,
    count_group: Any = None,
) -> Tensor:
    """What :func:`tgt_fast.distillation_loss` does where a record stands in the place of the teacher's logits."""
    _check(student_logits, record, options)
    check_rows(OP, "student_logits", student_logits, target, sample_weight, normalizer, options)
    shape, k = student_logits.shape, record.k
    if sample_weight is not None:
        sample_weight = sample_weight.reshape(-1)
    if target is not None:
        target = flat_labels(target)
        if not is_on(options.hard_weight):
            target, options = as_mask(OP, shape[-1], target, sample_weight, options)
    normalizer = divisor_over(OP, count_group, normalizer, student_logits, target, sample_weight, shape[-1], options)
    rest = record.rest()
    ids, log_probs = record.ids.reshape(-1, k).to(torch.int64), record.log_probs.reshape(-1, k)
    rest = None if rest is None else rest.reshape(-1)
    check_where_asked(record)

    if backend != "reference" and seen_by_dispatcher(student_logits, ids, log_probs, rest, target, sample_weight):
        on_device, divisor = split(beside(normalizer, student_logits))
        loss: Tensor = sparse_distillation_loss_op(
            student_logits.reshape(-1, shape[-1]), ids, log_probs, rest, target, sample_weight, on_device, divisor,
            *packed(options), record.tail, backend,
        )  # fmt: skip
    else:
        student = dense_rows(student_logits)
        if inplace:
            check_inplace(student_logits, student)
        listed = Listed(ids, log_probs, rest, record.tail)
        check_entries(OP, listed, target, sample_weight, options)
        warn_where_small(OP, record, listed, target, sample_weight, options, stacklevel=3)
        tensors = [student, ids, log_probs] if rest is None else [student, ids, log_probs, rest]
        chosen = select.choose("sparse", backend, tensors)
        arguments = (student, listed, target, sample_weight, normalizer, options)
        loss = _run_reference(*arguments) if chosen == "reference" else _run_compiled(*arguments, inplace, chosen)
    return loss.reshape(shape[:-1]) if options.reduction == "none" else loss


def _check(student: Tensor, record: TeacherTopK, options: DistillOptions) -> None:
    check_student(student)
    check_options(OP, record, options)
    if student.shape[-1:] != (record.num_classes,):
        found = student.shape[-1] if student.dim() else "no"
        raise ShapeError(
            f"{OP}: student_logits have {found} classes, the record's ids point into {record.num_classes}; "
            "select or map the classes that both share, or pad the student's logits with -inf"
        )
    check_classes(OP, "student_logits", record.num_classes, options)
    if student.shape[:-1] != record.shape:
        raise ShapeError(
            f"{OP}: student_logits {tuple(student.shape)} and the record's rows {tuple(record.shape)} do not match"
        )
    _checks.same_device(OP, "student_logits", student, "the record", record.log_probs)
    _checks.real(OP, "log_probs", record.log_probs)


def _run_reference(
    student: Tensor, record: Listed, target: Tensor | None, sample_weight: Tensor | None,
    normalizer: float | Tensor | None, options: DistillOptions,
) -> Tensor:  # fmt: skip
    if _checks.on_plain_cpu(student):
        check_values(student, record, target, sample_weight, options)
    return reference_sparse.distillation_loss(student, record, target, sample_weight, normalizer, options)


def _run_compiled(
    student: Tensor, record: Listed, target: Tensor | None, sample_weight: Tensor | None,
    normalizer: float | Tensor | None, options: DistillOptions, inplace: bool, backend: str,
) -> Tensor:  # fmt: skip
    """The direct door to the kernels."""
    kernel: Any = select.kernel("sparse", backend)
    if torch.is_grad_enabled() and student.requires_grad:
        call = Call(options, Bound(kernel, record), inplace, False, (record.ids, record.tail_log_prob))
        loss: Tensor = Distill.apply(student, record.log_probs, target, sample_weight, normalizer, call)[0]
        return loss
    loss = kernel.forward(student, record, target, sample_weight, normalizer, options).loss
    return loss
