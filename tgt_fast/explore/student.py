"""A student as it is called: what it must give, and what it must not be."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final

import torch
from torch import Tensor

from tgt_fast.errors import ArgumentError, DTypeError
from tgt_fast.explore.guard import what_runs
from tgt_fast.teacher import Teacher

_OF_LIBRARIES: Final = {"PreTrainedModel": "transformers", "PeftModel": "peft"}  # both called with keywords


def logits_of(op: str, student: Callable[..., Any], x: Any) -> Tensor:
    """``student(x)``.

    Raises:
        DTypeError: it is no tensor, as what models of other libraries give.
    """
    if not callable(student):
        raise ArgumentError(f"{op}: the student must be callable, got {type(student).__name__}")
    if not isinstance(x, Tensor) and not torch.compiler.is_compiling():
        _check_called_with_parts(op, student)
    made = student(x)
    if not isinstance(made, Tensor):
        raise DTypeError(
            f"{op}: the student must return a tensor of logits, got {type(made).__name__}; wrap it in a module whose "
            f"forward returns {_where_they_are(made)}"
        )
    return made


def refuse_labeler(op: str, teacher: Teacher, student: Callable[..., Any]) -> None:
    """
    Raises:
        ArgumentError: the student is the teacher's own labeler.
    """
    if any(what_runs(student) is what_runs(part) for part in (teacher, teacher.labeler)):
        raise ArgumentError(
            f"{op}: the student is the teacher's labeler, so their disagreement is identically 0; pass the model that "
            "is being trained (to begin with the labeler's weights: copy.deepcopy of it, made before the teacher)"
        )


def _check_called_with_parts(op: str, student: Callable[..., Any]) -> None:
    runs = what_runs(student)
    for kind in type(runs).__mro__:
        library = _OF_LIBRARIES.get(kind.__name__)
        if library is not None:
            raise DTypeError(
                f"{op}: the student is a {type(runs).__name__} of {library}, which takes the parts of a dict as "
                "keywords and returns more than logits; pass tgt_fast.teacher.TextClassifier(student), or a module "
                "whose forward(inputs) returns model(**inputs).logits"
            )


def _where_they_are(made: Any) -> str:
    if isinstance(getattr(made, "logits", None), Tensor):
        return "model(...).logits"
    if isinstance(made, Mapping):
        return f"the entry that holds them, of {sorted(map(str, made))}"
    if isinstance(made, (tuple, list)):
        return f"the one of the {len(made)} that holds them"
    return "them"
