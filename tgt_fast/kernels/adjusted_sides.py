"""Logits that are standardised, or divided by a temperature a row, as a kernel is to see them, and the way back."""

from __future__ import annotations

import math
from typing import Final, NamedTuple

import torch
from torch import Tensor

_TINY: Final = 1e-7  # beside a standard deviation
_SHRINK: Final = 0.25  # a power of 2: differences of logits are then finite


class Side(NamedTuple):
    """One side of some rows, and what leads back from its gradient."""

    logits: Tensor  # [n, C]
    scale: Tensor | None = None  # [n] float64, factor of the gradient; None: 1
    along: Tensor | None = None  # [n] float64, how much of the part along the logits is taken away; None: nothing
    shift: Tensor | None = None  # [n] float64, by what the logits are lower than they would be; None: 0

    def back_(self, grad: Tensor) -> None:
        """The gradient of the logits from that of what the kernel saw, in place.

        Of standardised ones z = (x - mean) / spread the way back takes away the gradient's mean, which is 0 already
        (for mse, too, whose gradient is of a difference of such rows), and its part along z.
        """
        if self.scale is None:
            return
        along = None
        if self.along is not None:
            there = self.logits.masked_fill(self.logits == -math.inf, 0.0)
            along = there * ((grad * there).sum(dim=1, dtype=torch.float64) * self.along).to(grad.dtype)[:, None]
        grad.mul_(self.scale.to(grad.dtype)[:, None])
        if along is not None:
            grad.sub_(along)


def adjusted_side(
    logits: Tensor, temperature: Tensor | None, factor: Tensor | None, *, standardize: bool, centred: bool
) -> Side:
    """A side of rows in the precision of the arithmetic.  [n, C], [n], [n] float64

    ``factor``: what the rows' losses are multiplied by after the kernel. ``centred``: whether a constant may be taken
    from a row, so that what is finite stays so whatever the temperature.
    """
    if not standardize and temperature is None:
        return Side(logits)
    tempered = torch.ones(len(logits), dtype=torch.float64, device=logits.device)
    if temperature is not None:
        tempered = temperature.to(torch.float64)
    made = _standardized(logits, tempered) if standardize else _tempered(logits, tempered, centred=centred)
    if factor is None:
        return made
    scale, along = (None if x is None else x * factor for x in (made.scale, made.along))
    return made._replace(scale=scale, along=along)


def _tempered(logits: Tensor, temperature: Tensor, *, centred: bool) -> Side:
    inverse = temperature.reciprocal()
    if not centred:
        return Side(logits * inverse.to(logits.dtype)[:, None], inverse)
    peak = logits.amax(dim=1, keepdim=True)
    peak = torch.where(peak.isfinite(), peak, 0.0)
    lowered = (logits * _SHRINK).sub_(peak * _SHRINK).mul_((inverse / _SHRINK).to(logits.dtype)[:, None])
    lowered.clamp_min_(torch.finfo(logits.dtype).min / 8).masked_fill_(logits == -math.inf, -math.inf)
    return Side(lowered, inverse, shift=peak[:, 0].double() * inverse)


def _standardized(logits: Tensor, temperature: Tensor) -> Side:
    """(x - mean) / (1e-7 + standard deviation) / temperature, over the classes that exist."""
    missing = logits == -math.inf
    count = (~missing).sum(dim=1)
    mean = logits.masked_fill(missing, 0.0).sum(dim=1, dtype=torch.float64) / count.clamp_min(1)
    z = (logits * _SHRINK).sub_((mean * _SHRINK).to(logits.dtype)[:, None]).masked_fill_(missing, 0.0)
    # Squares of what is at most 1 stay in range.
    most = torch.linalg.vector_norm(z, ord=math.inf, dim=1, keepdim=True)
    most = torch.where(most > 0, most, 1.0)
    z.div_(most)
    unit = most[:, 0].double() / _SHRINK
    degrees = (count - 1).clamp_min(1).double()
    spread = torch.linalg.vector_norm(z, dim=1).double() * unit / degrees.sqrt()
    scale = ((_TINY + spread) * temperature).reciprocal()
    along = torch.where(spread > 0, temperature / (degrees * torch.where(spread > 0, spread, 1.0)), 0.0)
    z.mul_((unit * scale).to(z.dtype)[:, None]).masked_fill_(missing, -math.inf)
    return Side(z, scale, along)
