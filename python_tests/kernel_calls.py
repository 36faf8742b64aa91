"""Calls of a backend's kernels themselves, whose results are allocated here."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from tgt_fast.kernels.calls import DistillCall, Gradients, Outputs, gradients, outputs
from tgt_fast.kernels.options import DistillOptions, TopK


def forward(
    kernel: Callable[..., None], student: Tensor, teacher: Tensor | TopK, target: Tensor | None = None,
    weight: Tensor | None = None, divisor: float | Tensor | None = None, options: DistillOptions | None = None, *,
    wanted: tuple[bool, bool] = (True, True), keep: bool = True, inplace: bool = False, want_stats: bool = False,
    **chosen: Any,
) -> Outputs:  # fmt: skip
    """One pass over the logits by ``kernel``, a module's ``forward``."""
    options = DistillOptions() if options is None else options
    call = DistillCall(options, student, teacher, target, weight, divisor, *wanted, keep, want_stats, inplace)
    out = outputs(call)
    kernel(call, out, **chosen)
    return out


def backward(
    kernel: Callable[..., None], student: Tensor, teacher: Tensor | TopK, target: Tensor | None,
    row_state: Tensor | None, d_loss: Tensor, options: DistillOptions, *, wanted: tuple[bool, bool] = (True, True),
    **chosen: Any,
) -> Gradients:  # fmt: skip
    """The gradients from a state by ``kernel``, a module's ``backward``."""
    call = DistillCall(options, student, teacher, target, None, None, *wanted)
    grads = gradients(call)
    kernel(call, row_state, d_loss, grads, **chosen)
    return grads


def loss_and_gradients(out: Outputs) -> list[Tensor]:
    """The results for the caller, without the state and the statistics."""
    return [value for value in (out.loss, out.d_student, out.d_teacher) if value is not None]
