"""A loss with adjustments beside a kernel that does not take them.

The kernel runs on logits that PyTorch adjusts (:mod:`tgt_fast.kernels.adjusted_rows`). A skewed divergence is no kernel
of logits: PyTorch makes it and its derivatives by the formula in float64. Either way no more than a chunk's rows are in
memory beside the logits, and nothing waits for a device.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tgt_fast.kernels import adjusted_rows
from tgt_fast.kernels.adjusted_rows import chunks, rows_of
from tgt_fast.kernels.calls import DistillCall, Gradients, Outputs
from tgt_fast.kernels.reference import distill


def serves(kernel: Any, call: DistillCall) -> bool:
    """True if a kernel takes a call's adjustments itself."""
    asked = getattr(kernel, "takes_adjustments", None)
    return asked is not None and bool(asked(call))


def forward(kernel: Any, call: DistillCall, out: Outputs) -> None:
    """Row losses, their reduction and the wanted gradients."""
    if adjusted_rows.serves(call):
        adjusted_rows.forward(kernel, call, out)
    else:
        forward_by_formula(call, out)


def backward(kernel: Any, call: DistillCall, row_state: Tensor, d_loss: Tensor, grads: Gradients) -> None:
    """The gradients from logits and the rows' weights in the reduced loss."""
    if adjusted_rows.serves(call):
        adjusted_rows.backward(kernel, call, row_state, d_loss, grads)
    else:
        backward_by_formula(call, row_state, d_loss, grads)


def forward_by_formula(call: DistillCall, out: Outputs) -> None:
    """The same by the formula, of any adjustments."""
    if call.options.reduction == "mean" and call.divisor is None:  # that of all rows, not of a chunk's
        *_, divisor = distill._counts(call.student, call.target, call.sample_weight, None, call.options)
        call = call._replace(divisor=divisor)
    a_row = call.options.reduction == "none"
    parts: list[Tensor] = []
    for at in chunks(call):
        loss = out.loss[at] if a_row else torch.empty((), dtype=torch.float64, device=out.loss.device)
        stats = None if out.stats is None else out.stats[:, at]
        rest = (None if x is None else x[at] for x in (out.d_student, out.d_teacher, out.row_state))
        distill.fill(rows_of(call, at), Outputs(loss, stats, *rest), distill._of_call)
        parts.append(loss)
    if not a_row:
        out.loss.copy_(torch.stack(parts).sum() if parts else torch.zeros(()))


def backward_by_formula(call: DistillCall, row_state: Tensor, d_loss: Tensor, grads: Gradients) -> None:
    """The same by the formula, of any adjustments."""
    for at in chunks(call):
        upstream = d_loss[at] if d_loss.dim() else d_loss
        d_student, d_teacher = (None if grad is None else grad[at] for grad in grads)
        distill.fill_gradients(rows_of(call, at), row_state[at], upstream, (d_student, d_teacher), distill._of_call)
