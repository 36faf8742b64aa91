"""A loss with adjustments beside a kernel that does not take them: the formula in float64, a few rows at a time.

PyTorch makes it and its derivatives. No more than a chunk's rows are in memory in float64, and nothing waits for a
device.
"""

from __future__ import annotations

from typing import Any, Final

import torch
from torch import Tensor

from tgt_fast.kernels.calls import DistillCall, Gradients, Outputs
from tgt_fast.kernels.reference import distill

_ELEMENTS: Final = {"cpu": 1 << 18, "cuda": 1 << 24}  # of a chunk's logits


def serves(kernel: Any, call: DistillCall) -> bool:
    """True if a kernel takes a call's adjustments itself."""
    asked = getattr(kernel, "takes_adjustments", None)
    return asked is not None and bool(asked(call))


def forward(call: DistillCall, out: Outputs) -> None:
    """Row losses, their reduction and the wanted gradients."""
    if call.options.reduction == "mean" and call.divisor is None:  # that of all rows, not of a chunk's
        *_, divisor = distill._counts(call.student, call.target, call.sample_weight, None, call.options)
        call = call._replace(divisor=divisor)
    a_row = call.options.reduction == "none"
    parts: list[Tensor] = []
    for at in _chunks(call):
        loss = out.loss[at] if a_row else torch.empty((), dtype=torch.float64, device=out.loss.device)
        stats = None if out.stats is None else out.stats[:, at]
        rest = (None if x is None else x[at] for x in (out.d_student, out.d_teacher, out.row_state))
        distill.fill(_rows(call, at), Outputs(loss, stats, *rest), distill._of_call)
        parts.append(loss)
    if not a_row:
        out.loss.copy_(torch.stack(parts).sum() if parts else torch.zeros(()))


def backward(call: DistillCall, row_state: Tensor, d_loss: Tensor, grads: Gradients) -> None:
    """The gradients from logits and the rows' weights in the reduced loss."""
    for at in _chunks(call):
        upstream = d_loss[at] if d_loss.dim() else d_loss
        d_student, d_teacher = (None if grad is None else grad[at] for grad in grads)
        distill.fill_gradients(_rows(call, at), row_state[at], upstream, (d_student, d_teacher), distill._of_call)


def _chunks(call: DistillCall) -> list[slice]:
    rows, classes = call.student.shape
    step = max(1, _ELEMENTS.get(call.student.device.type, 1 << 20) // max(1, classes))
    return [slice(start, start + step) for start in range(0, rows, step)]


def _rows(call: DistillCall, at: slice) -> DistillCall:
    assert isinstance(call.teacher, Tensor)
    assert call.adjust is not None
    return call._replace(
        student=call.student[at], teacher=call.teacher[at], target=None if call.target is None else call.target[at],
        sample_weight=None if call.sample_weight is None else call.sample_weight[at], adjust=call.adjust.of_rows(at),
    )  # fmt: skip
