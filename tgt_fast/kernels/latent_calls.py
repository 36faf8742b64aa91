"""Preparations of the kernels of perturb and ascend, whichever backend they belong to."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Samples(NamedTuple):
    """The tensors of a step, dense and without a graph, and the dtype of its arithmetic."""

    z: Tensor  # [B, D]
    grad: Tensor  # [B, D]
    anchor: Tensor | None  # [B, D]
    scale: Tensor | None  # [D]
    dtype: torch.dtype


def samples(z: Tensor, grad: Tensor, anchor: Tensor | None, scale: Tensor | None) -> Samples:
    """The tensors of ascend as every kernel reads them."""
    z, grad = z.detach().contiguous(), grad.detach().contiguous()
    anchor = None if anchor is None else anchor.detach().contiguous()
    dtype = accumulate_dtype(z, grad) if anchor is None else accumulate_dtype(z, grad, anchor)
    return Samples(z, grad, anchor, None if scale is None else vector(scale, dtype), dtype)


def vector(value: Tensor, dtype: torch.dtype) -> Tensor:
    """Factors as a dense vector in the type of the arithmetic."""
    return value.detach().reshape(-1).to(dtype).contiguous()


def on_device(device: torch.device, value: int | Tensor) -> int | Tensor:
    """A 0-d integer tensor as int64 on the device; a tensor of the host's as the number that it is."""
    if not isinstance(value, Tensor):
        return value
    return int(value) if value.device.type == "cpu" != device.type else value.detach().to(device, torch.int64)


def accumulate_dtype(*tensors: Tensor) -> torch.dtype:
    """The type of the arithmetic: float64 as soon as a tensor is."""
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32
