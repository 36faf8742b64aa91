"""A process's own part of rows, before anything travels: the state that its kernel leaves, and what that lacks."""

from __future__ import annotations

import math
from typing import Any, Final

import torch
from torch import Tensor

from tgt_fast.kernels.calls import DistillCall
from tgt_fast.kernels.options import DistillOptions

# The columns of a row's state, csrc/common/row_stats.h. The two spare ones hold what the other processes' gradients
# add up to, of the student's logits and of the teacher's: see gradients.py.
(
    STUDENT_MAX, TEACHER_MAX, STUDENT_SUM, TEACHER_SUM, HARD_SUM, X, Y, COEFFICIENT, FINITE, FLAGS, OTHERS_STUDENT,
    OTHERS_TEACHER,
) = range(12)  # fmt: skip
STATE: Final = 12
DROPPED, INVALID, INFINITE_SOFT, HARD, INFINITE_HARD, WIDE = 1, 2, 4, 8, 16, 32

# What stands beside a process's own state until the rows are merged.
LABEL, LINEAR, BAD_STUDENT, BAD_TEACHER, INFINITE, IS_WIDE, LABELLED = range(STATE, STATE + 7)
OPENED: Final = STATE + 7

SECOND_PASS: Final = ("jsd", "tvd")  # their sums are of probabilities, which need the normalisers of all


def soft_kind(options: DistillOptions) -> str:
    """The divergence, "none" where there is no soft term."""
    return options.divergence if options.soft_weight != 0 else "none"


def has(row_state: Tensor, flag: int) -> Tensor:
    """Which rows carry a flag.  -> [N] bool"""
    return (row_state[:, FLAGS].to(torch.int64) & flag) != 0


def on_host(tensor: Tensor) -> bool:
    """True if its values can be looked at without waiting for a device."""
    return tensor.is_cpu


def opened(kernel: Any, call: DistillCall) -> Tensor:
    """The rows' own state, with weights for coefficients, and what else is to travel.  -> [N, OPENED] float64"""
    options, student, teacher = call.options, call.student, call.teacher
    assert isinstance(teacher, Tensor)
    count, width = student.shape
    kind = soft_kind(options)
    made = student.new_zeros((count, OPENED), dtype=torch.float64)
    if width == 0:
        made[:, STUDENT_MAX] = made[:, TEACHER_MAX] = -math.inf
        _drop(made, call)
        return made
    plain = options._replace(reduction="none")
    if kind in SECOND_PASS:
        plain = plain._replace(divergence="cross_entropy")
    state = state_of(kernel, _labelled_somewhere(call), plain)
    made[:, :STATE] = state
    made[:, OTHERS_STUDENT:STATE] = 0
    dropped = has(state, DROPPED)
    lone = has(state, INVALID) & ~dropped
    if kind not in (*SECOND_PASS, "none"):
        made[:, INFINITE] = has(state, INFINITE_SOFT)
    made[:, IS_WIDE] = has(state, WIDE)
    if on_host(student):
        if bool(lone.any()):
            rows = lone.nonzero()[:, 0]
            some = call._replace(student=student[rows], teacher=teacher[rows], target=None, sample_weight=None)
            made[rows] = _side_by_side(kernel, some, made[rows])
    else:  # without waiting for it, nobody knows whether there are such rows
        alone = call._replace(target=None, sample_weight=None)
        made = torch.where(lone[:, None], _side_by_side(kernel, alone, made), made)
    if call.target is not None and options.hard_weight != 0:
        labelled = (call.target >= 0) & (call.target < width) & ~dropped
        made[:, LABELLED] = labelled
        label = student.gather(1, call.target.clamp(0, width - 1)[:, None])[:, 0].to(torch.float64)
        made[:, LABEL] = torch.where(labelled, label, 0.0)
        if options.label_smoothing > 0:
            made[:, LINEAR] = _linear(kernel, call, options, made)
    return made


def _drop(made: Tensor, call: DistillCall) -> None:
    """Which rows count, and their weights, where no kernel has looked at them."""
    weight = made.new_ones(made.shape[0]) if call.sample_weight is None else call.sample_weight.to(torch.float64)
    dropped = weight == 0
    if call.target is not None:
        dropped = dropped | (call.target == call.options.ignore_index) | (call.target >= 0)  # there is no class here
    made[:, COEFFICIENT] = weight
    made[:, FLAGS] = dropped.to(torch.float64) * DROPPED


def _labelled_somewhere(call: DistillCall) -> DistillCall:
    """The call with some label for each row that may have one elsewhere, or kernels on a device skip its hard sums."""
    if call.target is None or call.options.hard_weight == 0:
        return call
    return call._replace(target=torch.where(call.target == call.options.unlabeled_index, 0, call.target))


def state_of(kernel: Any, call: DistillCall, options: DistillOptions) -> Tensor:
    """The state that a kernel leaves of these rows, each by itself."""
    call = call._replace(
        options=options, divisor=None, want_d_student=False, want_d_teacher=False, want_row_state=True,
        want_stats=False, inplace=False,
    )  # fmt: skip
    state: Tensor = kernel.forward(call).row_state
    return state


def _side_by_side(kernel: Any, call: DistillCall, made: Tensor) -> Tensor:
    """The same of rows of which a side may hold no class here, or no number: each side beside itself."""
    options, made = call.options, made.clone()
    soft = options.soft_weight != 0
    plain = options._replace(reduction="none", divergence="forward_kl", soft_weight=1.0, hard_weight=1.0)
    some = torch.zeros(made.shape[0], dtype=torch.int64, device=made.device)
    student = call._replace(teacher=call.student, target=some)
    ts = options.temperature
    own = state_of(kernel, student, plain._replace(teacher_temperature=ts, unlabeled_index=-1))
    bad, empty = _extremes(call.student)
    for column in (STUDENT_SUM, HARD_SUM, FINITE):
        made[:, column] = torch.where(bad | empty, 0.0, own[:, column])
    made[:, STUDENT_MAX] = torch.where(bad, 0.0, torch.where(empty, -math.inf, own[:, STUDENT_MAX]))
    made[:, BAD_STUDENT] = bad.to(torch.float64)
    wide = has(own, WIDE)
    if soft:
        assert isinstance(call.teacher, Tensor)
        tt = options.teacher_temperature
        other = call._replace(student=call.teacher)
        own = state_of(kernel, other, plain._replace(temperature=tt, hard_weight=0.0, label_smoothing=0.0))
        bad_teacher, none_there = _extremes(call.teacher)
        made[:, TEACHER_SUM] = torch.where(bad_teacher | none_there, 0.0, own[:, STUDENT_SUM])
        top = torch.where(none_there, -math.inf, own[:, STUDENT_MAX])
        made[:, TEACHER_MAX] = torch.where(bad_teacher, 0.0, top)
        made[:, BAD_TEACHER] = bad_teacher.to(torch.float64)
        student_only = empty & ~none_there & ~bad_teacher
        teacher_only = none_there & ~empty & ~bad
        kind, infinite = options.divergence, torch.zeros_like(empty)
        if kind in ("forward_kl", "cross_entropy", "symmetric", "mse"):
            infinite = infinite | student_only
        if kind in ("reverse_kl", "symmetric", "mse"):
            infinite = infinite | teacher_only
        made[:, INFINITE] = infinite.to(torch.float64)
        wide = wide | has(own, WIDE)
    made[:, IS_WIDE] = wide.to(torch.float64)
    made[:, X] = made[:, Y] = 0.0
    return made


def _extremes(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Rows that hold NaN or +inf, and rows that hold nothing but -inf.  -> [N] bool, twice"""
    most = logits.amax(dim=-1)
    return most.isnan() | (most == math.inf), most == -math.inf


def _linear(kernel: Any, call: DistillCall, options: DistillOptions, made: Tensor) -> Tensor:
    """sum (s - max) over the classes that exist: a label that is spread over all of them is one pass of the kernel."""
    spread = options._replace(
        reduction="none", soft_weight=0.0, hard_weight=1.0, label_smoothing=1.0, ignore_index=-100, unlabeled_index=-1
    )
    some = torch.zeros(made.shape[0], dtype=torch.int64, device=made.device)
    call = call._replace(
        options=spread, teacher=call.student, target=some, sample_weight=None, divisor=None, want_d_student=False,
        want_d_teacher=False, want_row_state=True, want_stats=False, inplace=False,
    )  # fmt: skip
    out = kernel.forward(call)
    state = out.row_state
    loss = out.loss.to(torch.float64)
    return torch.where(made[:, FINITE] > 0, made[:, FINITE] * (state[:, HARD_SUM].log() - loss), 0.0)
