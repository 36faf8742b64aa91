"""Exploration that waits until validation stalls."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from tgt_fast.errors import ArgumentError
from tgt_fast.ops import _checks
from tgt_fast.train.objective import TGTObjective

if TYPE_CHECKING:
    from tgt_fast.train.run import FitResult


def checked_plateau(objective: Any, patience: Any, evaluate: Any) -> int | None:
    """
    Raises:
        ArgumentError: no positive number of evaluations, nothing that evaluates, or nothing that explores.
    """
    if patience is None:
        return None
    count = _checks.integer("fit", "explore_on_plateau", patience, 1, 1 << 30)
    if evaluate is None:
        raise ArgumentError("fit: explore_on_plateau follows the monitored metric, so it needs evaluate")
    if not isinstance(objective, TGTObjective) or objective.sampler is None:
        raise ArgumentError("fit: explore_on_plateau needs a TGTObjective with a sampler, which it lets wait")
    return count


def stalls(result: FitResult, patience: int) -> bool:
    """Whether the last ``patience`` evaluations brought nothing better, by the history, which a resumed run has."""
    best = -1 if result.best_step is None else result.best_step
    return sum(record["step"] > best for record in result.history) >= patience


@contextmanager
def waiting(objective: Any, patience: int | None) -> Iterator[None]:
    """Afterwards the objective explores as before."""
    before = getattr(objective, "waiting", False)
    try:
        yield
    finally:
        if patience is not None:
            objective.waiting = before


def follow(objective: Any, result: FitResult, patience: int | None) -> None:
    """Let the objective explore, or wait."""
    if patience is not None:
        objective.waiting = not stalls(result, patience)
