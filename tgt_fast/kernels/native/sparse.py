"""The loss against a top-k record, in the compiled core (csrc/cpu/sparse.cpp); CUDA tensors go to cuda_sparse."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tgt_fast._forks import threads
from tgt_fast.errors import ArgumentError
from tgt_fast.kernels.distill_calls import accumulate_dtype, dense, prepare, upstream
from tgt_fast.kernels.native import core, cuda, cuda_sparse
from tgt_fast.kernels.native.distill import bad_target, bad_weight, gradient_like, scale_
from tgt_fast.kernels.native.distill_calls import core_options, matrix, pointer
from tgt_fast.kernels.native.sparse_calls import dense_record, record_of
from tgt_fast.kernels.options import DistillOptions, Forward, Listed

__all__ = ["backward", "bad_id", "find_bad_id", "forward", "scale_"]

OP = "distillation_loss"


def find_bad_id(ids: Tensor, log_probs: Tensor, classes: int, counted: Tensor | None) -> tuple[int, int] | None:
    """(row, entry) of the first id that is out of range or repeats one of its row; None if all are fine.

    [N, k] int64, [N, k], [N] bool (the rows that are looked at)
    """
    listed = log_probs != -math.inf
    if counted is not None:
        listed = listed & counted[:, None]
    bad = listed & ((ids < 0) | (ids >= classes))
    # Padding gets ids of its own, which repeat nothing.
    places = torch.where(listed, ids, -1 - torch.arange(ids.shape[1], device=ids.device))
    in_order, order = places.sort(dim=-1, stable=True)
    repeats = torch.zeros_like(bad)
    repeats[:, 1:] = in_order[:, 1:] == in_order[:, :-1]
    bad = bad | (torch.zeros_like(bad).scatter(1, order, repeats) & listed)
    if not bool(bad.any()):
        return None
    row, entry = bad.nonzero()[0].tolist()
    return row, entry


def bad_id(op: str, ids: Tensor, row: int, entry: int, classes: int) -> str:
    """What is wrong with an id that ``find_bad_id`` found."""
    value = int(ids[row, entry])
    if 0 <= value < classes:
        return f"{op}: ids[{row}, {entry}] = {value} is listed twice in its row"
    return f"{op}: ids[{row}, {entry}] = {value} is not in [0, {classes})"


def forward(
    student: Tensor,  # [N, C] dense rows
    record: Listed,
    target: Tensor | None,  # [N] int64
    sample_weight: Tensor | None,  # [N]
    normalizer: float | Tensor | None,
    options: DistillOptions,
    *,
    wanted: bool = False,  # the student's gradient
    keep_rows: bool = False,
    inplace: bool = False,
) -> Forward:
    """Row losses, their reduction and the wanted gradient, in one pass over the student's logits."""
    record = dense_record(record)
    engine = cuda.engine(student)
    if engine is not None:
        return cuda_sparse.forward(
            engine, student, record, target, sample_weight, normalizer, options,
            wanted=wanted, keep_rows=keep_rows, inplace=inplace,
        )  # fmt: skip
    rows, classes = student.shape
    accumulate = accumulate_dtype(student, record.log_probs)
    loss, row_loss, target, weight = prepare(student, accumulate, target, sample_weight, options)
    d_student = None
    if wanted:
        d_student = student.detach() if inplace else gradient_like(student)
    compiled = core()
    state = torch.empty(rows, compiled.SPARSE_ROW_STATE, dtype=torch.float64, device="cpu") if keep_rows else None
    status, row = compiled.sparse_forward(
        core_options(compiled, options), rows, classes, matrix(student), record_of(record), pointer(target),
        pointer(weight), -1.0 if normalizer is None else float(normalizer), pointer(row_loss), pointer(loss),
        matrix(d_student), pointer(state), threads(),
    )  # fmt: skip
    if status == compiled.BAD_TARGET and target is not None:
        raise ArgumentError(bad_target(row, int(target[row]), classes, options))
    if status == compiled.BAD_WEIGHT and weight is not None:
        raise ArgumentError(bad_weight(row, float(weight[row])))
    if status == compiled.BAD_ID:
        alone = torch.arange(rows, device="cpu") == row
        found = find_bad_id(record.ids, record.log_probs, classes, alone)
        assert found is not None
        raise ArgumentError(bad_id(OP, record.ids, *found, classes))
    return Forward(loss, d_student, None, state, None)


def backward(
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
    record = dense_record(record)
    engine = cuda.engine(student)
    if engine is not None:
        return cuda_sparse.backward(engine, student, record, target, state, d_loss, options, inplace=inplace)
    compiled = core()
    target, d_loss = dense(target), upstream(d_loss, accumulate_dtype(student, record.log_probs))
    d_student = student.detach() if inplace else gradient_like(student)
    compiled.sparse_backward(
        core_options(compiled, options), *student.shape, matrix(student), record_of(record), pointer(target),
        pointer(state), pointer(d_loss), int(d_loss.dim() > 0), matrix(d_student), threads(),
    )  # fmt: skip
    return d_student
