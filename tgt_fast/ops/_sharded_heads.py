"""Heads that are spread over processes, by ``fully_shard`` or by DeepSpeed's ZeRO-3, as whole tensors for one call."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def whole_head(hidden: Any, weight: Any, bias: Any) -> tuple[Any, Any]:
    """Weight and bias, whole, in the dtype of the hidden states; those that are whole come back as they are.

    A gradient goes back as data parallel training wants it: the mean over the processes, each with its shard.
    """
    if weight is None or not (_is_spread(weight) or _is_spread(bias)):
        return weight, bias
    dtype = hidden.dtype if isinstance(hidden, Tensor) and hidden.is_floating_point() else None
    absent = [part for part in (weight, bias) if _is_partitioned(part)]
    if absent:
        absent[0].all_gather(param_list=absent)
    try:
        return _whole(weight, dtype), _whole(bias, dtype)
    finally:
        if absent:
            absent[0].partition(param_list=absent, has_been_updated=False)


def _is_spread(part: Any) -> bool:
    return part is not None and (hasattr(part, "full_tensor") or _is_partitioned(part))


def _is_partitioned(part: Any) -> bool:
    """True if it is a parameter of ZeRO-3 whose numbers are not here at the moment."""
    return hasattr(part, "ds_id") and hasattr(part, "all_gather") and part.numel() != part.ds_numel


def _whole(part: Any, dtype: torch.dtype | None) -> Any:
    if hasattr(part, "full_tensor"):
        from torch.distributed.tensor import Partial

        # Narrow before it travels: the shards are those of the optimizer, in float32 as a rule.
        cast = part if dtype is None or dtype == part.dtype else part.to(dtype)
        return cast.full_tensor(grad_placements=[Partial("avg")] * part.device_mesh.ndim)
    if hasattr(part, "ds_id"):
        return _Copy.apply(part, dtype or part.dtype)
    return part


class _Copy(torch.autograd.Function):
    """Of numbers that are about to leave. The gradient goes to the parameter, whose hooks reduce and partition it."""

    @staticmethod
    def forward(ctx: Any, parameter: Tensor, dtype: torch.dtype) -> Tensor:
        ctx.dtype = parameter.dtype
        return parameter.detach().to(dtype, copy=True)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        return grad.to(ctx.dtype), None
