"""What an objective gives, and what it keeps from step to step."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, TypedDict

from torch import Tensor, nn

from tgt_fast.ops import _checks
from tgt_fast.train.terms import Terms

if TYPE_CHECKING:
    from tgt_fast.losses.terms import GradientBalance, Term


class Parts(TypedDict):
    """The terms of the objective, weighted as they enter it: they add up to the loss. Detached, 0-d.

    Each of ``terms=`` is another, under its name.
    """

    hard: Tensor
    soft: Tensor
    synthetic: Tensor


class ObjectiveOutput(TypedDict):
    loss: Tensor  # 0-d, with a graph
    parts: Parts


class Kept:
    """The state of an objective with further terms."""

    terms: Sequence[Term]
    balance: GradientBalance | None
    _calls: int

    def parameters(self) -> Iterator[nn.Parameter]:
        """Those of the terms' losses, such as a projection's, each once: they are trained beside the student's."""
        losses = [term.loss for term in self.terms if isinstance(term.loss, nn.Module)]
        return nn.ModuleList(losses).parameters()

    def state_dict(self) -> dict[str, Any]:
        """The calls counted, and what losses of terms and the balance keep: for checkpoints, as the sampler's state."""
        return {"calls": self._calls, "terms": Terms(self.terms, self.balance).state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes what :meth:`state_dict` gave. Raises ArgumentError for the state of other terms."""
        Terms(self.terms, self.balance).load_state_dict(state["terms"])
        self._calls = _checks.integer("TGTObjective", "calls", state["calls"], 0, 1 << 62)
