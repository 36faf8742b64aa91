"""Results of a run of the demo, and the numbers made of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tgt_fast.demos.lm.settings import METHODS, Settings
from tgt_fast.demos.lm.students import StudentResult
from tgt_fast.demos.lm.teachers import TeacherResult
from tgt_fast.demos.results import StudentResults, provenance
from tgt_fast.report.numbers import summary

RECORDS, CACHED = "distillation-records", "distillation-cached"


@dataclass(frozen=True)
class TextFacts:
    """Amounts of text."""

    train_modules: int
    test_modules: int
    train_windows: int
    test_windows: int
    bytes_per_token: float  # of the test text


@dataclass(frozen=True, kw_only=True)
class DemoResult(StudentResults[StudentResult]):
    """Everything the table, the page and the JSON file show."""

    settings: Settings
    text: TextFacts
    teacher: TeacherResult
    memory: dict[str, int] | None  # bytes at the peak of one loss, by way

    def bits(self, method: str) -> float:
        """Bits per byte, the mean over seeds."""
        return self.mean(method, "bits_per_byte")

    @property
    def cache_is_exact(self) -> bool:
        """True if students with and without the cache ended at the same bits per byte, to the last digit."""
        return self.numbers(RECORDS, "bits_per_byte") == self.numbers(CACHED, "bits_per_byte")

    @property
    def cache_speedup(self) -> float:
        """The speed of a step that reads records relative to one that makes them."""
        return self.mean(RECORDS, "step_ms") / self.mean(CACHED, "step_ms")


def as_json(result: DemoResult) -> dict[str, Any]:
    """The result as plain data. Seconds a student, milliseconds a step, bytes."""
    means = ("before", "seconds", "first_epoch_ms", "step_ms", "cache_bytes", "windows", "steps")
    return {
        "methods": {
            method: {
                "bits_per_byte": summary(result.numbers(method, "bits_per_byte")),
                **{name: result.mean(method, name) for name in means},
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
        **provenance(result),
    }
