"""Tasks in a process of their own: what hangs is ended and named, and what faults takes nothing else down."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

OK, FAILED, HUNG, DIED = "ok", "failed", "hung", "died"
START_LIMIT = 90.0  # seconds to import everything and to open the device


@dataclass
class Outcome:
    """The outcome of a task."""

    status: str
    seconds: float
    reason: str = ""
    value: Any = None

    def to_json(self) -> dict[str, Any]:
        made = asdict(self)
        made["seconds"] = round(self.seconds, 2)
        return {key: value for key, value in made.items() if key != "value"}


class Isolated:
    """A process that is sent a task a line and answers a line; started when it is needed, and again after each loss."""

    def __init__(
        self, command: Sequence[str], log: Path, environment: Mapping[str, str] | None = None, end: float | None = None
    ) -> None:
        """``end``: of time.monotonic, after which no start is waited for."""
        self.command, self.log, self.end = list(command), log, end
        self.environment = dict(os.environ if environment is None else environment)
        self._process: subprocess.Popen[bytes] | None = None
        self._read = b""

    def run(self, task: dict[str, Any], limit: float) -> Outcome:
        """The task's outcome, after ``limit`` seconds at the latest, and those that a start takes."""
        began = time.monotonic()
        if self._process is None:
            lost = self._start()
            if lost is not None:
                return Outcome(FAILED, time.monotonic() - began, f"at the start: {lost.reason}")  # not the task's fault
            began = time.monotonic()
        process = self._process
        assert process is not None
        assert process.stdin is not None
        try:
            process.stdin.write(json.dumps({**task, "limit": limit}).encode() + b"\n")
            process.stdin.flush()
        except OSError:
            return self._lost(began, limit)
        answer = self._answer(limit)
        if answer is None:
            return self._lost(began, limit)
        seconds = time.monotonic() - began
        if answer.get("lost"):  # it is of no more use: the device has taken offence
            self.close()
            return Outcome(DIED, seconds, answer.get("reason", ""), answer.get("value"))
        return Outcome(answer["status"], seconds, answer.get("reason", ""), answer.get("value"))

    def close(self) -> None:
        """End the process, whatever it does."""
        process, self._process, self._read = self._process, None, b""
        if process is None:
            return
        for stream in (process.stdin, process.stdout):
            assert stream is not None
            with suppress(OSError):
                stream.close()
        if process.poll() is None:
            with suppress(OSError):
                os.killpg(process.pid, signal.SIGKILL)
        with suppress(subprocess.TimeoutExpired):  # the driver may hold on to one that hangs: others go on
            process.wait(5)

    def _start(self) -> Outcome | None:
        self._read = b""
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                self.command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, env=self.environment,
                start_new_session=True,
            )  # fmt: skip
        began = time.monotonic()
        limit = START_LIMIT if self.end is None else max(1.0, min(START_LIMIT, self.end - began))
        return None if self._answer(limit) is not None else self._lost(began, limit)

    def _answer(self, limit: float) -> dict[str, Any] | None:
        """The next line, or None: at the limit, or with the end of the process."""
        assert self._process is not None
        assert self._process.stdout is not None
        file, end = self._process.stdout.fileno(), time.monotonic() + limit
        while b"\n" not in self._read:
            left = end - time.monotonic()
            if left <= 0 or not select.select([file], [], [], left)[0]:
                return None
            found = os.read(file, 1 << 16)
            if not found:
                return None
            self._read += found
        line, _, self._read = self._read.partition(b"\n")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def _lost(self, began: float, limit: float) -> Outcome:
        process, seconds = self._process, time.monotonic() - began
        assert process is not None
        if seconds >= limit:
            self.close()
            return Outcome(HUNG, seconds, f"no answer within {limit:.0f} s")
        with suppress(subprocess.TimeoutExpired):  # its pipe closes a moment before it ends, which takes a dump
            process.wait(10)
        status = process.poll()
        self.close()
        ended = "it closed its output" if status is None else f"exit status {status}"
        return Outcome(DIED, seconds, f"signal {-status}" if status is not None and status < 0 else ended)
