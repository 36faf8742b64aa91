"""Parameters that a teacher keeps frozen and somebody else wants to train."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from typing import Any, Final

from torch import Tensor, nn
from torch.optim import Optimizer

from tgt_fast.errors import ArgumentError
from tgt_fast.teacher.parts import modules_of
from tgt_fast.teacher.teacher import Teacher

_SHOWN: Final = 3  # names in a message
_REMEDY: Final = (
    "Give the teacher a model of its own (copy.deepcopy of it, made before adapters are added), or, where the student "
    "is to keep them as they are, call requires_grad_(False) on them before the teacher is made"
)


def refuse_shared(op: str, teacher: Teacher, student: nn.Module, optimizer: Optimizer) -> None:
    """
    Raises:
        ArgumentError: the optimizer is to train what the teacher froze.
    """
    names = {id(parameter): name for name, parameter in student.named_parameters()}
    held = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    shared = teacher.frozen_by_it(held)
    if shared:
        raise ArgumentError(
            f"{op}: {len(shared)} of the {len(held)} parameters in the optimizer are the teacher's, which keeps them "
            f"frozen: {_listed(shared, names)}. {_REMEDY}"
        )


def warn_of_shared(op: str, teacher: Teacher, student: Callable[..., Any], stacklevel: int) -> None:
    """Warn of the student's parameters that the teacher froze, and that nothing will train."""
    names = {id(value): name for module in modules_of(student) for name, value in module.named_parameters()}
    held = [value for module in modules_of(student) for value in module.parameters()]
    shared = teacher.frozen_by_it(held)
    if shared:
        warnings.warn(
            f"{op}: {len(shared)} of the student's {len(names)} parameters are the teacher's, which keeps them frozen: "
            f"{_listed(shared, names)}. {_REMEDY}",
            stacklevel=stacklevel,
        )


def _listed(shared: Iterable[Tensor], names: dict[int, str]) -> str:
    found = [names.get(id(value), f"one of shape {tuple(value.shape)}") for value in shared]
    return ", ".join(found[:_SHOWN]) + (", ..." if len(found) > _SHOWN else "")
