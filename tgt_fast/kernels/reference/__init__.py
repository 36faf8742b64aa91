"""The reference backend: what each op means, in plain PyTorch and float64."""

from __future__ import annotations

from tgt_fast.kernels.reference.distill import distillation_loss
from tgt_fast.kernels.reference.latent import ascend, perturb, philox4x32, standard_normal

__all__ = ["ascend", "distillation_loss", "perturb", "philox4x32", "standard_normal"]
