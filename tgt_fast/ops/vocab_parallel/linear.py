"""The loss from hidden states of which each process has a slice of the heads: arguments, and the way to the kernels.

The driver is that of whole heads, a chunk of rows at a time, with a row kernel that merges the states of the rows. A
head's gradient stays in its process. Those of hidden states, which all classes give, are added up at the end.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tgt_fast.errors import ArgumentError, BackendError, ShapeError
from tgt_fast.kernels import calls, linear_chunks, select
from tgt_fast.kernels.late import is_on
from tgt_fast.kernels.linear_heads import casts_operands
from tgt_fast.kernels.options import (
    DIFFERENTIABLE,
    DistillOptions,
    DistillStats,
    LinearForward,
    LinearOptions,
    LinearTensors,
)
from tgt_fast.kernels.vocabulary import Vocabulary
from tgt_fast.ops import _checks, library
from tgt_fast.ops._distill_arguments import check_classes, check_rows, flat_labels
from tgt_fast.ops._heads import warn_of_adapters
from tgt_fast.ops._linear_arguments import OP, check_head, warn_of_trained_teacher
from tgt_fast.ops._linear_op import Call, Linear
from tgt_fast.ops.counts import divisor_over
from tgt_fast.ops.library import graph_wanted, seen_by_dispatcher
from tgt_fast.ops.topk import TeacherTopK
from tgt_fast.ops.vocab_parallel.distill import chosen, labels, refuse_shares
from tgt_fast.ops.vocab_parallel.kernel import Sharded
from tgt_fast.ops.vocab_parallel.shards import Shards
from tgt_fast.ops.vocabulary import check_labels_exist


class Driver:
    """The driver on a merging row kernel, as autograd wants it."""

    def __init__(self, backend: str, shards: Shards) -> None:
        self._kernel: Any = Sharded(calls.Direct(select.kernel("distill", backend)), shards)
        self._shards = shards

    def forward(
        self, t: LinearTensors, divisor: Any, heads: LinearOptions, options: DistillOptions, **keywords: Any
    ) -> LinearForward:
        """Losses and the wanted gradients."""
        with torch.no_grad(), library.without_autocast():
            made = linear_chunks.forward(
                self._kernel, t, divisor, heads, options, widest=self._shards.widest, **keywords
            )
            return made._replace(grads=self._added(made.grads, t))

    def backward(
        self, t: LinearTensors, divisor: Any, d_loss: Tensor, heads: LinearOptions, options: DistillOptions, *,
        wanted: tuple[bool, ...],
    ) -> tuple[Tensor | None, ...]:  # fmt: skip
        """The gradients anew."""
        return self.forward(t, divisor, heads, options, wanted=wanted, upstream=d_loss).grads

    def scale_(self, grad: Tensor, d_loss: Tensor) -> None:
        """grad *= d_loss, a factor for all rows or one a row."""
        self._kernel.scale_(grad, d_loss)

    def _added(self, grads: tuple[Tensor | None, ...], t: LinearTensors) -> tuple[Tensor | None, ...]:
        """With the hidden states' gradients of all processes."""
        made = list(grads)
        for at in (0, 3) if t.teacher_weight is not None else (0,):
            grad = made[at]
            if grad is not None:
                made[at] = self._shards.total(grad)
        return tuple(made)


def linear_distillation_loss(
    shards: Shards, given: LinearTensors, topk: TeacherTopK | None, normalizer: float | Tensor | None, count_group: Any,
    heads: LinearOptions, options: DistillOptions, return_stats: bool, backend: str,
) -> Tensor | tuple[Tensor, DistillStats]:  # fmt: skip
    """The loss of all classes, from this process's slices of the heads; ``given`` as the caller gave it."""
    if topk is not None:
        raise ArgumentError(f"{OP}: a top-k record is not taken with vocab_group; pass the teacher's head or logits")
    if given.vocab_map is not None:
        raise ArgumentError(
            f"{OP}: vocab_map is not taken with vocab_group: a class of the teacher may be in another process than the "
            "student's; bring the heads into one order before they are spread"
        )
    if seen_by_dispatcher(*given):
        raise BackendError(f"{OP}: a call with vocab_group is not compiled; take this loss outside")
    refuse_shares(OP, given.student_hidden, given.target)
    _check(shards, given, normalizer, heads, options)
    warn_of_trained_teacher(given.teacher_weight, given.teacher_bias)
    warn_of_adapters(OP, given.student_weight, given.teacher_weight)
    shape, device = given.student_hidden.shape[:-1], given.student_hidden.device
    target, weight = given.target, None if given.sample_weight is None else given.sample_weight.reshape(-1)
    exists = _existing(shards, given.vocab_mask, heads.vocab_size, device)
    if target is not None:
        target = flat_labels(target)
        if exists is not None and is_on(options.hard_weight):
            check_labels_exist(OP, target, ~exists, given.student_hidden, options)
            everywhere = Vocabulary(shards.classes, shards.classes, ~exists, None, None, None)
            target = everywhere.without_missing(target, options.ignore_index)
        target, options = labels(OP, shards, target, weight, options)  # type: ignore[arg-type]
    here = None if exists is None or not shards.width else exists[shards.start : shards.start + shards.width]
    t = given._replace(
        student_hidden=_rows(given.student_hidden, given.student_weight),
        teacher=_rows(given.teacher, given.teacher_weight), target=target, sample_weight=weight, vocab_mask=here,
    )  # fmt: skip
    divisor = divisor_over(OP, count_group, normalizer, t.student_hidden, target, weight, shards.width, options)
    heads = heads._replace(vocab_size=None)
    present = [x for x in t[:DIFFERENTIABLE] if x is not None]
    kernel = Driver(chosen(backend, present, "linear"), shards)
    if graph_wanted(*t[:DIFFERENTIABLE]):
        loss, rows = Linear.apply(divisor, Call(heads, options, kernel, return_stats), *t)
    else:
        out = kernel.forward(t, divisor, heads, options, want_stats=return_stats)
        loss, rows = out.loss, out.stats
    if options.reduction == "none":
        loss = loss.reshape(shape)
    if rows is None:
        return loss  # type: ignore[no-any-return]
    return loss, DistillStats(*(value.reshape(shape) for value in DistillStats.from_rows(rows)))


def _rows(matrix: Tensor, weight: Tensor | None) -> Tensor:
    """(..., H) as (N, H), in a dtype that hidden states' gradients are not rounded to before they are added up."""
    rows = matrix if matrix.dim() == 2 else matrix.reshape(-1, matrix.shape[-1])
    if weight is None or rows.dtype not in (torch.bfloat16, torch.float16) or casts_operands(rows.device):
        return rows
    return rows.to(torch.float32)


def _existing(shards: Shards, mask: Tensor | None, size: int | None, device: torch.device) -> Tensor | None:
    """Which classes exist at all; None: all.  -> [C] bool"""
    if size is None or size == shards.classes:
        return mask
    inside = torch.arange(shards.classes, device=device) < size
    return inside if mask is None else inside & mask


def _check(
    shards: Shards, t: LinearTensors, normalizer: float | Tensor | None, heads: LinearOptions, options: DistillOptions
) -> None:
    """The tensors of this process, and what is said of all classes."""
    teacher_name = "teacher_hidden" if t.teacher_weight is not None else "teacher_logits"
    named = {
        "student_hidden": t.student_hidden, "student_weight": t.student_weight, "student_bias": t.student_bias,
        teacher_name: t.teacher, "teacher_weight": t.teacher_weight, "teacher_bias": t.teacher_bias,
    }  # fmt: skip
    for name, tensor in named.items():
        if tensor is not None:
            _checks.floating(OP, name, tensor)
            _checks.same_device(OP, name, tensor, "student_hidden", t.student_hidden)
    check_head("student", t.student_hidden, t.student_weight, t.student_bias)
    if t.teacher_weight is not None:
        check_head("teacher", t.teacher, t.teacher_weight, t.teacher_bias)
    classes = t.teacher.shape[-1] if t.teacher_weight is None else t.teacher_weight.shape[0]
    if classes != shards.width:
        raise ShapeError(
            f"{OP}: student_weight has {shards.width} classes here and the teacher {classes}: with vocab_group each "
            "process passes the same classes of both"
        )
    if t.student_hidden.shape[:-1] != t.teacher.shape[:-1]:
        raise ShapeError(
            f"{OP}: student_hidden {tuple(t.student_hidden.shape)} and {teacher_name} {tuple(t.teacher.shape)} differ "
            "in their rows"
        )
    if heads.vocab_size is not None and heads.vocab_size > shards.classes:
        raise ShapeError(
            f"{OP}: vocab_size={heads.vocab_size}, but the processes have {shards.classes} classes between them"
        )
    if t.vocab_mask is not None:
        _checks.real(OP, "vocab_mask", t.vocab_mask)
        if t.vocab_mask.dtype != torch.bool or tuple(t.vocab_mask.shape) != (shards.classes,):
            raise ShapeError(
                f"{OP}: vocab_mask must hold a bool for each of the {shards.classes} classes of all processes, got "
                f"{t.vocab_mask.dtype} {tuple(t.vocab_mask.shape)}"
            )
        _checks.same_device(OP, "vocab_mask", t.vocab_mask, "student_hidden", t.student_hidden)
    check_classes(OP, "both sides together", shards.classes if heads.vocab_size is None else heads.vocab_size, options)
    check_rows(OP, "student_hidden", t.student_hidden, t.target, t.sample_weight, normalizer, options)
