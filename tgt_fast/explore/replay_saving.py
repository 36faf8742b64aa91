"""The state of a replay: its sampler's, and the pool, draws and statistics of each process."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor

from tgt_fast.errors import CheckpointError
from tgt_fast.explore.pool import RowPool
from tgt_fast.explore.processes import of_all_processes
from tgt_fast.explore.tally import Tally
from tgt_fast.ops.counts import counting_group
from tgt_fast.teacher import tree

if TYPE_CHECKING:
    from tgt_fast.explore.sampler import LatentSampler

_OP: Final = "SyntheticReplay"


class SavedReplay:
    """The part of :class:`tgt_fast.SyntheticReplay` that is saved and loaded."""

    sampler: LatentSampler
    capacity: int
    seed: int
    _pool: RowPool
    _tally: Tally
    _step: int
    _before: tuple[int | Tensor, int | Tensor]

    def _empty(self) -> None:
        raise NotImplementedError

    def state_dict(self, group: Any = None) -> dict[str, Any]:
        """The sampler's state and this process's pool, draws and statistics.

        With ``group="world"``, or a process group whose processes all call, it holds the pools of all of them, on the
        CPU, the same in each. As many processes then go on with their own; in another number each takes one of them.
        """
        together = counting_group(_OP, group, name="group")
        sampler = self.sampler.state_dict(group)
        mine = [self._own_state()]
        if together is not None:
            mine = of_all_processes(
                "state_dict", together, lambda: tree.map_batched(lambda leaf: leaf.cpu(), self._own_state())
            )
        return {"version": 1, "sampler": sampler, "ranks": mine}

    @torch.inference_mode(False)
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over a :meth:`state_dict`, the seeds included; reuse, select, candidates and retire stay as they are.

        Raises:
            CheckpointError: contents that are missing or foreign, or a pool of another capacity. This one is unchanged.
        """
        if not isinstance(state, dict) or state.keys() != {"version", "sampler", "ranks"} or state["version"] != 1:
            raise CheckpointError(f"{_OP}: the state is not that of a SyntheticReplay of this release")
        if not isinstance(state["ranks"], list) or not state["ranks"]:
            raise CheckpointError(f"{_OP}: the state holds no process's pool")
        rank, _ = self.sampler._counters.place
        own = state["ranks"][rank % len(state["ranks"])]
        if not isinstance(own, dict) or own.keys() != {"pool", "tally", "seed", "step", "before"}:
            raise CheckpointError(f"{_OP}: the state's part of a process is not one")
        if not isinstance(own["before"], list) or len(own["before"]) != 2:
            raise CheckpointError(f"{_OP}: the state's counters are not such")
        if not all(type(number) is int for number in (own["seed"], own["step"], *own["before"])):
            raise CheckpointError(f"{_OP}: the state's counters must be integers")
        pool, tally = RowPool.of_state(own["pool"], self.capacity), Tally.of_state(own["tally"])
        self.sampler.load_state_dict(state["sampler"])
        self._empty()
        self._pool, self._tally = pool, tally
        self.seed, self._step = own["seed"], own["step"]
        self._before = own["before"][0], own["before"][1]

    def _own_state(self) -> dict[str, Any]:
        return {
            "pool": self._pool.state_dict(),
            "tally": self._tally.state_dict(),
            "seed": self.seed,
            "step": self._step,
            "before": [int(part) for part in self._before],
        }
