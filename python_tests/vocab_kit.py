"""Losses whose classes are spread over processes, beside those of one process that has all of them."""

from __future__ import annotations

import functools
import itertools
import math
import random
from typing import Any, NamedTuple

import torch
from covering import covering
from numerics import Result, logits
from torch import Tensor

import tgt_fast as tgt
from tgt_fast.kernels.options import DIVERGENCES, DistillStats

ROWS, CLASSES = 9, 37
OFFSETS = {2: (0, 19, 37), 4: (0, 7, 19, 19, 37)}  # one process of four has no class

TERMS: dict[str, dict[str, Any]] = {
    "soft": {},
    "hard": {"hard_weight": 1.0},
    "smoothed": {"hard_weight": 0.7, "label_smoothing": 0.1},
    "spread": {"hard_weight": 1.0, "label_smoothing": 1.0},
    "hard alone": {"hard_weight": 1.0, "soft_weight": 0.0},
}
TEMPERATURES = ((1.0, 1.0), (2.0, 2.0), (2.0, 3.0), (0.5, 4.0))
KINDS = ("plain", "peaked", "masked", "far")
DTYPES = (
    (torch.float32, torch.float32), (torch.float64, torch.float32), (torch.bfloat16, torch.float32),
    (torch.float16, torch.float16), (torch.bfloat16, torch.bfloat16),
)  # fmt: skip


class Case(NamedTuple):
    """One call, of all classes."""

    divergence: str
    terms: str
    temperatures: tuple[float, float]
    kind: str
    dtypes: tuple[torch.dtype, torch.dtype]
    reduction: str
    weighed: bool

    @property
    def options(self) -> dict[str, Any]:
        ts, tt = self.temperatures
        made = {"divergence": self.divergence, "temperature": ts, "teacher_temperature": tt, **TERMS[self.terms]}
        return {**made, "beta": 0.3, "reduction": self.reduction}

    def inputs(self) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Student, teacher, target, weights: a dropped row, an unlabelled one, one of weight 0."""
        student, teacher = logits(ROWS, CLASSES, seed=1), logits(ROWS, CLASSES, seed=2)
        target = torch.randint(0, CLASSES, (ROWS,), generator=torch.Generator().manual_seed(3))
        if self.kind == "peaked":  # at one place, at two of one process or of two; and of a label, wherever it is
            for row, (s, t) in enumerate(((20, 20), (2, 30), (5, 6), (8, 33)), 2):
                student[row, s] = teacher[row, t] = 25.0
            student[6] *= 0.1
            student[6, target[6]] = 20.0
        elif self.kind == "masked":  # a side has no class in some process; what is no number, elsewhere
            student[2, :19] = teacher[2, :19] = -math.inf
            student[3, 19:] = -math.inf
            teacher[4, :19] = teacher[4, 25:] = -math.inf
            student[5, 30] = math.nan
            teacher[6, 3] = math.inf
            student[7] = -math.inf
            student[8, 3] = teacher[8, 3] = -math.inf
        elif self.kind == "far":  # the largest of one process is far below those of another
            student[2:5, 19:] -= 300.0
            teacher[4:7, :7] -= 200.0
        target[0], target[1] = -100, -1
        weight = None
        if self.weighed:
            weight = torch.rand(ROWS, generator=torch.Generator().manual_seed(4))
            weight[ROWS - 1] = 0
        return student.to(self.dtypes[0]), teacher.to(self.dtypes[1]), target, weight


@functools.cache
def cases() -> list[Case]:
    """Every two values meet."""
    every = [
        Case(*row)
        for row in itertools.product(
            DIVERGENCES, TERMS, TEMPERATURES, KINDS, DTYPES, ("mean", "sum", "none"), (False, True)
        )
        if not (row[3] == "far" and row[4][0] == torch.float16)
    ]
    every = random.Random(1).sample(every, 600)  # enough for any two, and soon looked through
    return [every[at] for at in covering([tuple(map(str, row)) for row in every], [str(row) for row in every])]


def part_of(tensor: Tensor, rank: int, world: int) -> Tensor:
    """A process's classes."""
    start, end = OFFSETS[world][rank : rank + 2]
    return tensor[..., start:end].contiguous()


def evaluated(
    case: Case, student: Tensor, teacher: Tensor, target: Tensor, weight: Tensor | None, stats: bool = True, **more: Any
) -> Any:
    """Loss, gradients and statistics, as plain tensors; without ``stats`` none of these."""
    student, teacher = student.clone().requires_grad_(), teacher.clone().requires_grad_()
    made = tgt.distillation_loss(
        student, teacher, target, sample_weight=weight, return_stats=stats, **case.options, **more
    )
    loss, fields = made if stats else (made, ())
    loss.sum().backward()
    return loss.detach(), student.grad, teacher.grad, tuple(fields)


def joined(found: list[Any]) -> Result:
    """The results of the processes, as of one; their losses and statistics are the same bits."""
    loss, _, _, stats = found[0]
    for other, _, _, also in found[1:]:
        assert torch.equal(loss.nan_to_num(7), other.nan_to_num(7))
        for mine, theirs in zip(stats, also, strict=True):
            assert torch.equal(mine.double().nan_to_num(7), theirs.double().nan_to_num(7))
    d_student, d_teacher = (torch.cat([one[side] for one in found], dim=-1) for side in (1, 2))
    return Result(loss, d_student, d_teacher, DistillStats(*stats) if stats else None)
