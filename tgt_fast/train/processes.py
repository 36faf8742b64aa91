"""The processes of a distributed run that share a checkpoint folder."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch

from tgt_fast.errors import ArgumentError, CheckpointError

T = TypeVar("T")


@dataclass(frozen=True)
class Processes:
    """``count`` of them, of which this is number ``rank``."""

    rank: int = 0
    count: int = 1

    @property
    def first(self) -> bool:
        """Whether this is the one that writes what they share."""
        return self.rank == 0

    def together(self, work: Callable[[], T]) -> list[T]:
        """What ``work`` gives in each process, in their order. All of them call this, at the same place of the run.

        When it fails in one all of them raise, so that none waits for one that has stopped.

        Raises:
            CheckpointError: it failed in another process; or they do not come together.
        """
        if self.count == 1:
            return [work()]
        failure: Exception | None = None
        made: T | None = None
        try:
            made = work()
        except Exception as error:
            failure = error
        found: list[Any] = _exchanged((None if failure is None else f"{type(failure).__name__}: {failure}", made))
        if failure is not None:
            raise failure
        for rank, (failed, _) in enumerate(found):
            if failed is not None:
                raise CheckpointError(f"in process {rank} of {self.count}: {failed}")
        return [made for _, made in found]


ALONE = Processes()


def sharing(op: str, folder: Path) -> Processes:
    """Those of a distributed run, if they use one folder; a process with a folder of its own is alone.

    Raises:
        ArgumentError: some share a folder and others do not.
    """
    distributed = torch.distributed
    if not (distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1):
        return ALONE
    places = _exchanged(os.path.realpath(folder))
    if len(set(places)) == 1:
        return Processes(distributed.get_rank(), distributed.get_world_size())
    if len(set(places)) == len(places):
        return ALONE
    raise ArgumentError(
        f"{op}: the processes must all have one checkpoint_dir, or each its own; theirs are {', '.join(places)}"
    )


def _exchanged(mine: Any) -> list[Any]:
    found: list[Any] = [None] * torch.distributed.get_world_size()
    try:
        torch.distributed.all_gather_object(found, mine)
    except RuntimeError as error:  # one has died, or does not come
        raise CheckpointError(f"the processes of the run do not come together for a checkpoint ({error})") from error
    return found
