"""What the synthetic term weighs: one factor, or one that a function gives each example."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import Tensor

from tgt_fast.errors import ShapeError
from tgt_fast.explore.synthetic import Synthetic
from tgt_fast.ops import _checks

WeightOf: TypeAlias = Callable[[Synthetic], "Tensor | float"]
_NAME = "synthetic_weight"


def check_weight(op: str, weight: Any) -> None:
    """
    Raises:
        ArgumentError: neither a function nor a number >= 0.
    """
    if not callable(weight) or isinstance(weight, Tensor):
        _checks.number(op, _NAME, weight, 0, sys.float_info.max, late=True)


def weights_of(
    op: str, weight: Any, made: Synthetic, shape: torch.Size, device: torch.device
) -> tuple[Any, Tensor | None]:
    """The factor of the term, and that of each row of logits, of this shape, where a function gives it.

    Raises:
        ShapeError: weights that are not one an example.
        ArgumentError, DTypeError: what is no weight; on a CPU, a negative one, or one that is not finite.
    """
    if not callable(weight) or isinstance(weight, Tensor):
        return weight, None
    with torch.no_grad():
        found = weight(made)
    if not isinstance(found, Tensor) or found.dim() == 0:
        return _checks.number(op, f"what {_NAME} returned", found, 0, sys.float_info.max, late=True), None
    found = _checks.real(op, f"what {_NAME} returned", found.detach()).to(device)
    if found.shape != shape and found.shape != shape[:1]:
        raise ShapeError(
            f"{op}: {_NAME} returned {tuple(found.shape)}, which must be a number or ({shape[0]},), one an example"
        )
    found = found.to(torch.float64 if found.dtype == torch.float64 else torch.float32)
    _checks.finite_from(op, f"what {_NAME} returned", found, 0)
    rows = found.reshape(*found.shape, *(1,) * (len(shape) - found.dim())).expand(shape)
    return 1.0, rows.contiguous()


def made_of(sampler: Any, count: int, labels: Any, device: torch.device) -> int | Tensor:
    """The synthetic examples that a sampler makes of a batch; without one, as many as there are."""
    made: int | Tensor = count if sampler is None else sampler.options.rows_made(count, labels, device)
    return made


def shown(weight: Any) -> str:
    """For a run's settings."""
    if callable(weight) and not isinstance(weight, Tensor):
        return str(getattr(weight, "__qualname__", type(weight).__name__))
    return str(weight)
