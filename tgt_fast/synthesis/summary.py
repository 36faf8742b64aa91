"""What a synthesis did."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple

SHOWN: Final = 8  # dropped examples that are kept, a filter


class Dropped(NamedTuple):
    """One synthetic example that a filter refused."""

    key: tuple[int, int, int]  # sample id, replica, step
    value: float  # of what the filter looks at
    x: Any  # the example, on the CPU


@dataclass
class SynthesisSummary:
    """Counts of one call, in this process, and the first examples that its filters refused.

    Attributes:
        computed: examples that were made and stored.
        found: examples that were there already, stored or dropped.
        dropped: examples that were made and not stored, by filter.
        examples: of those the first few, by filter.
    """

    computed: int = 0
    found: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[Dropped]] = field(default_factory=dict)

    def drop(self, name: str, one: Dropped) -> None:
        self.dropped[name] += 1
        kept = self.examples.setdefault(name, [])
        if len(kept) < SHOWN:
            kept.append(one)

    @staticmethod
    def of_all(parts: Iterable[SynthesisSummary]) -> SynthesisSummary:
        """The sum over workers."""
        whole = SynthesisSummary()
        for part in parts:
            whole.computed += part.computed
            whole.found += part.found
            whole.dropped.update(part.dropped)
            for name, dropped in part.examples.items():
                kept = whole.examples.setdefault(name, [])
                kept += dropped[: SHOWN - len(kept)]
        return whole

    def __str__(self) -> str:
        told = f"{self.computed} examples made, {self.found} were there"
        by = ", ".join(f"{name} {count}" for name, count in sorted(self.dropped.items()))
        return told + (f", {self.dropped.total()} dropped ({by})" if by else "")
