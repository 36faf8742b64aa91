"""The story of a training run, from its log or from its result."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from tgt_fast._versions import versions
from tgt_fast.train import log
from tgt_fast.train.probe import NAME as EXPLORATION
from tgt_fast.train.run import FitResult

Curve = list[tuple[float, float]]  # (step, value), finite
_POINTS: Final = 250  # of a curve; what lies between them is averaged
_NOT_METRICS: Final = ("step", "lr")


@dataclass
class Story:
    """A run as a report shows it."""

    name: str
    state: str  # "finished", "running", or what ended it
    steps: int
    total: int
    settings: Mapping[str, str]
    versions: Mapping[str, str]
    losses: dict[str, Curve] = field(default_factory=dict)
    records: Sequence[Mapping[str, Any]] = ()
    best_step: int | None = None
    best_score: float | None = None
    seconds: float | None = None  # of its steps, as far as the log has them
    steps_in_them: int = 0
    exploration: Mapping[str, Any] | None = None
    thirds: Mapping[str, float] | None = None  # measured for the report

    def curve(self, name: str) -> Curve:
        """Of a metric over the records."""
        return _finite((record["step"], record.get(name)) for record in self.records)

    @property
    def metrics(self) -> list[str]:
        """The names of what evaluations gave, in their order."""
        names = dict.fromkeys(name for record in self.records for name in record)
        return [name for name in names if name not in _NOT_METRICS and name not in self.losses]


def of_log(folder: Path) -> Story:
    """Of a run that wrote, or writes, a log into this folder.

    Raises:
        ArgumentError, CheckpointError: there is no log, or it cannot be read.
    """
    lines = log.read(folder)
    start = next(line for line in reversed(lines) if line["event"] == "start")
    last = lines[-1]
    state = {"end": "finished", "stopped": f"stopped: {last.get('error')}"}.get(last["event"], "running")
    steps = [line for line in lines if line["event"] == "steps"]
    names = dict.fromkeys(name for line in steps for name in line.get("values", {}) if name not in _NOT_METRICS)
    told = Story(
        name=folder.resolve().name,
        state=state,
        steps=int(last["step"]),
        total=int(start.get("total_steps", 0)),
        settings=start.get("settings", {}),
        versions=start.get("versions", {}),
        losses={name: thinned(_finite((one["step"], one["values"].get(name)) for one in steps)) for name in names},
        records=[line["values"] for line in lines if line["event"] == "record"],
        exploration=_exploration(folder),
    )
    scored = [line for line in lines if line["event"] == "end"]
    if scored:
        told.best_step, told.best_score = scored[-1].get("best_step"), scored[-1].get("best_score")
    told.seconds, told.steps_in_them = _spent(lines)
    return told


def of_result(result: FitResult, exploration: Mapping[str, Any] | None, thirds: Mapping[str, float] | None) -> Story:
    """Of a run that is over."""
    first = result.history[0] if result.history else {}
    names = [name for name in itertools.takewhile(lambda name: name != "lr", first) if name != "step"]
    told = Story(
        name="Training run",
        state="finished",
        steps=result.steps,
        total=result.steps,
        settings=result.settings,
        versions=versions(),
        records=result.history,
        best_step=result.best_step,
        best_score=result.best_score,
        exploration=exploration,
        thirds=thirds,
    )
    told.losses = {name: told.curve(name) for name in names}
    return told


def thinned(curve: Curve) -> Curve:
    """At most so many points, each the mean of neighbours, at the last of their steps; the first stays."""
    if len(curve) <= _POINTS:
        return curve
    size = -(-(len(curve) - 1) // (_POINTS - 1))
    parts = [curve[at : at + size] for at in range(1, len(curve), size)]
    return [curve[0], *((part[-1][0], math.fsum(value for _, value in part) / len(part)) for part in parts)]


def _finite(points: Any) -> Curve:
    return [(step, float(value)) for step, value in points if isinstance(value, (int, float)) and math.isfinite(value)]


def _exploration(folder: Path) -> Mapping[str, Any] | None:
    try:
        found = json.loads((folder / EXPLORATION).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def _spent(lines: Sequence[Mapping[str, Any]]) -> tuple[float | None, int]:
    """Seconds between the lines of one process, and the steps in them: what lay between a kill and a resume is none."""
    seconds, steps = 0.0, 0
    for before, after in itertools.pairwise(lines):
        if after["event"] != "start":
            seconds += max(0.0, after.get("time", 0.0) - before.get("time", 0.0))
            steps += after["step"] - before["step"]
    return (seconds, steps) if steps > 0 else (None, 0)
