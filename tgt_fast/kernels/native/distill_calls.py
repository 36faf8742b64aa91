"""Arguments of the soft-label loss as they reach the core, on a CPU and on a CUDA device."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from tgt_fast.kernels.native import DTYPES
from tgt_fast.kernels.options import DIVERGENCES, REDUCTIONS, DistillOptions


@functools.lru_cache(maxsize=256)
def core_options(core: Any, options: DistillOptions) -> Any:
    """The options as the core takes them."""
    made = core.DistillOptions()
    made.divergence = DIVERGENCES.index(options.divergence)
    made.reduction = REDUCTIONS.index(options.reduction)
    for name in (
        "beta", "temperature", "teacher_temperature", "soft_weight", "hard_weight", "label_smoothing",
        "ignore_index", "unlabeled_index",
    ):  # fmt: skip
        setattr(made, name, getattr(options, name))
    return made


def split_divisor(divisor: float | Tensor | None) -> tuple[Tensor | None, float]:
    """A divisor on the device, and as a number: -1 where it is to be read there, or what counts to be counted."""
    if isinstance(divisor, Tensor):
        return divisor.detach().to(torch.float64), -1.0
    return None, -1.0 if divisor is None else float(divisor)


def pointer(tensor: Tensor | None) -> int:
    """The address of a tensor's data; 0 for none."""
    return 0 if tensor is None else tensor.data_ptr()


def matrix(tensor: Tensor | None) -> tuple[int, int, int]:
    """(pointer, row stride, dtype code) of a matrix with dense rows; zeros for none."""
    return (0, 0, 0) if tensor is None else (tensor.data_ptr(), tensor.stride(0), DTYPES[tensor.dtype])
