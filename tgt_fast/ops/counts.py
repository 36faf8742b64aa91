"""Rows that are spread over processes: the divisor of their mean, and themselves, gathered."""

from __future__ import annotations

import math
from typing import Any, Final

import torch
from torch import Tensor

from tgt_fast._processes import connected
from tgt_fast.errors import ArgumentError, ShapeError
from tgt_fast.kernels.calls import is_soft
from tgt_fast.kernels.late import is_on
from tgt_fast.kernels.linear_call import row_weights
from tgt_fast.kernels.options import DistillOptions, LinearTensors
from tgt_fast.ops._distill_arguments import flat_labels, mask_of

WORLD: Final = "world"


def counting_group(op: str, group: Any, name: str = "count_group") -> Any:
    """The process group that an argument names; None where there is nobody to count with.

    Raises:
        ArgumentError: it is neither None, "world" nor a process group.
    """
    if group is None:
        return None
    distributed = torch.distributed
    if isinstance(group, str) and group == WORLD:
        # A program that is written for many processes runs in one, too.
        group = distributed.group.WORLD if connected() else None
    elif not (distributed.is_available() and isinstance(group, distributed.ProcessGroup)):
        raise ArgumentError(f"{op}: {name} must be None, 'world' or a process group, got {group!r:.200}")
    return None if group is None or distributed.get_world_size(group) == 1 else group


def weight_of_rows(
    shape: tuple[int, ...], device: torch.device, target: Tensor | None, sample_weight: Tensor | None, classes: int,
    options: DistillOptions,
) -> Tensor:  # fmt: skip
    """The divisor of ``"mean"`` in this process: the weights of the rows that count, or their number. 0-d float64."""
    rows = math.prod(shape)
    if is_soft(target):  # which drops none
        target = None
    if target is not None:
        target = flat_labels(target)
        if not is_on(options.hard_weight):
            target, options = mask_of(target, options)
    weight = None if sample_weight is None else sample_weight.reshape(-1)
    nothing = torch.empty(rows, 0, device=device)
    tensors = LinearTensors(nothing, nothing, None, nothing, None, None, target=target, sample_weight=weight)
    weights = row_weights(tensors, target, classes, None, options)
    return torch.full((), rows, dtype=torch.float64, device=device) if weights is None else weights.sum()


def over_processes(group: Any, *mine: Tensor) -> tuple[Tensor, ...]:
    """``sum over processes / their number`` of 0-d tensors, all in one all-reduce.

    Each process then divides by its share of the whole: the mean of their losses, and of their gradients, which is
    what data parallel training takes, is that of the whole.
    """
    total = torch.stack(mine)
    torch.distributed.all_reduce(total, group=group)
    return (total / torch.distributed.get_world_size(group)).unbind()


def divisor_over(
    op: str, count_group: Any, divisor: Any, student: Tensor, target: Tensor | None, sample_weight: Tensor | None,
    classes: int, options: DistillOptions,
) -> Any:  # fmt: skip
    """The divisor of a mean: what was given, else that of the group's rows, else None. ``student`` is [..., any]."""
    if count_group is None:
        return divisor
    group = counting_group(op, count_group)
    if options.reduction != "mean":
        raise ArgumentError(f"{op}: count_group counts the divisor of 'mean', but reduction is {options.reduction!r}")
    if group is None or divisor is not None:
        return divisor
    mine = weight_of_rows(student.shape[:-1], student.device, target, sample_weight, classes, options)
    return over_processes(group, mine)[0]


def process_group(op: str, group: Any) -> Any:
    """The group, by default that of all processes. Raises ArgumentError when there are no processes to speak of."""
    if not connected():
        raise ArgumentError(f"{op}: gather=True needs torch.distributed.init_process_group()")
    return torch.distributed.group.WORLD if group is None else group


def same_count(op: str, name: str, rows: Tensor, group: Any) -> None:
    """On a CPU, where it costs no synchronisation: ShapeError unless every process brings as many rows."""
    if rows.device.type != "cpu":
        return
    counts = [
        torch.zeros(1, dtype=torch.int64, device=rows.device) for _ in range(torch.distributed.get_world_size(group))
    ]
    torch.distributed.all_gather(counts, torch.tensor([rows.shape[0]], device=rows.device), group=group)
    found = [int(count) for count in counts]
    if len(set(found)) > 1:
        raise ShapeError(f"{op}: the processes bring {found} rows of {name}; they must bring equally many")


def gathered(rows: Tensor, group: Any) -> Tensor:
    """The rows of all processes, in the order of their ranks.  [M, ...] -> [W M, ...]

    Differentiable: in backward a process gets the sum of what all of them found for its rows.
    """
    made: Tensor = _Gather.apply(rows, group)
    return made


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, group: Any) -> Tensor:
        ctx.group, ctx.count = group, rows.shape[0]
        world = torch.distributed.get_world_size(group)
        out = rows.new_empty(world * rows.shape[0], *rows.shape[1:])
        torch.distributed.all_gather_into_tensor(out, rows.contiguous(), group=group)
        return out

    @staticmethod
    def backward(ctx: Any, d_out: Tensor) -> Any:  # type: ignore[override]
        # Summed in float32 at least, as the gradients of rows are within a process.
        dtype = torch.promote_types(d_out.dtype, torch.float32)
        total = d_out.to(dtype, copy=True, memory_format=torch.contiguous_format)
        torch.distributed.all_reduce(total, group=ctx.group)
        start = torch.distributed.get_rank(ctx.group) * ctx.count
        return total[start : start + ctx.count].to(d_out.dtype), None
