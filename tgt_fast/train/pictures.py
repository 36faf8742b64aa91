"""Examples as pictures, where they are some."""

from __future__ import annotations

import math
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional as F

from tgt_fast.teacher import tree

Pixels = npt.NDArray[np.uint8]  # [H, W, 1 or 3]
_CHANNELS: Final = (1, 3, 4)


def images_of(x: Any, *, like: Any = None, most: int | None = None) -> list[Pixels] | None:
    """The examples of a batch as images; None where they are none.

    Images are [B, H, W], [B, C, H, W] or [B, H, W, C], C one of 1, 3 and 4 (of which the last is left out), of whole
    numbers in 0..255 or of others: those within 0..1 are shown as they are, those within -1..1 shifted, and all else
    from the least to the greatest. Vectors of a square number of values in 0..1 are images, too.

    Args:
        like: a batch whose range of values is taken instead, so that several batches look alike.
        most: make larger ones smaller, to at most so many pixels a side.
    """
    pixels, reference = _layers(x), _layers(x if like is None else like)
    if pixels is None or reference is None:
        return None
    low, high = _range(reference)
    shown = ((pixels.float() - low) / (high - low)).nan_to_num(0.0).clamp(0, 1)
    side = max(shown.shape[-2:])
    if most is not None and side > most:
        shape = [max(1, round(size * most / side)) for size in shown.shape[-2:]]
        shown = F.interpolate(shown, size=shape, mode="area")
    values: npt.NDArray[np.uint8] = (shown * 255).round().to(torch.uint8).movedim(1, -1).cpu().numpy()
    return list(values)


def _layers(x: Any) -> Tensor | None:
    """[B, 1 or 3, H, W]."""
    leaves = [x] if isinstance(x, Tensor) else tree.batched_leaves(x) if x is not None else []
    if len(leaves) != 1 or leaves[0].is_complex() or 0 in leaves[0].shape:
        return None
    found = leaves[0].detach()
    if found.ndim == 2:
        side = math.isqrt(found.shape[1])
        if side < 4 or side * side != found.shape[1] or not found.is_floating_point() or _range(found) != (0.0, 1.0):
            return None
        found = found.view(-1, 1, side, side)
    elif found.ndim == 3:
        found = found[:, None]
    elif found.ndim == 4 and found.shape[1] not in _CHANNELS and found.shape[-1] in _CHANNELS:
        found = found.movedim(-1, 1)
    if found.ndim != 4 or found.shape[1] not in _CHANNELS or min(found.shape[-2:]) < 2:
        return None
    return found[:, :3]


def _range(values: Tensor) -> tuple[float, float]:
    if not values.is_floating_point():
        return 0.0, 1.0 if values.dtype == torch.bool else 255.0
    finite = values.float()[values.isfinite()]
    if not finite.numel():
        return 0.0, 1.0
    low, high = finite.min().item(), finite.max().item()
    for edges in ((0.0, 1.0), (-1.0, 1.0)):
        if edges[0] - 1e-3 <= low and high <= edges[1] + 1e-3:
            return edges
    return low, high if high > low else low + 1.0
