"""The meaning of the distillation loss from hidden states: plain PyTorch in float64, all logits at once.

Differentiable any number of times. It keeps N x C logits in float64, which is what every other way avoids.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tgt_fast.kernels.options import DistillOptions, DistillStats, LinearOptions, LinearTensors
from tgt_fast.kernels.reference import distill
from tgt_fast.kernels.vocabulary import shared

__all__ = ["linear_distillation_loss", "logits"]


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
    student = logits(t.student_hidden, t.student_weight, t.student_bias, heads.student_scale, heads.student_softcap)
    teacher = logits(t.teacher, t.teacher_weight, t.teacher_bias, heads.teacher_scale, heads.teacher_softcap)
    vocabulary = shared(student.shape[1], teacher.shape[1], heads.vocab_size, t.vocab_map, t.vocab_mask)
    student, teacher = vocabulary.align(student, teacher)
    target = vocabulary.without_missing(t.target, options.ignore_index)
    loss, stats = distill.distillation_loss(
        student, teacher, target, t.sample_weight, normalizer, options, want_stats=want_stats
    )
    dtype = result_dtype(tensors)
    if stats is not None:
        stats = DistillStats(*(v if v.dtype == torch.bool else v.to(dtype) for v in stats))
    return loss.to(dtype), stats


def result_dtype(tensors: LinearTensors) -> torch.dtype:
    """That of the loss and of the arithmetic: float64 as soon as an input is."""
    wide = any(t is not None and t.dtype == torch.float64 for t in tensors[:6])
    return torch.float64 if wide else torch.float32
