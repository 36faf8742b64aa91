"""The loss against a top-k record, on a device (csrc/cuda/sparse.cu). Nothing waits for the device."""

from __future__ import annotations

import torch
from torch import Tensor

from tgt_fast.errors import BackendError
from tgt_fast.kernels.distill_calls import accumulate_dtype, dense, prepare, upstream
from tgt_fast.kernels.native.cuda import Engine
from tgt_fast.kernels.native.distill_calls import core_options, divisor, matrix, pointer
from tgt_fast.kernels.native.sparse_calls import record_of
from tgt_fast.kernels.options import DistillOptions, Forward, Listed

MOST_ENTRIES = 2048  # of a row: they lie in shared memory, and 32 KiB of that every chip has to spare
AUTO_PLAN = (0, 0, True)  # path, blocks a row, bulk copies: chosen by size (csrc/cuda/api.h)


def forward(
    engine: Engine,
    student: Tensor,  # [N, C] dense rows
    record: Listed,
    target: Tensor | None,  # [N] int64
    sample_weight: Tensor | None,  # [N]
    normalizer: float | Tensor | None,
    options: DistillOptions,
    *,
    wanted: bool = False,
    keep_rows: bool = False,
    inplace: bool = False,
    plan: tuple[int, int, bool] = AUTO_PLAN,
) -> Forward:
    """Row losses, their reduction and the wanted gradient."""
    rows, classes = student.shape
    if record.ids.shape[1] > MOST_ENTRIES:
        raise BackendError(
            f"sparse: on a device a row may list up to {MOST_ENTRIES} classes, the record lists {record.ids.shape[1]}; "
            "pass fewer, or the teacher's logits"
        )
    accumulate = accumulate_dtype(student, record.log_probs)
    loss, row_loss, target, weight = prepare(student, accumulate, target, sample_weight, options)
    on_device, host_divisor = divisor(normalizer)
    d_student = None
    if wanted:
        d_student = student.detach() if inplace else student.new_empty(rows, classes)
    state = student.new_empty(rows, engine.core.SPARSE_ROW_STATE, dtype=torch.float64) if keep_rows else None
    workspace = student.new_empty(1, dtype=torch.float64)
    with engine.current(student) as stream:
        engine.core.cuda_sparse_forward(
            core_options(engine.core, options), rows, classes, matrix(student), record_of(record), pointer(target),
            pointer(weight), pointer(on_device), host_divisor, pointer(workspace), pointer(row_loss), pointer(loss),
            matrix(d_student), pointer(state), plan, stream,
        )  # fmt: skip
    return Forward(loss, d_student, None, state, None)


def backward(
    engine: Engine,
    student: Tensor,
    record: Listed,
    target: Tensor | None,
    state: Tensor,  # [N, SPARSE_ROW_STATE] from forward
    d_loss: Tensor,  # 0-d, or [N]
    options: DistillOptions,
    *,
    inplace: bool = False,
) -> Tensor:
    """The gradient from logits, record and row states, with the upstream gradient applied before rounding."""
    target, d_loss = dense(target), upstream(d_loss, accumulate_dtype(student, record.log_probs))
    d_student = student.detach() if inplace else student.new_empty(student.shape)
    with engine.current(student) as stream:
        engine.core.cuda_sparse_backward(
            core_options(engine.core, options), *student.shape, matrix(student), record_of(record), pointer(target),
            pointer(state), pointer(d_loss), d_loss.dim() > 0, matrix(d_student), stream,
        )  # fmt: skip
    return d_student
