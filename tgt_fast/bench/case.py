"""The subject of a measurement: a case, the calls that compete on it, and the check that comes before the clock."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

Result = Mapping[str, Tensor]  # what a call computed, by name; that is what is checked
Call = Callable[[], Result]


class UnfitError(Exception):
    """A rival has nothing that computes the case; the message says what it lacks."""


@dataclass(frozen=True)
class Check:
    """Distances of results from the float64 truth, by name, and their bounds."""

    errors: Mapping[str, float]
    bars: Mapping[str, float]

    @property
    def ok(self) -> bool:
        return all(error <= self.bars[name] for name, error in self.errors.items())  # a NaN never passes

    def __str__(self) -> str:
        return ", ".join(
            f"{name} errs by {error:.2g} (bar {self.bars[name]:.2g})" for name, error in self.errors.items()
        )


class Work(ABC):
    """The inputs of a case, in memory, and the calls on them."""

    operands: Sequence[Tensor]  # what a backend looks at to say whether it can run the call
    result_bytes: int  # what a call returns and its user keeps: the gradients, or the moved latents

    @abstractmethod
    def ours(self, backend: str) -> Call:
        """The public function on that backend."""

    @abstractmethod
    def rival(self, name: str) -> Call:
        """The same by a rival.

        Raises:
            UnfitError: it has nothing that computes this.
        """

    @abstractmethod
    def check(self, result: Result) -> Check:
        """Ours against the float64 truth, with the bars of every result."""

    @abstractmethod
    def compare(self, result: Result) -> Check:
        """A rival's result against the same truth, with bars that only tell another computation from this one."""

    def parts(self, calls: Mapping[str, Call]) -> Mapping[str, Mapping[str, float]]:
        """Milliseconds of a call by what it spends them on, of each contender; nothing where that is no question."""
        return {}

    def forget(self) -> None:
        """Let go of the last call's gradients."""
        return None


@dataclass(frozen=True)
class Case:
    """One row of a table, before anything is in memory."""

    noun: str
    op: str
    shape: str
    dtype: torch.dtype
    device: torch.device
    bytes_moved: int  # the floor: each input read once, each result written once
    bytes_needed: int  # of memory, to measure it; an estimate
    unit_bytes: int  # of one matrix of inputs: the unit of peak memory
    build: Callable[[], Work]
    rivals: tuple[str, ...]  # those for whom the case is a question at all
    numbers: Mapping[str, int | str | bool] = field(default_factory=dict)  # what the result files say of the case
    compiled: bool = True  # whether torch.compile is given the seconds that it takes
    peak: bool = False  # on a CPU: measure its peak memory, which takes a process a contender
    kernels: str = ""  # the op whose kernels ours needs, where that is not the noun

    @property
    def kernels_of(self) -> str:
        return self.kernels or self.noun

    @property
    def title(self) -> str:
        return f"{self.op} {self.shape} {dtype_name(self.dtype)}"


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
