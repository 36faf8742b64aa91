"""The meaning of the distillation loss from hidden states: plain PyTorch in float64, all logits at once.

Differentiable any number of times. It keeps N x C logits in float64, which is what every other way avoids.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tgt_fast.kernels.adjust import Adjustments
from tgt_fast.kernels.linear_call import result_dtype, row_weights, topk_of, vocabulary_of
from tgt_fast.kernels.options import DistillOptions, DistillStats, LinearOptions, LinearTensors
from tgt_fast.kernels.record_stats import record_stats
from tgt_fast.kernels.reference import distill, topk


def logits(
    hidden: Tensor,  # [N, H]
    weight: Tensor | None,  # [C, H]; None: hidden holds the logits
    bias: Tensor | None,  # [C]
    scale: float,
    softcap: float | None,
) -> Tensor:
    """scale * (hidden @ weight.T + bias), and softcap * tanh(that / softcap).  -> [N, C] float64"""
    made = hidden.to(torch.float64)
    if weight is None:
        return made
    made = made @ weight.to(torch.float64).T
    if bias is not None:
        made = made + bias.to(torch.float64)
    made = scale * made
    return made if softcap is None else softcap * torch.tanh(made / softcap)


def linear_distillation_loss(
    tensors: LinearTensors, divisor: float | Tensor | None, heads: LinearOptions, options: DistillOptions,
    want_stats: bool = False, adjust: Adjustments | None = None,
) -> tuple[Tensor, DistillStats | Tensor | None]:  # fmt: skip
    """The loss, 0-d or [N], in float32 (float64 if an input is), and the statistics of each row if wanted.

    Beside a record these are [3, N].
    """
    t = tensors
    vocabulary = vocabulary_of(tensors, heads)
    target = vocabulary.without_missing(t.target, options.ignore_index)
    weights = row_weights(t, target, vocabulary.classes, divisor, options)
    student_hidden, teacher = t.student_hidden, t.teacher
    if weights is not None:  # a gradient of 0 times what a dropped row holds would be NaN in a weight, if that is NaN
        counted = (weights != 0)[:, None]
        student_hidden, teacher = torch.where(counted, student_hidden, 0.0), torch.where(counted, teacher, 0.0)
    student = logits(student_hidden, t.student_weight, t.student_bias, heads.student_scale, heads.student_softcap)
    entries = topk_of(tensors, heads)
    if entries is not None:
        student = vocabulary.align_student(student)
        entries = vocabulary.align_topk(entries)
        loss = topk.distillation_loss(student, entries, target, t.sample_weight, divisor, options)
        if not want_stats:
            return loss.to(result_dtype(tensors)), None
        rest = (target, t.sample_weight, divisor, options)
        return loss.to(result_dtype(tensors)), record_stats(student, entries, *rest, result_dtype(tensors))
    teacher = logits(teacher, t.teacher_weight, t.teacher_bias, heads.teacher_scale, heads.teacher_softcap)
    student, teacher = vocabulary.align(student, teacher)
    loss, stats = distill.distillation_loss(
        student, teacher, target, t.sample_weight, divisor, options, want_stats=want_stats, adjust=adjust
    )
    dtype = result_dtype(tensors)
    if stats is not None:
        stats = DistillStats(*(v if v.dtype == torch.bool else v.to(dtype) for v in stats))
    return loss.to(dtype), stats
