"""What the reference's losses are made of: a side's distribution, and the divergences of two of them, in float64."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from tgt_fast.kernels.late import as_scalar, is_symbolic
from tgt_fast.kernels.options import DistillOptions

# Lower is as good as this; it keeps 0 * log q finite when float64 logits span their whole range.
_LOWEST_SHIFTED = -1e300


class _Side(NamedTuple):
    """One side's distribution. Where a class is missing, ``log`` and ``p`` are 0."""

    log: Tensor  # [N, C] log-probabilities
    p: Tensor  # [N, C] probabilities
    exists: Tensor  # [N, C] bool
    lse: Tensor  # [N] log-sum-exp of logits / temperature


def _side(logits: Tensor, temperature: float) -> _Side:
    """softmax(logits / temperature) of rows that hold a finite logit and neither +inf nor NaN."""
    exists = logits > -math.inf
    peak = logits.detach().amax(dim=-1, keepdim=True)
    shifted = torch.where(exists, (logits - peak) / temperature, 0.0).clamp_min(_LOWEST_SHIFTED)
    lse = torch.where(exists, shifted.exp(), 0.0).sum(dim=-1, keepdim=True).log()
    log = torch.where(exists, shifted - lse, 0.0)
    p = torch.where(exists, log.exp(), 0.0)
    return _Side(log, p, exists, (lse + peak / temperature).squeeze(-1))


def _kl(a: _Side, b: _Side) -> Tensor:
    """sum a (log a - log b) over classes; b must exist wherever a does."""
    return (a.p * (a.log - b.log)).sum(dim=-1)


def _mixed(teacher: _Side, student: _Side, beta: float) -> Tensor:
    """log(beta p + (1 - beta) q), without underflow."""
    log_bp = teacher.log + (beta.log() if isinstance(beta, Tensor) else math.log(beta))
    log_bq = student.log + ((-beta).log1p() if isinstance(beta, Tensor) else math.log1p(-beta))
    onto_p = log_bp + F.softplus(log_bq - log_bp, threshold=50.0)
    onto_q = log_bq + F.softplus(log_bp - log_bq, threshold=50.0)
    both = torch.where(log_bp > log_bq, onto_p, onto_q)  # the same, from the larger: the other may be far away
    return torch.where(teacher.exists & student.exists, both, torch.where(teacher.exists, log_bp, log_bq))


def _jsd(teacher: _Side, student: _Side, beta: float) -> Tensor:
    """beta KL(p, m) + (1 - beta) KL(q, m) with m = beta p + (1 - beta) q."""
    beta = as_scalar(beta) if is_symbolic(beta) else beta  # type: ignore[assignment]
    log_m = _mixed(teacher, student, beta)
    to_teacher = (teacher.p * (teacher.log - log_m)).sum(dim=-1)
    to_student = (student.p * (student.log - log_m)).sum(dim=-1)
    return beta * to_teacher + (1.0 - beta) * to_student


def _divergence(student: Tensor, teacher: Tensor, options: DistillOptions) -> Tensor:
    """The soft term of each row, for rows on which it is finite.  [N, C], [N, C] -> [N]"""
    ts, tt = options.temperature, options.teacher_temperature
    if options.divergence == "mse":
        exists = student > -math.inf  # on such rows both sides agree on which classes exist
        difference = torch.where(exists, student, 0.0) / ts - torch.where(exists, teacher, 0.0) / tt
        return difference.square().sum(dim=-1)

    q, p = _side(student, ts), _side(teacher, tt)
    if options.divergence == "forward_kl":
        value = _kl(p, q)
    elif options.divergence == "reverse_kl":
        value = _kl(q, p)
    elif options.divergence == "symmetric":
        value = _kl(p, q) + _kl(q, p)
    elif options.divergence == "jsd":
        value = _jsd(p, q, options.beta)
    elif options.divergence == "tvd":
        value = 0.5 * (p.p - q.p).abs().sum(dim=-1)
    elif options.divergence == "cross_entropy":
        value = -(p.p * q.log).sum(dim=-1)
    else:
        raise ValueError(f"unknown divergence {options.divergence!r}")
    return ts * ts * value


def _is_infinite(student: Tensor, teacher: Tensor, divergence: str) -> Tensor:
    """Rows whose divergence is +inf because one side has mass where the other has none.  -> [N] bool

    Mass is a logit above -inf: a probability that underflows to 0 is still mass.
    """
    has_q, has_p = student > -math.inf, teacher > -math.inf
    if divergence in ("forward_kl", "cross_entropy"):
        return (has_p & ~has_q).any(dim=-1)
    if divergence == "reverse_kl":
        return (has_q & ~has_p).any(dim=-1)
    if divergence in ("symmetric", "mse"):
        return (has_q ^ has_p).any(dim=-1)
    return torch.zeros(student.shape[0], dtype=torch.bool, device=student.device)  # jsd and tvd are bounded


def _is_undefined(logits: Tensor) -> Tensor:
    """Rows that hold NaN or +inf, or nothing but -inf.  [N, C] -> [N] bool"""
    return (logits.isnan() | (logits == math.inf)).any(dim=-1) | (logits == -math.inf).all(dim=-1)


def _select(rows: Tensor, logits: Tensor) -> Tensor:
    """The logits where ``rows``, harmless zeros elsewhere; no gradient reaches the other rows."""
    return torch.where(rows[:, None], logits, 0.0)


def _not_a_number(rows: Tensor, logits: Tensor) -> Tensor:
    """NaN in value and in every gradient where ``rows``, 0 elsewhere.  [N], [N, C] -> [N]"""
    poison = torch.where(rows, math.nan, 0.0).to(logits.dtype)
    return (_select(rows, logits) * poison[:, None]).sum(dim=-1)


def _clamped(value: Tensor) -> Tensor:
    """max(value, 0) without touching the gradient: a value below 0 is rounding, its gradient is not."""
    return value + (value.clamp_min(0.0) - value).detach()
