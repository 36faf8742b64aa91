"""The meaning of the contrastive distillation loss: plain PyTorch in float64, all scores at once.

Differentiable any number of times. It keeps N x M scores in float64, which is what every other way avoids.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tgt_fast.kernels.linear_call import result_dtype, row_weights, same_as_own
from tgt_fast.kernels.options import DistillOptions, DistillStats, LinearTensors
from tgt_fast.kernels.reference import distill


def contrastive_distillation_loss(
    student_q: Tensor,  # [N, Hs]
    student_d: Tensor,  # [M, Hs]
    teacher_q: Tensor,  # [N, Ht]
    teacher_d: Tensor,  # [M, Ht]
    positives: Tensor | None,  # [N] int64
    passage_ids: Tensor | None,  # [M] int64
    sample_weight: Tensor | None,  # [N]
    divisor: float | Tensor | None,
    temperatures: tuple[float, float],  # the student's and the teacher's
    options: DistillOptions,  # whose temperatures are 1: the scores are divided already
    want_stats: bool = False,
) -> tuple[Tensor, DistillStats | None]:
    """The loss, 0-d or [N], in float32 (float64 if an input is), and the statistics of each row if wanted."""
    t = LinearTensors(student_q, student_d, None, teacher_q, teacher_d, None, positives, sample_weight)
    weights = row_weights(t, positives, student_d.shape[0], divisor, options)
    if weights is not None:  # a gradient of 0 times what a dropped row holds would be NaN in a passage, if that is NaN
        student_q, teacher_q = (torch.where((weights != 0)[:, None], q, 0.0) for q in (student_q, teacher_q))
    student, teacher = (
        q.to(torch.float64) @ d.to(torch.float64).T / temperature
        for q, d, temperature in zip((student_q, teacher_q), (student_d, teacher_d), temperatures, strict=True)
    )
    if passage_ids is not None and positives is not None:
        copies = same_as_own(passage_ids, positives)
        student, teacher = student.masked_fill(copies, -math.inf), teacher.masked_fill(copies, -math.inf)
    loss, stats = distill.distillation_loss(
        student, teacher, positives, sample_weight, divisor, options, want_stats=want_stats
    )
    dtype = result_dtype(t)
    if stats is not None:
        stats = DistillStats(*(v if v.dtype == torch.bool else v.to(dtype) for v in stats))
    return loss.to(dtype), stats
