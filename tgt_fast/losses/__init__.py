"""The losses as modules, which keep their options."""

from tgt_fast.losses.contrast import ContrastiveDistillationLoss
from tgt_fast.losses.distill import DistillationLoss
from tgt_fast.losses.linear import LinearDistillationLoss

__all__ = ["ContrastiveDistillationLoss", "DistillationLoss", "LinearDistillationLoss"]
