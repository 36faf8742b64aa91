"""The processes of a distributed run that share a checkpoint folder."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch

from tgt_fast._processes import done_by_each, exchanged, place
from tgt_fast.errors import ArgumentError, CheckpointError

T = TypeVar("T")


@dataclass(frozen=True)
class Processes:
    """``count`` of them, of which this is number ``rank``."""

    rank: int = 0
    count: int = 1

    @property
    def first(self) -> bool:
        """True if this is the one that writes what they share."""
        return self.rank == 0

    def together(self, work: Callable[[], T]) -> list[T]:
        """Results of ``work`` in each process, in their order. All of them call this, at the same place of the run.

        When it fails in one all of them raise, so that none waits for one that has stopped.

        Raises:
            CheckpointError: it failed in another process; or they do not come together.
        """
        if self.count == 1:
            return [work()]

        def refusal(rank: int, kind: str, text: str) -> CheckpointError:
            return CheckpointError(f"in process {rank} of {self.count}: {kind}: {text}")

        return done_by_each(work, _exchanged, refusal)


ALONE = Processes()

# The process group over which an evaluation inside a run is, where its loader gives each process a part of the data
_EVALUATION: ContextVar[Any] = ContextVar("_EVALUATION", default=None)


@contextmanager
def evaluated_by(group: Any) -> Iterator[None]:
    """Inside, :func:`tgt_fast.train.evaluate` is over the data of the group's processes."""
    token = _EVALUATION.set(group)
    try:
        yield
    finally:
        _EVALUATION.reset(token)


def evaluating_group() -> Any:
    return _EVALUATION.get()


def mean_over(group: Any, values: Mapping[str, float]) -> dict[str, float]:
    """Of each name the mean of the processes that have it, in the order of their ranks: equal to the bit in each."""
    if group is None or torch.distributed.get_world_size(group) == 1:
        return dict(values)
    found = exchanged(dict(values), group)
    names = dict.fromkeys(name for of_rank in found for name in of_rank)
    return {name: sum(there := [of_rank[name] for of_rank in found if name in of_rank]) / len(there) for name in names}


def sharing(op: str, folder: Path) -> Processes:
    """Those of a distributed run, if they use one folder; a process with a folder of its own is alone.

    Raises:
        ArgumentError: some share a folder and others do not.
    """
    here = Processes(*place())
    if here.count == 1:
        return ALONE
    places = _exchanged(os.path.realpath(folder))
    if len(set(places)) == 1:
        return here
    if len(set(places)) == len(places):
        return ALONE
    raise ArgumentError(
        f"{op}: the processes must all have one checkpoint_dir, or each its own; theirs are {', '.join(places)}"
    )


def _exchanged(mine: Any) -> list[Any]:
    try:
        return exchanged(mine)
    except RuntimeError as error:  # one has died, or does not come
        raise CheckpointError(f"the processes of the run do not come together for a checkpoint ({error})") from error
