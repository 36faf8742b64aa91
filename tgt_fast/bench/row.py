"""One measured row: a case on one of our backends, beside its rivals."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from tgt_fast.bench.case import Case, Check, dtype_name
from tgt_fast.bench.load import Load
from tgt_fast.bench.timing import Timing

OK, WRONG, FAILED, SKIPPED, DIFFERS = "ok", "WRONG", "failed", "skipped", "differs"


@dataclass
class Standing:
    """The result of a contender."""

    status: str = OK
    reason: str = ""
    check: Check | None = None
    timing: Timing | None = None
    peak: int | None = None  # bytes, results included

    def to_json(self) -> dict[str, Any]:
        made: dict[str, Any] = {"status": self.status, "reason": self.reason}
        if self.check is not None:
            made["errors"] = dict(self.check.errors)
        if self.timing is not None:
            made["milliseconds"] = self.timing.total
            if self.timing.spread is not None:
                made["spread"] = round(self.timing.spread, 4)
            if self.timing.device is not None:
                made["device_milliseconds"] = self.timing.device
                made["wall_milliseconds"] = self.timing.wall
        return made


@dataclass
class Row:
    """Ours and the rivals on one case."""

    case: Case
    backend: str
    ours: Standing
    rivals: dict[str, Standing]
    copy: Timing | None = None  # plainly copying as many bytes, taking turns with the others
    copy_rate: float = 0.0  # bytes a second of large copies: the roof
    result_bytes: int = 0
    seconds: float = 0.0  # all that the case took
    load: Load | None = None  # of the machine, meanwhile
    parts: Mapping[str, Mapping[str, float]] = field(default_factory=dict)  # milliseconds, by contender

    @property
    def failed(self) -> bool:
        return self.ours.status in (WRONG, FAILED)

    @property
    def busy(self) -> bool:
        """True if other processes took so much of the machine that the times are rough ones."""
        return self.load is not None and self.load.busy

    @property
    def rate(self) -> float | None:
        """Bytes a second, of those that have to move."""
        return self.rate_of(self.ours)

    def rate_of(self, standing: Standing) -> float | None:
        return None if standing.timing is None else self.case.bytes_moved / (standing.timing.total * 1e-3)

    @property
    def of_copy(self) -> float | None:
        return None if self.rate is None or not self.copy_rate else self.rate / self.copy_rate

    def over(self, rival: str) -> float | None:
        """The speed relative to a rival that computed the same."""
        theirs = self.rivals.get(rival)
        if theirs is None or theirs.timing is None or self.ours.timing is None:
            return None
        return theirs.timing.total / self.ours.timing.total

    @property
    def extra_memory(self) -> int | None:
        """Peak bytes beyond what the call returns."""
        return None if self.ours.peak is None else max(0, self.ours.peak - self.result_bytes)

    def to_json(self) -> dict[str, Any]:
        case = self.case
        standings = {"ours": self.ours, **self.rivals}
        milliseconds = {name: s.timing.total for name, s in standings.items() if s.timing is not None}
        if self.copy is not None:
            milliseconds["copy"] = self.copy.total
        made: dict[str, Any] = {
            "noun": case.noun,
            "op": case.op,
            "shape": case.shape,
            "dtype": dtype_name(case.dtype),
            **case.numbers,
            "backend": self.backend,
            "status": self.ours.status,
            "reason": self.ours.reason,
            "bytes": case.bytes_moved,
            "milliseconds": milliseconds,
            "bytes_per_second": self.rate,
            "of_copy": self.of_copy,
        }
        for rival in self.rivals:
            made[f"over_{rival}"] = self.over(rival)
        if self.ours.check is not None:
            made["errors"] = dict(self.ours.check.errors)
            made["bars"] = dict(self.ours.check.bars)
        peaks = {name: s.peak / case.unit_bytes for name, s in standings.items() if s.peak is not None}
        if peaks:
            made["peak_extra"] = peaks  # in units of one input matrix, results included
            made["extra_memory_bytes"] = self.extra_memory
        if self.parts:
            made["parts_milliseconds"] = {name: dict(found) for name, found in self.parts.items()}
        made["ours"] = self.ours.to_json()
        made["rivals"] = {name: standing.to_json() for name, standing in self.rivals.items()}
        made["seconds"] = round(self.seconds, 2)
        if self.load is not None:
            made["load"] = self.load.to_json()
        return made
