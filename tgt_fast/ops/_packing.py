"""How the soft-label loss passes through a schema: its options one by one, and results that there may not be."""

from __future__ import annotations

from dataclasses import fields
from typing import Any, Final

from torch import Tensor

from tgt_fast.kernels.options import DistillOptions

OPTIONS: Final = (
    "str divergence, float beta, float temperature, float teacher_temperature, float soft_weight, float hard_weight, "
    "float label_smoothing, int ignore_index, int unlabeled_index, str reduction"
)
DIVISOR: Final = "Tensor? normalizer, float? divisor"  # the same on the device or as a number

_COUNT = len(fields(DistillOptions))


def packed(options: DistillOptions) -> tuple[Any, ...]:
    """The options in the order of the schemas, which is that of the fields."""
    return (
        options.divergence, options.beta, options.temperature, options.teacher_temperature, options.soft_weight,
        options.hard_weight, options.label_smoothing, options.ignore_index, options.unlabeled_index, options.reduction,
    )  # fmt: skip


def unpacked(arguments: tuple[Any, ...]) -> tuple[DistillOptions, tuple[Any, ...]]:
    """The options at the head of an op's last arguments, and the arguments behind them."""
    return DistillOptions(*arguments[:_COUNT]), arguments[_COUNT:]


def or_nothing(tensor: Tensor | None, like: Tensor) -> Tensor:
    """An op returns tensors, all of them: one of no elements stands for none."""
    return like.new_empty(0) if tensor is None else tensor
