"""A call of the listwise loss: what goes in, room for what comes out, and the order of the classes."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tgt_fast.kernels.memory import gradient_like


class ListwiseCall(NamedTuple):
    """Inputs of a kernel, and what is wanted of it. Rows that do not count have the factor 0."""

    student: Tensor  # [N, C] dense rows
    teacher: Tensor  # [N, C] logits; with ids [N, k] log-probabilities of listed classes, -inf: padding
    ids: Tensor | None  # [N, k] int64
    others: Tensor | None  # [N] float64, with ids: the weight of a label that is not listed
    label: Tensor | None  # [N] int64, -1: none
    factor: Tensor  # [N] float64, of a row's loss and gradient
    teacher_temperature: float = 1.0
    want_d_student: bool = False


class Outputs(NamedTuple):
    loss: Tensor  # [N] float64
    d_student: Tensor | None  # [N, C] like the student


def outputs(call: ListwiseCall) -> Outputs:
    """Room for all that is wanted."""
    loss = call.student.new_empty(call.student.shape[0], dtype=torch.float64)
    return Outputs(loss, gradient_like(call.student) if call.want_d_student else None)


class Direct:
    """A backend's kernel, called from Python."""

    __slots__ = ("kernel",)

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel

    def forward(self, call: ListwiseCall) -> Outputs:
        """Row losses and, where it is wanted, the gradient of their sum."""
        out = outputs(call)
        self.kernel.forward(call, out)
        return out


# What kernels do, whichever backend they belong to


def ranked(call: ListwiseCall, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The classes in their order and their weights.  -> [N, C] int64, -1 at the end for those left out, [N, C]"""
    student, teacher = call.student, call.teacher.detach().to(dtype)
    if call.ids is None:
        exists = teacher > -math.inf
        key = teacher
        shifted = teacher - teacher.amax(-1, keepdim=True) if teacher.shape[1] else teacher
        weights = (shifted / call.teacher_temperature).softmax(-1)
    else:
        listed = (call.ids >= 0) & (call.ids < student.shape[1]) & (teacher > -math.inf)
        key = torch.full(student.shape, -math.inf, dtype=dtype, device=student.device)
        log_probs = torch.where(listed | teacher.isnan(), teacher, -math.inf)
        key = key.scatter_reduce(1, torch.where(listed, call.ids, 0), log_probs, "amax")
        exists = torch.ones_like(key, dtype=torch.bool)
        weights = key.exp()
    if call.label is not None:
        place = call.label.clamp(min=0)[:, None]
        labeled = (call.label >= 0)[:, None] & exists.gather(1, place)
        weight = weights.gather(1, place)
        if call.others is not None:
            unlisted = key.gather(1, place) == -math.inf
            weight = torch.where(labeled & unlisted, call.others[:, None].to(dtype), weight)
        weights = weights.scatter(1, place, weight)
        key = key.scatter(1, place, torch.where(labeled, math.inf, key.gather(1, place)))
    order = key.sort(dim=-1, descending=True, stable=True).indices
    left_out = ~exists.gather(1, order)
    return torch.where(left_out, -1, order), torch.where(left_out, 0.0, weights.gather(1, order))


def no_distribution(call: ListwiseCall) -> Tensor:
    """The rows that hold NaN or +inf, or nothing but -inf.  [N] bool"""
    return ~(call.student.detach().amax(-1).isfinite() & call.teacher.detach().amax(-1).isfinite())
