"""What a replay has made and served so far."""

from __future__ import annotations

from typing import Any, Final

import torch
from torch import Tensor

from tgt_fast.errors import CheckpointError

_COUNTED: Final = ("calls", "explored", "served", "ages")


class Tally:
    """Numbers of rows; those that a device knows stay there until they are asked for."""

    def __init__(self) -> None:
        self.calls = self.explored = self.served = 0
        self.ages: int | Tensor = 0  # summed over the rows served, in calls
        self.by_class: Tensor | None = None  # [C] rows served, by the labeler's class

    @torch.inference_mode(False)
    @torch.no_grad()
    def add(self, explored: int, born: Tensor, classes: Tensor, number: int | None) -> None:
        """A call: of each row that it served the call that made it, and its class, of ``number`` if there are such."""
        self.ages = self.ages + (self.calls - born).sum()
        if number is not None:
            if self.by_class is None:
                self.by_class = torch.zeros(number, dtype=torch.int64, device=classes.device)
            self.by_class = self.by_class.to(classes.device)
            self.by_class.index_add_(0, classes, torch.ones_like(classes))
        self.calls += 1
        self.explored += explored
        self.served += len(born)

    def shown(self) -> dict[str, Any]:
        """Waits for the device."""
        return {
            "calls": self.calls,
            "explored": self.explored,
            "served": self.served,
            "mean_uses": self.served / max(1, self.explored),
            "mean_age": int(self.ages) / max(1, self.served),
            "share_by_class": [] if self.by_class is None else (self.by_class / self.by_class.sum()).tolist(),
        }

    def state_dict(self) -> dict[str, Any]:
        counted = {name: int(getattr(self, name)) for name in _COUNTED}
        return {**counted, "by_class": None if self.by_class is None else self.by_class.clone()}

    @classmethod
    def of_state(cls, state: Any) -> Tally:
        """
        Raises:
            CheckpointError: it is no :meth:`state_dict`.
        """
        if not isinstance(state, dict) or state.keys() != {*_COUNTED, "by_class"}:
            raise CheckpointError("SyntheticReplay: the state's statistics are not such")
        tally, by_class = cls(), state["by_class"]
        if not all(type(state[name]) is int for name in _COUNTED) or not isinstance(by_class, (Tensor, type(None))):
            raise CheckpointError("SyntheticReplay: the state's statistics must be integers")
        tally.calls, tally.explored, tally.served, tally.ages = (state[name] for name in _COUNTED)
        tally.by_class = None if by_class is None else by_class.clone()
        return tally
