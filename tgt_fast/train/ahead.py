"""The batches of the next steps of a run, and the examples explored from them ahead of their turn."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Any, Final

from torch import Tensor

from tgt_fast._ranges import named_range
from tgt_fast.errors import ArgumentError
from tgt_fast.explore.ahead import Ahead, check_ahead
from tgt_fast.explore.by_class import label_argument
from tgt_fast.explore.prefetch import MOST, ReadingAhead
from tgt_fast.explore.replay import SyntheticReplay
from tgt_fast.explore.sampler import LatentSampler
from tgt_fast.explore.synthetic import Synthetic
from tgt_fast.ops import _checks
from tgt_fast.teacher import tree
from tgt_fast.teacher.batches import Batch
from tgt_fast.train.objective import TGTObjective

if TYPE_CHECKING:
    from tgt_fast.train.run import Run

_OP: Final = "fit"


def checked_prefetch(objective: Any, prefetch: Any) -> int:
    """
    Raises:
        ArgumentError: nothing can be explored ahead for this objective.
    """
    depth = _checks.integer(_OP, "prefetch", prefetch, 0, MOST)
    if depth:
        if not isinstance(objective, TGTObjective) or objective.sampler is None:
            raise ArgumentError(f"{_OP}: prefetch= explores ahead: the objective must be a TGTObjective with a sampler")
        if not isinstance(objective.sampler, (LatentSampler, SyntheticReplay)):
            name = type(objective.sampler).__name__
            raise ArgumentError(f"{_OP}: prefetch= explores ahead with a sampler of tgt_fast's own, not a {name}")
        check_ahead(_OP, objective.sampler)
    return depth


def within(step: int, steps: int, *every: int) -> int:
    """Steps from here to the next one after which something is due, that one included."""
    left = [steps - step, *(period - step % period for period in every if period > 0)]
    return min(left)


class StepsAhead:
    """What a run takes its steps from."""

    def __init__(self, run: Run, depth: int) -> None:
        self._run, self._depth = run, depth
        self._reading = ReadingAhead()
        self._groups: deque[list[Batch]] = deque()  # of the steps to come, all but the last of them whole
        self._copies: deque[list[Tensor | None]] = deque()  # of the whole ones
        self._failed: Exception | None = None  # what reading the batch after those in the groups raised
        self._ahead: Ahead | None = None

    def close(self) -> None:
        if self._ahead is not None:
            self._ahead.close()

    def next(self, accumulate: int, within: int) -> tuple[list[Batch], list[Tensor | None]]:
        """The batches of a step, and which copies of their ids the rows are; exploration of steps ahead has begun."""
        self._same_sampler()
        self._fill(accumulate, due=True)
        assert self._ahead is not None
        while self._ahead.beside and self._reading.allowed and len(self._copies) < min(within, self._depth + 1):
            if self._failed is not None or not self._run.stream.more():
                break
            self._fill(accumulate, due=False)
        return self._groups.popleft(), self._copies.popleft()

    def made(self) -> Synthetic | None:
        """Examples for the next micro-batch of the step; None where the objective is to ask its sampler."""
        assert self._ahead is not None
        if not self._objective.explores or not len(self._ahead):
            if len(self._ahead):
                self._ahead.drop()
            return None
        if not self._objective.begun(self._run.result.steps):  # for such a step nothing was explored
            return None
        with named_range("explore (ahead)"):
            return self._ahead.take(lend=self._ahead.replay is not None)

    @property
    def _objective(self) -> TGTObjective:
        objective: Any = self._run.objective
        return objective  # type: ignore[no-any-return]

    def _same_sampler(self) -> None:
        sampler: Any = self._objective.sampler
        if self._ahead is not None and self._ahead.given is sampler:
            return
        self.close()
        checked_prefetch(self._objective, self._depth)
        self._ahead = Ahead(sampler)
        for at in range(len(self._copies)):
            self._submit(at)

    def _fill(self, accumulate: int, *, due: bool) -> None:
        """Read until there is one step more, or the first one is there; ahead of its turn, not beyond the epoch."""
        if due and self._copies:
            return
        while len(self._groups) == len(self._copies) or len(self._groups[-1]) < accumulate:
            if len(self._groups) == len(self._copies):
                self._groups.append([])
            if not self._read(self._groups[-1], due=due):
                break
        if self._groups and not self._groups[-1]:
            self._groups.pop()
        elif self._groups and len(self._groups[-1]) == accumulate:
            self._copies.append(self._run.copies(self._groups[-1]))
            self._submit(len(self._copies) - 1)

    def _read(self, group: list[Batch], *, due: bool) -> bool:
        """One batch more; whether there was one."""
        run = self._run
        if due and self._failed is not None:
            raise self._failed
        try:
            with named_range("data"):
                if due:
                    group.append(run.batch_of(self._reading(run.stream.take, due=True)))
                    return True
                found = self._reading(run.stream.take_early, due=False) if run.stream.more() else ()
                group.extend(run.batch_of(raw) for raw in found)
                return bool(found)
        except Exception as error:
            if due:
                raise
            self._failed = error  # which the step that needs the batch will raise
            return False

    def _submit(self, at: int) -> None:
        assert self._ahead is not None
        run = self._run
        if not self._objective.begun(run.result.steps + at):
            return
        for (ids, x, y), copies in zip(self._groups[at], self._copies[at], strict=True):
            call: dict[str, Any] = {"sample_ids": ids, "step": run.result.steps + at}
            call |= label_argument(self._objective.sampler, y, tree.batch_size(x), tree.first_device(x))
            if copies is not None:
                call["occurrence"] = copies
            with run.precision():
                try:
                    latents = self._objective.known_latents(x, ids)
                except Exception as error:
                    self._ahead.fail(error)
                    continue
                if latents is not None:
                    call["latents"] = latents
                self._ahead.submit(x, tree.first_device(x), **call)
