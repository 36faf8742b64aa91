"""The reference backend: what each op means, in plain PyTorch and float64. It runs wherever PyTorch does."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from tgt_fast.kernels.reference.distill import distillation_loss
from tgt_fast.kernels.reference.latent import ascend, perturb, standard_normal

__all__ = [
    "ascend",
    "distillation_loss",
    "perturb",
    "refusal",
    "standard_normal",
    "status",
]


def refusal(op: str, tensors: Sequence[Tensor]) -> str | None:
    """Why it cannot run: it computes in float64, which some devices lack."""
    device = tensors[0].device.type
    if device == "mps" or (device == "xpu" and not _xpu_has_float64()):
        return f"the reference computes in float64, which {device} devices lack; move the tensors to the CPU"
    return None


@functools.cache
def _xpu_has_float64() -> bool:
    return torch.xpu.is_available() and bool(torch.xpu.get_device_properties().has_fp64)


def status() -> tuple[bool, str, tuple[str, ...], str]:
    """(available, reason, devices, detail): whether it can run here, why not, on which devices, and what was built."""
    devices = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)
    return True, "", devices, f"plain PyTorch {torch.__version__} in float64"
