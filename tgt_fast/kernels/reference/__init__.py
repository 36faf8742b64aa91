"""The reference backend: what each op means, in plain PyTorch and float64. It runs wherever PyTorch does."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tgt_fast.kernels.reference.distill import distillation_loss
from tgt_fast.kernels.reference.latent import ascend, perturb, philox4x32, standard_normal

__all__ = [
    "ascend",
    "distillation_loss",
    "perturb",
    "philox4x32",
    "refusal",
    "standard_normal",
    "status",
]


def refusal(op: str, tensors: Sequence[Tensor]) -> str | None:
    """None: the reference runs every call."""
    return None


def status() -> tuple[bool, str, tuple[str, ...], str]:
    """Whether it can run here, why not, on which devices, and what was built."""
    devices = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)
    return True, "", devices, f"plain PyTorch {torch.__version__} in float64"
