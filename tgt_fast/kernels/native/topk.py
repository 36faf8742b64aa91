"""The loss against a top-k record, in the compiled core: csrc/cpu/topk.cpp, and csrc/cuda/topk.cu on a device.

On a device nothing waits for it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tgt_fast.errors import ArgumentError, BackendError
from tgt_fast.kernels.calls import DistillCall, Gradients, Outputs
from tgt_fast.kernels.native import core, cuda
from tgt_fast.kernels.native.abi import topk_values
from tgt_fast.kernels.native.distill import AUTO_PLAN, run_backward, run_forward, scale_
from tgt_fast.kernels.options import TopK
from tgt_fast.kernels.row_checks import bad_id, find_bad_id

__all__ = ["backward", "forward", "scale_"]

OP = "distillation_loss"
MOST_ENTRIES = 2048  # of a row on a device: they lie in shared memory, and 32 KiB of that every chip has to spare


def _dense(teacher: Tensor | TopK) -> TopK:
    """The teacher's top k with dense rows."""
    assert isinstance(teacher, TopK)
    ids, log_probs = (x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous() for x in teacher[:2])
    tail = None if teacher.tail_log_prob is None else teacher.tail_log_prob.contiguous()
    return TopK(ids, log_probs.detach(), tail, teacher.tail_mode)


def forward(call: DistillCall, out: Outputs, *, plan: tuple[int, int, bool] = AUTO_PLAN) -> None:
    """Row losses, their reduction and the wanted gradient, in one pass over the student's logits."""
    topk = _dense(call.teacher)
    if topk.ids.shape[1] > MOST_ENTRIES and cuda.engine(call.student) is not None:
        raise BackendError(
            f"{OP}: on a device a row may list up to {MOST_ENTRIES} classes, the record lists {topk.ids.shape[1]}; "
            "pass fewer, or the teacher's logits"
        )
    status, row = run_forward("topk_forward", call, out, plan, topk_values(topk))
    if status and status == core().BAD_ID:
        rows, classes = call.student.shape
        alone = torch.arange(rows, device="cpu") == row
        found = find_bad_id(topk.ids, topk.log_probs, classes, alone)
        assert found is not None
        raise ArgumentError(bad_id(OP, topk.ids, *found, classes))


def backward(call: DistillCall, row_state: Tensor, d_loss: Tensor, grads: Gradients) -> None:
    """The gradient from logits, top k and row states, with the upstream gradient applied before rounding."""
    topk = _dense(call.teacher)
    run_backward("topk_backward", call, row_state, d_loss, grads, topk_values(topk))
