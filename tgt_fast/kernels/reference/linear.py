"""The meaning of the distillation loss from hidden states: plain PyTorch in float64, all logits at once.

Differentiable any number of times. It keeps N x C logits in float64, which is what every other way avoids.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tgt_fast.kernels.options import DistillOptions, DistillStats, LinearOptions, LinearTensors, Listed
from tgt_fast.kernels.reference import distill, sparse
from tgt_fast.kernels.vocabulary import Vocabulary, shared

__all__ = ["linear_distillation_loss", "logits", "record_of", "result_dtype", "row_weights", "vocabulary_of"]


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
    tensors: LinearTensors, normalizer: float | Tensor | None, heads: LinearOptions, options: DistillOptions,
    want_stats: bool = False,
) -> tuple[Tensor, DistillStats | None]:  # fmt: skip
    """The loss, 0-d or [N], in float32 (float64 if an input is), and the statistics of each row if wanted."""
    t = tensors
    vocabulary = vocabulary_of(tensors, heads)
    target = vocabulary.without_missing(t.target, options.ignore_index)
    weights = row_weights(t, target, vocabulary.classes, normalizer, options)
    student_hidden, teacher = t.student_hidden, t.teacher
    if weights is not None:  # a gradient of 0 times what a dropped row holds would be NaN in a weight, if that is NaN
        counted = (weights != 0)[:, None]
        student_hidden, teacher = torch.where(counted, student_hidden, 0.0), torch.where(counted, teacher, 0.0)
    student = logits(student_hidden, t.student_weight, t.student_bias, heads.student_scale, heads.student_softcap)
    record = record_of(tensors, heads)
    if record is not None:
        student = vocabulary.align_student(student)
        record = vocabulary.align_record(record)
        loss = sparse.distillation_loss(student, record, target, t.sample_weight, normalizer, options)
        return loss.to(result_dtype(tensors)), None
    teacher = logits(teacher, t.teacher_weight, t.teacher_bias, heads.teacher_scale, heads.teacher_softcap)
    student, teacher = vocabulary.align(student, teacher)
    loss, stats = distill.distillation_loss(
        student, teacher, target, t.sample_weight, normalizer, options, want_stats=want_stats
    )
    dtype = result_dtype(tensors)
    if stats is not None:
        stats = DistillStats(*(v if v.dtype == torch.bool else v.to(dtype) for v in stats))
    return loss.to(dtype), stats


def vocabulary_of(t: LinearTensors, heads: LinearOptions) -> Vocabulary:
    """The classes that both sides share."""
    if heads.record_classes is not None:
        teacher_classes = heads.record_classes
    else:
        teacher_classes = t.teacher.shape[1] if t.teacher_weight is None else t.teacher_weight.shape[0]
    return shared(t.student_weight.shape[0], teacher_classes, heads.vocab_size, t.vocab_map, t.vocab_mask)


def record_of(t: LinearTensors, heads: LinearOptions) -> Listed | None:
    """The teacher's top-k record, if it gave one; its ids are the teacher's."""
    if t.record_ids is None or heads.tail is None:
        return None
    return Listed(t.record_ids, t.teacher, t.record_tail, heads.tail)


def row_weights(
    t: LinearTensors, target: Tensor | None, classes: int, normalizer: float | Tensor | None, options: DistillOptions
) -> Tensor | None:
    """The weight of each row in the sum, 0 for rows that are dropped; None: all count alike.  -> [N] float64"""
    if target is None and t.sample_weight is None and normalizer is None:
        return None
    weight = torch.ones(t.student_hidden.shape[0], dtype=torch.float64, device=t.student_hidden.device)
    if t.sample_weight is not None:
        weight = t.sample_weight.detach().to(torch.float64)
        weight = torch.where((weight > 0) & (weight < math.inf), weight, 0.0)
    if target is not None:
        named = ((target >= 0) & (target < classes)) | (target == options.unlabeled_index)
        weight = torch.where(named & (target != options.ignore_index), weight, 0.0)
    return weight if normalizer is None else weight * (normalizer != 0)


def result_dtype(tensors: LinearTensors) -> torch.dtype:
    """That of the loss and of the arithmetic: float64 as soon as an input is."""
    wide = any(t is not None and t.dtype == torch.float64 for t in tensors[:6])
    return torch.float64 if wide else torch.float32
