"""The meaning of the distillation loss: plain PyTorch in float64, differentiable any number of times.

Every other backend is measured against this file, so it prefers the formula to speed. Two ideas keep it exact
(:mod:`tgt_fast.kernels.reference.sides` holds what they are made of) where logits are -inf, +inf or NaN:

* Rows that cannot go through the formula (dropped, not a number, infinitely far apart) are replaced by zeros
  *before* it and given their value after it. ``torch.where`` then cuts their gradient exactly, where
  multiplying by 0 would leave NaN.
* A class exists on a side where its logit is above -inf. A missing one gets log-probability and probability
  0, both finite, so that every product below is 0 there, in value and in every derivative.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from tgt_fast.kernels.adjust import Adjustments
from tgt_fast.kernels.calls import DistillCall, Gradients, Outputs, is_soft, labels_of
from tgt_fast.kernels.late import is_on
from tgt_fast.kernels.options import ROW_COEFFICIENT, DistillOptions, DistillStats
from tgt_fast.kernels.reference import adjusted
from tgt_fast.kernels.reference.sides import (
    _clamped,
    _divergence,
    _is_infinite,
    _is_undefined,
    _kl,
    _not_a_number,
    _select,
    _side,
)

__all__ = ["backward", "distillation_loss", "forward", "scale_"]


def _soft_term(student: Tensor, teacher: Tensor, counted: Tensor, options: DistillOptions) -> Tensor:
    """The divergence of the rows that count, 0 elsewhere.  -> [N]"""
    infinite = counted & _is_infinite(student, teacher, options.divergence)
    finite = counted & ~infinite
    rows = _clamped(_divergence(_select(finite, student), _select(finite, teacher), options))
    return torch.where(finite, rows, torch.where(infinite, math.inf, 0.0))


def _hard_term(student: Tensor, target: Tensor, labeled: Tensor, label_smoothing: float) -> Tensor:
    """Cross-entropy with the label, T = 1; smoothing is spread over the classes that exist.  -> [N]"""
    if is_soft(target):
        return _shared_term(student, target.detach().to(torch.float64), labeled)
    index = torch.where(labeled, target, 0)[:, None]
    label_is_missing = student.detach().gather(-1, index).squeeze(-1) == -math.inf
    infinite = labeled & label_is_missing & (label_smoothing < 1.0)
    finite = labeled & ~infinite
    q = _side(_select(finite, student), 1.0)
    rows = -(1.0 - label_smoothing) * q.log.gather(-1, index).squeeze(-1)
    if is_on(label_smoothing):
        rows = rows - label_smoothing * q.log.sum(dim=-1) / q.exists.sum(dim=-1)
    return torch.where(finite, _clamped(rows), torch.where(infinite, math.inf, 0.0))


def _shared_term(student: Tensor, shares: Tensor, counted: Tensor) -> Tensor:
    """Cross-entropy with shares of the classes, which need not add up to 1.  [N, C], [N, C] -> [N]"""
    named = shares > 0
    infinite = counted & (named & (student == -math.inf)).any(dim=-1)
    finite = counted & ~infinite
    q = _side(_select(finite, student), 1.0)
    rows = -(torch.where(named & q.exists, shares, 0.0) * q.log).sum(dim=-1)
    return torch.where(finite, _clamped(rows), torch.where(infinite, math.inf, 0.0))


def _statistics(student: Tensor, teacher: Tensor, counted: Tensor, options: DistillOptions) -> DistillStats:
    """Statistics of each row's two distributions; 0 and False on rows that do not count."""
    bad_student, bad_teacher = _is_undefined(student), _is_undefined(teacher)
    q = _side(_select(counted & ~bad_student, student), options.temperature)
    p = _side(_select(counted & ~bad_teacher, teacher), options.teacher_temperature)

    def finish(value: Tensor, undefined: Tensor) -> Tensor:
        return torch.where(counted, value.masked_fill(undefined, math.nan), 0.0)

    infinite = _is_infinite(student, teacher, "forward_kl")
    undefined = bad_student | bad_teacher
    kl = _kl(p, q).clamp_min(0.0).masked_fill(infinite, math.inf)
    return DistillStats(
        student_entropy=finish(-(q.p * q.log).sum(dim=-1), bad_student),
        teacher_entropy=finish(-(p.p * p.log).sum(dim=-1), bad_teacher),
        kl=finish(kl, undefined),
        agreement=counted & ~undefined & (student.argmax(dim=-1) == teacher.argmax(dim=-1)),
        student_lse=finish(q.lse, bad_student),
        teacher_lse=finish(p.lse, bad_teacher),
    )


def _counts(
    student: Tensor, target: Tensor | None, sample_weight: Tensor | None, given: float | Tensor | None,
    options: DistillOptions,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Which rows count and which of them have a label, [N] bool; their weights, [N]; the divisor of "mean", 0-d."""
    rows, classes = student.shape
    counted = torch.ones(rows, dtype=torch.bool, device=student.device)
    labeled = torch.full_like(counted, is_soft(target))
    target = labels_of(target)
    if target is not None:
        names_a_class = (target >= 0) & (target < classes)
        unlabeled = target == options.unlabeled_index
        counted = (target != options.ignore_index) & (names_a_class | unlabeled)
        labeled = counted & ~unlabeled
    weight = torch.ones(rows, dtype=torch.float64, device=student.device)
    if sample_weight is not None:
        weight = sample_weight.detach().to(torch.float64)
        counted = counted & (weight != 0)
    if given is not None:
        if isinstance(given, Tensor):
            divisor = given.detach().to(student.device, torch.float64)
        else:  # written on a device, for which nothing waits
            divisor = student.new_full((), given, dtype=torch.float64)
        counted = counted & (divisor != 0)
    else:
        divisor = torch.where(counted, weight, 0.0).sum()
    return counted, labeled, weight, divisor


def distillation_loss(
    student: Tensor,  # [N, C] fp64 | fp32 | bf16 | fp16
    teacher: Tensor,  # [N, C] fp64 | fp32 | bf16 | fp16
    target: Tensor | None,  # [N] int64
    sample_weight: Tensor | None,  # [N]
    divisor: float | Tensor | None,  # a number or a 0-d tensor
    options: DistillOptions,
    want_stats: bool = False,
    adjust: Adjustments | None = None,
) -> tuple[Tensor, DistillStats | None]:
    """soft_weight * Ts^2 * D(softmax(teacher/Tt), softmax(student/Ts)) + hard_weight * CE(student, target).

    A row counts unless its target is ``ignore_index`` (or no class at all), its weight is 0, or the
    divisor is 0; a target of ``unlabeled_index`` drops only the hard term. Rows that do not count give 0
    and pass no gradient.

    Returns:
        The loss, 0-d or [N], in float32 (float64 if an input is), and the statistics of each row if wanted.
    """
    result_dtype = torch.float64 if torch.float64 in (student.dtype, teacher.dtype) else torch.float32
    s, t = student.to(torch.float64), teacher.to(torch.float64)
    if adjust is not None:
        s, t = adjusted.with_bias(s, adjust.student_bias), adjusted.with_bias(t, adjust.teacher_bias)
    counted, labeled, weight, divisor = _counts(s, target, sample_weight, divisor, options)

    undefined = _is_undefined(s)
    if is_on(options.soft_weight):
        undefined = undefined | _is_undefined(t)
    undefined = undefined & counted
    defined = counted & ~undefined
    loss = _not_a_number(undefined, s) + _not_a_number(undefined, t)
    if is_on(options.soft_weight):
        if adjust is None:
            rows = _soft_term(s, t, defined, options)
        else:
            rows = adjusted.soft_term(s, t, labels_of(target), defined, defined & labeled, options, adjust)
        loss = loss + options.soft_weight * rows
    if is_on(options.hard_weight) and target is not None:
        hard = defined & labeled
        of_hard = s if adjust is None else adjusted.with_margin(s, target, hard, adjust.label_margin)
        loss = loss + options.hard_weight * _hard_term(of_hard, target, hard, options.label_smoothing)
    if options.reduction == "mean":  # before they meet the losses: the products may leave the range, the shares do not
        weight = weight / torch.where(divisor != 0, divisor, 1.0)
    loss = torch.where(counted, weight * loss, 0.0)
    if options.reduction != "none":
        loss = loss.sum()

    stats = None
    if want_stats:
        with torch.no_grad():
            if adjust is not None:
                s, t, options = adjusted.scores(s, t, options, adjust)
            values = _statistics(s.detach(), t.detach(), counted, options)
        stats = DistillStats(*(v if v.dtype == torch.bool else v.to(result_dtype) for v in values))
    return loss.to(result_dtype), stats


# The same in the form of the compiled kernels, for calls that arrive through the dispatcher


def takes_shares(call: DistillCall) -> bool:
    """True if a target may be shares of the classes."""
    return True


def takes_adjustments(call: DistillCall) -> bool:
    """True if a call's adjustments are taken, too."""
    return True


def forward(call: DistillCall, out: Outputs) -> None:
    """Row losses, their reduction and the wanted gradients."""
    fill(call, out, _of_call)


def backward(call: DistillCall, row_state: Tensor, d_loss: Tensor, grads: Gradients) -> None:
    """The gradients from logits and the rows' weights in the reduced loss, which is what a state holds here."""
    fill_gradients(call, row_state, d_loss, grads, _of_call)


def _of_call(call: DistillCall) -> tuple[Tensor, DistillStats | None]:
    assert isinstance(call.teacher, Tensor)
    return distillation_loss(
        call.student, call.teacher, call.target, call.sample_weight, call.divisor, call.options, call.want_stats,
        call.adjust,
    )  # fmt: skip


Formula = Callable[[DistillCall], tuple[Tensor, "DistillStats | None"]]


def fill(call: DistillCall, out: Outputs, formula: Formula) -> None:
    """Record a loss and its derivatives, by a formula that autograd can follow."""
    with _recording():
        leaves = _leaves(call)
        loss, stats = formula(leaves)
        made = _gradients(loss, leaves, torch.ones_like(loss))
    if out.row_state is not None:
        counted, _, weight, divisor = _counts(call.student, call.target, call.sample_weight, call.divisor, call.options)
        divisor = divisor if call.options.reduction == "mean" else torch.ones_like(divisor)
        out.row_state.zero_()[:, ROW_COEFFICIENT] = torch.where(counted, weight / divisor, 0.0)
    if out.stats is not None and stats is not None:
        out.stats.copy_(torch.stack([value.to(loss.dtype) for value in stats]))
    out.loss.copy_(loss.detach())
    _write((out.d_student, out.d_teacher), made)


def fill_gradients(call: DistillCall, row_state: Tensor, d_loss: Tensor, grads: Gradients, formula: Formula) -> None:
    """The derivatives again, from the rows' coefficients."""
    with _recording():
        a_row = call.options._replace(reduction="none")
        leaves = _leaves(call)._replace(sample_weight=row_state[:, ROW_COEFFICIENT], divisor=None, options=a_row)
        loss, _ = formula(leaves)
        made = _gradients(loss, leaves, d_loss.detach().to(loss.dtype).expand_as(loss))
    _write(grads, made)


def scale_(grad: Tensor, d_loss: Tensor) -> None:
    """grad *= d_loss, a factor for all rows or one a row."""
    grad.mul_(d_loss.detach().reshape(-1, 1) if d_loss.dim() else d_loss.detach())


def _leaves(call: DistillCall) -> DistillCall:
    """The call with its logits as leaves of a graph of their own."""
    teacher = call.teacher
    if isinstance(teacher, Tensor):
        teacher = teacher.detach().requires_grad_(call.want_d_teacher)
    return call._replace(student=call.student.detach().requires_grad_(call.want_d_student), teacher=teacher)


def _write(room: Gradients, made: Gradients) -> None:
    for here, grad in zip(room, made, strict=True):
        if here is not None and grad is not None:
            here.copy_(grad)


def _gradients(loss: Tensor, leaves: DistillCall, d_loss: Tensor) -> Gradients:
    """The gradients to those of the two sides that want one."""
    wanted = (leaves.want_d_student, leaves.want_d_teacher)
    sides = [side for side, want in zip((leaves.student, leaves.teacher), wanted, strict=True) if want]
    made = iter(torch.autograd.grad(loss, sides, d_loss, materialize_grads=True) if sides else ())  # type: ignore[arg-type]
    return next(made) if wanted[0] else None, next(made) if wanted[1] else None


@contextmanager
def _recording() -> Iterator[None]:
    """Autograd, also below the dispatcher's autograd keys, where a registered op runs."""
    cpu, cuda = (torch._C.DispatchKeySet(key) for key in (_KEYS.AutogradCPU, _KEYS.AutogradCUDA))
    included = torch._C._dispatch_tls_local_include_set()
    excluded = torch._C._dispatch_tls_local_exclude_set() - (cpu | cuda)
    with torch.inference_mode(False), torch._C._ForceDispatchKeyGuard(included, excluded), torch.enable_grad():
        yield


_KEYS = torch._C.DispatchKey
