"""The meaning of an image's numbers: two ends, and the way to other ones."""

from __future__ import annotations

import math
import warnings

from torch import Tensor

from tgt_fast.errors import ArgumentError, DTypeError
from tgt_fast.ops import _checks

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


def checked_images(who: str, x: Tensor, here: Range, slack: float) -> None:
    """That images are numbers of a range: floating point and, as far as a CPU sees, not far outside of it.

    ``slack``, in units of the range, is how far outside they may lie: interpolation and decoders overshoot.

    Raises:
        DTypeError: integers, whose black and white are others than the range's.
    """
    if not x.is_floating_point():
        low, high = here
        scaled = "x.float() / 255" if here == (0.0, 1.0) else f"x.float() * ({high - low:g} / 255) + ({low:g})"
        raise DTypeError(
            f"{who}: images must be floating point with black at {low:g} and white at {high:g}, got {x.dtype}; of "
            f"uint8 make {scaled} where the loader makes them, so that labeler and student see the same"
        )
    if not _checks.on_plain_cpu(x) or not x.numel():
        return
    low, high = (float(end) for end in x.detach().aminmax())
    width = here[1] - here[0]
    if low < here[0] - slack * width or high > here[1] + slack * width:
        warnings.warn(
            f"{who}: images have values from {low:g} to {high:g}, but value_range says {here}; give the range that "
            "they have, or scale them. Normalisation by mean and std belongs into the labeler (TimmLabeler) and into "
            "student_transform",
            stacklevel=2,
        )


def moved(x: Tensor, here: Range, there: Range) -> Tensor:
    """``x`` with the ends of the one range carried to those of the other; differentiable."""
    if here == there:
        return x
    factor = (there[1] - there[0]) / (here[1] - here[0])
    return x * factor + (there[0] - here[0] * factor)
