"""How the soft-label loss passes through a schema: its options one by one, and results that there may not be."""

from __future__ import annotations

from dataclasses import fields
from typing import Any, Final

from torch import Tensor

from tgt_fast.kernels import late
from tgt_fast.kernels.options import DistillOptions, LateOptions
from tgt_fast.ops._distill_arguments import as_mask, make_options, mask_of

OPTIONS: Final = (
    "str divergence, float beta, float temperature, float teacher_temperature, float soft_weight, float hard_weight, "
    "float label_smoothing, int ignore_index, int unlabeled_index, str reduction, Tensor? numbers"
)
DIVISOR: Final = "Tensor? normalizer, float? divisor"  # the same on the device or as a number

_COUNT = len(fields(DistillOptions))


def packed(options: DistillOptions) -> tuple[Any, ...]:
    """The options in the order of the schemas, which is that of the fields; behind them the tensor of late numbers."""
    values: tuple[Any, ...] = _numbers(options)
    numbers = options.numbers if isinstance(options, LateOptions) else None
    if numbers is None:
        values, numbers = late.packed(*values)
    return (
        options.divergence, *values, options.ignore_index, options.unlabeled_index, options.reduction, numbers,
    )  # fmt: skip


def unpacked(arguments: tuple[Any, ...]) -> tuple[DistillOptions, tuple[Any, ...]]:
    """The options at the head of an op's last arguments, their numbers perhaps still late, and what is behind them."""
    numbers, rest = arguments[_COUNT], arguments[_COUNT + 1 :]
    if numbers is None:
        return DistillOptions(*arguments[:_COUNT]), rest
    return LateOptions(*arguments[: _COUNT + 1]), rest


def settled(
    op: str, options: DistillOptions, classes: int, target: Tensor | None, sample_weight: Tensor | None = None, *,
    looked_at: bool = False,
) -> tuple[DistillOptions, Tensor | None]:  # fmt: skip
    """The options with their numbers, where the op runs, and the target as they want it.

    Args:
        looked_at: whether the target's values have been checked before.

    Raises:
        ArgumentError: a late number out of its range.
    """
    if not isinstance(options, LateOptions):
        return options, target
    o = options
    options = make_options(
        o.divergence, *late.unpacked(_numbers(o), o.numbers), o.ignore_index, o.unlabeled_index, o.reduction, op
    )
    if target is not None and options.hard_weight == 0:
        if looked_at:
            target, options = mask_of(target, options)
        else:
            target, options = as_mask(op, classes, target, sample_weight, options)
    return options, target


def _numbers(options: DistillOptions) -> tuple[float, ...]:
    return (
        options.beta, options.temperature, options.teacher_temperature, options.soft_weight, options.hard_weight,
        options.label_smoothing,
    )  # fmt: skip


def or_nothing(tensor: Tensor | None, like: Tensor) -> Tensor:
    """An op returns tensors, all of them: one of no elements stands for none."""
    return like.new_empty(0) if tensor is None else tensor
