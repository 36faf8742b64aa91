"""Inputs for the tests of the losses beside the fused ones."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

Array = Any  # of float64


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


S, T = 2 * normal(1, 5, 6), 2 * normal(2, 5, 6)
Y = torch.tensor([0, 5, 2, 2, -1])
MAPS = normal(3, 5, 2, 4, 4), normal(4, 5, 3, 2, 2)


def soft(z: Array, temperature: float = 1.0) -> Array:
    e = np.exp(np.asarray(z, dtype=np.float64) / temperature)
    return e / e.sum()


def huber(x: float) -> float:
    return 0.5 * x * x if abs(x) < 1 else abs(x) - 0.5
