"""A loss from hidden states before any product: its classes, its rows' weights, its dtype."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tgt_fast.kernels.calls import labels_of
from tgt_fast.kernels.options import DistillOptions, LinearOptions, LinearTensors, TopK
from tgt_fast.kernels.vocabulary import Vocabulary, shared


def vocabulary_of(t: LinearTensors, heads: LinearOptions) -> Vocabulary:
    """The classes that both sides share."""
    if heads.topk_classes is not None:
        teacher_classes = heads.topk_classes
    else:
        teacher_classes = t.teacher.shape[1] if t.teacher_weight is None else t.teacher_weight.shape[0]
    return shared(t.student_weight.shape[0], teacher_classes, heads.vocab_size, t.vocab_map, t.vocab_mask)


def topk_of(t: LinearTensors, heads: LinearOptions) -> TopK | None:
    """The teacher's top-k record, if it gave one; its ids are the teacher's."""
    if t.topk_ids is None or heads.tail_mode is None:
        return None
    return TopK(t.topk_ids, t.teacher, t.tail_log_prob, heads.tail_mode)


def row_weights(
    t: LinearTensors, target: Tensor | None, classes: int, divisor: float | Tensor | None, options: DistillOptions
) -> Tensor | None:
    """The weight of each row in the sum, 0 for rows that are dropped; None: all count alike.  -> [N] float64"""
    target = labels_of(target)
    if target is None and t.sample_weight is None and divisor is None:
        return None
    weight = torch.ones(t.student_hidden.shape[0], dtype=torch.float64, device=t.student_hidden.device)
    if t.sample_weight is not None:
        weight = t.sample_weight.detach().to(torch.float64)
        weight = torch.where((weight > 0) & (weight < math.inf), weight, 0.0)
    if target is not None:
        named = ((target >= 0) & (target < classes)) | (target == options.unlabeled_index)
        weight = torch.where(named & (target != options.ignore_index), weight, 0.0)
    return weight if divisor is None else weight * (divisor != 0)


def result_dtype(tensors: LinearTensors) -> torch.dtype:
    """That of the loss and of the arithmetic: float64 as soon as an input is."""
    wide = any(t is not None and t.dtype == torch.float64 for t in tensors[:6])
    return torch.float64 if wide else torch.float32


def same_as_own(class_ids: Tensor, own: Tensor) -> Tensor:
    """Which classes have the id of a row's own class without being it.  [C], [N] int64 -> [N, C] bool

    A row whose own class is out of range has none.
    """
    classes = class_ids.shape[0]
    has = (own >= 0) & (own < classes)
    place = torch.where(has, own, 0)
    same = class_ids[place, None] == class_ids[None]
    same &= has[:, None]
    return same.scatter_(1, place[:, None], False)
