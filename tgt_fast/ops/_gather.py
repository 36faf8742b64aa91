"""Rows of all processes, with gradients back to the process that they came from."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tgt_fast._processes import connected
from tgt_fast.errors import ArgumentError, ShapeError


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
