"""Memory for results."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final

import torch
from torch import Tensor

from tgt_fast.kernels import native
from tgt_fast.kernels.plain import PLAIN

_LARGE: Final = 1 << 20  # bytes: below it the allocator of the C library keeps freed memory by itself


def workspace(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Memory on a CPU, contiguous. A large piece of it the core uses again from call to call."""
    bytes_needed = math.prod(shape) * dtype.itemsize
    module = native.load() if bytes_needed >= _LARGE else ""
    if isinstance(module, str):
        return torch.empty(shape, dtype=dtype, device="cpu")
    return torch.frombuffer(module.Buffer(bytes_needed), dtype=dtype).view(shape)


def gradient_like(tensor: Tensor) -> Tensor:
    """Contiguous room for a tensor's gradient; also of a fake one, whose size is not asked for."""
    if tensor.is_cpu and type(tensor) in PLAIN:
        return workspace(tensor.shape, tensor.dtype)
    return tensor.new_empty(tensor.shape)
