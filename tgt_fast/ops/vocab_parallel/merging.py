"""The rows of all processes from their own states: maxima first, then at most eight sums, all of them of float64.

With P and Q a process's shares of the teacher's and the student's probability, and a divergence's sums x, y over its
own classes, normalised there, those over all classes are::

    forward_kl      sum P (x + log P - log Q)
    reverse_kl      sum Q (y + log Q - log P)
    cross_entropy   sum P (x - log Q)
    mse             sum x

jsd and tvd are not of this kind: theirs are taken by a second pass, once the normalisers of all are known.
"""

from __future__ import annotations

import math
from typing import Final, NamedTuple

import torch
from torch import Tensor

from tgt_fast.kernels.options import DistillOptions
from tgt_fast.ops.vocab_parallel.opening import (
    BAD_STUDENT,
    BAD_TEACHER,
    COEFFICIENT,
    DROPPED,
    FINITE,
    FLAGS,
    HARD,
    HARD_SUM,
    INFINITE,
    INFINITE_HARD,
    INFINITE_SOFT,
    INVALID,
    IS_WIDE,
    LABEL,
    LABELLED,
    LINEAR,
    OTHERS_STUDENT,
    OTHERS_TEACHER,
    SECOND_PASS,
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

assert (STUDENT_MAX, TEACHER_MAX) == (0, 1)
assert tuple(range(BAD_STUDENT + 1, BAD_STUDENT + 5)) == (BAD_TEACHER, INFINITE, IS_WIDE, LABELLED)
SUMS: Final = 8
_FLOAT_MAX: Final = 3.4028234663852886e38
_FORWARD: Final = ("forward_kl", "symmetric")
_REVERSE: Final = ("reverse_kl", "symmetric")


class Parts(NamedTuple):
    """A process's part of each row's sums, relative to the maxima of all; or those of all."""

    student: Tensor  # sum exp((s - max) / Ts)
    teacher: Tensor
    hard: Tensor  # sum exp(s - max)
    finite: Tensor
    linear: Tensor  # sum (s - max) over the finite
    label: Tensor  # s - max of the label
    x: Tensor
    y: Tensor


def maxima_of(opened: Tensor) -> Tensor:
    """Numbers of which the processes take the largest.  [N, OPENED] -> [N, 7]"""
    # Slices alone: a list of columns would have to be sent to a device.
    return torch.cat([opened[:, :2], opened[:, BAD_STUDENT : LABELLED + 1]], dim=1)


def sums_of(opened: Tensor, maxima: Tensor, options: DistillOptions) -> Tensor:
    """Numbers that they add up.  -> [N, SUMS]"""
    return torch.stack(parts_of(opened, maxima, options), dim=1)


def parts_of(opened: Tensor, maxima: Tensor, options: DistillOptions) -> Parts:
    """The same, by name."""
    student_max, teacher_max = maxima[:, 0], maxima[:, 1]
    log_q = log_of(opened[:, STUDENT_SUM], opened[:, STUDENT_MAX] - student_max, options.temperature)
    log_p = log_of(opened[:, TEACHER_SUM], opened[:, TEACHER_MAX] - teacher_max, options.teacher_temperature)
    log_h = log_of(opened[:, HARD_SUM], opened[:, STUDENT_MAX] - student_max, 1.0)
    q, p = log_q.exp(), log_p.exp()
    kind = soft_kind(options)
    x = y = torch.zeros_like(q)
    if kind in _FORWARD:
        x = weighed(p, opened[:, X] + log_p - log_q)
    elif kind == "cross_entropy":
        x = weighed(p, opened[:, X] - log_q)
    elif kind == "mse":
        x = opened[:, X]
    if kind in _REVERSE:
        y = weighed(q, opened[:, Y] + log_q - log_p)
    finite = opened[:, FINITE]
    rise = torch.where(finite > 0, opened[:, STUDENT_MAX] - student_max, 0.0)
    labelled = opened[:, LABELLED] != 0
    label = torch.where(labelled, opened[:, LABEL] - student_max, 0.0)
    linear = torch.where(finite > 0, opened[:, LINEAR] + finite * rise, 0.0)
    return Parts(q, p, log_h.exp(), finite, linear, label, x, y)


def log_of(total: Tensor, rise: Tensor, temperature: float) -> Tensor:
    """log(total exp(rise / temperature)), -inf where there is nothing."""
    some = total > 0
    return torch.where(
        some, torch.where(some, total, 1.0).log() + torch.where(some, rise, 0.0) / temperature, -math.inf
    )


def weighed(share: Tensor, value: Tensor) -> Tensor:
    """share * value; 0 where there is no share, and where the value is infinite, of which a flag tells."""
    return torch.where((share > 0) & value.isfinite(), share * value, 0.0)


def merged(opened: Tensor, maxima: Tensor, totals: Tensor, divisor: Tensor, options: DistillOptions) -> Tensor:
    """The state of the rows over all classes, as kernels read it in backward, and their losses but for jsd and tvd.

    ``divisor``: of the rows' weights, 0-d. -> [N, STATE + 1], of which the last is the loss, unweighted
    """
    all_of, own = Parts(*totals.unbind(1)), parts_of(opened, maxima, options)
    kind = soft_kind(options)
    state = opened.new_zeros((opened.shape[0], STATE + 1))
    state[:, STUDENT_MAX], state[:, TEACHER_MAX] = maxima[:, 0], maxima[:, 1]
    state[:, STUDENT_SUM], state[:, TEACHER_SUM] = all_of.student, all_of.teacher
    state[:, HARD_SUM], state[:, FINITE] = all_of.hard, all_of.finite

    dropped = has(opened, DROPPED)
    invalid = (maxima[:, 2] > 0) | (maxima[:, 0] == -math.inf)
    if kind != "none":
        invalid = invalid | (maxima[:, 3] > 0) | (maxima[:, 1] == -math.inf)
    infinite = maxima[:, 4] > 0
    hard = maxima[:, 6] > 0
    no_label = hard & (all_of.label == -math.inf) & (options.label_smoothing < 1)
    sound = ~dropped & ~invalid
    soft = sound & ~infinite
    log_q, log_p = all_of.student.log(), all_of.teacher.log()
    if kind in _FORWARD:
        state[:, X] = torch.where(soft, all_of.x / all_of.teacher - (log_p - log_q), 0.0)
    elif kind == "cross_entropy":
        state[:, X] = torch.where(soft, all_of.x / all_of.teacher + log_q, 0.0)
    elif kind == "mse":
        state[:, X] = torch.where(soft, all_of.x, 0.0)
    if kind in _REVERSE:
        state[:, Y] = torch.where(soft, all_of.y / all_of.student - (log_q - log_p), 0.0)

    weight = opened[:, COEFFICIENT]
    share = torch.where(divisor != 0, weight / torch.where(divisor != 0, divisor, 1.0), 0.0)
    state[:, COEFFICIENT] = torch.where(dropped, 0.0, share)
    beyond = ~((state[:, X].abs() < 1e30) & (state[:, Y].abs() < 1e30))
    wide = (maxima[:, 5] > 0) | beyond | _far(opened, maxima, options)
    flags = torch.where(dropped, DROPPED, torch.where(invalid, INVALID, 0))
    flags = flags + sound * (infinite * INFINITE_SOFT + hard * HARD + no_label * INFINITE_HARD + wide * WIDE)
    state[:, FLAGS] = flags.to(torch.float64)

    _keep_others(state, own, all_of, opened, hard & ~no_label, options)
    if kind not in SECOND_PASS:
        state[:, OTHERS_STUDENT] += soft * _of_others(own, all_of, state, options, student=True)
        state[:, OTHERS_TEACHER] = soft * _of_others(own, all_of, state, options, student=False)
    state[:, STATE] = hard_loss(all_of, hard, no_label, options)
    return state


def _far(opened: Tensor, maxima: Tensor, options: DistillOptions) -> Tensor:
    """True if the logits here are so far below the largest that differences leave the range of float32."""
    reach = 16 * max(1 / options.temperature, 1 / options.teacher_temperature, 1.0)
    most = (maxima[:, :2] - opened[:, :2]) * reach
    return ((most > _FLOAT_MAX) & (most < math.inf)).any(dim=1)


def hard_loss(all_of: Parts, hard: Tensor, no_label: Tensor, options: DistillOptions) -> Tensor:
    """Cross-entropy with the label, smoothed over the classes whose logit is finite.  -> [N]"""
    smoothing = options.label_smoothing
    loss = all_of.hard.log()
    if smoothing < 1:
        loss = loss - (1 - smoothing) * torch.where(no_label, 0.0, all_of.label)
    if smoothing > 0:
        loss = loss - smoothing / all_of.finite * all_of.linear
    return torch.where(hard, torch.where(no_label, math.inf, loss.clamp_min(0.0)), 0.0)


# What the gradients of the other processes' classes add up to, for one that has most of its row's probability.


def _keep_others(
    state: Tensor, own: Parts, all_of: Parts, opened: Tensor, hard: Tensor, options: DistillOptions
) -> None:
    """That of the hard term, in units of the row's coefficient."""
    smoothing = options.label_smoothing
    of_hard = (all_of.hard - own.hard) / all_of.hard
    if smoothing > 0:
        of_hard = of_hard - smoothing * (all_of.finite - own.finite) / all_of.finite
    elsewhere = 1.0 - opened[:, LABELLED]
    of_hard = of_hard - (1 - smoothing) * elsewhere
    state[:, OTHERS_STUDENT] = torch.where(hard, options.hard_weight * of_hard, 0.0)


def _of_others(own: Parts, all_of: Parts, state: Tensor, options: DistillOptions, *, student: bool) -> Tensor:
    """That of the soft term, of a divergence whose sums merge."""
    kind = soft_kind(options)
    q, p = (all_of.student - own.student) / all_of.student, (all_of.teacher - own.teacher) / all_of.teacher
    log_ratio = all_of.teacher.log() - all_of.student.log()
    made = torch.zeros_like(q)
    if kind in (*_FORWARD, "cross_entropy"):
        if student:
            made = made + (q - p)
        else:
            x = (all_of.x - own.x) / all_of.teacher
            x = x + all_of.student.log() * p if kind == "cross_entropy" else x - log_ratio * p
            made = made + (x - p * state[:, X])
    if kind in _REVERSE:
        if student:
            y = (all_of.y - own.y) / all_of.student + log_ratio * q
            made = made + (y - q * state[:, Y])
        else:
            made = made + (p - q)
    return _scaled(made, options, student=student)


def _scaled(made: Tensor, options: DistillOptions, *, student: bool) -> Tensor:
    factor = options.soft_weight * options.temperature**2
    factor /= options.temperature if student else options.teacher_temperature
    return torch.where(made.isfinite(), made * factor, 0.0)


# After the second pass


def with_second(
    state: Tensor, opened: Tensor, maxima: Tensor, own: Tensor, sums: Tensor, options: DistillOptions
) -> Tensor:
    """The state with the sums of jsd or tvd, [N, 2] of this process and of all.  -> [N, STATE + 1]"""
    state = state.clone()
    sound = ~(has(state, DROPPED) | has(state, INVALID))
    sums = torch.where(sound[:, None], sums, 0.0)
    state[:, X], state[:, Y] = sums[:, 0], sums[:, 1]
    parts = parts_of(opened, maxima, options)
    q = (state[:, STUDENT_SUM] - parts.student) / state[:, STUDENT_SUM]
    p = (state[:, TEACHER_SUM] - parts.teacher) / state[:, TEACHER_SUM]
    of_student, of_teacher = (sums[:, 1] - own[:, 1]) - q * sums[:, 1], (sums[:, 0] - own[:, 0]) - p * sums[:, 0]
    if options.divergence == "jsd":
        of_student, of_teacher = (1 - options.beta) * of_student, options.beta * of_teacher
    state[:, OTHERS_STUDENT] += sound * _scaled(of_student, options, student=True)
    state[:, OTHERS_TEACHER] = sound * _scaled(of_teacher, options, student=False)
    return state


def losses(state: Tensor, options: DistillOptions) -> Tensor:
    """The weighted loss of each row, divided as the result wants it.  [N, STATE + 1] -> [N]"""
    kind, coefficient = soft_kind(options), state[:, COEFFICIENT]
    loss = options.hard_weight * state[:, STATE] if options.hard_weight != 0 else torch.zeros_like(coefficient)
    if kind != "none":
        x, y = state[:, X], state[:, Y]
        if kind == "jsd":
            x, y = options.beta * x, (1 - options.beta) * y
        value = y if kind == "reverse_kl" else x + y
        squared = 1.0 if kind == "mse" else options.temperature**2
        soft = options.soft_weight * squared * value.clamp_min(0.0)
        loss = loss + torch.where(has(state, INFINITE_SOFT), math.inf, soft)
    loss = torch.where(has(state, INVALID), math.nan, loss)
    return torch.where(coefficient == 0, 0.0, coefficient * loss)


def divisor_of(opened: Tensor, given: float | Tensor | None, options: DistillOptions) -> Tensor:
    """The divisor of the rows' weights, 0-d float64."""
    if options.reduction != "mean":
        return opened.new_ones(())
    if isinstance(given, Tensor):
        return given.detach().to(opened.device, torch.float64)
    if given is not None:
        return opened.new_full((), float(given))
    return torch.where(has(opened, DROPPED), 0.0, opened[:, COEFFICIENT]).sum()
