"""Rows that a hard embedding takes from its table and gradients that it gives back to it, on any device."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def taken(table: Tensor, chosen: Tensor) -> Tensor:
    """table[chosen], NaN where chosen is -1.  [V, D], [N] -> [N, D]"""
    rows = table.detach().index_select(0, chosen.clamp_min(0))
    return rows.masked_fill_((chosen < 0)[:, None], math.nan)


def given_back(table: Tensor, chosen: Tensor, d_out: Tensor) -> Tensor:
    """The gradient of that to the table: the upstream gradients of each row's takers, added in a fixed order."""
    dtype = torch.float64 if torch.float64 in (table.dtype, d_out.dtype) else torch.float32
    upstream = d_out.detach().to(dtype).masked_fill((chosen < 0)[:, None], 0.0)
    total = torch.zeros(table.shape, dtype=dtype, device=table.device)
    return total.index_put_((chosen.clamp_min(0),), upstream, accumulate=True).to(table.dtype)
