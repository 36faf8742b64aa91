"""What a student and a teacher's top-k record agree on: the classes that the record lists, in plain PyTorch."""

from __future__ import annotations

import math
from typing import Any, Final

import torch
from torch import Tensor

from tgt_fast.kernels.calls import labels_of
from tgt_fast.kernels.options import DistillOptions, TopK
from tgt_fast.kernels.reference import distill

_ELEMENTS: Final = {"cpu": 1 << 18, "cuda": 1 << 24}  # of a chunk's logits


@torch.no_grad()
def record_stats(
    student: Tensor, topk: TopK, target: Tensor | None, sample_weight: Tensor | None, divisor: Any,
    options: DistillOptions, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """Of flat rows, ``RecordStats`` one after the other; 0 where a row does not count, NaN where a side is no
    distribution.  -> [3, N]"""
    rows, classes = student.shape
    counted, *_ = distill._counts(student, labels_of(target), sample_weight, divisor, options)
    listed = (topk.log_probs > -math.inf) & (topk.ids >= 0) & (topk.ids < classes)
    log_p = topk.log_probs.to(torch.float64)
    if topk.tail_mode == "renormalize":
        log_p = log_p.log_softmax(dim=-1)
    p = torch.where(listed, log_p.exp(), 0.0)
    ids = torch.where(listed, topk.ids, 0).long()
    step = max(1, _ELEMENTS.get(student.device.type, 1 << 20) // classes)
    parts = []
    for start in range(0, rows, step):
        at = slice(start, start + step)
        scaled = student[at].detach().to(torch.float64) / options.temperature
        log_q = scaled.gather(-1, ids[at]) - scaled.logsumexp(dim=-1, keepdim=True)
        parts.append(torch.where(listed[at], log_q.exp(), 0.0))
    q = torch.cat(parts) if parts else torch.zeros_like(p)
    values = torch.stack([q.sum(-1), p.sum(-1), torch.minimum(p, q).sum(-1)])
    return torch.where(counted, values, 0.0).to(dtype)
