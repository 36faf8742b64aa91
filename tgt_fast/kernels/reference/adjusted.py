"""The meaning of the adjustments of a soft-label loss, in the terms of :mod:`tgt_fast.kernels.reference.sides`."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tgt_fast.kernels.adjust import Adjustments
from tgt_fast.kernels.options import DistillOptions
from tgt_fast.kernels.reference.sides import (
    _clamped,
    _divergence,
    _is_infinite,
    _kl,
    _mixed,
    _select,
    _Side,
    _side,
)

_TINY = 1e-7  # beside a standard deviation


def with_bias(logits: Tensor, bias: Tensor | None) -> Tensor:
    return logits if bias is None else logits + bias.to(logits.dtype)


def with_margin(student: Tensor, target: Tensor, labeled: Tensor, margin: Tensor | None) -> Tensor:
    """The logits with that of the label lowered.  [N, C], [N], [N], [C]"""
    if margin is None:
        return student
    index = torch.where(labeled, target, 0)[:, None]
    lowered = torch.where(labeled[:, None], -margin.to(student.dtype)[index], 0.0)
    return student.scatter_add(-1, index, lowered)


def scores(
    student: Tensor, teacher: Tensor, options: DistillOptions, adjust: Adjustments
) -> tuple[Tensor, Tensor, DistillOptions]:
    """What the soft term takes for logits, both sides, and the options for these: a temperature a row is in them."""
    if adjust.standardize:
        student, teacher = _standardized(student), _standardized(teacher)
    if adjust.student_temperature is not None and adjust.teacher_temperature is not None:
        student = student / adjust.student_temperature.to(student.dtype)[:, None]
        teacher = teacher / adjust.teacher_temperature.to(teacher.dtype)[:, None]
        options = options._replace(temperature=1.0, teacher_temperature=1.0)
    return student, teacher, options


def soft_term(
    student: Tensor, teacher: Tensor, target: Tensor | None, counted: Tensor, labeled: Tensor,
    options: DistillOptions, adjust: Adjustments,
) -> Tensor:  # fmt: skip
    """The divergence of the rows that count, times its factor of the temperature; 0 elsewhere.  -> [N]"""
    index = torch.zeros_like(counted, dtype=torch.int64) if target is None else torch.where(labeled, target, 0)
    infinite = counted & _without_end(student, teacher, index, labeled, options, adjust)
    finite = counted & ~infinite
    student, teacher, options = scores(_select(finite, student), _select(finite, teacher), options, adjust)
    if not (adjust.by_label or adjust.skew):
        value = _divergence(student, teacher, options)
    else:
        q, p = _side(student, options.temperature), _side(teacher, options.teacher_temperature)
        if adjust.decoupled is not None:
            parts = _decoupled(student, teacher, index, options, *adjust.decoupled)
            value = torch.where(labeled, parts, _kl(p, q))
        elif adjust.correct_teacher is not None:
            value = torch.where(labeled, _corrected(q, p, index, adjust.correct_teacher), _kl(p, q))
        else:
            value = _skewed(q, p, options.divergence, adjust.skew)
        value = options.temperature * options.temperature * value
    if adjust.student_temperature is not None and options.divergence != "mse":
        value = value * adjust.student_temperature.to(value.dtype).square()
    return torch.where(finite, _clamped(value), torch.where(infinite, math.inf, 0.0))


def _standardized(logits: Tensor) -> Tensor:
    """(x - mean) / (1e-7 + standard deviation), over the classes that exist, of which -inf says that they do not."""
    exists = logits != -math.inf  # NaN stays, for the row to be seen as what it is
    count = exists.sum(dim=-1, keepdim=True)
    mean = torch.where(exists, logits, 0.0).sum(dim=-1, keepdim=True) / count.clamp_min(1)
    difference = torch.where(exists, logits - torch.where(exists, mean, 0.0), 0.0)
    variance = difference.square().sum(dim=-1, keepdim=True) / (count - 1).clamp_min(1)
    spread = torch.where(variance > 0, torch.where(variance > 0, variance, 1.0).sqrt(), 0.0)
    return torch.where(exists, difference / (_TINY + spread), -math.inf)


def _without_end(
    student: Tensor, teacher: Tensor, index: Tensor, labeled: Tensor, options: DistillOptions, adjust: Adjustments
) -> Tensor:
    """Rows whose soft term is +inf.  -> [N] bool"""
    if adjust.skew:
        return torch.zeros_like(labeled)  # what is compared with has some of either side everywhere
    plain = _is_infinite(student, teacher, options.divergence)
    if not adjust.by_label:
        return plain
    lacks = (teacher > -math.inf) & (student == -math.inf)
    of_label = lacks.gather(-1, index[:, None]).squeeze(-1)
    if adjust.decoupled is None:
        student_lacks = student.gather(-1, index[:, None]).squeeze(-1) == -math.inf
        return plain | (labeled & student_lacks)
    others = _others(index, student.shape[-1])
    of_others = (lacks & others).any(dim=-1)
    nothing_else = ~((student > -math.inf) & others).any(dim=-1) & ((teacher > -math.inf) & others).any(dim=-1)
    of_both, of_rest = (weight > 0 for weight in adjust.decoupled)
    without_end = ((of_label | nothing_else) & of_both) | (of_others & of_rest)
    return torch.where(labeled, without_end, plain)


def _others(index: Tensor, classes: int) -> Tensor:
    """[N, C] bool, all but the row's own class."""
    return torch.arange(classes, device=index.device) != index[:, None]


def _decoupled(
    student: Tensor, teacher: Tensor, index: Tensor, options: DistillOptions, of_both: float, of_rest: float
) -> Tensor:
    """a TCKD + b NCKD: KL of (label, all others), and KL among the others.  -> [N]"""
    own_q, rest_q = _parted(student, options.temperature, index)
    own_p, rest_p = _parted(teacher, options.teacher_temperature, index)
    value = torch.zeros_like(own_q.lse)
    if of_both:
        value = value + of_both * _kl(own_p, own_q)
    if of_rest:
        value = value + of_rest * _kl(rest_p, rest_q)
    return value


def _parted(logits: Tensor, temperature: float, index: Tensor) -> tuple[_Side, _Side]:
    """A distribution of the label and all others together, and that of the others among themselves.

    The others' is of their own logits: next to a label that is far ahead their probabilities leave nothing to divide.
    """
    others = (logits > -math.inf) & _others(index, logits.shape[-1])
    some = others.any(dim=-1, keepdim=True)
    top = logits.detach().amax(dim=-1, keepdim=True)
    peak = torch.where(some, torch.where(others, logits.detach(), -math.inf).amax(dim=-1, keepdim=True), 0.0)
    log, p, _, lse = _side(torch.where(some, torch.where(others, logits - peak, -math.inf), 0.0), temperature)
    rest = _Side(torch.where(some, log, 0.0), torch.where(some, p, 0.0), others, lse)
    together = torch.where(some, lse[:, None] + (peak - top) / temperature, -math.inf)
    pair = torch.cat([(logits.gather(-1, index[:, None]) - top) / temperature, together], dim=-1)
    return _side(pair, 1.0), rest


def _corrected(student: _Side, teacher: _Side, index: Tensor, lead: float) -> Tensor:
    """KL((1 - m) p + m onehot(label), q) = (1 - m) KL(p, q) + what the label's class adds.  -> [N]"""
    at_label = index[:, None]
    of_label, top = teacher.p.gather(-1, at_label).squeeze(-1), teacher.p.detach().argmax(dim=-1)
    of_top = teacher.p.gather(-1, top[:, None]).squeeze(-1)
    kept = kept_of_teacher(of_label, of_top, top == index, lead)
    own, theirs = (side.log.gather(-1, at_label).squeeze(-1) for side in (teacher, student))
    return kept * _kl(teacher, student) + beside_kept(kept, of_label, own, theirs)


def kept_of_teacher(of_label: Tensor, of_top: Tensor, is_top: Tensor, lead: float) -> Tensor:
    """1 - m, from the teacher's probabilities of the label and of its own first class.  -> [N]"""
    ahead = of_top - of_label
    short = torch.where(is_top, 1.0 - of_label, 1.0)
    sure = of_label + lead >= 1.0
    kept = torch.where(is_top, torch.where(sure, 0.0, 1.0 - lead / torch.where(sure, 1.0, short)), 0.0)
    return torch.where(is_top, kept, (1.0 - lead) / (1.0 + ahead))


def beside_kept(kept: Tensor, of_label: Tensor, own: Tensor, theirs: Tensor) -> Tensor:
    """What the label's class adds; ``own`` and ``theirs``: its log-probabilities, the teacher's and the student's."""
    some = kept > 0
    log_kept = torch.where(some, torch.where(some, kept, 1.0).log(), 0.0)
    both = of_label * kept + (1.0 - kept)
    before = torch.where(some, kept * log_kept - kept * of_label * (log_kept + own), 0.0)
    return before + both * both.log() - (1.0 - kept) * theirs


def _skewed(student: _Side, teacher: _Side, divergence: str, skew: float) -> Tensor:
    """KL(p, l p + (1 - l) q), or its mirror KL(q, l q + (1 - l) p).  -> [N]"""
    if divergence == "forward_kl":
        log_m = _mixed(teacher, student, skew)
        return (teacher.p * (teacher.log - log_m)).sum(dim=-1)
    log_m = _mixed(student, teacher, skew)
    return (student.p * (student.log - log_m)).sum(dim=-1)
