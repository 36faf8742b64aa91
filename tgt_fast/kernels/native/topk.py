"""The loss against a top-k record, in the compiled core: csrc/cpu/topk.cpp, and csrc/cuda/topk.cu on a device.

On a device nothing waits for it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tgt_fast._forks import threads
from tgt_fast.errors import ArgumentError, BackendError
from tgt_fast.kernels.calls import (
    DistillCall,
    Gradients,
    Outputs,
    accumulate_dtype,
    dense,
    prepared,
    upstream,
)
from tgt_fast.kernels.native import DTYPES, core, cuda
from tgt_fast.kernels.native.distill import AUTO_PLAN, refuse_row, scale_
from tgt_fast.kernels.native.distill_calls import core_options, matrix, pointer, split_divisor
from tgt_fast.kernels.options import TAILS, TopK
from tgt_fast.kernels.row_checks import bad_id, find_bad_id

__all__ = ["backward", "forward", "scale_"]

OP = "distillation_loss"
MOST_ENTRIES = 2048  # of a row on a device: they lie in shared memory, and 32 KiB of that every chip has to spare


def _dense_topk(teacher: Tensor | TopK) -> TopK:
    """The record with dense rows."""
    assert isinstance(teacher, TopK)
    ids, log_probs = (x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous() for x in teacher[:2])
    tail = None if teacher.tail_log_prob is None else teacher.tail_log_prob.contiguous()
    return TopK(ids, log_probs.detach(), tail, teacher.tail_mode)


def _packed(topk: TopK) -> tuple[Any, ...]:
    """A dense record as the core takes it."""
    ids, tail = topk.ids, topk.tail_log_prob
    rest = (0, 0, 0) if tail is None else (tail.data_ptr(), 1, DTYPES[tail.dtype])
    form = TAILS.index(topk.tail_mode)
    return ids.data_ptr(), ids.stride(0), ids.shape[1], matrix(topk.log_probs), rest, form


def forward(call: DistillCall, out: Outputs, *, plan: tuple[int, int, bool] = AUTO_PLAN) -> None:
    """Row losses, their reduction and the wanted gradient, in one pass over the student's logits."""
    options, student, topk = call.options, call.student, _dense_topk(call.teacher)
    rows, classes = student.shape
    target, weight, row_loss = prepared(call, out)
    written = pointer(row_loss), pointer(out.loss), matrix(out.d_student), pointer(out.row_state)
    engine = cuda.engine(student)
    if engine is not None:
        if topk.ids.shape[1] > MOST_ENTRIES:
            raise BackendError(
                f"{OP}: on a device a row may list up to {MOST_ENTRIES} classes, the record lists "
                f"{topk.ids.shape[1]}; pass fewer, or the teacher's logits"
            )
        divisor_at, divisor = split_divisor(call.divisor)
        workspace = student.new_empty(1, dtype=torch.float64)
        with engine.current(student) as stream:
            engine.core.cuda_topk_forward(
                core_options(engine.core, options), rows, classes, matrix(student), _packed(topk), pointer(target),
                pointer(weight), pointer(divisor_at), divisor, pointer(workspace), *written, plan, stream,
            )  # fmt: skip
        return
    compiled = core()
    status, row = compiled.topk_forward(
        core_options(compiled, options), rows, classes, matrix(student), _packed(topk), pointer(target),
        pointer(weight), -1.0 if call.divisor is None else float(call.divisor), *written, threads(),
    )  # fmt: skip
    refuse_row(status, row, classes, target, weight, options)
    if status == compiled.BAD_ID:
        alone = torch.arange(rows, device="cpu") == row
        found = find_bad_id(topk.ids, topk.log_probs, classes, alone)
        assert found is not None
        raise ArgumentError(bad_id(OP, topk.ids, *found, classes))


def backward(call: DistillCall, row_state: Tensor, d_loss: Tensor, grads: Gradients) -> None:
    """The gradient from logits, record and row states, with the upstream gradient applied before rounding."""
    student, topk = call.student, _dense_topk(call.teacher)
    target, d_loss = dense(call.target), upstream(d_loss, accumulate_dtype(student, topk))
    given = (
        *student.shape, matrix(student), _packed(topk), pointer(target), pointer(row_state), pointer(d_loss),
        d_loss.dim() > 0, matrix(grads[0]),
    )  # fmt: skip
    engine = cuda.engine(student)
    if engine is None:
        core().topk_backward(core_options(core(), call.options), *given, threads())
        return
    with engine.current(student) as stream:
        engine.core.cuda_topk_backward(core_options(engine.core, call.options), *given, stream)
