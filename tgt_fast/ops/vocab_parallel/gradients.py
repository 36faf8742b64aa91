"""Passes over the logits once more: the sums of jsd and tvd, and the gradients.

A kernel takes the gradients of a row to add up to 0, and gives a class that has most of its row's probability what the
sum of the others' leaves: a difference of numbers near 1 would be rounding. Of a process's own classes that is not so.
Either the others' part is put in afterwards, which is known without such a difference; or, where gradients are rounded
to half precision or must not be looked at, the kernel is kept from finding the class, by a maximum that lies a little
above all logits and sums that are of that one.
"""

from __future__ import annotations

from typing import Any, Final

import torch
from torch import Tensor

from tgt_fast.kernels.calls import DistillCall, Gradients, accumulate_dtype
from tgt_fast.kernels.options import DistillOptions
from tgt_fast.ops.vocab_parallel import opening
from tgt_fast.ops.vocab_parallel.opening import (
    COEFFICIENT,
    DROPPED,
    FLAGS,
    HARD,
    HARD_SUM,
    INFINITE_HARD,
    INFINITE_SOFT,
    INVALID,
    OTHERS_STUDENT,
    OTHERS_TEACHER,
    STATE,
    STUDENT_MAX,
    STUDENT_SUM,
    TEACHER_MAX,
    TEACHER_SUM,
    WIDE,
    X,
    Y,
    has,
    soft_kind,
)
from tgt_fast.ops.vocab_parallel.triton_rows import TritonRows

_BYTES: Final = 1 << 19  # of a chunk of rows, which stays in a core's cache
_DEVICE_BYTES: Final = 1 << 26  # and of one that keeps a device busy
_RUN: Final = 1024  # classes
_FARTHEST: Final = 80.0  # exp(-80) is a float32
_NORMAL: Final = 2.0**-100


def second_sums(kernel: Any, call: DistillCall, row_state: Tensor) -> Tensor:
    """This process's part of the sums x and y of jsd or tvd.  -> [N, 2] float64

    Where no kernel makes them they are sums of its gradients, of which x and y are left out.
    """
    options, student, teacher = call.options, call.student, call.teacher
    assert isinstance(teacher, Tensor)
    count, width = student.shape
    made = row_state.new_zeros((count, 2))
    if width == 0 or soft_kind(options) == "none":
        return made
    plain = options._replace(reduction="none", soft_weight=1.0, hard_weight=0.0, label_smoothing=0.0)
    state = row_state[:, :STATE].contiguous().clone()
    if kernel.sums(DistillCall(plain, student, teacher), state):
        return state[:, X : Y + 1]
    dtype = accumulate_dtype(student, teacher)
    state = _out_of_sight(kernel, row_state[:, :STATE], dtype, options)
    state[:, X] = state[:, Y] = 0.0
    state[:, COEFFICIENT] = 1.0
    state[:, FLAGS] = torch.where(has(state, DROPPED) | has(state, INVALID), DROPPED, 0).to(torch.float64)
    to_y = options.temperature
    to_x = options.temperature**2 / options.teacher_temperature
    if options.divergence == "jsd":
        to_x, to_y = to_x * options.beta, to_y * (1 - options.beta)
    rows = max(1, (_BYTES if opening.on_host(student) else _DEVICE_BYTES) // (width * dtype.itemsize))
    one = torch.ones((), dtype=dtype, device=student.device)
    for start in range(0, count, rows):
        at = slice(start, min(start + rows, count))
        part = DistillCall(
            plain, student[at].to(dtype), teacher[at].to(dtype), want_d_student=True, want_d_teacher=True
        )
        d_student, d_teacher = kernel.backward(part, state[at].contiguous(), one)
        made[at, 0] = _sum(d_teacher) / to_x
        made[at, 1] = _sum(d_student) / to_y
    return made


def _sum(rows: Tensor) -> Tensor:
    """The sums of rows, by runs that their own dtype is enough for.  [N, C] -> [N] float64"""
    runs = rows.shape[1] // _RUN
    made = rows[:, runs * _RUN :].sum(dim=1).to(torch.float64)
    if runs:
        made = made + rows[:, : runs * _RUN].unflatten(1, (runs, _RUN)).sum(dim=2).sum(dim=1, dtype=torch.float64)
    return made


def gradients(kernel: Any, call: DistillCall, row_state: Tensor, d_loss: Tensor) -> Gradients:
    """The gradients to this process's logits, from the state of whole rows."""
    options, student = call.options, call.student
    sides = student, call.teacher if isinstance(call.teacher, Tensor) else student
    if student.shape[1] == 0:
        wanted = call.want_d_student, call.want_d_teacher
        none = [torch.zeros_like(side) if want else None for side, want in zip(sides, wanted, strict=True)]
        return none[0], none[1]
    dtype = accumulate_dtype(student, call.teacher)
    # Triton's kernels find such a class by a rule of their own, on a device but for tests.
    looked_at = not isinstance(kernel, TritonRows)
    corrected = [looked_at and opening.on_host(side) and side.dtype == dtype for side in sides]
    row_state = _out_of_sight(kernel, row_state, dtype, options, tuple(not one for one in corrected))
    if not any(corrected):
        return kernel.backward(call, row_state, d_loss)  # type: ignore[no-any-return]
    kind = soft_kind(options)
    counted = ~(has(row_state, DROPPED) | has(row_state, INVALID)) & (row_state[:, COEFFICIENT] != 0)
    infinite = has(row_state, INFINITE_SOFT)
    soft = counted & ~infinite & (kind not in ("none", "mse"))
    hard = counted & has(row_state, HARD) & ~has(row_state, INFINITE_HARD)
    if kind == "mse":  # a row with that has no such class
        hard = hard & infinite
    peaked = (soft & (row_state[:, STUDENT_SUM] < 2)) | (hard & (row_state[:, HARD_SUM] < 2))
    places = []
    if call.want_d_student and corrected[0]:
        places.append((0, student, peaked & (row_state[:, OTHERS_STUDENT] != 0), STUDENT_MAX, OTHERS_STUDENT))
    if call.want_d_teacher and corrected[1]:
        assert isinstance(call.teacher, Tensor)
        peaked = soft & (row_state[:, TEACHER_SUM] < 2) & (row_state[:, OTHERS_TEACHER] != 0)
        places.append((1, call.teacher, peaked, TEACHER_MAX, OTHERS_TEACHER))
    # Before the student's gradient may overwrite its logits.
    found = [(side, *_peaks(logits, rows, row_state[:, most]), others) for side, logits, rows, most, others in places]
    grads: Gradients = kernel.backward(call, row_state, d_loss)
    for side, rows, at, others in found:
        grad = grads[side]
        if grad is None or not len(rows):
            continue
        factor = d_loss.detach().to(torch.float64)
        factor = factor[rows] if factor.dim() else factor
        missing = factor * row_state[rows, COEFFICIENT] * row_state[rows, others]
        grad[rows, at] = (grad[rows, at].to(torch.float64) - missing).to(grad.dtype)
    return grads


def _peaks(logits: Tensor, rows: Tensor, most: Tensor) -> tuple[Tensor, Tensor]:
    """Of those rows the ones whose largest logit is here, and its place.  -> [n] int64, twice"""
    at = rows.nonzero()[:, 0]
    places = torch.empty_like(at)
    here = torch.empty_like(at, dtype=torch.bool)
    step = max(1, _BYTES // max(1, logits.shape[1] * logits.itemsize))
    for start in range(0, len(at), step):
        some = at[start : start + step]
        values, found = logits.detach()[some].max(dim=1)
        places[start : start + step] = found
        here[start : start + step] = values.to(torch.float64) == most[some]
    return at[here], places[here]


def _out_of_sight(
    kernel: Any, row_state: Tensor, dtype: torch.dtype, options: DistillOptions,
    wanted: tuple[bool, ...] = (True, True),
) -> Tensor:  # fmt: skip
    """The same rows, relative to a number just above a side's largest logit, which no logit equals."""
    made = row_state.clone()
    sides = (
        (STUDENT_MAX, ((STUDENT_SUM, options.temperature), (HARD_SUM, 1.0))),
        (TEACHER_MAX, ((TEACHER_SUM, options.teacher_temperature),)),
    )
    # Of rows that are wide other kernels read a maximum in float64.
    wide = has(row_state, WIDE) & (not isinstance(kernel, TritonRows))
    for (column, sums), want in zip(sides, wanted, strict=True):
        if not want:
            continue
        most = row_state[:, column]
        above = torch.nextafter(most.to(dtype), torch.full((), torch.inf, dtype=dtype, device=most.device))
        above = torch.where(most.abs() < _NORMAL, _NORMAL, above)  # of two subnormal numbers a device may make one
        beyond = torch.nextafter(most, torch.full((), torch.inf, dtype=torch.float64, device=most.device))
        above = torch.where(wide, beyond, above.to(torch.float64))
        rise = above - most
        safe = (rise / min(temperature for _, temperature in sums) < _FARTHEST) & above.isfinite()
        rise = torch.where(safe, rise, 0.0)
        made[:, column] = most + rise
        for total, temperature in sums:
            made[:, total] = row_state[:, total] * (-rise / temperature).exp()
    return made
