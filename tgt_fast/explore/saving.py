"""The state of a sampler: what a resumed run needs to go on with the same numbers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tgt_fast.explore.bank import LatentBank, latest
from tgt_fast.explore.processes import of_all_processes, warn_of_foreign_chains, warn_of_own_chains
from tgt_fast.explore.state import SamplerState, checked_state
from tgt_fast.ops.counts import counting_group

if TYPE_CHECKING:
    from tgt_fast.explore.anchors import AnchorPool
    from tgt_fast.explore.counters import Counters
    from tgt_fast.explore.options import SamplerOptions


class Saved:
    """The part of :class:`tgt_fast.LatentSampler` that is saved and loaded."""

    options: SamplerOptions
    scale: Tensor | None
    _counters: Counters
    _bank: LatentBank
    _pool: AnchorPool | None

    def state_dict(self, group: Any = None) -> dict[str, Tensor | int]:
        """The state that a resumed run needs to go on with the same numbers: tensors and ints, not the teacher's.

        In persistent mode the chains are this process's alone: with several, save every rank's state. The first one's
        warns, as frameworks save that one alone. With ``group="world"``, or a process group whose processes all call,
        it holds the chains of all of them, on the CPU, the same in each; any number of processes can load it.
        """
        counters = self._counters
        state: dict[str, Tensor | int] = {"version": 1, **self.options.fingerprint(), "stride": counters.stride}
        for name in ("seed", "step", "next_id"):
            state[name] = getattr(counters, name).clone()
        if self.scale is not None:
            state["scale"] = self.scale.clone()
        together = counting_group("LatentSampler", group, name="group")
        if together is not None:
            if self.options.mode == "persistent":
                state |= latest(of_all_processes("state_dict", together, self._bank.everything))
        elif len(self._bank):
            warn_of_own_chains(counters.place)
            state |= {"rank": counters.place[0], "world_size": counters.place[1], **self._bank.state_dict()}
        elif self.options.mode == "persistent":
            state |= self._bank.state_dict()  # those that wait
        if self._pool is not None:
            state |= self._pool.state_dict()
        return state

    @torch.inference_mode(False)
    def load_state_dict(self, state: dict[str, Tensor | int]) -> None:
        """Take over a :meth:`state_dict`, the seed included; the options stay this sampler's (a schedule may have
        changed its sigma, step size, steps or radius). Chains of another rank than this one warn; those of all ranks
        wait until their id is met, in whichever process that is.

        Raises:
            CheckpointError: contents that are missing or foreign, or a sampler of another mode, units, norm or
                number of replicas. This one is then unchanged.
        """
        checked: SamplerState = checked_state(state, self.options)
        counters = self._counters
        if len(checked.bank) and checked.place is not None:
            warn_of_foreign_chains(checked.place, counters.place)
        counters.seed, counters.step, counters.next_id = checked.seed, checked.step, checked.next_id
        counters.stride = checked.stride
        self.scale, self._bank, self._pool = checked.scale, checked.bank, checked.pool
