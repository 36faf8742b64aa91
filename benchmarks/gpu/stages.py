"""Commands within their time, and what is told of a call as it goes on."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from results import Results

PASSED, FAILED, SKIPPED = "passed", "failed", "skipped"
KEPT_LINES = 80  # of what a stage that failed has printed


class Stages:
    """The stages of a call, each in the summary as soon as it ends."""

    def __init__(self, results: Results, logs: Path, end: float) -> None:
        self.results, self.logs, self.end = results, logs, end
        self.found: list[dict[str, Any]] = []
        self._lock = threading.Lock()
        self._began = time.monotonic()
        logs.mkdir(parents=True, exist_ok=True)

    def left(self, of: float | None = None) -> float:
        """Seconds to the end of the call, or ``of`` if that is less."""
        left = self.end - time.monotonic()
        return left if of is None else min(left, of)

    def log(self, name: str) -> Path:
        return self.logs / f"{name}.log"

    def tell(self, line: str) -> None:
        with self._lock:
            print(f"{time.monotonic() - self._began:6.1f}s  {line}", flush=True)

    def record(self, stage: str, outcome: str, seconds: float, note: str = "", log: Path | None = None) -> None:
        with self._lock:
            self.found.append({"stage": stage, "outcome": outcome, "seconds": round(seconds, 1), "note": note})
            found = list(self.found)
        self.tell(f"== {stage}: {outcome}, {seconds:.0f} s{f', {note}' if note else ''}")
        logs = dict(self.results.summary.get("logs", {}))
        if outcome == FAILED and log is not None and log.exists():
            logs[stage] = last_lines(log)
        self.results.update(stages=found, logs=logs, seconds=round(time.monotonic() - self._began, 1))

    @property
    def failed(self) -> bool:
        return any(stage["outcome"] == FAILED for stage in self.found)

    def command(
        self, stage: str, command: Sequence[str], limit: float, environment: Mapping[str, str] | None = None,
        log: str | None = None,
    ) -> bool:  # fmt: skip
        """Run it within its time, record what became of it; whether it passed."""
        path, began = self.log(log or stage), time.monotonic()
        status, note = run(command, max(1.0, self.left(limit)), path, environment)
        note = note or ("" if status == 0 else f"exit status {status}")
        self.record(stage, PASSED if status == 0 else FAILED, time.monotonic() - began, note, path)
        return status == 0


def run(
    command: Sequence[str], limit: float, log: Path, environment: Mapping[str, str] | None = None
) -> tuple[int, str]:
    """(exit status, note) of a command whose output goes to a log. At the limit it ends, and all that it started."""
    with log.open("ab") as file:
        file.write(f"\n== {' '.join(command)}\n".encode())
        file.flush()
        try:
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT, start_new_session=True,
                env=None if environment is None else {**os.environ, **environment},
            )  # fmt: skip
        except OSError as error:
            return 127, str(error)
        try:
            return process.wait(limit), ""
        except subprocess.TimeoutExpired:
            for number in (signal.SIGTERM, signal.SIGKILL):
                with suppress(OSError):
                    os.killpg(process.pid, number)
                with suppress(subprocess.TimeoutExpired):
                    process.wait(2)
            return 124, f"stopped after {limit:.0f} s"


def last_lines(log: Path, lines: int = KEPT_LINES) -> list[str]:
    """The end of a log, which is worth more than its beginning."""
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - (64 << 10)))
        text = file.read().decode(errors="replace")
    return [line[:500] for line in text.splitlines()[-lines:]]
