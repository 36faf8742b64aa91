"""Shares of the classes in the place of a label: the hard term ``sum_c t_c (log-sum-exp(s) - s_c)`` of a row.

The compiled core takes them in its pass over the logits on a CPU. Beside any other kernel the term and its gradient are
made here, in PyTorch, a few rows at a time.
"""

from __future__ import annotations

import math
from typing import Any, Final

import torch
from torch import Tensor

from tgt_fast.kernels.calls import DistillCall, Gradients, Outputs, accumulate_dtype, gradients
from tgt_fast.kernels.options import ROW_STATE

_ELEMENTS: Final = 1 << 24  # of a chunk's logits


def rows_of(logits: Tensor, target: Tensor) -> Tensor:
    """The term of each row; differentiable in the logits.  [N, C], [N, C] -> [N]

    +inf, without a gradient, where a class with a share has a logit of -inf.
    """
    exists = logits.detach() > -math.inf
    named = target > 0
    infinite = (named & ~exists).any(dim=-1)
    lse = torch.logsumexp(logits, dim=-1, keepdim=True)
    terms = torch.where(named & exists, target, 0.0) * (lse - torch.where(exists, logits, 0.0))
    return torch.where(infinite, math.inf, torch.where(infinite[:, None], 0.0, terms).sum(dim=-1))


def gradient_of(logits: Tensor, target: Tensor) -> Tensor:
    """The gradient of ``rows_of(logits, target).sum()``.  [N, C]"""
    infinite = ((target > 0) & (logits == -math.inf)).any(dim=-1, keepdim=True)
    grad = torch.softmax(logits, dim=-1) * target.sum(dim=-1, keepdim=True) - target
    # It adds up to 0. Of a class with nearly all the probability it is a small difference, which takes what is left.
    excess = grad.sum(dim=-1, keepdim=True, dtype=torch.float64).to(grad.dtype)
    grad = grad.scatter_add(-1, logits.argmax(dim=-1, keepdim=True), -excess)
    return torch.where(infinite, 0.0, grad)


def serves(kernel: Any, call: DistillCall) -> bool:
    """True if a kernel takes shares itself."""
    asked = getattr(kernel, "takes_shares", None)
    return asked is not None and bool(asked(call))


def forward(kernel: Any, call: DistillCall, out: Outputs) -> None:
    """A kernel's forward for a call with shares. The state of a row is the kernel's, and the row's weight behind it."""
    state = None if out.row_state is None else out.row_state.new_empty(len(out.row_state), ROW_STATE)
    if serves(kernel, call):
        kernel.forward(call, out._replace(row_state=state))
        factor = None
    else:
        factor = _factors(call)
        _forward_beside(kernel, call, out, state, factor)
    if out.row_state is not None and state is not None:
        out.row_state[:, :ROW_STATE] = state
        out.row_state[:, ROW_STATE] = 0.0 if factor is None else factor


def backward(kernel: Any, call: DistillCall, row_state: Tensor, d_loss: Tensor, grads: Gradients) -> None:
    """A kernel's backward for a call with shares."""
    state = row_state[:, :ROW_STATE].contiguous()
    if serves(kernel, call):
        kernel.backward(call, state, d_loss, grads)
        return
    inner = _soft_term(call)
    room = gradients(inner._replace(want_d_teacher=False))[0]
    kernel.backward(inner, state, d_loss, (room, grads[1]))
    _add_hard(call, row_state[:, ROW_STATE] * d_loss.detach().double(), room, grads[0])


def _forward_beside(kernel: Any, call: DistillCall, out: Outputs, state: Tensor | None, factor: Tensor) -> None:
    """The kernel makes the soft term; the hard one, and its gradient, are added."""
    inner = _soft_term(call)
    room = gradients(inner._replace(want_d_teacher=False))[0]
    loss = torch.empty_like(out.loss)
    kernel.forward(inner, out._replace(loss=loss, d_student=room, row_state=state))
    losses = _add_hard(call, factor, room, out.d_student).to(loss.dtype)
    out.loss.copy_(loss + (losses if call.options.reduction == "none" else losses.sum()))


def _add_hard(call: DistillCall, factor: Tensor, soft: Tensor | None, d_student: Tensor | None) -> Tensor:
    """The hard term of each row times its factor, [N]; its gradient and the soft term's go into ``d_student``."""
    rows, classes = call.student.shape
    dtype = accumulate_dtype(call.student, call.teacher)
    losses = torch.empty(rows, dtype=torch.float64, device=factor.device)
    step = max(1, _ELEMENTS // max(1, classes))
    for start in range(0, rows, step):
        at = slice(start, start + step)
        logits, target = (x[at].detach().to(dtype) for x in (call.student, call.target) if x is not None)
        counted = factor[at] != 0
        losses[at] = torch.where(counted, rows_of(logits, target) * factor[at], 0.0)
        if soft is not None and d_student is not None:  # which may be the memory of the logits
            part = gradient_of(logits, target) * factor[at, None].to(dtype)
            d_student[at] = (soft[at] + torch.where(counted[:, None], part, 0.0)).to(d_student.dtype)
    return losses


def _soft_term(call: DistillCall) -> DistillCall:
    """The call without the hard term; of half precision widened, so that the gradient is rounded once."""
    student = call.student
    if call.want_d_student and student.dtype in (torch.float16, torch.bfloat16):
        student = student.to(torch.float32)
    return call._replace(student=student, target=None, inplace=False, options=call.options._replace(hard_weight=0.0))


def _factors(call: DistillCall) -> Tensor:
    """Factors of the hard term of each row, 0 for rows that do not count.  -> [N] float64"""
    weights = torch.ones(len(call.student), dtype=torch.float64, device=call.student.device)
    if call.sample_weight is not None:
        weights = call.sample_weight.detach().to(torch.float64)
    if call.options.reduction == "mean" or call.divisor is not None:
        divisor = weights.sum() if call.divisor is None else torch.as_tensor(call.divisor, device=weights.device)
        weights = torch.where(divisor == 0, 0.0, weights / divisor.double())
    return weights * call.options.hard_weight
