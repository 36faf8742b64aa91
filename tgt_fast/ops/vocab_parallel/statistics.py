"""The statistics of rows whose classes are spread over processes, merged from those of each."""

from __future__ import annotations

import math
from typing import Any, Final

import torch
from torch import Tensor

from tgt_fast.kernels.calls import DistillCall
from tgt_fast.kernels.options import DistillOptions
from tgt_fast.ops.vocab_parallel import merging, opening
from tgt_fast.ops.vocab_parallel.opening import OPENED, STUDENT_MAX, STUDENT_SUM, TEACHER_MAX, TEACHER_SUM, has
from tgt_fast.ops.vocab_parallel.shards import Shards

_FIELDS: Final = 3  # of the kernel's: both entropies, and whether both sides have their largest logit at one place
DTYPE: Final = torch.float64
OWN, SUMS, VALUES = OPENED + _FIELDS, 6, 6  # numbers a row, of what a process has, adds up, and of what comes out


def _plain(options: DistillOptions) -> DistillOptions:
    return options._replace(
        divergence="forward_kl", soft_weight=1.0, hard_weight=0.0, label_smoothing=0.0, reduction="none"
    )


def opened(kernel: Any, call: DistillCall) -> Tensor:
    """A process's own part.  -> [N, OPENED + 3] float64"""
    call = call._replace(
        options=_plain(call.options), divisor=None, want_d_student=False, want_d_teacher=False, inplace=False,
        want_row_state=False,
    )  # fmt: skip
    state = opening.opened(kernel, call._replace(want_stats=False))
    made = state.new_zeros((state.shape[0], OPENED + _FIELDS))
    made[:, :OPENED] = state
    if call.student.shape[1]:
        stats = kernel.forward(call._replace(want_stats=True)).stats
        made[:, OPENED : OPENED + 2], made[:, OPENED + 2] = stats[:2].t(), stats[3]
    return made


def maxima_of(own: Tensor) -> Tensor:
    """The numbers of which the processes take the largest."""
    return merging.maxima_of(own[:, :OPENED])


def first_of(own: Tensor, maxima: Tensor, shards: Shards) -> Tensor:
    """Less the first class here for a side whose largest logit is here; of all, the largest says whose.  -> [N, 2]"""
    owned = torch.stack([own[:, STUDENT_MAX], own[:, TEACHER_MAX]], dim=1) == maxima[:, :2]
    return torch.where(owned, float(-shards.start) if shards.width else -math.inf, -math.inf).to(DTYPE)


def sums_of(own: Tensor, maxima: Tensor, mine: Tensor, options: DistillOptions) -> Tensor:
    """The numbers that they add up; ``mine``: whether the largest logits of each side are here.  -> [N, SUMS]"""
    state, fields, plain = own[:, :OPENED], own[:, OPENED:], _plain(options)
    parts = merging.parts_of(state, maxima, plain)
    log_q = merging.log_of(state[:, STUDENT_SUM], state[:, STUDENT_MAX] - maxima[:, 0], options.temperature)
    log_p = merging.log_of(state[:, TEACHER_SUM], state[:, TEACHER_MAX] - maxima[:, 1], options.teacher_temperature)
    of_student = merging.weighed(parts.student, fields[:, 0] - log_q)
    of_teacher = merging.weighed(parts.teacher, fields[:, 1] - log_p)
    agree = (mine.all(dim=1) & (fields[:, 2] != 0)).to(DTYPE)
    return torch.stack([parts.student, parts.teacher, parts.x, of_student, of_teacher, agree], dim=1)


def values_of(
    own: Tensor, maxima: Tensor, sums: Tensor, divisor: float | Tensor | None, options: DistillOptions
) -> Tensor:
    """The fields of DistillStats.  -> [N, VALUES]"""
    q, p, x, of_student, of_teacher, agree = sums.unbind(1)
    bad_student = (maxima[:, 2] > 0) | (maxima[:, 0] == -math.inf)
    bad_teacher = (maxima[:, 3] > 0) | (maxima[:, 1] == -math.inf)
    bad = bad_student | bad_teacher
    kl = (x / p - (p.log() - q.log())).clamp_min(0.0).masked_fill(maxima[:, 4] > 0, math.inf)
    values = (
        (of_student / q + q.log()).clamp_min(0.0).masked_fill(bad_student, math.nan),
        (of_teacher / p + p.log()).clamp_min(0.0).masked_fill(bad_teacher, math.nan),
        kl.masked_fill(bad, math.nan),
        agree.masked_fill(bad, 0.0),
        (maxima[:, 0] / options.temperature + q.log()).masked_fill(bad_student, math.nan),
        (maxima[:, 1] / options.teacher_temperature + p.log()).masked_fill(bad_teacher, math.nan),
    )
    state = own[:, :OPENED]
    counted = ~has(state, opening.DROPPED) & (merging.divisor_of(state, divisor, options) != 0)
    return torch.where(counted[:, None], torch.stack(values, dim=1), 0.0)
