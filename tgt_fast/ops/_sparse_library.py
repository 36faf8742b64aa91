"""The loss against a top-k record in PyTorch's dispatcher: the op that users call, and what its autograd calls."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tgt_fast.errors import ArgumentError
from tgt_fast.kernels import select
from tgt_fast.kernels.distill_calls import accumulate_dtype
from tgt_fast.kernels.native.sparse import bad_id, find_bad_id
from tgt_fast.kernels.options import SPARSE_ROW_STATE, DistillOptions, Forward, Listed
from tgt_fast.ops import _checks, library
from tgt_fast.ops._distill_arguments import OP
from tgt_fast.ops._distill_arguments import check_values as check_targets
from tgt_fast.ops._distill_autograd import Call, Distill
from tgt_fast.ops._distill_library import dense_rows, distill_scale_
from tgt_fast.ops._packing import DIVISOR, OPTIONS, or_nothing, packed, settled, unpacked
from tgt_fast.ops._record_values import check_log_probs, warn_of_small_log_probs
from tgt_fast.ops._sparse_record import TeacherTopK

_TENSORS = "Tensor student, Tensor ids, Tensor log_probs, Tensor? tail_log_prob, Tensor? target, Tensor? sample_weight"


class Bound:
    """Kernels of this op as the autograd of the dense one calls them: the record's log-probabilities in the teacher's
    place, which no gradient reaches, and the rest of it bound."""

    def __init__(self, kernel: Any, record: Listed) -> None:
        self.kernel = kernel
        self.record = record

    def forward(
        self, student: Tensor, log_probs: Tensor, target: Tensor | None, sample_weight: Tensor | None,
        normalizer: float | Tensor | None, options: DistillOptions, *, wanted: tuple[bool, bool], keep_rows: bool,
        inplace: bool, want_stats: bool,
    ) -> Forward:  # fmt: skip
        out: Forward = self.kernel.forward(
            student, self.record, target, sample_weight, normalizer, options, wanted=wanted[0], keep_rows=keep_rows,
            inplace=inplace,
        )  # fmt: skip
        return out

    def backward(
        self, student: Tensor, log_probs: Tensor, target: Tensor | None, state: Tensor, d_loss: Tensor,
        options: DistillOptions, *, wanted: tuple[bool, bool], inplace: bool,
    ) -> tuple[Tensor, None]:  # fmt: skip
        return self.kernel.backward(student, self.record, target, state, d_loss, options, inplace=inplace), None

    def scale_(self, grad: Tensor, d_loss: Tensor) -> None:
        self.kernel.scale_(grad, d_loss)


def check_values(
    student: Tensor, record: Listed, target: Tensor | None, sample_weight: Tensor | None, options: DistillOptions
) -> None:
    """What the compiled core checks while it runs, for the reference on a CPU."""
    check_targets(student, target, sample_weight, options)
    check_ids(OP, record, student.shape[1], target, sample_weight, options)


def check_ids(
    op: str, record: Listed, classes: int, target: Tensor | None, sample_weight: Tensor | None, options: DistillOptions
) -> None:
    """That the rows that count list classes that exist, each once."""
    if options.soft_weight == 0:
        return
    found = find_bad_id(record.ids, record.log_probs, classes, counted_rows(record, target, sample_weight, options))
    if found is not None:
        raise ArgumentError(bad_id(op, record.ids, *found, classes))


def check_entries(
    op: str, record: Listed, target: Tensor | None, sample_weight: Tensor | None, options: DistillOptions
) -> None:
    """On a CPU: that the rows that count hold log-probabilities."""
    if options.soft_weight > 0 and _checks.on_plain_cpu(record.log_probs):
        check_log_probs(op, record.log_probs, counted_rows(record, target, sample_weight, options))


def warn_where_small(
    op: str, record: TeacherTopK, listed: Listed, target: Tensor | None, sample_weight: Tensor | None,
    options: DistillOptions, *, stacklevel: int,
) -> None:  # fmt: skip
    """On a CPU, of a record whose tail was derived: say so where its entries are too small to be the likeliest."""
    derived = record.tail_log_prob is None and record.tail != "renormalize" and record.k < record.num_classes
    if derived and options.soft_weight > 0 and _checks.on_plain_cpu(listed.log_probs):
        counted = counted_rows(listed, target, sample_weight, options)
        warn_of_small_log_probs(op, listed.log_probs, record.num_classes, counted, stacklevel=stacklevel + 1)


def counted_rows(
    record: Listed, target: Tensor | None, sample_weight: Tensor | None, options: DistillOptions
) -> Tensor | None:
    """The rows that enter the loss, bool [N]; None: all."""
    counted = None if target is None else target != options.ignore_index
    if sample_weight is not None:
        weighed = sample_weight != 0
        counted = weighed if counted is None else counted & weighed
    return counted


def _choose(backend: str, *tensors: Tensor | None) -> str:
    return select.choose("sparse", backend, [tensor for tensor in tensors if tensor is not None])


# The kernels


def _forward(
    student: Tensor, ids: Tensor, log_probs: Tensor, tail_log_prob: Tensor | None, target: Tensor | None,
    sample_weight: Tensor | None, normalizer: Tensor | None, divisor: float | None, *rest: Any,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    options, (tail, backend, wanted, keep_rows) = unpacked(rest)
    options, target = settled(OP, options, student.shape[1], target, sample_weight)
    student = dense_rows(student)
    record = Listed(ids, log_probs, tail_log_prob, tail)
    chosen = _choose(backend, student, ids, log_probs, tail_log_prob)
    if chosen == "reference" and _checks.on_plain_cpu(student):
        check_values(student, record, target, sample_weight, options)
    check_entries(OP, record, target, sample_weight, options)
    out = select.kernel("sparse", chosen).forward(
        student, record, target, sample_weight, divisor if normalizer is None else normalizer, options,
        wanted=wanted, keep_rows=keep_rows,
    )  # fmt: skip
    return out.loss, or_nothing(out.d_student, student), or_nothing(out.rows, out.loss)


def _forward_fake(
    student: Tensor, ids: Tensor, log_probs: Tensor, tail_log_prob: Tensor | None, target: Tensor | None,
    sample_weight: Tensor | None, normalizer: Tensor | None, divisor: float | None, *rest: Any,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    options, (_, _, wanted, keep_rows) = unpacked(rest)
    rows, classes = student.shape
    loss = student.new_empty(rows if options.reduction == "none" else (), dtype=accumulate_dtype(student, log_probs))
    return (
        loss,
        student.new_empty((rows, classes) if wanted else 0),
        loss.new_empty(rows, SPARSE_ROW_STATE, dtype=torch.float64) if keep_rows else loss.new_empty(0),
    )


def _backward(
    student: Tensor, ids: Tensor, log_probs: Tensor, tail_log_prob: Tensor | None, target: Tensor | None, rows: Tensor,
    d_loss: Tensor, *rest: Any,
) -> Tensor:  # fmt: skip
    options, (tail, backend) = unpacked(rest)
    options, target = settled(OP, options, student.shape[1], target, looked_at=True)
    student = dense_rows(student)
    kernel = select.kernel("sparse", _choose(backend, student, ids, log_probs, tail_log_prob))
    made: Tensor = kernel.backward(
        student, Listed(ids, log_probs, tail_log_prob, tail), target, rows.contiguous(), d_loss, options
    )
    return made


def _backward_fake(
    student: Tensor, ids: Tensor, log_probs: Tensor, tail_log_prob: Tensor | None, target: Tensor | None, rows: Tensor,
    d_loss: Tensor, *rest: Any,
) -> Tensor:  # fmt: skip
    return student.new_empty(student.shape)


# The op


def _loss(
    student: Tensor, ids: Tensor, log_probs: Tensor, tail_log_prob: Tensor | None, target: Tensor | None,
    sample_weight: Tensor | None, normalizer: Tensor | None, divisor: float | None, *rest: Any,
) -> Tensor:  # fmt: skip
    return _forward(
        student, ids, log_probs, tail_log_prob, target, sample_weight, normalizer, divisor, *rest, False, False
    )[0]  # fmt: skip


def _loss_fake(
    student: Tensor, ids: Tensor, log_probs: Tensor, tail_log_prob: Tensor | None, target: Tensor | None,
    sample_weight: Tensor | None, normalizer: Tensor | None, divisor: float | None, *rest: Any,
) -> Tensor:  # fmt: skip
    return _forward_fake(
        student, ids, log_probs, tail_log_prob, target, sample_weight, normalizer, divisor, *rest, False, False
    )[0]  # fmt: skip


def _loss_autograd(
    student: Tensor, ids: Tensor, log_probs: Tensor, tail_log_prob: Tensor | None, target: Tensor | None,
    sample_weight: Tensor | None, normalizer: Tensor | None, divisor: float | None, *rest: Any,
) -> Tensor:  # fmt: skip
    options, (tail, backend) = unpacked(rest)
    record = Listed(ids, log_probs.detach(), tail_log_prob, tail)
    call = Call(options, Bound(_Dispatched(backend), record), False, False, (ids, tail_log_prob))
    divide_by = divisor if normalizer is None else normalizer
    loss: Tensor = library.apply(Distill, student, record.log_probs, target, sample_weight, divide_by, call)[0]
    return loss


class _Dispatched:
    """The kernels as autograd wants them, each call an op that a tracer can see."""

    def __init__(self, backend: str) -> None:
        self.backend = backend

    def forward(
        self, student: Tensor, record: Listed, target: Tensor | None, sample_weight: Tensor | None,
        normalizer: float | Tensor | None, options: DistillOptions, *, wanted: bool, keep_rows: bool, inplace: bool,
    ) -> Forward:  # fmt: skip
        on_device, divisor = library.split(normalizer)
        with torch._C._AutoDispatchBelowAutograd():
            loss, d_student, rows = _sparse_forward(
                student, record.ids, record.log_probs, record.tail_log_prob, target, sample_weight, on_device, divisor,
                *packed(options), record.tail, self.backend, wanted, keep_rows,
            )  # fmt: skip
        return Forward(loss, d_student if wanted else None, None, rows if keep_rows else None, None)

    def backward(
        self, student: Tensor, record: Listed, target: Tensor | None, state: Tensor, d_loss: Tensor,
        options: DistillOptions, *, inplace: bool,
    ) -> Tensor:  # fmt: skip
        with torch._C._AutoDispatchBelowAutograd():
            made: Tensor = _sparse_backward(
                student, record.ids, record.log_probs, record.tail_log_prob, target, state, d_loss,
                *packed(options), record.tail, self.backend,
            )  # fmt: skip
        return made

    def scale_(self, grad: Tensor, d_loss: Tensor) -> None:
        with torch._C._AutoDispatchBelowAutograd():
            distill_scale_(grad, d_loss, self.backend)


sparse_distillation_loss = library.define(
    f"sparse_distillation_loss({_TENSORS}, {DIVISOR}, {OPTIONS}, str tail, str backend) -> Tensor",
    _loss,
    _loss_fake,
    _loss_autograd,
    differentiable=1,
)
_sparse_forward = library.define(
    f"sparse_forward({_TENSORS}, {DIVISOR}, {OPTIONS}, str tail, str backend, bool want_d_student, "
    "bool keep_rows) -> (Tensor, Tensor, Tensor)",
    _forward,
    _forward_fake,
)
_sparse_backward = library.define(
    "sparse_backward(Tensor student, Tensor ids, Tensor log_probs, Tensor? tail_log_prob, Tensor? target, Tensor rows, "
    f"Tensor d_loss, {OPTIONS}, str tail, str backend) -> Tensor",
    _backward,
    _backward_fake,
)
