"""The result of every demo: students of several methods, one a seed, and what they were made with."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

from tgt_fast._versions import versions
from tgt_fast.errors import ArgumentError
from tgt_fast.report.identity import commit
from tgt_fast.report.numbers import Difference, mean
from tgt_fast.report.plots import Curve


class Student(Protocol):
    """One trained student."""

    @property
    def method(self) -> str: ...
    @property
    def seed(self) -> int: ...
    @property
    def curve(self) -> Curve: ...


AStudent = TypeVar("AStudent", bound=Student)


@dataclass(frozen=True, kw_only=True)
class StudentResults(Generic[AStudent]):
    """Students by method and seed."""

    seeds: tuple[int, ...]
    students: tuple[AStudent, ...]
    seconds: float  # for everything

    def of(self, method: str) -> list[AStudent]:
        """A method's students, in the order of the seeds."""
        return [student for student in self.students if student.method == method]

    def numbers(self, method: str, name: str) -> list[float]:
        """One number of each of a method's students."""
        return [getattr(student, name) for student in self.of(method)]

    def mean(self, method: str, name: str) -> float:
        """The mean of that number over the seeds."""
        return mean(self.numbers(method, name))

    def ahead(self, method: str, other: str, name: str) -> list[float]:
        """By how much ``method`` has more of a number than ``other``, seed by seed."""
        return [a - b for a, b in zip(self.numbers(method, name), self.numbers(other, name), strict=True)]


class AccuracyResults(StudentResults[AStudent]):
    """Students that are judged by their accuracy, in percent."""

    def accuracy(self, method: str) -> float:
        return self.mean(method, "accuracy")

    def best(self, methods: Sequence[str]) -> str:
        """The method of the highest mean accuracy."""
        return max(methods, key=self.accuracy)

    def lead(self, method: str, other: str) -> Difference:
        """Points of accuracy by which ``method`` is ahead of ``other``."""
        return Difference(self.ahead(method, other, "accuracy"))


def checked_seeds(seeds: Sequence[int]) -> tuple[int, ...]:
    """The seeds of a run.

    Raises:
        ArgumentError: no seeds, one twice, or a negative one.
    """
    if not seeds or len(set(seeds)) != len(seeds) or min(seeds) < 0:
        raise ArgumentError(f"seeds must be different integers >= 0, at least one; got {list(seeds)}")
    return tuple(seeds)


def in_order(students: Iterable[AStudent], methods: Sequence[str], seeds: Sequence[int]) -> tuple[AStudent, ...]:
    """Students by method, then by seed, however the workers were done with them."""
    return tuple(sorted(students, key=lambda student: (methods.index(student.method), seeds.index(student.seed))))


def provenance(result: StudentResults[Any], packages: Sequence[str] = ()) -> dict[str, Any]:
    """The origin of a JSON file's numbers. ``packages``: whose versions belong to them."""
    return {
        "versions": versions(packages),
        "seeds": list(result.seeds),
        "commit": commit(),
        "total_seconds": result.seconds,
    }
