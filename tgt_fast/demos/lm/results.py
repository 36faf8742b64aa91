"""What a run of the demo found, and the numbers made of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tgt_fast.demos.lm.settings import METHODS, Settings
from tgt_fast.demos.lm.students import StudentResult
from tgt_fast.demos.lm.teachers import TeacherResult
from tgt_fast.report.identity import commit, versions
from tgt_fast.report.numbers import mean, summary

RECORDS, CACHED = "distillation-records", "distillation-cached"


@dataclass(frozen=True)
class TextFacts:
    """How much text there is."""

    train_modules: int
    test_modules: int
    train_windows: int
    test_windows: int
    bytes_per_token: float  # of the test text


@dataclass(frozen=True)
class DemoResult:
    """Everything the table, the page and the JSON file show."""

    settings: Settings
    seeds: tuple[int, ...]
    text: TextFacts
    teacher: TeacherResult
    students: tuple[StudentResult, ...]
    memory: dict[str, int] | None  # bytes at the peak of one loss, by way
    seconds: float

    def of(self, method: str) -> list[StudentResult]:
        """A method's students, in the order of the seeds."""
        return [student for student in self.students if student.method == method]

    def numbers(self, method: str, name: str) -> list[float]:
        """One number of each of a method's students."""
        return [getattr(student, name) for student in self.of(method)]

    def bits(self, method: str) -> float:
        """Bits per byte, the mean over seeds."""
        return mean(self.numbers(method, "bits_per_byte"))

    @property
    def cache_is_exact(self) -> bool:
        """Whether students with and without the cache ended at the same bits per byte, to the last digit."""
        return self.numbers(RECORDS, "bits_per_byte") == self.numbers(CACHED, "bits_per_byte")

    @property
    def cache_speedup(self) -> float:
        """How many times faster a step is that reads records than one that makes them."""
        return mean(self.numbers(RECORDS, "step_ms")) / mean(self.numbers(CACHED, "step_ms"))


def as_json(result: DemoResult) -> dict[str, Any]:
    """The result as plain data. Seconds a student, milliseconds a step, bytes."""
    means = ("before", "seconds", "first_epoch_ms", "step_ms", "cache_bytes", "windows", "steps")
    return {
        "methods": {
            method: {
                "bits_per_byte": summary(result.numbers(method, "bits_per_byte")),
                **{name: mean(result.numbers(method, name)) for name in means},
            }
            for method in METHODS
        },
        "teacher": {
            "bits_per_byte": result.teacher.bits_per_byte,
            "before": result.teacher.before,
            "seconds": result.teacher.seconds,
        },
        "cache_is_exact": result.cache_is_exact,
        "loss_peak_bytes": result.memory,
        "text": vars(result.text),
        "settings": vars(result.settings),
        "versions": versions(),
        "seeds": list(result.seeds),
        "commit": commit(),
        "total_seconds": result.seconds,
    }
