"""A student as it is called: what it must give, and what it must not be."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from tgt_fast.errors import ArgumentError
from tgt_fast.explore.guard import underlying_callable
from tgt_fast.teacher import Teacher
from tgt_fast.teacher.returned import LogitsOf, call, logits_in


def student_logits(
    op: str, student: Callable[..., Any], x: Any, logits_of: LogitsOf = None, class_dim: int = -1
) -> Tensor:
    """The logits of ``student(x)``; of a dict that a model of several parameters names, of ``student(**x)``.

    Their classes are in the last dimension, wherever (``class_dim``) the student has them.

    Raises:
        DTypeError: there are no logits in what it returned.
    """
    if not callable(student):
        raise ArgumentError(f"{op}: the student must be callable, got {type(student).__name__}")
    return logits_in(f"{op}: the student", call(student, x), logits_of, class_dim)


def refuse_labeler(op: str, teacher: Teacher, student: Callable[..., Any]) -> None:
    """
    Raises:
        ArgumentError: the student is the teacher's own labeler.
    """
    labelers: tuple[Callable[..., Any], ...] = (teacher, *teacher.labelers)
    if any(underlying_callable(student) is underlying_callable(part) for part in labelers):
        raise ArgumentError(
            f"{op}: the student is the teacher's labeler, so their disagreement is identically 0; pass the model that "
            "is being trained (to begin with the labeler's weights: copy.deepcopy of it, made before the teacher)"
        )
