"""The meaning of the loss against a top-k record: plain PyTorch in float64, differentiable any number of times.

A record and a student's row become a pair of dense rows, and the divergences are those of ``reference/distill.py``:

* ``bucket``: k + 1 classes, of which the last is all that are not listed. The student's share of it is a log-sum-exp
  over those classes themselves; 1 minus the listed mass would lose everything on a peaked row.
* ``renormalize``: the k listed classes, on both sides.
* ``uniform``: all C classes; those not listed share the rest of the teacher's mass, each that the student can give at
  all the same. Where there is none, the rest is a class of its own that the student cannot give.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from tgt_fast.kernels.calls import DistillCall, Gradients, Outputs
from tgt_fast.kernels.late import is_on
from tgt_fast.kernels.options import DistillOptions, TopK
from tgt_fast.kernels.reference import distill, sides
from tgt_fast.kernels.reference.distill import scale_, takes_shares

__all__ = ["backward", "distillation_loss", "forward", "scale_", "takes_shares"]


class _Entries(NamedTuple):
    """A record in float64. What is not kept has id 0 and log-probability -inf."""

    ids: Tensor  # [N, k]
    log: Tensor  # [N, k]
    kept: Tensor  # [N, k] bool: neither padding, nor out of range, nor a repetition
    tail: Tensor  # [N]
    in_topk: Tensor  # [N, C] bool


def _entries(topk: TopK, classes: int) -> _Entries:
    log = topk.log_probs.detach().to(torch.float64)
    ids = topk.ids
    kept = (log != -math.inf) & (ids >= 0) & (ids < classes)
    places = torch.where(kept, ids, classes)
    in_order, order = places.sort(dim=-1, stable=True)
    repeats = torch.zeros_like(kept)
    repeats[:, 1:] = in_order[:, 1:] == in_order[:, :-1]
    kept = kept & ~torch.zeros_like(kept).scatter(1, order, repeats)  # the first of several counts
    if topk.tail_log_prob is None:
        tail = log.new_full((log.shape[0],), -math.inf)
    else:
        tail = topk.tail_log_prob.detach().to(torch.float64)
    in_topk = torch.zeros(ids.shape[0], classes + 1, dtype=torch.bool, device=ids.device)
    in_topk = in_topk.scatter(1, torch.where(kept, ids, classes), True)[:, :classes]
    return _Entries(torch.where(kept, ids, 0), torch.where(kept, log, -math.inf), kept, tail, in_topk)


def _is_undefined(entries: _Entries) -> Tensor:
    """Rows whose record holds NaN or +inf, or nothing but -inf.  -> [N] bool"""
    return sides._is_undefined(torch.cat([entries.log, entries.tail[:, None]], dim=-1))


def _log_sum_exp(logits: Tensor, exists: Tensor) -> Tensor:
    """Over the classes that exist; -inf, with no gradient, where none does.  [N, C], [N, C] -> [N, 1]"""
    none = ~exists.any(dim=-1, keepdim=True)
    peak = torch.where(exists, logits.detach(), -math.inf).amax(dim=-1, keepdim=True)
    peak = torch.where(none, 0.0, peak)
    total = torch.where(exists, (logits - peak).exp(), 0.0).sum(dim=-1, keepdim=True)
    return torch.where(none, -math.inf, torch.where(none, 1.0, total).log() + peak)


def _dense_pair(student: Tensor, entries: _Entries, options: DistillOptions, tail_mode: str) -> tuple[Tensor, Tensor]:
    """Rows of tempered logits that say the same, of the student and of the teacher.  [N, C] -> 2 x [N, any]"""
    tempered = student / options.temperature
    of_topk = torch.where(entries.kept, tempered.gather(1, entries.ids), -math.inf)
    if tail_mode == "renormalize":
        return of_topk, entries.log
    rest = entries.tail[:, None]
    others = (student > -math.inf) & ~entries.in_topk
    if tail_mode == "bucket":
        of_others = _log_sum_exp(torch.where(others, tempered, 0.0), others)
        return torch.cat([of_topk, of_others], -1), torch.cat([entries.log, rest], -1)
    count = others.sum(dim=-1, keepdim=True)
    each = torch.where(others, rest - count.to(torch.float64).clamp_min(1.0).log(), -math.inf)
    teacher = torch.cat([each, torch.zeros_like(rest)], -1)
    place = torch.where(entries.kept, entries.ids, student.shape[1])
    teacher = teacher.scatter(1, place, entries.log)
    homeless = torch.where(count == 0, rest, -math.inf)
    return torch.cat([tempered, torch.full_like(rest, -math.inf)], -1), torch.cat([teacher[:, :-1], homeless], -1)


def distillation_loss(
    student: Tensor,  # [N, C] fp64 | fp32 | bf16 | fp16
    topk: TopK,
    target: Tensor | None,  # [N] int64
    sample_weight: Tensor | None,  # [N]
    divisor: float | Tensor | None,  # a number or a 0-d tensor
    options: DistillOptions,
) -> Tensor:
    """soft_weight * T^2 * D(record, softmax(student/T)) + hard_weight * CE(student, target).

    Rows count, and rows that are no distribution give NaN, as in the dense loss.

    Returns:
        The loss, 0-d or [N], in float32 (float64 if an input is).
    """
    is_fp64 = torch.float64 in (student.dtype, topk.log_probs.dtype)
    s = student.to(torch.float64)
    counted, labeled, weight, divisor = distill._counts(s, target, sample_weight, divisor, options)
    undefined = sides._is_undefined(s)
    if is_on(options.soft_weight):
        entries = _entries(topk, s.shape[1])
        undefined = undefined | _is_undefined(entries)
        if topk.tail_mode == "renormalize":  # there the student must be a distribution, too
            undefined = undefined | (~entries.kept | (s.gather(1, entries.ids) == -math.inf)).all(dim=-1)
    undefined = undefined & counted
    defined = counted & ~undefined
    loss = sides._not_a_number(undefined, s)
    if is_on(options.soft_weight):
        q, p = _dense_pair(sides._select(defined, s), entries, options, topk.tail_mode)
        tempered = options._replace(temperature=1.0, teacher_temperature=1.0)
        soft = options.soft_weight * options.temperature**2
        loss = loss + soft * distill._soft_term(q, sides._select(defined, p), defined, tempered)
    if is_on(options.hard_weight) and target is not None:
        loss = loss + options.hard_weight * distill._hard_term(s, target, defined & labeled, options.label_smoothing)
    if options.reduction == "mean":  # before they meet the losses: the products may leave the range, the shares do not
        weight = weight / torch.where(divisor != 0, divisor, 1.0)
    loss = torch.where(counted, weight * loss, 0.0)
    if options.reduction != "none":
        loss = loss.sum()
    return loss.to(torch.float64 if is_fp64 else torch.float32)


def forward(call: DistillCall, out: Outputs) -> None:
    """Row losses, their reduction and the wanted gradient."""
    distill.fill(call, out, _of_call)


def backward(call: DistillCall, row_state: Tensor, d_loss: Tensor, grads: Gradients) -> None:
    """The gradient from logits, record and the rows' weights in the reduced loss, which is what a state holds here."""
    distill.fill_gradients(call, row_state, d_loss, grads, _of_call)


def _of_call(call: DistillCall) -> tuple[Tensor, None]:
    assert isinstance(call.teacher, TopK)
    return distillation_loss(
        call.student, call.teacher, call.target, call.sample_weight, call.divisor, call.options
    ), None
