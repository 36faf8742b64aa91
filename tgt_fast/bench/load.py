"""The load of the machine while something was measured."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch

_STAT: Final = Path("/proc/stat")
_MUCH: Final = 0.1  # of the cores: what others may use before a time is a rough one
_IDLE: Final = (3, 4)  # of a line in /proc/stat: idle, and waiting for a disk
_COUNTED: Final = 8  # what comes behind is counted before


@dataclass(frozen=True)
class Load:
    """Of the machine: its load average of a minute, and how many cores others used meanwhile; None: unknown."""

    average: float | None
    others: float | None

    @property
    def busy(self) -> bool:
        """True if others took so much that times are rough ones."""
        cores = os.cpu_count() or 1
        if self.others is not None:
            return self.others > _MUCH * cores
        return self.average is not None and self.average - torch.get_num_threads() > _MUCH * cores

    def __str__(self) -> str:
        average = "unknown" if self.average is None else f"{self.average:.2f}"
        return f"load average {average} on {os.cpu_count()} cores"

    def to_json(self) -> dict[str, Any]:
        others = None if self.others is None else round(self.others, 2)
        return {"average": self.average, "others": others, "busy": self.busy}


class Watch:
    """From when it was made."""

    def __init__(self) -> None:
        self._begun, self._all, self._own = time.perf_counter(), _used(), _own()

    def load(self) -> Load:
        now, seconds = _used(), time.perf_counter() - self._begun
        if now is None or self._all is None or seconds <= 0:
            return Load(_average(), None)
        return Load(_average(), max(0.0, (now - self._all - (_own() - self._own)) / seconds))


def _average() -> float | None:
    try:
        return os.getloadavg()[0]
    except (AttributeError, OSError):
        return None


def _used() -> float | None:
    """Seconds that all cores together were at work."""
    try:
        numbers = [int(number) for number in _STAT.read_text().split("\n", 1)[0].split()[1 : 1 + _COUNTED]]
        ticks = os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, AttributeError):
        return None
    return sum(number for place, number in enumerate(numbers) if place not in _IDLE) / ticks


def _own() -> float:
    """Of these, the ones of this process and of its children that are over."""
    return sum(os.times()[:4])
