"""Error measures and bars: the same as those of the tests, see "Precision" of each op's documentation.

An error is ``||out - truth|| / max(||truth||, floor)`` in float64, on the same, already rounded inputs.
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

FLOAT64_BAR: Final = 1e-9
FLOAT32_BAR: Final = 1e-5
HALF_FACTOR: Final = 1.5  # bf16 and fp16 results may err so many times as much as the rounded truth does


def relative_error(out: Tensor, truth: Tensor, floor: float) -> float:
    """The error; NaN where anything is NaN."""
    truth = truth.double()
    return float((out.double() - truth).norm()) / max(float(truth.norm()), floor)


def arithmetic_bar(wide: bool, largest: float) -> float:
    """The bar of a result computed in float32 (float64 if wide): exp magnifies the rounding of arguments this large."""
    return FLOAT64_BAR if wide else FLOAT32_BAR * max(1.0, largest / 10.0)


def result_bar(dtype: torch.dtype, truth: Tensor, floor: float, largest: float = 0.0) -> float:
    """The bar of a result that is rounded to ``dtype``."""
    bar = arithmetic_bar(dtype == torch.float64, largest)
    if dtype in (torch.float64, torch.float32):
        return bar
    return max(bar, HALF_FACTOR * relative_error(truth.to(dtype), truth, floor))


def edge_rows(rows: int, count: int) -> Tensor:
    """At most ``count`` row numbers, from the first rows and from the last, where offsets are largest.  -> int64"""
    if rows <= count:
        return torch.arange(rows)
    first = count // 2
    return torch.cat([torch.arange(first), torch.arange(rows - (count - first), rows)])
