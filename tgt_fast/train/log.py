"""A run's log: lines of JSON, each written whole as soon as it is known."""

from __future__ import annotations

import json
import os
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from torch import Tensor

from tgt_fast._opening import as_path
from tgt_fast._versions import versions
from tgt_fast.errors import ArgumentError, CheckpointError
from tgt_fast.explore import LatentSampler, SyntheticReplay
from tgt_fast.train.files import make_writable, replace_file, reported, standard_json
from tgt_fast.train.probe import EXAMPLES, probe
from tgt_fast.train.probe import NAME as EXPLORATION

if TYPE_CHECKING:
    from tgt_fast.train.run import Run

NAME: Final = "log.jsonl"
_LINES: Final = 1000  # of a run's steps, about
_SAFE: Final = getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)
_SECONDS: Final = 30.0  # between lines of slow steps
_SHARE: Final = 20.0  # times as long as a look at the sampler took it is left alone


class Means:
    """Means of a run's loss and parts since it was last asked; a step costs nothing, an answer waits for the device.

    They are read from the sums that a run makes for its history.
    """

    def __init__(self, run: Run) -> None:
        self._run = run
        self._sums, self._summed = dict(run.sums), run.summed

    def __call__(self) -> dict[str, float]:
        """Empty where there was no step."""
        sums, summed = self._run.sums, self._run.summed
        if summed < self._summed:  # a record has begun them anew
            self._sums, self._summed = {}, 0
        steps = summed - self._summed
        found = {name: _since(value, self._sums.get(name)) / steps for name, value in sums.items()} if steps else {}
        self._sums, self._summed = dict(sums), summed
        return found


def _since(value: Tensor, before: Tensor | None) -> float:
    return float(value if before is None else value - before)


class RunLog:
    """``log.jsonl`` in the folder of a run, which the first of its processes writes; nothing without a folder.

    Its lines are objects with ``event``, ``time`` (seconds since 1970) and ``step``:

    - ``start``: ``total_steps``, ``settings`` and ``versions``; a run that goes on, or begins anew, has another one;
    - ``steps``: ``values``, the means of loss and parts since the line before, in this process, and ``lr``;
    - ``record``: ``values``, an entry of the history;
    - ``end``: ``best_step`` and ``best_score``; or ``stopped``: ``error``, what ended the run.
    """

    def __init__(self, folder: str | os.PathLike[str] | None, *, first: bool) -> None:
        self.folder = None if folder is None else as_path("fit", "log", folder)
        self._file: int | None = None
        if self.folder is None or not first:
            return
        if self.folder.exists() and not self.folder.is_dir():
            raise ArgumentError(f"fit: log must be a folder, and {self.folder} is a file")
        make_writable(self.folder)
        path = self.folder / NAME
        with reported(path, "write"):
            torn = path.is_file() and path.read_bytes()[-1:] not in (b"", b"\n")  # by a writer that was killed
            self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | _SAFE, 0o666)
            if torn:
                os.write(self._file, b"\n")

    @property
    def written(self) -> bool:
        return self._file is not None

    @contextmanager
    def of(self, run: Run, total: int, settings: Mapping[str, str]) -> Iterator[None]:
        """From the run's beginning to its end, whatever ends it."""
        if self.written:
            self._means, self._every = Means(run), max(1, total // _LINES)
            self._due = run.result.steps + 1  # the first step is logged
            self._total, self._looked, run.kept = total, -1e9, EXAMPLES
            self._line("start", run, total_steps=total, settings=settings, versions=versions())
        try:
            yield
        except BaseException as error:
            self._line("stopped", run, error=f"{type(error).__name__}: {error}"[:500].rstrip(": "))
            raise
        else:
            self._line("end", run, best_step=run.result.best_step, best_score=run.result.best_score)
        finally:
            self.close()

    def stepped(self, run: Run) -> None:
        """After a step."""
        if self.written and (run.result.steps >= self._due or time.time() - self._time >= _SECONDS):
            self._steps(run)

    def before_record(self, run: Run) -> None:
        """The steps up to here; a record begins the sums anew."""
        if self.written:
            self._steps(run)

    def recorded(self, run: Run) -> None:
        if self.written:
            self._line("record", run, values=run.result.history[-1])
            self._look(run)

    def close(self) -> None:
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def _steps(self, run: Run) -> None:
        values = self._means()
        if values:
            self._line("steps", run, values={**values, "lr": float(run.optimizer.param_groups[0]["lr"])})
        self._due = run.result.steps - run.result.steps % self._every + self._every

    def _look(self, run: Run) -> None:
        """Look at what the sampler makes, for the report, as often as it takes next to nothing of the run's time."""
        sampler = getattr(run.objective, "sampler", None)
        if (
            not isinstance(sampler, (LatentSampler, SyntheticReplay))
            or run.sample is None
            or run.parallel.sharded
            or self.folder is None
        ):
            return  # the shards of a student answer only where all processes ask
        begun = time.monotonic()
        if begun < self._looked and run.result.steps < self._total:
            return
        logits_of = run.asked.get("logits_of", getattr(run.objective, "logits_of", None))
        found = probe(sampler, run.model, run.sample, getattr(run.objective, "loss", None), logits_of)
        text = json.dumps(standard_json({"step": run.result.steps, **found}), allow_nan=False)
        try:
            replace_file(self.folder / EXPLORATION, lambda file: file.write(text.encode()))
        except CheckpointError as error:
            warnings.warn(f"fit: {error}", stacklevel=4)
        now = time.monotonic()
        self._looked = now + _SHARE * (now - begun)

    def _line(self, event: str, run: Run, **more: Any) -> None:
        if self._file is None:
            return
        self._time = time.time()
        line = {"event": event, "time": round(self._time, 3), "step": run.result.steps, **more}
        data = json.dumps(standard_json(line), allow_nan=False, separators=(",", ":")).encode() + b"\n"
        try:
            written = os.write(self._file, data)  # in one call: a process that is killed has written it or has not
            if written != len(data):
                raise OSError(28, "No space left on device")
        except OSError as error:  # a training run is worth more than its log
            warnings.warn(f"fit: the log is not written any more: {error.strerror or error}", stacklevel=5)
            self.close()


def read(folder: Path) -> list[dict[str, Any]]:
    """The lines of the last run in a log, in their order; what it took back to a checkpoint is left out.

    A line that is not whole, of a writer that was killed, is skipped.

    Raises:
        ArgumentError: there is no log.
        CheckpointError: it cannot be read.
    """
    path = folder / NAME
    if not path.is_file():
        raise ArgumentError(f"no {NAME} in {folder}: it is written by fit(log=...)")
    with reported(path, "read"):
        text = path.read_bytes().decode("utf-8", errors="replace")
    found: list[dict[str, Any]] = []
    for line in text.split("\n"):
        try:
            entry = json.loads(line)
            event, step = entry["event"], int(entry["step"])
        except (ValueError, KeyError, TypeError):
            continue
        if event == "start":
            found = [] if step == 0 else [one for one in found if one["step"] <= step and one["event"] != "stopped"]
        found.append(entry)
    if not found or found[0]["event"] != "start":
        raise ArgumentError(f"{path} is not a log that fit(log=...) wrote")
    return found
