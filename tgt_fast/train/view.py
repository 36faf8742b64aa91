"""The view of a run that a callback has."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from torch import nn

if TYPE_CHECKING:
    from tgt_fast.train.run import Run

EVENTS = ("start", "step", "record", "checkpoint", "end")


class RunView:
    """A run of :func:`tgt_fast.fit` as it is at the moment, to read.

    Attributes:
        steps: optimizer steps taken; total_steps: those of the whole run.
        epoch: passes over the loader that are over.
        history: the records so far, as in :class:`FitResult`.
        best_step, best_score: of the best evaluation so far.
        lr: the learning rate of the first group of parameters.
        losses: the last step's ``loss`` and its parts, in this process; reading them waits for the device.
        student: the module in training, without what wraps it; not to be changed.
        rank, world_size: of this process, among those that average the student's gradients.
    """

    __slots__ = ("_run", "_total")

    _run: Run
    _total: int

    def __init__(self, run: Run, total: int) -> None:
        object.__setattr__(self, "_run", run)
        object.__setattr__(self, "_total", total)

    def __setattr__(self, name: str, value: Any) -> None:
        raise AttributeError(f"a callback reads the run; {name} cannot be set")

    @property
    def steps(self) -> int:
        return self._run.result.steps

    @property
    def total_steps(self) -> int:
        return self._total

    @property
    def epoch(self) -> int:
        return self._run.stream.epoch

    @property
    def history(self) -> tuple[Mapping[str, float], ...]:
        return tuple(MappingProxyType(record) for record in self._run.result.history)

    @property
    def best_step(self) -> int | None:
        return self._run.result.best_step

    @property
    def best_score(self) -> float | None:
        return self._run.result.best_score

    @property
    def lr(self) -> float:
        return float(self._run.optimizer.param_groups[0]["lr"])

    @property
    def losses(self) -> Mapping[str, float]:
        return {name: float(value) for name, value in self._run.last.items()}

    @property
    def student(self) -> nn.Module:
        model: nn.Module = self._run.model
        return model

    @property
    def rank(self) -> int:
        return self._run.parallel.rank

    @property
    def world_size(self) -> int:
        return self._run.parallel.count

    def __repr__(self) -> str:
        return f"RunView(steps={self.steps}, total_steps={self.total_steps}, epoch={self.epoch})"
