"""Means over seeds, and what a difference between two methods decides."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np


def mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def deviation(values: Sequence[float]) -> float:
    """The sample standard deviation; 0 for a single value."""
    return float(np.std(values, ddof=1)) if len(values) > 1 else 0.0


def spread(values: Sequence[float], digits: int = 1) -> str:
    """``mean ± deviation``; the mean alone of a single value."""
    beside = f" ± {deviation(values):.{digits}f}" if len(values) > 1 else ""
    return f"{mean(values):.{digits}f}{beside}"


def summary(values: Sequence[float]) -> dict[str, Any]:
    """Mean, standard deviation and the values themselves, as plain data."""
    return {"mean": mean(values), "std": deviation(values), "per_seed": list(values)}


@dataclass(frozen=True)
class Difference:
    """The lead of one method over another, seed by seed; more is better."""

    points: Sequence[float]
    unit: str = "points"
    digits: int = 1  # behind the decimal point

    @property
    def mean(self) -> float:
        return mean(self.points)

    @property
    def verdict(self) -> str:
        """In words; a single seed, or seeds that disagree, decide nothing."""

        def signed(value: float) -> str:
            return f"{value:+.{self.digits}f}"

        size = f"{abs(self.mean):.{self.digits}f} {self.unit}"
        if len(self.points) == 1:
            return f"{'gained' if self.mean >= 0 else 'lost'} {size} in the one seed of this run, which decides nothing"
        if min(self.points) > 0:
            return f"gained {size}, in each of {len(self.points)} seeds"
        if max(self.points) < 0:
            return f"lost {size}, in each of {len(self.points)} seeds: it did not help"
        return (
            f"made no clear difference: {signed(self.mean)} {self.unit} on average, from {signed(min(self.points))} to "
            f"{signed(max(self.points))} by seed"
        )
