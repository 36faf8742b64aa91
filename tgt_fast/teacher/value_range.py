"""What the numbers of an image mean: two ends, and the way to other ones."""

from __future__ import annotations

import math

from torch import Tensor

from tgt_fast.errors import ArgumentError

Range = tuple[float, float]


def checked_range(who: str, ends: Range) -> Range:
    """(black, white) as floats.

    Raises:
        ArgumentError: they are not two finite numbers, the first below the second.
    """
    if not isinstance(ends, (tuple, list)) or len(ends) != 2 or not all(math.isfinite(end) for end in ends):
        raise ArgumentError(f"{who}: value_range must be two numbers, got {ends!r}")
    low, high = map(float, ends)
    if not low < high:
        raise ArgumentError(f"{who}: value_range must ascend, got {ends!r}")
    return low, high


def moved(x: Tensor, here: Range, there: Range) -> Tensor:
    """``x`` with the ends of the one range carried to those of the other; differentiable."""
    if here == there:
        return x
    factor = (there[1] - there[0]) / (here[1] - here[0])
    return x * factor + (there[0] - here[0] * factor)
