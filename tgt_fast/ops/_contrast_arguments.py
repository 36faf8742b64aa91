"""Arguments of the contrastive loss: its towers, its indices, and, on a CPU, their values."""

from __future__ import annotations

import warnings
from typing import NamedTuple

import torch
from torch import Tensor

from tgt_fast.errors import ArgumentError, ShapeError
from tgt_fast.kernels.late import is_on
from tgt_fast.kernels.options import DistillOptions
from tgt_fast.ops import _checks
from tgt_fast.ops._distill_arguments import check_rows
from tgt_fast.ops._row_checks import check_row_values

OP = "contrastive_distillation_loss"
_SMALL, _LARGE = 1e-30, 1e30  # of a temperature: its inverse is a finite float32


class ContrastTensors(NamedTuple):
    """The tensors of a contrastive loss."""

    student_q: Tensor  # [N, Hs]
    student_d: Tensor  # [M, Hs]
    teacher_q: Tensor  # [N, Ht]
    teacher_d: Tensor  # [M, Ht]
    positives: Tensor | None  # [N] int64
    passage_ids: Tensor | None  # [M] int64
    sample_weight: Tensor | None  # [N]


def make_temperatures(temperature: object, teacher_temperature: object) -> tuple[float, float]:
    """The student's and the teacher's, which is by default the same."""
    student = _checks.number(OP, "temperature", temperature, _SMALL, _LARGE, late=True)
    if teacher_temperature is None:
        return student, student
    return student, _checks.number(OP, "teacher_temperature", teacher_temperature, _SMALL, _LARGE, late=True)


def check_tensors(t: ContrastTensors, normalizer: float | Tensor | None, options: DistillOptions) -> None:
    """Dtypes, devices and shapes. ``positives`` may still be missing."""
    for name, tensor in zip(t._fields[:4], t[:4], strict=True):
        _checks.floating(OP, name, tensor)
        assert tensor is not None
        if tensor.dim() != 2 or tensor.shape[1] == 0:
            raise ShapeError(f"{OP}: {name} must be (rows, H) with H >= 1, got {tuple(tensor.shape)}")
        _checks.same_device(OP, name, tensor, "student_q", t.student_q)
    for side, q, d in (("student", t.student_q, t.student_d), ("teacher", t.teacher_q, t.teacher_d)):
        if q.shape[1] != d.shape[1]:
            raise ShapeError(f"{OP}: {side}_q {tuple(q.shape)} and {side}_d {tuple(d.shape)} differ in their width")
    for kind in ("q", "d"):
        student, teacher = getattr(t, f"student_{kind}"), getattr(t, f"teacher_{kind}")
        if student.shape[0] != teacher.shape[0]:
            raise ShapeError(
                f"{OP}: student_{kind} {tuple(student.shape)} and teacher_{kind} {tuple(teacher.shape)} differ in "
                "their rows"
            )
    if t.student_d.shape[0] == 0:
        raise ShapeError(f"{OP}: there must be a passage, got student_d {tuple(t.student_d.shape)}")
    _check_indices("positives", t.positives, "student_q", t.student_q)
    _check_indices("passage_ids", t.passage_ids, "student_d", t.student_d)
    target = None if not is_on(options.hard_weight) else t.student_q.new_empty(t.student_q.shape[0], dtype=torch.int64)
    check_rows(OP, "student_q", t.student_q, target, t.sample_weight, normalizer, options, classes=-1)


def _check_indices(name: str, ids: Tensor | None, of: str, rows: Tensor) -> None:
    if ids is None:
        return
    _checks.integers(OP, name, ids)
    if tuple(ids.shape) != (rows.shape[0],):
        raise ShapeError(f"{OP}: {name} {tuple(ids.shape)} must be ({rows.shape[0]},), one a row of {of}")
    _checks.same_device(OP, name, ids, "student_q", rows)


def diagonal(t: ContrastTensors) -> Tensor:
    """The own passage of query i where nothing else is said: passage i."""
    queries, passages = t.student_q.shape[0], t.student_d.shape[0]
    if passages < queries:
        raise ArgumentError(
            f"{OP}: there are {queries} queries and {passages} passages; without positives passage i is query i's own"
        )
    return torch.arange(queries, device=t.student_q.device)


def check_values(t: ContrastTensors, options: DistillOptions) -> None:
    """Check what needs the data, on a CPU, before anything runs."""
    if not _checks.on_plain_cpu(t.student_q):
        return
    passages = t.student_d.shape[0]
    check_row_values(OP, passages, t.positives, t.sample_weight, options)


def warn_of_one_passage(t: ContrastTensors) -> None:
    """Say that a loss is 0 because there is nothing to compare: legal, as a last batch may be that small."""
    if t.student_d.shape[0] == 1 and t.student_q.shape[0] and not torch.compiler.is_compiling():
        warnings.warn(
            f"{OP}: there is one passage, whose probability is 1 whatever its score, so loss and gradients are 0; "
            "make batches of two queries at least (drop_last=True), or add passages",
            stacklevel=4,
        )
