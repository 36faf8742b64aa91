"""A recipe: how a student of the digits demo is trained, as an entry of a table."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from tgt_fast import long_tail
from tgt_fast.demos.digits import models
from tgt_fast.demos.digits.data import CLASSES, Images
from tgt_fast.demos.digits.methods import Objective
from tgt_fast.demos.digits.settings import Settings
from tgt_fast.losses.distill import DistillationLoss
from tgt_fast.teacher import Teacher
from tgt_fast.train import TGTObjective


@dataclass(frozen=True)
class Kitchen:
    """What a recipe is made with."""

    teacher: Teacher
    images: Images
    settings: Settings
    seed: int
    student: nn.Module
    number: float = math.nan  # what the recipe leaves open

    @property
    def counts(self) -> Tensor:
        return long_tail.class_counts(self.images.y, CLASSES)


@dataclass(frozen=True)
class Number:
    """What a recipe leaves open, its value, and those that ``benchmarks/methods_digits.py --tune`` compares."""

    name: str
    value: float
    tried: tuple[float, ...]


@dataclass(frozen=True)
class Recipe:
    """How a student is trained."""

    group: str  # under which it stands in the table
    label: str
    objective: Callable[[Kitchen], Objective]
    student: Callable[[], nn.Module] = models.student
    draw: Callable[..., Any] | None = None  # the sampler of labelled images; None: each equally often
    synthetic: bool = False  # half of the student's examples are made
    after: Callable[[nn.Module, Kitchen], nn.Module] | None = None  # what the trained student becomes
    rate: float | None = None  # of learning, where it is not the settings'
    number: Number | None = None


class WithHard:
    """An objective without a hard term, and a hard term of one's own beside it."""

    def __init__(self, base: TGTObjective, hard: Callable[[Tensor, Tensor, int], Tensor]) -> None:
        self.base, self.hard = base, hard
        self.teacher, self.sampler = base.teacher, base.sampler

    def __call__(self, student: nn.Module, x: Tensor, y: Tensor, /, *, step: int, **rest: Any) -> Mapping[str, Any]:
        found = self.base(student, x, y, step=step, **rest)
        return {"loss": found["loss"] + self.hard(student(x), y, step)}


def loss_of(
    kitchen: Kitchen, hard_weight: float = 1.0, temperature: float | None = None, **options: Any
) -> DistillationLoss:
    if temperature is None:
        temperature = kitchen.settings.temperature
    return DistillationLoss(temperature=temperature, hard_weight=hard_weight, **options)


def distillation(kitchen: Kitchen) -> Objective:
    return TGTObjective(kitchen.teacher, None, loss=loss_of(kitchen))


def plain(kitchen: Kitchen) -> Objective:
    """The same at a temperature of its own."""
    return TGTObjective(kitchen.teacher, None, loss=loss_of(kitchen, temperature=kitchen.number))
