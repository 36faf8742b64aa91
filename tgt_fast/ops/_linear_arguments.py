"""Arguments of the loss from hidden states: its heads, its tensors, and, on a CPU, their values."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from tgt_fast.errors import ArgumentError, ShapeError
from tgt_fast.kernels.late import is_late, shown
from tgt_fast.kernels.linear_call import topk_of, vocabulary_of
from tgt_fast.kernels.options import DistillOptions, LinearOptions, LinearTensors
from tgt_fast.kernels.vocabulary import Vocabulary
from tgt_fast.ops import _checks
from tgt_fast.ops._checks import check_entries, check_ids, check_row_values
from tgt_fast.ops._distill_arguments import check_classes, check_rows
from tgt_fast.ops.topk import TeacherTopK, check_options
from tgt_fast.ops.vocabulary import check_labels_exist, check_vocabulary, check_vocabulary_values

OP = "linear_distillation_loss"
LARGE = 1e30
_NOT_SHARED = (
    "its tail does not say how much of its mass lies on the others; take the record from the shared classes' logits "
    "alone, or with tail='renormalize'"
)


def make_heads(
    student_scale: float, student_softcap: float | None, teacher_scale: float, teacher_softcap: float | None,
    vocab_size: int | None, memory_budget: int | None, topk: TeacherTopK | None = None,
) -> LinearOptions:  # fmt: skip
    def positive(name: str, value: float) -> float:
        return _checks.number(OP, name, value, 0, LARGE, open_low=True)

    def scale(name: str, value: float) -> float:
        return _checks.number(OP, name, value, 0, LARGE, open_low=True, late=True)

    return LinearOptions(
        student_scale=scale("student_scale", student_scale),
        student_softcap=None if student_softcap is None else positive("student_softcap", student_softcap),
        teacher_scale=scale("teacher_scale", teacher_scale),
        teacher_softcap=None if teacher_softcap is None else positive("teacher_softcap", teacher_softcap),
        vocab_size=None if vocab_size is None else _checks.integer(OP, "vocab_size", vocab_size, 1, 2**62),
        memory_budget=None if memory_budget is None else _checks.integer(OP, "memory_budget", memory_budget, 1, 2**62),
        tail_mode=None if topk is None else topk.tail,
        topk_classes=None if topk is None else topk.num_classes,
    )


def check_teacher(
    teacher_hidden: Tensor | None, teacher_weight: Tensor | None, teacher_bias: Tensor | None,
    teacher_logits: Tensor | TeacherTopK | None, heads: LinearOptions,
) -> None:  # fmt: skip
    """That the teacher is given in one of the two ways."""
    if teacher_logits is None:
        if teacher_hidden is None or teacher_weight is None:
            given = "only one of them" if (teacher_hidden is None) != (teacher_weight is None) else "neither"
            raise ArgumentError(f"{OP}: pass teacher_hidden and teacher_weight, or teacher_logits; got {given}")
        return
    extra = [
        name
        for name, given in (
            ("teacher_hidden", teacher_hidden is not None),
            ("teacher_weight", teacher_weight is not None),
            ("teacher_bias", teacher_bias is not None),
            (f"teacher_scale={shown(heads.teacher_scale)}", is_late(heads.teacher_scale) or heads.teacher_scale != 1.0),
            ("teacher_softcap", heads.teacher_softcap is not None),
        )
        if given
    ]
    if extra:
        raise ArgumentError(f"{OP}: teacher_logits are taken as they are, but {', '.join(extra)} is given too")


def check_topk(topk: TeacherTopK, heads: LinearOptions, options: DistillOptions) -> None:
    """That a loss of these options can be taken of the record, whose rows are not looked at."""
    check_options(OP, topk, options)
    if topk.tail != "renormalize" and heads.vocab_size is not None and topk.num_classes > heads.vocab_size:
        raise ArgumentError(
            f"{OP}: the record was taken over {topk.num_classes} classes, of which vocab_size={heads.vocab_size} are "
            f"shared, and {_NOT_SHARED}"
        )


def check_tensors(
    t: LinearTensors, normalizer: float | Tensor | None, heads: LinearOptions, options: DistillOptions
) -> None:
    """``t`` as the caller gave it: hidden states (..., H), targets and weights (...)."""
    linear = t.teacher_weight is not None
    is_topk = heads.topk_classes is not None
    teacher_name = "teacher_hidden" if linear else "the record's log_probs" if is_topk else "teacher_logits"
    named = (
        ("student_hidden", t.student_hidden),
        ("student_weight", t.student_weight),
        ("student_bias", t.student_bias),
        (teacher_name, t.teacher),
        ("teacher_weight", t.teacher_weight),
        ("teacher_bias", t.teacher_bias),
    )
    for place, (name, tensor) in enumerate(named):
        if tensor is None and place > 1:
            continue
        tensor = _checks.floating(OP, name, tensor)
        _checks.same_device(OP, name, tensor, "student_hidden", t.student_hidden)
    check_head("student", t.student_hidden, t.student_weight, t.student_bias)
    teacher_classes = t.teacher.shape[-1] if t.teacher.dim() else 0
    if t.teacher_weight is not None:
        check_head("teacher", t.teacher, t.teacher_weight, t.teacher_bias)
        teacher_classes = t.teacher_weight.shape[0]
    if heads.topk_classes is not None:
        teacher_classes = heads.topk_classes
    if t.teacher.dim() == 0 or t.student_hidden.shape[:-1] != t.teacher.shape[:-1]:
        raise ShapeError(
            f"{OP}: student_hidden {tuple(t.student_hidden.shape)} and {teacher_name} {tuple(t.teacher.shape)} differ "
            "in their rows"
        )
    names = "student_weight", "teacher_weight" if linear else "the record" if is_topk else "teacher_logits"
    counts = t.student_weight.shape[0], teacher_classes
    shared = check_vocabulary(OP, names, counts, t.student_hidden, heads.vocab_size, t.vocab_map, t.vocab_mask)
    check_classes(OP, "both sides together", min(shared, *counts), options)
    check_rows(OP, "student_hidden", t.student_hidden, t.target, t.sample_weight, normalizer, options, shared)


def check_head(side: str, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    if hidden.dim() == 0 or weight.dim() != 2 or hidden.shape[-1] != weight.shape[1] or weight.shape[1] == 0:
        raise ShapeError(
            f"{OP}: {side}_hidden {tuple(hidden.shape)} and {side}_weight {tuple(weight.shape)} must be (..., H) and "
            "(C, H) with H >= 1"
        )
    if bias is not None and tuple(bias.shape) != (weight.shape[0],):
        raise ShapeError(f"{OP}: {side}_bias {tuple(bias.shape)} must be ({weight.shape[0]},), one a class")


def check_values(t: LinearTensors, heads: LinearOptions, options: DistillOptions) -> None:
    """Check what needs the data, on a CPU, before anything runs."""
    if not _checks.on_plain_cpu(t.student_hidden):
        return
    student_classes = t.student_weight.shape[0]
    classes = student_classes if heads.vocab_size is None else heads.vocab_size
    check_row_values(OP, classes, t.target, t.sample_weight, options)
    check_vocabulary_values(OP, student_classes, t.vocab_map, t.student_hidden)
    mapped = t.vocab_map is not None or t.vocab_mask is not None
    if t.target is not None and mapped:
        check_labels_exist(OP, t.target, vocabulary_of(t, heads).missing, t.student_hidden, options)
    topk = topk_of(t, heads)
    if topk is not None and heads.topk_classes is not None:
        check_ids(OP, topk, heads.topk_classes, t.target, t.sample_weight, options)
        check_entries(OP, topk, t.target, t.sample_weight, options)
        if mapped and topk.tail_mode != "renormalize":
            check_tail(vocabulary_of(t, heads), heads.topk_classes)


def check_tail(vocabulary: Vocabulary, classes: int) -> None:
    """That every class of a record is shared, so that its tail is the mass of shared classes alone."""
    own = torch.arange(classes, device="cpu") if vocabulary.back is None else vocabulary.back
    lost = torch.zeros(classes, dtype=torch.bool, device="cpu") if vocabulary.unused is None else vocabulary.unused
    if vocabulary.missing is not None:
        lost = lost | vocabulary.missing[own]
    if bool(lost.any()):
        raise ArgumentError(
            f"{OP}: vocab_map or vocab_mask leaves out class {int(lost.nonzero()[0])} of the record's {classes}, and "
            f"{_NOT_SHARED}"
        )


_warned_of_trained_teacher = False


def warn_of_trained_teacher(weight: Tensor | None, bias: Tensor | None) -> None:
    """Say once a process that the teacher's head gets a gradient, which few callers mean to ask for."""
    global _warned_of_trained_teacher
    # A traced call says nothing: warnings would break its graph.
    if torch.compiler.is_compiling() or _warned_of_trained_teacher or not torch.is_grad_enabled():
        return
    asking = [
        name
        for name, value in (("teacher_weight", weight), ("teacher_bias", bias))
        if value is not None and value.requires_grad
    ]
    if asking:
        _warned_of_trained_teacher = True
        warnings.warn(
            f"{OP}: {' and '.join(asking)} requires grad, so the teacher's head gets a gradient, which takes time and "
            f"memory of the head's size; pass {asking[0]}.detach() if the teacher is not trained",
            stacklevel=4,
        )
