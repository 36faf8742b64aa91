"""Shares of the classes as targets where a process has some of the classes, and their shares.

With m what a row's shares t add up to over all classes, its hard term ``sum_c t_c (log-sum-exp(s) - s_c)`` is m times
the cross-entropy of ``t / m``: that of a teacher whose logits are ``log t``, at temperature 1. So it is taken as the
soft term of a call of its own, and the losses and gradients of both are added.
"""

from __future__ import annotations

import math
from typing import Any, Final

import torch
from torch import Tensor

from tgt_fast.kernels.calls import DistillCall, Gradients, Outputs, accumulate_dtype
from tgt_fast.kernels.options import DistillOptions
from tgt_fast.ops.vocab_parallel.kernel import Sharded
from tgt_fast.ops.vocab_parallel.opening import STATE

_HALVES: Final = (torch.float16, torch.bfloat16)
_HARD: Final = 4  # the hard weight's place among the late numbers of DistillOptions


class WithShares:
    """The loss of a call whose target is shares, of the form of ``Direct``; ``inner`` takes what is not of them."""

    def __init__(self, inner: Any, sharded: Sharded) -> None:
        self._inner, self._sharded = inner, sharded

    def forward(self, call: DistillCall) -> Outputs:
        """Losses: what the shares add up to in one reduction, and those of two calls."""
        call, shares = _with_divisor(call), call.target
        assert shares is not None
        mass = self._sharded.shards.total(shares.detach().sum(dim=1, dtype=torch.float64)[:, None])[:, 0]
        # A share below 0, or that is no number, has a logarithm that is none either, in the process that has it.
        mass = torch.where((mass >= 0) & (mass < math.inf), mass, 1.0)
        weight = mass if call.sample_weight is None else mass * call.sample_weight.detach().to(torch.float64)
        wide = _widened(call)
        hard = self._sharded.forward(
            _hard(wide)._replace(sample_weight=weight, want_d_teacher=False, want_stats=False, inplace=False)
        )
        soft = self._inner.forward(_soft(wide))
        states = [out.row_state for out in (soft, hard) if out.row_state is not None]
        grad = _added(call, soft.d_student, hard.d_student)
        return Outputs(
            soft.loss + hard.loss, soft.stats, grad, soft.d_teacher, torch.cat(states, dim=1) if states else None
        )

    def backward(self, call: DistillCall, row_state: Tensor, d_loss: Tensor) -> Gradients:
        """The gradients anew, from the states of both calls. Nothing travels."""
        wide, width = _widened(call), row_state.shape[1] - STATE
        hard, _ = self._sharded.backward(
            _hard(wide)._replace(want_d_teacher=False, inplace=False), row_state[:, width:].contiguous(), d_loss
        )
        soft, d_teacher = self._inner.backward(_soft(wide), row_state[:, :width].contiguous(), d_loss)
        return _added(call, soft, hard), d_teacher

    def scale_(self, grad: Tensor, d_loss: Tensor) -> None:
        """grad *= d_loss, a factor for all rows or one a row."""
        self._inner.scale_(grad, d_loss)


def _with_divisor(call: DistillCall) -> DistillCall:
    """The call with the divisor of its mean, which the shares of a row have no part in."""
    if call.options.reduction != "mean" or call.divisor is not None:
        return call
    if call.sample_weight is None:
        return call._replace(divisor=float(call.student.shape[0]))
    return call._replace(divisor=call.sample_weight.detach().sum(dtype=torch.float64))


def _widened(call: DistillCall) -> DistillCall:
    """In half precision with float32 logits, whose gradients are rounded once they are added."""
    if not call.want_d_student or call.student.dtype not in _HALVES:
        return call
    return call._replace(student=call.student.to(torch.float32), inplace=False)


def _added(call: DistillCall, soft: Tensor | None, hard: Tensor | None) -> Tensor | None:
    if soft is None or hard is None:
        return None
    total = soft.add_(hard)
    if total.dtype == call.student.dtype:
        return total
    return call.student.detach().copy_(total) if call.inplace else total.to(call.student.dtype)


def _soft(call: DistillCall) -> DistillCall:
    """The call without its hard term."""
    options, numbers = call.options, call.options.numbers
    if numbers is not None:
        numbers = torch.cat([numbers[:_HARD], torch.zeros_like(numbers[_HARD:])])
    plain = options._replace(hard_weight=0.0, label_smoothing=0.0, numbers=numbers)
    return call._replace(options=plain, target=None)


def _hard(call: DistillCall) -> DistillCall:
    """The hard term as the soft one of a call whose teacher the shares are."""
    assert call.target is not None
    options, numbers = call.options, call.options.numbers
    if numbers is not None:
        half, ones = numbers.new_full((1,), 0.5), numbers.new_ones(2)
        numbers = torch.cat([half, ones, numbers[_HARD : _HARD + 1], torch.zeros_like(numbers[:2])])
    plain = DistillOptions(
        "cross_entropy", soft_weight=options.hard_weight, ignore_index=options.ignore_index,
        unlabeled_index=options.unlabeled_index, reduction=options.reduction, numbers=numbers,
    )  # fmt: skip
    teacher = call.target.detach().to(accumulate_dtype(call.student, call.teacher)).log()
    return call._replace(options=plain, teacher=teacher, target=None)
