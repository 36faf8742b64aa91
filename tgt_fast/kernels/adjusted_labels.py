"""Forms of forward_kl that go by a row's label, made of a kernel's KL and a few numbers a row."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from tgt_fast.kernels.calls import Gradients
from tgt_fast.kernels.reference import adjusted, distill

# The kernel on logits of both sides, for losses times weights: (student, teacher, weight, loss, gradients)
Kernel = Callable[[Tensor, Tensor, Tensor, Tensor, Gradients], None]


class Rows(NamedTuple):
    """Some rows as the kernel is to see them; those that do not count hold what is finite."""

    logits: tuple[Tensor, Tensor]  # of student and teacher, [n, C], in memory that may be written to
    temperatures: tuple[float, float]
    weight: Tensor  # [n] float64, 0: does not count
    factor: float  # of a KL beside the weight: what the kernel multiplies by
    labeled: Tensor  # [n] bool
    label: Tensor  # [n] int64, 0 where there is none


class _Exponentials(NamedTuple):
    """exp(x - max) of a side, tempered, and what they add up to."""

    terms: Tensor  # [n, C]
    total: Tensor  # [n] float64, 0: there is no class; NaN: a row holds NaN or +inf
    peak: Tensor  # [n] float64, the largest logit

    def add_to_(self, grad: Tensor, share: Tensor) -> None:
        """grad += share * softmax.  [n, C], [n] float64"""
        grad.addcmul_(self.terms, (share / torch.where(self.total > 0, self.total, 1.0)).to(grad.dtype)[:, None])


def _exponentials(logits: Tensor, temperature: float) -> _Exponentials:
    peak = logits.amax(dim=1, keepdim=True)
    here = torch.where(peak == -math.inf, 0.0, peak)
    terms = (logits - here).mul_(1.0 / temperature).exp_()
    total = terms.sum(dim=1, dtype=torch.float64)
    return _Exponentials(terms, total, peak[:, 0].double())


def decoupled(rows: Rows, weights: tuple[float, float], kernel: Kernel, loss: Tensor, grads: Gradients) -> None:
    """a TCKD + b NCKD of rows with a label: the kernel's KL without the label, and that of (label, all others)."""
    own, rest = weights
    at = rows.label[:, None]
    of_label = [x.gather(1, at)[:, 0].double() for x in rows.logits]
    # A label that is no number is left in its row, for the kernel to see.
    parted = rows.labeled & (of_label[0] < math.inf) & (of_label[1] < math.inf)
    for x, logit in zip(rows.logits, of_label, strict=True):
        x.scatter_(1, at, torch.where(parted, -math.inf, logit).to(x.dtype)[:, None])
    others = [_exponentials(x, t) for x, t in zip(rows.logits, rows.temperatures, strict=True)]
    student_has, teacher_has = (side.peak != -math.inf for side in others)
    sound = torch.ones_like(parted)  # both sides are distributions
    for side, logit in zip(others, of_label, strict=True):
        sound = sound & (side.total >= 0) & ((side.peak != -math.inf) | (logit != -math.inf))
    lacking = torch.zeros_like(parted)
    if own:
        lacking = (of_label[1] > -math.inf) & (of_label[0] == -math.inf)
    if own or rest:
        lacking = lacking | (teacher_has & ~student_has)
    lacking = lacking & parted & sound
    among = teacher_has & student_has & ~lacking
    weight = torch.where(parted & sound, torch.where(among, rows.weight * rest, 0.0), rows.weight)
    kernel(*rows.logits, weight, loss, grads)

    parts = []  # (log-probability of the label, of all others) of both sides
    for side, logit, temperature in zip(others, of_label, rows.temperatures, strict=True):
        label, rest_of = ((x - torch.maximum(logit, side.peak)) / temperature for x in (logit, side.peak))
        rest_of = rest_of + side.total.log()
        both = torch.logaddexp(label, rest_of)
        parts.append((label - both, rest_of - both))
    (log_q, log_rest_q), (log_p, log_rest_p) = parts
    p, q, rest_p, rest_q = (x.exp() for x in (log_p, log_q, log_rest_p, log_rest_q))
    less, less_rest = (torch.where(p > 0, x, 0.0) for p, x in ((p, log_p - log_q), (rest_p, log_rest_p - log_rest_q)))
    value = p * less + rest_p * less_rest
    use = parted & ~lacking & (rows.weight != 0) & value.isfinite() & loss.isfinite()
    share = torch.where(use, rows.weight * (own * rows.factor), 0.0)
    loss.add_(torch.where(use, share * value.clamp_min(0.0), 0.0).to(loss.dtype))
    loss.masked_fill_(lacking & (rows.weight != 0), math.inf)
    ahead = torch.where(p > 0.5, rest_p - rest_q, q - p)  # q - p, from the smaller numbers
    slopes = ((ahead, -ahead), (p * (less - value), rest_p * (less_rest - value)))
    for side, grad, temperature, slope in zip(others, grads, rows.temperatures, slopes, strict=True):
        if grad is None:
            continue
        to_label, to_others = (torch.where(use, share * x / temperature, 0.0) for x in slope)
        side.add_to_(grad, to_others)
        grad.scatter_add_(1, at, to_label.to(grad.dtype)[:, None])
    for x, logit in zip(rows.logits, of_label, strict=True):
        x.scatter_(1, at, logit.to(x.dtype)[:, None])


def corrected(rows: Rows, lead: float, kernel: Kernel, loss: Tensor, grads: Gradients) -> None:
    """KL((1 - m) p + m onehot(label), q) of rows with a label: 1 - m times the kernel's KL, and the label's."""
    at = rows.label[:, None]
    sides = [_exponentials(x, t) for x, t in zip(rows.logits, rows.temperatures, strict=True)]
    log_q, log_p = (
        (x.gather(1, at)[:, 0].double() - side.peak) / t - side.total.log()
        for x, t, side in zip(rows.logits, rows.temperatures, sides, strict=True)
    )
    top = rows.logits[1].argmax(dim=1)
    log_top = -sides[1].total.log()
    lacking = rows.labeled & (log_q == -math.inf) & (sides[1].total > 0)
    has_label = log_p > -math.inf
    with distill._recording():
        leaves = [torch.where(x.isfinite(), x, 0.0).detach().requires_grad_() for x in (log_p, log_top, log_q)]
        of_label = torch.where(has_label, leaves[0].exp(), 0.0)
        kept = adjusted.kept_of_teacher(of_label, leaves[1].exp(), top == rows.label, lead)
        # Too small to be seen, and not 0: the kernel is to find an infinite loss also where nothing is kept.
        seen = torch.where(rows.labeled, kept.detach().clamp_min(1e-30), 1.0)
        kernel(*rows.logits, torch.where(lacking, 0.0, rows.weight * seen), loss, grads)
        use = rows.labeled & ~lacking & (rows.weight != 0) & loss.isfinite()
        share = torch.where(use, rows.weight * rows.factor, 0.0)
        kl = torch.where(use, loss.double() / torch.where(share > 0, share * seen, 1.0), 0.0)
        beside = adjusted.beside_kept(kept, of_label, leaves[0], leaves[2])
        slopes = torch.autograd.grad((share * (kept * kl + beside)).sum(), leaves)
    loss.add_((share * beside.detach()).to(loss.dtype)).clamp_min_(0.0)
    loss.masked_fill_(lacking & (rows.weight != 0), math.inf)
    of_teacher = (torch.where(has_label, slopes[0], 0.0), slopes[1])
    points = ([(at, slopes[2])], [(at, of_teacher[0]), (top[:, None], of_teacher[1])])
    for side, grad, temperature, here in zip(sides, grads, rows.temperatures, points, strict=True):
        if grad is None:
            continue
        side.add_to_(grad, torch.stack([slope for _, slope in here]).sum(0) / -temperature)
        for where, slope in here:
            grad.scatter_add_(1, where, (slope / temperature).to(grad.dtype)[:, None])
