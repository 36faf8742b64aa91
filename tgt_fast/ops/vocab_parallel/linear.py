"""The loss from hidden states of which each process has a slice of the heads: arguments, and the way to the kernels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tgt_fast.errors import ArgumentError, BackendError, ShapeError
from tgt_fast.kernels.calls import is_soft
from tgt_fast.kernels.late import as_scalar, beside, is_late, is_on
from tgt_fast.kernels.linear_heads import casts_operands
from tgt_fast.kernels.options import DIFFERENTIABLE, DistillOptions, DistillStats, LinearOptions, LinearTensors
from tgt_fast.kernels.vocabulary import Vocabulary, shared
from tgt_fast.ops import _checks
from tgt_fast.ops._checks import check_entries, check_ids
from tgt_fast.ops._distill_arguments import as_rows, check_classes, check_rows, flat_target, packed
from tgt_fast.ops._heads import warn_of_adapters
from tgt_fast.ops._linear_arguments import OP, check_head, check_tail, warn_of_trained_teacher
from tgt_fast.ops._linear_op import Call, Linear, packed_call
from tgt_fast.ops.counts import divisor_over
from tgt_fast.ops.library import graph_wanted, seen_by_dispatcher
from tgt_fast.ops.topk import TeacherTopK, check_where_asked, rows_of, warn_where_small
from tgt_fast.ops.vocab_parallel.distill import labels
from tgt_fast.ops.vocab_parallel.library import as_arguments
from tgt_fast.ops.vocab_parallel.linear_library import Driver, vocab_linear_distillation_loss
from tgt_fast.ops.vocab_parallel.shards import Shards
from tgt_fast.ops.vocabulary import check_labels_exist, check_vocabulary, check_vocabulary_values


def linear_distillation_loss(
    shards: Shards, given: LinearTensors, topk: TeacherTopK | None, normalizer: float | Tensor | None, count_group: Any,
    heads: LinearOptions, options: DistillOptions, return_stats: bool, backend: str,
) -> Tensor | tuple[Tensor, DistillStats]:  # fmt: skip
    """The loss of all classes, from this process's slices of the heads; ``given`` as the caller gave it."""
    if return_stats and topk is not None:
        raise ArgumentError(
            f"{OP}: return_stats=True needs the teacher's logits with classes in several processes, got a top-k record"
        )
    if given.vocab_map is not None and topk is None:
        raise ArgumentError(
            f"{OP}: vocab_map is not taken with vocab_group: a class of the teacher may be in another process than the "
            "student's; bring the heads into one order before they are spread"
        )
    _check(shards, given, topk, normalizer, heads, options)
    warn_of_trained_teacher(given.teacher_weight, given.teacher_bias)
    warn_of_adapters(OP, given.student_weight, given.teacher_weight)
    shape, device = given.student_hidden.shape[:-1], given.student_hidden.device
    target, weight = given.target, None if given.sample_weight is None else given.sample_weight.reshape(-1)
    vocabulary = _vocabulary(shards, given, heads, device)
    missing = vocabulary.missing
    if target is not None:
        target = flat_target(target, len(shape), given.student_hidden)
        if missing is not None and is_on(options.hard_weight) and not is_soft(target):
            check_labels_exist(OP, target, missing, given.student_hidden, options)
            target = vocabulary.without_missing(target, options.ignore_index)
        target, options = labels(OP, shards, target, weight, options)  # type: ignore[arg-type]
    here = None if missing is None or not shards.width else ~missing[shards.start : shards.start + shards.width]
    hidden, bias, heads = _with_known_scale(given, heads)
    t = given._replace(
        student_hidden=_rows(hidden, given.student_weight), student_bias=bias,
        teacher=_rows(given.teacher, given.teacher_weight), target=target, sample_weight=weight, vocab_map=None,
        vocab_mask=here,
    )  # fmt: skip
    if topk is not None:
        t = _with_record(t, topk, vocabulary, weight, options)
    divisor = divisor_over(OP, count_group, normalizer, t.student_hidden, target, weight, shards.width, options)
    heads = heads._replace(vocab_size=None, topk_classes=None)
    if seen_by_dispatcher(*t):
        loss, rows = vocab_linear_distillation_loss(
            *packed_call(t, beside(divisor, t.student_hidden), heads, packed(options)), return_stats, backend,
            *as_arguments(shards),
        )  # fmt: skip
        rows = rows if return_stats else None
    else:
        kernel = Driver.of(backend, t, shards)
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


def _with_record(
    t: LinearTensors, record: TeacherTopK, vocabulary: Vocabulary, weight: Tensor | None, options: DistillOptions
) -> LinearTensors:
    """The tensors with a record's rows by the classes of the loss, all of them."""
    check_where_asked(record)
    rows = rows_of(record)
    if _checks.on_plain_cpu(t.student_hidden) and not seen_by_dispatcher(*t):
        check_ids(OP, rows, record.num_classes, t.target, weight, options)
        check_entries(OP, rows, t.target, weight, options)
        if record.tail != "renormalize" and vocabulary.missing is not None:
            check_tail(vocabulary, record.num_classes)
        warn_where_small(OP, record, rows, t.target, weight, options, stacklevel=4)
    rows = vocabulary.align_topk(rows)
    return t._replace(teacher=rows.log_probs, topk_ids=rows.ids, tail_log_prob=rows.tail_log_prob)


def _with_known_scale(given: LinearTensors, heads: LinearOptions) -> tuple[Tensor, Tensor | None, LinearOptions]:
    """Hidden states and bias times a scale that is known only when the program runs, in the place of that scale."""
    scale: Any = heads.student_scale
    hidden, bias = given.student_hidden, given.student_bias
    if not is_late(scale):
        return hidden, bias, heads
    if is_late(heads.teacher_scale):
        raise BackendError(
            f"{OP}: with vocab_group teacher_scale must be a number that does not change while compiling"
        )
    if hidden.dtype in (torch.bfloat16, torch.float16):
        hidden = hidden.to(torch.float32)
    scale = as_scalar(scale).to(hidden.device, hidden.dtype)
    return hidden * scale, None if bias is None else bias * scale, heads._replace(student_scale=1.0)


def _rows(matrix: Tensor, weight: Tensor | None) -> Tensor:
    """(..., H) as (N, H), in a dtype that hidden states' gradients are not rounded to before they are added up."""
    rows = matrix if matrix.dim() == 2 else as_rows(matrix)
    if weight is None or rows.dtype not in (torch.bfloat16, torch.float16) or casts_operands(rows.device):
        return rows
    return rows.to(torch.float32)


def _vocabulary(shards: Shards, given: LinearTensors, heads: LinearOptions, device: torch.device) -> Vocabulary:
    """The classes of all processes, which of them exist, and where a record's are among them."""
    classes, size = shards.classes, heads.vocab_size
    named = classes if heads.topk_classes is None else heads.topk_classes
    made = shared(classes, named, None, given.vocab_map, given.vocab_mask)
    if given.vocab_map is None:
        made = made._replace(teacher_classes=min(named, classes))
    if size is None or size == classes:
        return made
    beyond = torch.arange(classes, device=device) >= size
    return made._replace(missing=beyond if made.missing is None else beyond | made.missing)


def _check(
    shards: Shards, t: LinearTensors, topk: TeacherTopK | None, normalizer: float | Tensor | None, heads: LinearOptions,
    options: DistillOptions,
) -> None:  # fmt: skip
    """The tensors of this process, and what is said of all classes."""
    teacher_name = "teacher_hidden" if t.teacher_weight is not None else "teacher_logits"
    teacher_name = teacher_name if topk is None else "the record's log_probs"
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
    if topk is not None:
        counts = shards.classes, topk.num_classes
        names = "student_weight, of all processes,", "the record"
        check_vocabulary(OP, names, counts, t.student_hidden, heads.vocab_size, t.vocab_map, t.vocab_mask)
        check_vocabulary_values(OP, shards.classes, t.vocab_map, t.student_hidden)
    elif (t.teacher.shape[-1] if t.teacher_weight is None else t.teacher_weight.shape[0]) != shards.width:
        classes = t.teacher.shape[-1] if t.teacher_weight is None else t.teacher_weight.shape[0]
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
    rows = t.student_hidden, t.target, t.sample_weight
    check_rows(OP, "student_hidden", *rows, normalizer, options, shards.width)
